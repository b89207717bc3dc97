"""`ldm.models.diffusion.plms` of the original: PLMS (arXiv:2202.09778), calling `apply_model`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.compat.diffusion_util import (
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
from ldm.compat.sampling_util import norm_thresholding

# Order -> Adams–Bashforth coefficients of predicted noise, newest first
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PLMSSampler(BaseDDIMSampler):
    """PLMS; as in the original, the output of the model is used as eps, even if it predicts v."""

    supports_eta = False
    plms_sampling = BaseDDIMSampler.run_steps

    def sample_loop(
        self, cond: Condition, shape: Sequence[int], *, ucg_schedule: object = None, **options: Any
    ) -> Any:
        # The original ignores `ucg_schedule` here.
        return self.plms_sampling(cond, shape, **options)

    def step(self, *args: Any, t_next: Tensor, old_eps: list[Tensor], **options: Any) -> StepOutput:
        options |= {"old_eps": old_eps, "t_next": t_next}
        x, pred_x0, e_t = self.p_sample_plms(*args, **options)
        old_eps[:] = [*old_eps, e_t][-3:]
        return x, pred_x0

    @torch.no_grad()
    def p_sample_plms(
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
        old_eps: Sequence[Tensor] | None = None,
        t_next: Tensor | None = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step from x (B, C, h, w) at timesteps t (B,) to the previous, less noisy timestep.

        Args:
            index: Index of t in `ddim_timesteps`.
            old_eps: Predicted noise of up to three earlier steps, oldest first; None or empty at
                the first step.
            t_next: Timesteps (B,) to step to, needed only at the first step.
            dynamic_threshold: See `norm_thresholding`; None = no limit. The others: see `sample`.

        Returns:
            x at the previous timestep, the predicted x0, and the predicted noise.
        """
        apply_model, scale = self.model.apply_model, unconditional_guidance_scale

        def predict_noise(x: Tensor, t: Tensor) -> Tensor:
            e_t = apply_with_guidance(apply_model, x, t, c, scale, unconditional_conditioning)
            if score_corrector is not None:
                e_t = correct_score(self.model, score_corrector, e_t, x, t, c, corrector_kwargs)
            return e_t

        def get_x_prev_and_pred_x0(e_t: Tensor) -> StepOutput:
            a_t, a_prev, sigma_t, sqrt_one_minus_at = self.get_step_coefficients(
                index, x, use_original_steps
            )
            pred_x0 = (x - sqrt_one_minus_at * e_t) / a_t.sqrt()
            if quantize_denoised:
                pred_x0 = self.model.first_stage_model.quantize(pred_x0)[0]
            if dynamic_threshold is not None:
                pred_x0 = norm_thresholding(pred_x0, dynamic_threshold)
            noise = self.draw_noise(x, sigma_t, repeat_noise, temperature, noise_dropout)
            x_prev = a_prev.sqrt() * pred_x0 + (1.0 - a_prev - sigma_t**2).sqrt() * e_t + noise
            return x_prev, pred_x0

        e_t = predict_noise(x, t)
        if not old_eps:
            if t_next is None:
                raise TypeError("the first step needs t_next")
            # Heun's method, as there is no history yet: two evaluations, and two draws of noise.
            x_prev, _ = get_x_prev_and_pred_x0(e_t)
            e_t_prime = (e_t + predict_noise(x_prev, t_next)) / 2
        else:
            eps_history = [e_t, *reversed(old_eps)][:4]
            weights = ADAMS_BASHFORTH[len(eps_history)]
            e_t_prime = sum(
                (w * eps for w, eps in zip(weights, eps_history, strict=True)),
                torch.zeros_like(e_t),
            )
        x_prev, pred_x0 = get_x_prev_and_pred_x0(e_t_prime)
        return x_prev, pred_x0, e_t
