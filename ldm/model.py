"""LatentDiffusion: UNet, autoencoder, conditioner and noise schedule of one model.

    autoencoder    image (B, 3, H, W) in [-1, 1]  <->  z (B, C, h, w), std about 1
                   (RGB-D images have more channels: `ldm.imaging.rgbd`)
    conditioner    batch                           ->  Cond
    unet           (z_t, t, Cond)                  ->  prediction
    schedule       noise level of each timestep

Other modules sample and train. Rombach et al. 2022 (arXiv:2112.10752).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Batch, Cond, Conditioner, DropRate, PrepareOptions
from ldm.diffusion.denoiser import PARAMETERIZATIONS, SIGMA_DATA, Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.encoders.text import TextEncoder
from ldm.nets.autoencoder import Autoencoder, PixelSpace
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.nets.lora import MergedChanges
from ldm.nets.tiled import apply_tiled
from ldm.nets.tiny_autoencoder import TinyAutoencoder
from ldm.nets.unet import UNet
from ldm.runtime.errors import ArgumentError, check_name
from ldm.runtime.offload import offload

__all__ = ["Defaults", "LatentDiffusion", "LatentSpace"]

SCALE_FACTOR_TOLERANCE = 0.01  # relative; scale factors in files are rounded


@dataclass(frozen=True)
class Defaults:
    """Default sampling options of a model.

    Args:
        scale: Guidance scale; 1 disables guidance; None = the default of the task, mostly 9.
        sampler: Name in `ldm.SAMPLERS`.
        scheduler: Name in `ldm.diffusion.names.SCHEDULERS`; None = the sampler's default.
        eta: Amount of noise that steps add, 0 = deterministic; None = the sampler's default.
        max_steps, max_scale: Upper limits for a few-step (distilled) model; None = no limit.
    """

    scale: float | None = None
    steps: int = 50
    sampler: str = "ddim"
    scheduler: str | None = None
    eta: float | None = None
    max_steps: int | None = None
    max_scale: float | None = None


@dataclass(frozen=True)
class LatentSpace:
    """Properties that must be equal in two models to exchange latents.

    Args:
        channels, scale_factor: See `LatentDiffusion`.
        downscale: Its `downscale_factor`; named as in saved latents.
        pixel_channels: Channels of the images.
        is_normalized: Whether latents are normalized by mean and standard deviation per channel.
    """

    channels: int
    downscale: int
    pixel_channels: int
    scale_factor: float
    is_normalized: bool

    def matches(self, other: "LatentSpace") -> bool:
        """Return whether the models can exchange latents."""
        ratio = other.scale_factor / self.scale_factor
        is_equal = replace(other, scale_factor=self.scale_factor) == self
        return is_equal and abs(ratio - 1) <= SCALE_FACTOR_TOLERANCE


class LatentDiffusion(nn.Module):
    """A latent diffusion model of any family.

    Args:
        parameterization: What `unet` predicts, "eps", "v", "x0" or "edm".
        sigma_data: Standard deviation of z, used by "edm" only.
        scale_factor: Factor of the autoencoder's latents, about 1 / their standard deviation.
        latent_mean, latent_std: (C,), z = (latent - mean) / std * scale_factor; None = 0 and 1.
        image_size: Side of the latents that the model was trained with, in latent pixels, or
            (height, width).
        upcast_autoencoder: Whether the autoencoder overflows in float16, as that of SDXL does.
        defaults: Default sampling options.

    Attributes:
        latent_size: (height, width) of the latents in training.
        image_size: The larger side of `latent_size`; the original's name.
        provenance: Files and settings that the model was loaded with, set by `ldm.load`.
        merged_changes: Changes of weights by `ldm.set_loras`; None if it was never called.
    """

    def __init__(
        self,
        *,
        unet: UNet | LatentUpscalerUNet,
        autoencoder: Autoencoder | TinyAutoencoder | PixelSpace,
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
        check_name(
            "parameterization", parameterization, PARAMETERIZATIONS, argument="parameterization"
        )
        if schedule.zero_snr and parameterization == "eps":
            raise ArgumentError(
                "rescale_betas_zero_snr needs parameterization `v` or `x0`, got `eps`: at zero "
                "terminal SNR, z_t is pure noise and eps carries no information about z"
            )
        self.unet = unet
        self.autoencoder: Autoencoder | TinyAutoencoder | PixelSpace = autoencoder
        self.conditioner = conditioner
        self.schedule = schedule
        self.parameterization = parameterization
        self.sigma_data = sigma_data
        self.scale_factor = float(scale_factor)  # YAML reads numbers such as 1e-1 as strings
        if not 0 < self.scale_factor < math.inf:
            raise ArgumentError(f"scale_factor must be a positive number, got {scale_factor}")
        # Not buffers, as the state dicts of the original do not have them.
        self.latent_mean = _to_channel_tensor(latent_mean)
        self.latent_std = _to_channel_tensor(latent_std)
        self.upcast_autoencoder = upcast_autoencoder
        self.defaults = defaults
        sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            message = "image_size must be a positive integer, or (height, width)"
            raise ArgumentError(f"{message}, got {image_size!r}")
        self.latent_size = (sides[0], sides[1])
        self.image_size = max(sides)
        self.provenance: dict[str, Any] = {}
        self.merged_changes: MergedChanges | None = None
        self._execution_device: torch.device | None = None

    @property
    def denoiser(self) -> Denoiser:
        """Denoiser D(x, sigma, cond), for samplers and the training loss."""
        return Denoiser(self.unet, self.schedule, self.parameterization, sigma_data=self.sigma_data)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.unet.out_channels

    @property
    def guidance_embed_dim(self) -> int | None:
        """Dimension of the guidance-scale embedding of a distilled UNet (LCM); None for others."""
        return self.unet.time_cond_proj_dim if isinstance(self.unet, UNet) else None

    @property
    def downscale_factor(self) -> int:
        """Image pixels per latent pixel along each side, often 8."""
        return self.autoencoder.downscale_factor

    @property
    def size_multiple(self) -> int:
        """Number of pixels that the sides of images must be multiples of.

        A UNet that downsamples in residual blocks needs multiples of its own factor, too.
        """
        unet = self.unet
        if isinstance(unet, UNet) and unet.resblock_updown:
            return self.downscale_factor << (len(unet.channel_mult) - 1)
        return self.downscale_factor

    @property
    def latent_space(self) -> LatentSpace:
        """Properties that must be equal in two models to exchange latents."""
        return LatentSpace(
            self.channels,
            self.downscale_factor,
            self.autoencoder.in_channels,
            self.scale_factor,
            self.latent_mean is not None or self.latent_std is not None,
        )

    @property
    def device(self) -> torch.device:
        """Device that the networks run on."""
        return self._execution_device or next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the UNet's weights."""
        return next(self.unet.parameters()).dtype

    def offload(self, device: torch.device) -> None:
        """Run on a device too small for the whole model, with one network at a time on it.

        Text encoders, UNet and autoencoder stay on the CPU; the one that runs is copied to the
        device until another one runs. Other encoders are moved to the device.
        """
        for encoder in self.conditioner.encoders.values():
            if isinstance(encoder, TextEncoder):
                offload(encoder, device)
            else:
                encoder.to(device)
        offload(self.unet, device)
        offload(self.autoencoder, device)
        self._execution_device = device

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to posterior samples z (B, C, h, w) float32."""
        return self.normalize(self.autoencoder.encode(image).sample(generator).float())

    def normalize(self, z: Tensor) -> Tensor:
        """Convert latents (B, C, h, w) of the autoencoder to z, with std about 1."""
        if self.latent_mean is not None:
            z = z - self.latent_mean.to(z.device)
        if self.latent_std is not None:
            z = z / self.latent_std.to(z.device)
        return z * self.scale_factor

    def denormalize(self, z: Tensor) -> Tensor:
        """Convert z (B, C, h, w) to latents of the autoencoder."""
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
                blended. This needs less memory, but changes the image slightly, as the statistics
                of group norms are those of a tile. None = no tiles.
        """
        z = self.denormalize(z)
        if tile is None:
            return self.autoencoder.decode(z)
        return apply_tiled(self.autoencoder.decode, z, tile, factor=self.downscale_factor)

    def prepare(
        self, batch: Batch, latent_size: tuple[int, int], generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """Add inputs of encoders to a batch: a depth map, the latent of a masked image, noise.

        Slow or random computations run here, once for the conditional and the unconditional batch.

        Args:
            batch: Images, masks, texts … by batch key.
            latent_size: (h, w) of the latent.
            generator: Random generator; None = torch's global one.
        """
        encode = partial(self.encode, generator=generator)
        options = PrepareOptions(latent_size, encode, generator)
        prepared = dict(batch)
        for encoder in self.conditioner.encoders.values():
            prepared |= encoder.prepare(prepared, options)
        return prepared

    def condition(
        self,
        batch: Batch,
        drop: DropRate = 0.0,
        generator: torch.Generator | None = None,
        legacy: Collection[str] = (),
    ) -> Cond:
        """Encode a batch, such as {"txt": ["a red apple", …]}; see `Conditioner.forward`."""
        cond: Cond = self.conditioner(batch, drop, generator, legacy)
        return cond


def _to_channel_tensor(values: Sequence[float] | Tensor | None) -> Tensor | None:
    """Convert C values, one per channel, to (C, 1, 1) float32 on the CPU."""
    if values is None:
        return None
    return torch.as_tensor(values, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)
