"""Pictures joined to the latent: a small one to be enlarged, or one with a hole to be filled.

    lr, level, noise        --LowRes.noised-->  Cond.concat (B, 3, h, w), Cond.vector (B,)
    image, mask --hole, autoencoder, pair-->    Cond.concat (B, 1 + C, h, w)

Noise and the autoencoder come in before conditioning, by `prepare` or by the functions here: the
conditions with and without a prompt must see the same noise. The encoders themselves only say
which record goes to which slot; they have no `null`, as leaving out the prompt leaves them in.

Low resolution with noise: Ho et al. 2021 (arXiv:2106.15282), section 4.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.schedule import Schedule, make_betas

# the tables that checkpoints of the x4 upscaler hold under `low_scale_model`
TABLES = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)  # fmt: skip


class LowRes(nn.Module):
    """A low-resolution image with noise on it, (B, 3, h, w) of the latent's size, as channels.

        noise_schedule_config: keywords of `make_betas`, with `beta_schedule` for its `name`; None
            adds no noise whatever the level.
        max_noise_level: training draws levels below it.
        low_scale_key: the record of the image without noise.

    The levels are a condition of their own, see `NoiseLevel`. The tables of the schedule are in the
    state dict because published files hold them; the numbers used are computed here in float64.
    """

    slot: Literal["concat"] = "concat"
    key = "lowres"

    def __init__(
        self,
        *,
        noise_schedule_config: Mapping[str, Any] | None = None,
        max_noise_level: int = 1000,
        low_scale_key: str = "lr",
    ) -> None:
        super().__init__()
        self.max_noise_level = max_noise_level
        self.low_scale_key = low_scale_key
        self.schedule: Schedule | None = None
        if noise_schedule_config is not None:
            options = dict(noise_schedule_config)
            name = options.pop("beta_schedule", "linear")
            with torch.device("cpu"):  # real numbers, also where weights are on the meta device
                self.schedule = Schedule(make_betas(name, **options))
                tables = self.schedule.buffers()
            for table in TABLES:
                self.register_buffer(table, tables[table])

    @property
    def cached(self) -> str:
        """The record made of the picture alone, for caches: noise is drawn anew."""
        return self.low_scale_key

    def forward(self, lowres: Tensor) -> Tensor:
        """lowres: (B, 3, h, w), what `noised` gave."""
        return lowres

    def noised(self, lr: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """√ᾱ lr + √(1-ᾱ) noise at the levels, float32.

            lr: (B, 3, h, w) in [-1, 1]. level: (B,) integers. noise: like lr.
        Raises ValueError for a level outside the schedule.

        arXiv:2006.11239, eq. 4.
        """
        if self.schedule is None:
            return lr.float()
        return self.schedule.noised(lr, noise, level)

    def draw_level(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Levels (count,) int64, uniform below `max_noise_level`, as in training."""
        if self.schedule is None:
            return torch.zeros(count, dtype=torch.int64)
        device = torch.device("cpu") if generator is None else generator.device
        return torch.randint(self.max_noise_level, (count,), generator=generator, device=device)

    def prepare(
        self,
        batch: Mapping[str, Any],
        *,
        size: tuple[int, int] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The records `lowres` and `noise_level`, made from what a batch has.

        batch: `lr` (or as `low_scale_key` says) (B, 3, h, w) in [-1, 1]; `noise_level`, one
            number or (B,), is drawn if absent.
        size, encode: not needed here.
        generator: of the levels, then of the noise; None = torch's own.
        """
        if self.key in batch:
            return {}
        lr: Tensor = batch[self.low_scale_key]
        if "noise_level" in batch:
            level = torch.as_tensor(batch["noise_level"]).long().expand(len(lr))
        else:
            level = self.draw_level(len(lr), generator)
        device = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(lr.shape, generator=generator, device=device)
        return {self.key: self.noised(lr, level, noise), "noise_level": level.to(lr.device)}


class NoiseLevel(nn.Module):
    """The level of noise on another condition, (B,) integers: a class for the network."""

    slot: Literal["vector"] = "vector"
    key = "noise_level"

    def forward(self, level: Tensor) -> Tensor:
        return level  # (B,)


class Folded(nn.Module):
    """A picture cut into patch x patch parts, which become channels: (B, 3 patch², H / p, W / p).

    key: the record of the picture (B, 3, H, W), `patch` times as large as the latent.
    """

    slot: Literal["concat"] = "concat"

    def __init__(self, *, key: str = "lr", patch: int = 1) -> None:
        super().__init__()
        self.key = self.cached = key
        self.patch = patch

    def forward(self, image: Tensor) -> Tensor:
        height, width = (side // self.patch for side in image.shape[-2:])
        parts = image.unflatten(-1, (self.patch, width)).unflatten(-3, (self.patch, height))
        return parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 3)  # (B, patch² C, H / patch, W / patch)


class MaskedImage(nn.Module):
    """What inpainting models read beside the latent: mask, then latent of the masked picture."""

    slot: Literal["concat"] = "concat"
    key = cached = "masked"

    def forward(self, masked: Tensor) -> Tensor:
        """masked: (B, 1 + C, h, w), what `pair` gave."""
        return masked

    def prepare(
        self,
        batch: Mapping[str, Any],
        *,
        encode: Callable[[Tensor], Tensor],
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The record `masked`, made from what a batch has.

        batch: `mask` (B, 1, H, W), 1 = paint anew; `masked_image` (B, 3, H, W), else `jpg`.
        encode: image in [-1, 1] -> z, drawn from the posterior: the model's own `encode`.
        size, generator: not needed here.
        """
        if self.key in batch:
            return {}
        image = batch.get("masked_image")
        if image is None:
            image = hole(batch["jpg"], batch["mask"])
        return {self.key: pair(batch["mask"], encode(image))}


def hole(image: Tensor, mask: Tensor) -> Tensor:
    """The image with 0 (grey) where it is to be painted anew.

    image: (B, 3, H, W) in [-1, 1]. mask: (B, 1, H, W); at least 0.5 = paint anew.
    """
    if mask.shape[-2:] != image.shape[-2:]:
        ours, theirs = ("{} x {}".format(*x.shape[-2:]) for x in (image, mask))
        raise ValueError(f"an image of {ours} pixels has a mask of {theirs}")
    return image * (mask < 0.5)


def pair(mask: Tensor, z: Tensor) -> Tensor:
    """Mask (B, 1, H, W) and latent of the masked image (B, C, h, w) -> (B, 1 + C, h, w).

    The mask becomes 0 or 1 and takes the size of the latent by its nearest pixels.
    """
    small = F.interpolate((mask >= 0.5).to(z), size=z.shape[-2:], mode="nearest")  # (B, 1, h, w)
    return torch.cat([small, z], dim=1)
