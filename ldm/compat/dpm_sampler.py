"""`ldm.models.diffusion.dpm_solver` of the original, and its `sampler`: DPM-Solver++ 2M."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.compat.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper
from ldm.compat.sampling import Condition, DiffusionModel, Sampler

MODEL_TYPES = {"eps": "noise", "v": "v"}  # `model_type` of `model_wrapper` by parameterization


class DPMSolverSampler(Sampler):
    """DPM-Solver++ 2M over `apply_model`, which gets fractional timesteps.

    As in the original, `sample` ignores all but the number of steps, conditions, guidance scale and
    `x_T`.
    """

    alphas_cumprod: Tensor

    def __init__(
        self, model: DiffusionModel, device: str | torch.device | None = None, **kwargs: object
    ) -> None:
        super().__init__(model, device)
        self.register_buffer("alphas_cumprod", model.alphas_cumprod.detach().float())

    def make_schedule(self, ddim_num_steps: int, *ignored: object, **options: object) -> None:
        self.steps = ddim_num_steps

    def sample_loop(
        self,
        cond: Condition,
        shape: Sequence[int],
        *,
        x_T: Tensor | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        **ignored: object,
    ) -> tuple[Tensor, None]:
        device = self.model.betas.device
        x = torch.randn(*shape, device=device) if x_T is None else x_T
        schedule = NoiseScheduleVP("discrete", alphas_cumprod=self.alphas_cumprod.to(device))
        predict = model_wrapper(
            self.model.apply_model,
            schedule,
            model_type=MODEL_TYPES[self.model.parameterization],
            guidance_type="classifier-free",
            condition=cond,
            unconditional_condition=unconditional_conditioning,
            guidance_scale=unconditional_guidance_scale,
        )
        solver = DPM_Solver(predict, schedule, predict_x0=True)
        return solver.sample(x, steps=self.steps, order=2, method="multistep"), None
