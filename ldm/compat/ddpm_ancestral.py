"""DDPM (ancestral) sampling of the original's LatentDiffusion: all timesteps, one by one.

Ho et al. 2020 (arXiv:2006.11239), algorithm 2. As in the original, v-prediction is not supported.
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
    drop_none,
    restore_masked,
    slice_condition,
)


class AncestralSampling(DDPM):
    """DDPM with the methods of ancestral sampling, which LatentDiffusion inherits."""

    clip_denoised: bool
    first_stage_model: Any
    shorten_cond_schedule: bool
    cond_ids: Tensor
    apply_model: Callable[..., Any]  # defined by LatentDiffusion

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
        """Return mean, variance and log variance of p(x_{t-1} | x_t).

        Args:
            return_codebook_ids: Whether to return the logits of the codebook ids as well.
            return_x0: Whether to return the predicted x_0 as well, unless the logits are returned.
        """
        output = self.apply_model(x, t, c, **drop_none(return_ids=return_codebook_ids or None))
        if score_corrector is not None:
            output = correct_score(self, score_corrector, output, x, t, c, corrector_kwargs)
        extras: tuple[Tensor, ...] = ()
        if return_codebook_ids:
            output, logits = output
            extras = (logits,)
        if self.parameterization == "v":
            raise NotImplementedError("ancestral sampling does not support v-prediction")
        x0 = output
        if self.parameterization == "eps":
            x0 = self.predict_start_from_noise(x, t, output)
        if clip_denoised:
            x0 = x0.clamp(-1.0, 1.0)
        if quantize_denoised:
            x0 = self.first_stage_model.quantize(x0)[0]
        if return_x0 and not return_codebook_ids:
            extras = (x0,)
        return (*self.q_posterior(x0, x, t), *extras)

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
        """Sample x_{t-1} from x_t, both (B, C, h, w).

        Args:
            return_codebook_ids: Whether to return the most likely codebook ids as well.
            return_x0: Whether to return the predicted x_0 as well, unless the ids are returned.
        """
        mean, _, log_variance, *extras = self.p_mean_variance(
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
        # Drawn also at t = 0, where it has no effect, so that later draws equal the original's.
        noise = noise_like(x.shape, x.device, repeat_noise) * temperature
        if noise_dropout > 0.0:
            noise = F.dropout(noise, p=noise_dropout)
        nonzero_mask = (t != 0).reshape(-1, *(1,) * (x.dim() - 1))
        x_prev = mean + nonzero_mask * (0.5 * log_variance).exp() * noise
        if return_codebook_ids:
            return x_prev, extras[0].argmax(dim=1)
        return (x_prev, extras[0]) if return_x0 else x_prev

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
        """Sample latents; return them, and the predicted x_0 at some timesteps.

        Args:
            shape: Shape of the batch, or of one latent if `batch_size` is given.
            mask: 1 where `x0` is kept, 0 where latents are sampled; None = sampled everywhere.
            temperature: Factor of the noise, or a list of one factor per timestep.
            x_T: Initial noise; None draws it.
            start_T: Number of timesteps, of which the first is `start_T` - 1; None = all.
            log_every_t: x_0 is returned at timesteps divisible by this; None = `self.log_every_t`.
        """
        if batch_size is not None:
            shape = (batch_size, *shape)
            cond = slice_condition(cond, batch_size)
        img = torch.randn(*shape, device=self.device) if x_T is None else x_T
        num_timesteps = min(self.num_timesteps, start_T or self.num_timesteps)
        img, _, pred_x0s = self._denoise_loop(
            img,
            cond,
            num_timesteps,
            log_every_t,
            mask,
            x0,
            callback,
            img_callback,
            temperature,
            quantize_denoised=quantize_denoised,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        return img, pred_x0s

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
        """Sample latents of a shape (B, C, h, w).

        Args:
            return_intermediates: Whether to return the initial noise and the latents at every
                `log_every_t`-th timestep as well.
            timesteps, start_T: The smaller of both is the number of timesteps; None = all. The
                others: see `progressive_denoising`.
        """
        img = torch.randn(*shape, device=self.betas.device) if x_T is None else x_T
        timesteps = self.num_timesteps if timesteps is None else timesteps
        timesteps = min(timesteps, start_T or timesteps)
        samples, intermediates, _ = self._denoise_loop(
            img,
            cond,
            timesteps,
            log_every_t,
            mask,
            x0,
            callback,
            img_callback,
            quantize_denoised=quantize_denoised,
        )
        return (samples, [img, *intermediates]) if return_intermediates else samples

    def _denoise_loop(
        self,
        img: Tensor,
        cond: Condition,
        num_timesteps: int,
        log_every_t: int | None,
        mask: Tensor | None,
        x0: Tensor | None,
        callback: Callable[[int], object] | None,
        img_callback: Callable[[Tensor, int], object] | None,
        temperature: float | Sequence[float] = 1.0,
        **options: Any,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Denoise at the timesteps `num_timesteps` - 1 … 0.

        Returns:
            The final latents; the latents and the predicted x_0 at every `log_every_t`-th timestep.
        """
        log_every_t = log_every_t or self.log_every_t
        intermediates, pred_x0s = [], []
        for i in reversed(range(num_timesteps)):
            t = torch.full((len(img),), i, device=self.betas.device, dtype=torch.long)
            cond = self._add_noise_to_condition(cond, t)
            img, pred_x0 = self.p_sample(
                img,
                cond,
                t,
                clip_denoised=self.clip_denoised,
                return_x0=True,
                temperature=temperature
                if isinstance(temperature, (int, float))
                else temperature[i],
                **options,
            )
            if mask is not None:  # after the step, unlike in DDIM, as in the original
                img = restore_masked(self, img, x0, mask, t)
            if i % log_every_t == 0 or i == num_timesteps - 1:
                intermediates.append(img)
                pred_x0s.append(pred_x0)
            if callback:
                callback(i)
            if img_callback:
                img_callback(img, i)
        return img, intermediates, pred_x0s

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
        """Sample latents by `p_sample_loop`.

        Args:
            cond: Condition of at least `batch_size` samples; None = unconditional.
            shape: Shape of the batch; None = `batch_size` latents of the model's `image_size`.
            kwargs: Ignored, as in the original.
        """
        if shape is None:
            shape = (batch_size, self.channels, self.image_size, self.image_size)
        return self.p_sample_loop(
            slice_condition(cond, batch_size),
            shape,
            return_intermediates=return_intermediates,
            x_T=x_T,
            verbose=verbose,
            timesteps=timesteps,
            quantize_denoised=quantize_denoised,
            mask=mask,
            x0=x0,
        )

    def _add_noise_to_condition(self, cond: Condition, t: Tensor) -> Condition:
        """Add noise to the condition if `num_timesteps_cond` is above 1."""
        if not self.shorten_cond_schedule:
            return cond
        return self.q_sample(cond, self.cond_ids[t.cpu()].to(t), torch.randn_like(cond))
