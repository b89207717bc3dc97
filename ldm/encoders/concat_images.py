"""Images concatenated to the latent: a low-resolution image, or a masked image with its mask.

    lr, level, noise          --LowResImage.add_noise-->      concat (B, 3, h, w), vector (B,)
    latent, sigma, noise      --LowResLatent.add_noise-->     concat (B, C, 2h, 2w), vector (B, 1)
    image, mask --mask_image, autoencoder, concat_mask-->     concat (B, 1 + C, h, w)

Noise augmentation of low-resolution images: Ho et al. 2021 (arXiv:2106.15282), section 4.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Unpack

from ldm.conditioning import Batch, Config, Encoder, EncoderOptions, PrepareOptions, Slot
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.nets.blocks import Conv2d, upsample_nearest
from ldm.runtime.errors import ArgumentError, check_name


def register_schedule(module: nn.Module, config: Config) -> Schedule:
    """Build a noise schedule, and register its buffers with the names in checkpoints.

    Args:
        config: Keyword arguments of `make_betas`, with `beta_schedule` for `name`.
    """
    options = dict(config)
    beta_schedule = options.pop("beta_schedule", "linear")
    with torch.device("cpu"):  # buffers need values even if the weights are on the meta device
        schedule = Schedule(make_betas(beta_schedule, **options))
        buffers = schedule.compute_buffers()
    for name, buffer in buffers.items():
        if not name.startswith("posterior"):
            module.register_buffer(name, buffer)
    return schedule


class LowResImage(Encoder):
    """A low-resolution image with noise, as channels (B, 3, h, w) of the latent's size.

    Its noise level is another condition, see `NoiseLevel`.

    Args:
        noise_schedule_config: See `register_schedule`; None = no noise at any level.
        max_noise_level: Highest noise level; random ones are below it.
        low_scale_key: Batch key of the image without noise.
    """

    slot: Slot = "concat"
    key = "lowres"

    def __init__(
        self,
        *,
        noise_schedule_config: Config | None = None,
        max_noise_level: int = 1000,
        low_scale_key: str = "lr",
    ) -> None:
        super().__init__()
        self.max_noise_level = max_noise_level
        self.low_scale_key = low_scale_key
        self.cache_key = self.source_key = low_scale_key
        self.schedule: Schedule | None = None
        if noise_schedule_config is not None:
            self.schedule = register_schedule(self, noise_schedule_config)

    def add_noise(self, lr: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Add noise to images (B, 3, h, w) in [-1, 1], at levels (B,) int64 of the schedule."""
        return lr.float() if self.schedule is None else self.schedule.add_noise(lr, noise, level)

    def prepare(self, batch: Batch, options: PrepareOptions) -> dict[str, Tensor]:
        """Make `lowres` and `noise_level` from the image without noise.

        The batch may have `noise_level`, a number or (B,); else it is random, as in training.
        """
        if self.key in batch:
            return {}
        lr: Tensor = batch[self.low_scale_key]
        if "noise_level" in batch:
            level = torch.as_tensor(batch["noise_level"]).long().expand(len(lr))
        elif self.schedule is None:
            level = torch.zeros(len(lr), dtype=torch.int64)
        else:
            level = options.randint(self.max_noise_level, len(lr))
        noise = options.randn(lr.shape)
        return {self.key: self.add_noise(lr, level, noise), "noise_level": level.to(lr.device)}


class NoiseLevel(Encoder):
    """The noise level of another condition, (B,) int64, as a class label of the UNet."""

    slot: Slot = "vector"
    key = "noise_level"


class RGBDLatent(Encoder):
    """The latent of a low-resolution RGBD image, as channels (B, C, h, w); no noise is added.

    Args:
        max_noise_level: Highest noise level; only UNets that embed the level use it.
    """

    slot: Slot = "concat"
    key = "rgbd"
    cache_key = "rgbd"

    def __init__(self, *, max_noise_level: int = 350) -> None:
        super().__init__()
        self.max_noise_level = max_noise_level


class LowResLatent(Encoder):
    """A low-resolution latent with noise, upsampled by nearest neighbor to channels (B, C, 2h, 2w).

    Its noise level is another condition, see `NoiseSigma`.
    """

    slot: Slot = "concat"
    key = "lowres_latent"
    NOISE_KINDS = ("gaussian", "fake")  # see `add_noise`

    def forward(self, latent: Tensor) -> Tensor:
        return upsample_nearest(latent)  # (B, C, 2h, 2w)

    def add_noise(self, latent: Tensor, sigma: float, noise: Tensor | None) -> Tensor:
        """Add noise to a latent (B, C, h, w), and divide by sqrt(1 + sigma²) to keep the variance.

        Args:
            noise: Standard normal noise; None ("fake" noise) = the latent is unchanged, although
                the network is given sigma.
        """
        return latent if noise is None else (latent + sigma * noise) / (1 + sigma**2) ** 0.5


