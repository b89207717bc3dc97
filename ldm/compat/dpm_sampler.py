"""`ldm.models.diffusion.dpm_solver` of the original, and its `sampler`: DPM-Solver++ 2M."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.compat.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper
from ldm.compat.sampling import Condition, DiffusionModel

__all__ = ["MODEL_TYPES", "DPMSolverSampler", "DPM_Solver", "NoiseScheduleVP", "model_wrapper"]

MODEL_TYPES = {"eps": "noise", "v": "v"}


class DPMSolverSampler:
    """DPM-Solver++ of order 2 over `apply_model`, which gets fractional timesteps.

    Args:
        device: Where the tables are; None for the model's device.
    """

    alphas_cumprod: Tensor

    def __init__(
        self, model: DiffusionModel, device: str | torch.device | None = None, **kwargs: object
    ) -> None:
        self.model = model
        self.device = model.device if device is None else torch.device(device)
        self.register_buffer("alphas_cumprod", model.alphas_cumprod.detach().float())

    def register_buffer(self, name: str, attr: object) -> None:
        """Set an attribute; tensors are moved to the device."""
        setattr(self, name, attr.to(self.device) if isinstance(attr, Tensor) else attr)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Condition = None,
        callback: Callable[[int], object] | None = None,
        normals_sequence: object = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: object = None,
        corrector_kwargs: Mapping[str, object] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Sample latents (batch_size, *shape).

        As in the original, all but conditions, guidance, steps and `x_T` is ignored.
        """
        device = self.model.betas.device
        x = torch.randn(batch_size, *shape, device=device) if x_T is None else x_T
        schedule = NoiseScheduleVP("discrete", alphas_cumprod=self.alphas_cumprod.to(device))
        predict = model_wrapper(
            self.model.apply_model,
            schedule,
            model_type=MODEL_TYPES[self.model.parameterization],
            guidance_type="classifier-free",
            condition=conditioning,
            unconditional_condition=unconditional_conditioning,
            guidance_scale=unconditional_guidance_scale,
        )
        solver = DPM_Solver(predict, schedule, predict_x0=True)
        return solver.sample(x, steps=S, order=2, method="multistep"), None
