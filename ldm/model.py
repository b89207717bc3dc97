"""LatentDiffusion: the lake where loading, sampling and training meet.

It owns four things and no procedures:

    autoencoder    image (B, 3, H, W) in [-1, 1]  <->  z (B, C, h, w), std about 1
    conditioner    batch                           ->  Cond
    unet           (z_t, t, Cond)                  ->  prediction
    schedule       how much noise at which step

Rombach et al. 2022 (arXiv:2112.10752).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Cond, Conditioner
from ldm.diffusion.denoiser import Denoiser, scalings
from ldm.diffusion.schedule import Schedule
from ldm.nets.autoencoder import AutoencoderKL, PixelSpace
from ldm.nets.unet import UNet

__all__ = ["LatentDiffusion"]


class LatentDiffusion(nn.Module):
    """A latent diffusion model of any family: families differ in encoders and numbers only.

        unet: (z_t, t, context=…, y=…) -> prediction.
        conditioner: batch -> Cond.
        parameterization: what `unet` predicts, "eps", "v" or "x0".
        scale_factor: latents are the autoencoder's, times this (about 1 / their std).
        image_size: side of the latent that the model was trained at, in latent pixels.

    `provenance` says which files it came from; `ldm.load` fills it in.
    """

    def __init__(
        self,
        *,
        unet: UNet,
        autoencoder: AutoencoderKL | PixelSpace,
        conditioner: Conditioner,
        schedule: Schedule,
        parameterization: str = "eps",
        scale_factor: float = 1.0,
        image_size: int = 64,
    ) -> None:
        super().__init__()
        scalings(parameterization, torch.ones(()))  # raises for an unknown one
        self.unet = unet
        self.autoencoder = autoencoder
        self.conditioner = conditioner
        self.schedule = schedule
        self.parameterization = parameterization
        self.scale_factor = scale_factor
        self.image_size = image_size
        self.provenance: dict[str, Any] = {}

    @property
    def denoiser(self) -> Denoiser:
        """D(x, sigma, cond), and the loss that trains it."""
        return Denoiser(self.unet, self.schedule, self.parameterization)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.unet.out_channels

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, along one side."""
        return self.autoencoder.downscale

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> z (B, C, h, w) float32, drawn from the posterior."""
        return self.autoencoder.encode(image).sample(generator).float() * self.scale_factor

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """z (B, C, h, w) -> image (B, 3, H, W) float32, about [-1, 1] (not clamped).

        tile: side in latent pixels of overlapping tiles, decoded one by one and blended: less
            memory, and not quite the same picture, as each tile is normalised by itself.
        """
        z = z / self.scale_factor
        if tile is None or max(z.shape[-2:]) <= tile:
            return self.autoencoder.decode(z)
        return _decode_tiled(self.autoencoder, z, tile)

    def condition(
        self,
        batch: Mapping[str, Any],
        drop: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Cond:
        """The condition of a batch, a dict keyed like the records: {"txt": ["a red apple", …]}.

        drop: share of records replaced by "nothing", for training with guidance.
        """
        return self.conditioner(batch, drop, generator)


def _decode_tiled(autoencoder: AutoencoderKL | PixelSpace, z: Tensor, tile: int) -> Tensor:
    """Tiles that overlap by a quarter, blended linearly where they do."""
    f, (height, width) = autoencoder.downscale, z.shape[-2:]
    image = total = torch.zeros(())
    for top in _starts(height, tile):
        for left in _starts(width, tile):
            part = autoencoder.decode(z[..., top : top + tile, left : left + tile])
            if not image.dim():
                image = part.new_zeros(*part.shape[:2], height * f, width * f)
                total = part.new_zeros(height * f, width * f)
            rows, columns = part.shape[-2:]
            weight = torch.outer(_ramp(rows, tile * f // 4), _ramp(columns, tile * f // 4)).to(part)
            where = (..., slice(top * f, top * f + rows), slice(left * f, left * f + columns))
            image[where] += part * weight
            total[where] += weight
    return image / total


def _starts(length: int, tile: int) -> list[int]:
    """First pixels of tiles that cover `length`, each overlapping the next by a quarter or more."""
    if length <= tile:
        return [0]
    count = 1 + -(-(length - tile) // max(tile * 3 // 4, 1))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, overlap: int) -> Tensor:
    """Rises over `overlap` pixels, and falls over as many; never 0."""
    up = (torch.arange(length) + 0.5) / max(overlap, 1)
    return torch.minimum(up, up.flip(0)).clamp(max=1.0)
