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
from ldm.nets.tiling import tiled
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
        if schedule.zero_snr and parameterization == "eps":
            raise ValueError(
                "rescale_betas_zero_snr needs parameterization `v` or `x0`, got `eps`: where z_t "
                "is noise alone, eps says nothing of z"
            )
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

    def prepare(
        self,
        batch: Mapping[str, Any],
        size: tuple[int, int],
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """The batch with the records that encoders read, made of what they are made from.

        What is slow or drawn at random (a depth map, the latent of a masked picture, noise) is so
        made once, and conditions with and without a prompt agree.

        size: (h, w) of the latent. generator: of all that is drawn.
        """
        prepared = dict(batch)
        encoder: Any
        for encoder in self.conditioner.children():
            if hasattr(encoder, "prepare"):
                prepared |= encoder.prepare(
                    prepared,
                    size=size,
                    encode=lambda image: self.encode(image, generator),
                    generator=generator,
                )
        return prepared

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """z (B, C, h, w) -> image (B, 3, H, W) float32, about [-1, 1] (not clamped).

        tile: side in latent pixels of overlapping tiles, decoded one by one and blended: less
            memory, and not quite the same picture, as each tile is normalised by itself.
        """
        z = z / self.scale_factor
        if tile is None:
            return self.autoencoder.decode(z)
        return tiled(self.autoencoder.decode, z, tile, factor=self.downscale)

    def condition(
        self,
        batch: Mapping[str, Any],
        drop: float | Mapping[str, float] = 0.0,
        generator: torch.Generator | None = None,
    ) -> Cond:
        """The condition of a batch, a dict keyed like the records: {"txt": ["a red apple", …]}.

        drop: share of records replaced by "nothing", for training with guidance; see `Conditioner`.
        """
        return self.conditioner(batch, drop, generator)
