"""`ldm.models.diffusion.ddim` of the original: DDIM (arXiv:2010.02502), calling `apply_model`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.compat.diffusion_util import (
    extract_into_tensor,
    make_ddim_sampling_parameters as make_ddim_sampling_parameters,
    make_ddim_timesteps as make_ddim_timesteps,
    noise_like as noise_like,
)
from ldm.compat.sampling import (
    BaseDDIMSampler,
    Condition,
    ScoreCorrector,
    StepOutput,
    apply_with_guidance,
    correct_score,
)


class DDIMSampler(BaseDDIMSampler):
    """DDIM, with the arguments and the order of random draws of the original."""

    ddim_sampling = BaseDDIMSampler.run_steps

    def sample_loop(self, cond: Condition, shape: Sequence[int], **options: Any) -> Any:
        return self.ddim_sampling(cond, shape, **options)

    def step(self, *args: Any, t_next: Tensor, old_eps: list[Tensor], **options: Any) -> StepOutput:
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
        """Step from x (B, C, h, w) at timesteps t (B,) to the previous, less noisy timestep.

        Args:
            index: Index of t in `ddim_timesteps`. The others: see `sample`.

        Returns:
            x at the previous timestep, and the predicted x0.
        """
        apply_model, scale = self.model.apply_model, unconditional_guidance_scale
        output = apply_with_guidance(apply_model, x, t, c, scale, unconditional_conditioning)
        # The output of an x0-prediction model is used as eps, as in the original.
        predicts_v = self.model.parameterization == "v"
        e_t = self.model.predict_eps_from_z_and_v(x, t, output) if predicts_v else output
        if score_corrector is not None:
            e_t = correct_score(self.model, score_corrector, e_t, x, t, c, corrector_kwargs)
        a_t, a_prev, sigma_t, sqrt_one_minus_at = self.get_step_coefficients(
            index, x, use_original_steps
        )
        if predicts_v:
            pred_x0 = self.model.predict_start_from_z_and_v(x, t, output)
        else:
            pred_x0 = (x - sqrt_one_minus_at * e_t) / a_t.sqrt()
        if quantize_denoised:
            pred_x0 = self.model.first_stage_model.quantize(pred_x0)[0]
        if dynamic_threshold is not None:
            raise NotImplementedError("dynamic_threshold is supported by PLMS only")
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
        """Invert DDIM: compute the latents that `decode` denoises to x0 (B, C, h, w).

        Args:
            t_enc: Number of steps.
            return_intermediates: Approximate number of intermediate latents to return; None returns
                no intermediate latents.

        Returns:
            Latents; and a dict of `x_encoded` (the same latents), `intermediate_steps` (indices of
            steps), and `intermediates` (their latents, if `return_intermediates`).
        """
        num_timesteps = len(self.choose_timesteps(None, use_original_steps))
        if t_enc > num_timesteps:
            raise ValueError(f"t_enc must be at most {num_timesteps}, got {t_enc}")
        if use_original_steps:
            alphas_next, alphas = self.alphas_cumprod, self.alphas_cumprod_prev
        else:
            alphas_next = self.ddim_alphas
            alphas = torch.as_tensor(self.ddim_alphas_prev).to(alphas_next)
        apply_model, scale = self.model.apply_model, unconditional_guidance_scale
        x = x0
        intermediates: list[Tensor] = []
        intermediate_steps: list[int] = []
        for i in range(t_enc):
            # As in the original, the model gets the index of the step, 0, 1, 2 …, instead of its
            # timestep, and its output is used as eps.
            t = torch.full((len(x0),), i, device=self.model.device, dtype=torch.long)
            e_t = apply_with_guidance(apply_model, x, t, c, scale, unconditional_conditioning)
            a_t, a_next = alphas[i], alphas_next[i]
            noise_coef = a_next.sqrt() * ((1 / a_next - 1).sqrt() - (1 / a_t - 1).sqrt())
            x = (a_next / a_t).sqrt() * x + noise_coef * e_t
            if return_intermediates and (
                (i % (t_enc // return_intermediates) == 0 and i < t_enc - 1) or i >= t_enc - 2
            ):
                intermediates.append(x)
                intermediate_steps.append(i)
            if callback:
                callback(i)
        out: dict[str, object] = {"x_encoded": x, "intermediate_steps": intermediate_steps}
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
        """Add noise to x0 (B, C, h, w).

        Args:
            t: Indices (B,) into `ddim_timesteps`.
            use_original_steps: Whether t are timesteps of the model instead.
            noise: Standard normal noise, shaped like x0; None draws it.
        """
        if use_original_steps:
            x0_coefs, noise_coefs = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        else:
            x0_coefs, noise_coefs = self.ddim_alphas.sqrt(), self.ddim_sqrt_one_minus_alphas
        noise = torch.randn_like(x0) if noise is None else noise
        scaled_x0 = extract_into_tensor(x0_coefs, t, x0.shape) * x0
        return scaled_x0 + extract_into_tensor(noise_coefs, t, x0.shape) * noise

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
        """Denoise latents of `stochastic_encode` or `encode` in the last `t_start` steps."""
        # As in the original, the first step is at index `t_start` - 1, although scripts call
        # `stochastic_encode` with index `t_start`, which adds more noise than the model expects.
        timesteps = self.choose_timesteps(None, use_original_steps)[:t_start]
        x = x_latent
        for i, timestep in enumerate(np.flip(timesteps)):
            t = torch.full((len(x),), int(timestep), device=x.device, dtype=torch.long)
            x, _ = self.p_sample_ddim(
                x,
                cond,
                t,
                index=len(timesteps) - i - 1,
                use_original_steps=use_original_steps,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback:
                callback(i)
        return x
