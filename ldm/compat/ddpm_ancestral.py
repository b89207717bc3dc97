"""Ancestral sampling of the original's LatentDiffusion: all timesteps of the schedule, one by one.

Ho et al. 2020 (arXiv:2006.11239), algorithm 2. Models that predict v are not supported, as ever.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.compat.ddpm_base import DDPM
from ldm.compat.diffusion_util import noise_like
from ldm.compat.sampling import (
    Condition,
    ScoreCorrector,
    correct_score,
    keep_known,
    unless_none,
)

__all__ = ["AncestralSampling", "first_rows"]


class AncestralSampling(DDPM):
    """Methods of LatentDiffusion that sample by its own loops."""

    clip_denoised: bool
    first_stage_model: Any
    shorten_cond_schedule: bool
    cond_ids: Tensor
    apply_model: Callable[..., Any]  # of LatentDiffusion

    def p_mean_variance(
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        clip_denoised: bool,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, object] | None = None,
    ) -> tuple[Tensor, ...]:
        """Return mean, variance and log variance of p(x_{t-1} | x_t), then what is asked for."""
        output = self.apply_model(x, t, c, **unless_none(return_ids=return_codebook_ids or None))
        if score_corrector is not None:
            output = correct_score(self, score_corrector, output, x, t, c, corrector_kwargs)
        extra: tuple[Tensor, ...] = ()
        if return_codebook_ids:
            output, logits = output
            extra = (logits,)
        if self.parameterization == "v":
            raise NotImplementedError("models that predict v have no ancestral sampling")
        x0 = output
        if self.parameterization == "eps":
            x0 = self.predict_start_from_noise(x, t, output)
        if clip_denoised:
            x0 = x0.clamp(-1.0, 1.0)
        if quantize_denoised:
            x0 = self.first_stage_model.quantize(x0)[0]
        if return_x0 and not return_codebook_ids:
            extra = (x0,)
        return (*self.q_posterior(x0, x, t), *extra)

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        """Sample x_{t-1} from x_t, both (B, C, h, w); noise is drawn at t = 0, too."""
        mean, _, log_variance, *extra = self.p_mean_variance(
            x,
            c,
            t,
            clip_denoised,
            return_codebook_ids=return_codebook_ids,
            quantize_denoised=quantize_denoised,
            return_x0=return_x0,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        noise = noise_like(x.shape, x.device, repeat_noise) * temperature
        if noise_dropout > 0.0:
            noise = F.dropout(noise, p=noise_dropout)
        is_last = (t == 0).reshape(-1, *(1,) * (x.dim() - 1))
        previous = mean + (~is_last) * (0.5 * log_variance).exp() * noise
        if return_codebook_ids:
            return previous, extra[0].argmax(dim=1)
        return (previous, extra[0]) if return_x0 else previous

    @torch.no_grad()
    def progressive_denoising(
        self,
        cond: Condition,
        shape: Sequence[int],
        verbose: bool = True,
        callback: Callable[[int], object] | None = None,
        quantize_denoised: bool = False,
        img_callback: Callable[[Tensor, int], object] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, object] | None = None,
        batch_size: int | None = None,
        x_T: Tensor | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample, and keep the estimates of x0.

        Args:
            shape: Of the batch, or of a latent where `batch_size` is given.
            temperature: Factor of the noise, or one for each timestep.
        """
        if batch_size is not None:
            shape = (batch_size, *shape)
        img = torch.randn(*shape, device=self.device) if x_T is None else x_T
        if cond is not None and batch_size is not None:
            cond = first_rows(cond, batch_size)
        timesteps = min(self.num_timesteps, start_T or self.num_timesteps)
        log_every_t = log_every_t or self.log_every_t
        temperatures = [temperature] * timesteps if isinstance(temperature, float) else temperature
        intermediates = []
        for i in reversed(range(timesteps)):
            t = torch.full((shape[0],), i, device=self.device, dtype=torch.long)
            cond = self._noise_condition(cond, t)
            img, x0_partial = self.p_sample(
                img,
                cond,
                t,
                clip_denoised=self.clip_denoised,
                quantize_denoised=quantize_denoised,
                return_x0=True,
                temperature=temperatures[i],
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
            )
            if mask is not None:  # after the step, unlike DDIM, as in the original
                img = keep_known(self, img, x0, mask, t)
            if i % log_every_t == 0 or i == timesteps - 1:
                intermediates.append(x0_partial)
            if callback:
                callback(i)
            if img_callback:
                img_callback(img, i)
        return img, intermediates

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond: Condition,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], object] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> Any:
        """Sample latents of a shape (B, C, h, w), and return those of some steps if asked for."""
        log_every_t = log_every_t or self.log_every_t
        device = self.betas.device
        img = torch.randn(*shape, device=device) if x_T is None else x_T
        intermediates = [img]
        timesteps = self.num_timesteps if timesteps is None else timesteps
        timesteps = min(timesteps, start_T or timesteps)
        for i in reversed(range(timesteps)):
            t = torch.full((shape[0],), i, device=device, dtype=torch.long)
            cond = self._noise_condition(cond, t)
            img = self.p_sample(
                img,
                cond,
                t,
                clip_denoised=self.clip_denoised,
                quantize_denoised=quantize_denoised,
            )
            if mask is not None:  # after the step, unlike DDIM, as in the original
                img = keep_known(self, img, x0, mask, t)
            if i % log_every_t == 0 or i == timesteps - 1:
                intermediates.append(img)
            if callback:
                callback(i)
            if img_callback:
                img_callback(img, i)
        return (img, intermediates) if return_intermediates else img

    @torch.no_grad()
    def sample(
        self,
        cond: Condition,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: object,
    ) -> Any:
        """Sample latents of the model's size; unknown keywords are ignored, as ever."""
        if shape is None:
            shape = (batch_size, self.channels, self.image_size, self.image_size)
        if cond is not None:
            cond = first_rows(cond, batch_size)
        return self.p_sample_loop(
            cond,
            shape,
            return_intermediates=return_intermediates,
            x_T=x_T,
            verbose=verbose,
            timesteps=timesteps,
            quantize_denoised=quantize_denoised,
            mask=mask,
            x0=x0,
        )

    def _noise_condition(self, cond: Condition, t: Tensor) -> Condition:
        """Add noise to a condition that has a schedule of its own, see `num_timesteps_cond`."""
        if not self.shorten_cond_schedule:
            return cond
        return self.q_sample(cond, self.cond_ids[t.cpu()].to(t), torch.randn_like(cond))


def first_rows(c: Condition, n: int) -> Condition:
    """Return the first n samples of a condition."""
    if isinstance(c, Mapping):
        return {key: first_rows(value, n) for key, value in c.items()}
    if isinstance(c, list) and all(isinstance(one, Tensor) for one in c):
        return [one[:n] for one in c]
    return c if c is None else c[:n]
