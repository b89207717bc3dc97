"""`ldm.models.diffusion.ddim` of the original: DDIM (arXiv:2010.02502) over `apply_model`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.compat.diffusion_util import (
    extract_into_tensor,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)
from ldm.compat.sampling import (
    Condition,
    ScoreCorrector,
    Step,
    TableSampler,
    correct_score,
    guided_output,
)

__all__ = [
    "DDIMSampler",
    "extract_into_tensor",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "noise_like",
]


class DDIMSampler(TableSampler):
    """DDIM, with the arguments and the order of draws of the original."""

    ddim_sampling = TableSampler.walk

    def sampling(self, cond: Condition, shape: Sequence[int], **options: Any) -> Any:
        return self.ddim_sampling(cond, shape, **options)

    def step(self, *args: Any, t_next: Tensor, old_eps: list[Tensor], **options: Any) -> Step:
        return self.p_sample_ddim(*args, **options)

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, object] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Step from x (B, C, h, w) at timesteps t (B,) to the step below `index`.

        Returns:
            x at that step, and the estimate of x0.
        """
        output = guided_output(
            self.model, x, t, c, unconditional_guidance_scale, unconditional_conditioning
        )
        # Models that predict x0 are taken for ones that predict eps, as in the original.
        predicts_v = self.model.parameterization == "v"
        e_t = self.model.predict_eps_from_z_and_v(x, t, output) if predicts_v else output
        if score_corrector is not None:
            e_t = correct_score(self.model, score_corrector, e_t, x, t, c, corrector_kwargs)
        a_t, a_prev, sigma_t, sqrt_one_minus_at = self.coefficients(index, x, use_original_steps)
        if predicts_v:
            pred_x0 = self.model.predict_start_from_z_and_v(x, t, output)
        else:
            pred_x0 = (x - sqrt_one_minus_at * e_t) / a_t.sqrt()
        if quantize_denoised:
            pred_x0 = self.model.first_stage_model.quantize(pred_x0)[0]
        if dynamic_threshold is not None:
            raise NotImplementedError("DDIM has no dynamic threshold, PLMS has")
        noise = self.draw_noise(x, sigma_t, repeat_noise, temperature, noise_dropout)
        x_prev = a_prev.sqrt() * pred_x0 + (1.0 - a_prev - sigma_t**2).sqrt() * e_t + noise
        return x_prev, pred_x0

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Condition,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        callback: Callable[[int], object] | None = None,
    ) -> tuple[Tensor, dict[str, object]]:
        """Invert DDIM: find noise that gives x0 (B, C, h, w).

        As in the original, the model is told the number of the step, 0, 1, 2 …, not its timestep,
        and its output is taken for eps.
        """
        steps = self.choose_timesteps(None, use_original_steps)
        if t_enc > len(steps):
            raise ValueError(f"t_enc must be at most {len(steps)}, got {t_enc}")
        if use_original_steps:
            after, before = self.alphas_cumprod, self.alphas_cumprod_prev
        else:
            after = self.ddim_alphas
            before = torch.as_tensor(self.ddim_alphas_prev).to(after)
        x = x0
        intermediates: list[Tensor] = []
        noted: list[int] = []
        for i in range(t_enc):
            t = torch.full((len(x0),), i, device=self.model.device, dtype=torch.long)
            e_t = guided_output(
                self.model, x, t, c, unconditional_guidance_scale, unconditional_conditioning
            )
            weight = (1 / after[i] - 1).sqrt() - (1 / before[i] - 1).sqrt()
            x = (after[i] / before[i]).sqrt() * x + after[i].sqrt() * weight * e_t
            if return_intermediates and (
                (i % (t_enc // return_intermediates) == 0 and i < t_enc - 1) or i >= t_enc - 2
            ):
                intermediates.append(x)
                noted.append(i)
            if callback:
                callback(i)
        out: dict[str, object] = {"x_encoded": x, "intermediate_steps": noted}
        if return_intermediates:
            out["intermediates"] = intermediates
        return x, out

    @torch.no_grad()
    def stochastic_encode(
        self,
        x0: Tensor,
        t: Tensor,
        use_original_steps: bool = False,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Add noise to x0 (B, C, h, w) up to the steps t (B,), indices into `ddim_timesteps`."""
        if use_original_steps:
            signal, root = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        else:
            signal, root = self.ddim_alphas.sqrt(), self.ddim_sqrt_one_minus_alphas
        noise = torch.randn_like(x0) if noise is None else noise
        scaled = extract_into_tensor(signal, t, x0.shape) * x0
        return scaled + extract_into_tensor(root, t, x0.shape) * noise

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Condition,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        use_original_steps: bool = False,
        callback: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Denoise latents of `stochastic_encode` in the last `t_start` steps."""
        # As in the original, the first step is the one below the level of `stochastic_encode`, so
        # that the model expects less noise than was added.
        steps = self.choose_timesteps(None, use_original_steps)[:t_start]
        x = x_latent
        for i, step in enumerate(np.flip(steps)):
            t = torch.full((len(x),), int(step), device=x.device, dtype=torch.long)
            x, _ = self.p_sample_ddim(
                x,
                cond,
                t,
                index=len(steps) - i - 1,
                use_original_steps=use_original_steps,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback:
                callback(i)
        return x