class NoiseSigma(Encoder):
    """The sigma of another condition, (B,), as one feature of the vector, (B, 1)."""

    slot: Slot = "vector"
    key = "noise_sigma"

    def forward(self, sigma: Tensor) -> Tensor:
        return sigma[:, None]  # (B, 1)


class PatchesToChannels(Encoder):
    """An image split into n x n patches, stacked as channels: (B, n² C, h, w).

    Unlike in `pixel_unshuffle`, a channel is a contiguous region of the image.

    Args:
        key: Batch key of the image, (B, C, n h, n w).
        patches_per_side: n, the number of patches (not their size).
    """

    slot: Slot = "concat"

    def __init__(self, *, key: str = "lr", patches_per_side: int = 1) -> None:
        super().__init__()
        self.key = key
        self.cache_key = self.source_key = key
        self.patches_per_side = patches_per_side

    def forward(self, image: Tensor) -> Tensor:
        n = self.patches_per_side
        return rearrange(image, "b c (p1 h) (p2 w) -> b (p1 p2 c) h w", p1=n, p2=n)


class SpatialRescaler(Encoder):
    """An image or segmentation map, resized `n_stages` times, and mapped to other channels.

    Args:
        method: Mode of `torch.nn.functional.interpolate`.
        multiplier: Factor of each resizing; sizes are rounded down.
        in_channels: Channels of the image; with a segmentation map, one for each class.
        out_channels: Channels of the output; None = those of the image, without a convolution.
        bias: Whether the convolution has a bias.
        key: Batch key of the image, (B, in_channels, H, W).
    """

    slot: Slot = "concat"
    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        *,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
        key: str = "segmentation",
        **options: Unpack[EncoderOptions],
    ) -> None:
        super().__init__(**options)
        check_name("method", method, self.METHODS)
        self.key = key
        self.cache_key = self.source_key = key
        self.in_channels = in_channels
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        self.channel_mapper: nn.Module = nn.Identity()
        if out_channels is not None:
            self.channel_mapper = Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            image = F.interpolate(image, scale_factor=self.multiplier, mode=self.method)
        mapped: Tensor = self.channel_mapper(image)
        return mapped  # (B, out_channels, h, w)


class MaskedImage(Encoder):
    """The condition for inpainting: mask and latent of the masked image, (B, 1 + C, h, w)."""

    slot: Slot = "concat"
    key = "masked"
    cache_key = "masked"
    source_key = "mask"

    def prepare(self, batch: Batch, options: PrepareOptions) -> dict[str, Tensor]:
        """Make `masked` from `mask` (B, 1, H, W) and `masked_image`, else `jpg` (B, 3, H, W)."""
        if self.key in batch:
            return {}
        image = batch.get("masked_image")
        if image is None:
            image = self.mask_image(batch["jpg"], batch["mask"])
        return {self.key: self.concat_mask(batch["mask"], options.encode(image))}

    def mask_image(self, image: Tensor, mask: Tensor) -> Tensor:
        """Remove the masked part of an image (B, 3, H, W) in [-1, 1]; see `mask_image`."""
        return mask_image(image, mask)

    def concat_mask(self, mask: Tensor, z: Tensor) -> Tensor:
        """Concatenate a mask (B, 1, H, W) and the latent (B, C, h, w) of the masked image."""
        return torch.cat([resize_mask(mask, z), z], dim=1)  # (B, 1 + C, h, w)


class BlackMaskedImage(MaskedImage):
    """The condition for inpainting of latent-diffusion: latent and mask, (B, C + 1, h, w).

    The masked part of the image is black instead of gray; the mask is -1 or 1 instead of 0 or 1.
    """

    def mask_image(self, image: Tensor, mask: Tensor) -> Tensor:
        """Set the masked part of an image (B, 3, H, W) to -1 (black)."""
        return mask_image(image + 1, mask) - 1

    def concat_mask(self, mask: Tensor, z: Tensor) -> Tensor:
        """Concatenate the latent (B, C, h, w) of the masked image, and a mask (B, 1, H, W)."""
        return torch.cat([z, 2 * resize_mask(mask, z) - 1], dim=1)  # (B, C + 1, h, w)


def mask_image(image: Tensor, mask: Tensor) -> Tensor:
    """Set an image (B, 3, H, W) to 0 (gray) where a mask (B, 1, H, W) is at least 0.5."""
    if mask.shape[-2:] != image.shape[-2:]:
        image_size, mask_size = (f"{x.shape[-1]}x{x.shape[-2]}" for x in (image, mask))
        message = f"the mask must have the image's size {image_size}, got {mask_size}"
        raise ArgumentError(message, "mask")
    return image * (mask < 0.5)


def resize_mask(mask: Tensor, z: Tensor) -> Tensor:
    """Binarize a mask (B, 1, H, W), and resize it to (B, 1, h, w) for latents (B, C, h, w)."""
    return F.interpolate((mask >= 0.5).to(z), size=z.shape[-2:], mode="nearest")
