"""`ldm.modules.diffusionmodules.upscaling` of the original: noise augmentation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.encoders.concat_images import register_schedule


class AbstractLowScaleModel(nn.Module):
    """Base class of noise augmentation models.

    Args:
        noise_schedule_config: Keyword arguments of `register_schedule`; None = no schedule.
    """

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if noise_schedule_config is not None:
            self.register_schedule(**noise_schedule_config)

    def register_schedule(
        self,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Register the buffers of a noise schedule."""
        self.num_timesteps = timesteps
        self.schedule = register_schedule(
            self,
            {
                "beta_schedule": beta_schedule,
                "timesteps": timesteps,
                "linear_start": linear_start,
                "linear_end": linear_end,
                "cosine_s": cosine_s,
            },
        )

    def q_sample(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """Add the noise of timesteps t (B,) to x_start (B, …).

        Args:
            noise: Standard normal noise; None draws it from torch's global generator.
            seed: Passed to `torch.manual_seed` before noise is drawn; None = no seeding.
        """
        if noise is None:
            if seed is not None:
                torch.manual_seed(seed)
            noise = torch.randn_like(x_start)
        signal_scale, noise_scale = (
            buffer[t].view(-1, *[1] * (x_start.dim() - 1)).to(x_start.device)
            for buffer in (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        )
        return signal_scale * x_start + noise_scale * noise

    def forward(self, x: Tensor) -> Any:
        return x, None

    def decode(self, x: Tensor) -> Tensor:
        return x


class SimpleImageConcat(AbstractLowScaleModel):
    """No noise augmentation: images are returned unchanged, with noise level 0."""

    max_noise_level = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(len(x), dtype=torch.int64, device=x.device)


class ImageConcatWithNoiseAugmentation(AbstractLowScaleModel):
    """Noise augmentation with given or random noise levels.

    Args:
        max_noise_level: Random noise levels are 0 … max_noise_level - 1.
        to_cuda: Ignored, as noise levels are on the device of the images.
    """

    def __init__(
        self,
        noise_schedule_config: Mapping[str, Any],
        max_noise_level: int = 1000,
        to_cuda: bool = False,
    ) -> None:
        super().__init__(noise_schedule_config)
        self.max_noise_level = max_noise_level

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return noised images and their noise levels (B,), which are drawn if None."""
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (len(x),), device=x.device)
        return self.q_sample(x, noise_level, seed=seed), noise_level
