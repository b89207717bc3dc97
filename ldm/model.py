"""LatentDiffusion: UNet, autoencoder, conditioner and noise schedule of one model.

    autoencoder    image (B, 3, H, W) in [-1, 1]  <->  z (B, C, h, w), std about 1
                   (with depth in further channels: `ldm.imaging.rgbd`)
    conditioner    batch                           ->  Cond
    unet           (z_t, t, Cond)                  ->  prediction
    schedule       noise level of each timestep

Sampling and training live in other modules. Rombach et al. 2022 (arXiv:2112.10752).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Batch, Cond, Conditioner, Drop, PrepareOptions
from ldm.diffusion.denoiser import SIGMA_DATA, Denoiser, scalings
from ldm.diffusion.schedule import Schedule
from ldm.encoders.text import TextEncoder
from ldm.nets.autoencoder import AutoencoderKL, PixelSpace
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.nets.lora import MergedChanges
from ldm.nets.tiled import apply_tiled
from ldm.nets.tiny_autoencoder import TinyAutoencoder
from ldm.nets.unet import UNet
from ldm.runtime.errors import ArgumentError
from ldm.runtime.offload import offload

__all__ = ["Defaults", "LatentDiffusion", "LatentSpace"]

SCALE_TOLERANCE = 0.01  # relative, of the scale factors of autoencoders


@dataclass(frozen=True)
class Defaults:
    """Options of sampling that a model is made for; pipelines use them for what is not given.

    Args:
        scale: Guidance scale; 1 is no guidance.
        scheduler: Choice of steps; None for the sampler's own.
        eta: Noise between the steps of this sampler; None for the sampler's own.
        max_steps, max_scale: What a model for few steps is not made for: more than that.
    """

    scale: float = 9.0
    steps: int = 50
    sampler: str = "ddim"
    scheduler: str | None = None
    eta: float | None = None
    max_steps: int | None = None
    max_scale: float | None = None


@dataclass(frozen=True)
class LatentSpace:
    """What tells the latents of one autoencoder from those of another.

    Args:
        channels, downscale, scale_factor: As those of `LatentDiffusion`.
        pixel_channels: Channels of the images.
        is_normalised: Whether latents have a mean and a standard deviation of each channel.
    """

    channels: int
    downscale: int
    pixel_channels: int
    scale_factor: float
    is_normalised: bool

    def matches(self, other: "LatentSpace") -> bool:
        """Return whether latents of both are of one kind."""
        ratio = other.scale_factor / self.scale_factor
        same = replace(other, scale_factor=self.scale_factor)
        return self == same and abs(ratio - 1) <= SCALE_TOLERANCE


class LatentDiffusion(nn.Module):
    """A latent diffusion model of any family: families differ in encoders and sizes only.

    Args:
        parameterization: What `unet` predicts, "eps", "v", "x0" or "edm".
        sigma_data: Standard deviation of z, for "edm".
        scale_factor: Factor of the autoencoder's latents, about 1 / their standard deviation.
        latent_mean, latent_std: Of each channel of the autoencoder's latents, (C,), where they are
            normalised: z = (latent - mean) / std * scale_factor.
        image_size: Side of the latents that the model was trained with, in latent pixels, or
            (height, width).
        upcast_autoencoder: Whether the autoencoder overflows in float16, as that of SDXL.
        defaults: Options of sampling that are not given.

    Attributes:
        latent_size: (height, width) of the latents in training; `image_size` is the greater.
        provenance: Files that the model was loaded from, set by `ldm.load`.
        merged: What `ldm.set_loras` has merged into the weights; None if it was never called.
    """

    def __init__(
        self,
        *,
        unet: UNet | LatentUpscalerUNet,
        autoencoder: AutoencoderKL | TinyAutoencoder | PixelSpace,
        conditioner: Conditioner,
        schedule: Schedule,
        parameterization: str = "eps",
        sigma_data: float = SIGMA_DATA,
        scale_factor: float = 1.0,
        image_size: int | Sequence[int] = 64,
        latent_mean: Sequence[float] | Tensor | None = None,
        latent_std: Sequence[float] | Tensor | None = None,
        upcast_autoencoder: bool = False,
        defaults: Defaults = Defaults(),
    ) -> None:
        super().__init__()
        scalings(parameterization, torch.ones(()))  # raises for an unknown one
        if schedule.zero_snr and parameterization == "eps":
            raise ArgumentError(
                "rescale_betas_zero_snr needs parameterization `v` or `x0`, got `eps`: at zero "
                "terminal SNR, z_t is pure noise and eps carries no information about z"
            )
        self.unet = unet
        self.autoencoder: AutoencoderKL | TinyAutoencoder | PixelSpace = autoencoder
        self.conditioner = conditioner
        self.schedule = schedule
        self.parameterization = parameterization
        self.sigma_data = sigma_data
        self.scale_factor = scale_factor
        self.latent_mean = _channel_values(latent_mean)
        self.latent_std = _channel_values(latent_std)
        self.upcast_autoencoder = upcast_autoencoder
        self.defaults = defaults
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        self.latent_size = (height, width)
        self.image_size = max(height, width)
        self.provenance: dict[str, Any] = {}
        self.merged: MergedChanges | None = None
        self._offload_device: torch.device | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser D(x, sigma, cond), for samplers and the training loss."""
        return Denoiser(self.unet, self.schedule, self.parameterization, sigma_data=self.sigma_data)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.unet.out_channels

    @property
    def guidance_width(self) -> int | None:
        """Features of the embedded guidance scale that a distilled UNet reads; None for others."""
        return self.unet.time_cond_proj_dim if isinstance(self.unet, UNet) else None

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel along one side, such as 8."""
        return self.autoencoder.downscale

    @property
    def latent_space(self) -> LatentSpace:
        """What its latents must share with those of another model to be of use to it."""
        return LatentSpace(
            self.channels,
            self.downscale,
            self.autoencoder.in_channels,
            self.scale_factor,
            self.latent_mean is not None or self.latent_std is not None,
        )

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self._offload_device or next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def offload(self, device: torch.device) -> None:
        """Run on a device that need not hold the whole model: for a GPU of little memory.

        Text encoders, UNet and autoencoder stay on the CPU, and have a copy on the device from when
        they run until another of them does. Encoders of images stay on the device.
        """
        for encoder in self.conditioner.encoders.values():
            if isinstance(encoder, TextEncoder):
                offload(encoder, device)
            else:
                encoder.to(device)
        offload(self.unet, device)
        offload(self.autoencoder, device)
        self._offload_device = device

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as z (B, C, h, w) float32, a posterior sample."""
        return self.normalize(self.autoencoder.encode(image).sample(generator).float())

    def normalize(self, z: Tensor) -> Tensor:
        """Convert latents (B, C, h, w) of the autoencoder to those of the UNet, of std about 1."""
        if self.latent_mean is not None:
            z = z - self.latent_mean.to(z.device)
        if self.latent_std is not None:
            z = z / self.latent_std.to(z.device)
        return z * self.scale_factor

    def denormalize(self, z: Tensor) -> Tensor:
        """Convert latents (B, C, h, w) of the UNet to those of the autoencoder."""
        z = z / self.scale_factor
        if self.latent_std is not None:
            z = z * self.latent_std.to(z.device)
        if self.latent_mean is not None:
            z = z + self.latent_mean.to(z.device)
        return z

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) float32, about [-1, 1], not clamped.

        Args:
            tile: Side, in latent pixels, of overlapping tiles that are decoded one by one and
                blended: needs less memory, but changes the image a little, as each tile is
                normalized by itself. None decodes everything at once.
        """
        z = self.denormalize(z)
        if tile is None:
            return self.autoencoder.decode(z)
        return apply_tiled(self.autoencoder.decode, z, tile, factor=self.downscale)

    def prepare(
        self, batch: Batch, size: tuple[int, int], generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """Add to a batch what encoders read: a depth map, the latent of a masked image, noise.

        This is slow or random; `condition` then gives consistent results with and without a prompt.

        Args:
            batch: Images, masks, texts … by batch key.
            size: (h, w) of the latent.
        """
        options = PrepareOptions(size, lambda image: self.encode(image, generator), generator)
        prepared = dict(batch)
        for encoder in self.conditioner.encoders.values():
            prepared |= encoder.prepare(prepared, options)
        return prepared

    def condition(
        self,
        batch: Batch,
        drop: Drop = 0.0,
        generator: torch.Generator | None = None,
        legacy: Collection[str] = (),
    ) -> Cond:
        """Encode a batch, such as {"txt": ["a red apple", …]}; see Conditioner.forward."""
        cond: Cond = self.conditioner(batch, drop, generator, legacy)
        return cond


def _channel_values(values: Sequence[float] | Tensor | None) -> Tensor | None:
    """Return one value per channel as (C, 1, 1) float32 on the CPU."""
    if values is None:
        return None
    return torch.as_tensor(values, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)
