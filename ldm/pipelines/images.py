"""Encode images as latents, and decode latents to images."""

from collections.abc import Callable
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.samplers.common import NoiseSource
from ldm.imaging.rgbd import join_depth
from ldm.model import LatentDiffusion
from ldm.pipelines.families import quote_name
from ldm.pipelines.finite import check_finite
from ldm.runtime.errors import ArgumentError, MissingArgument

__all__ = [
    "DecodingOptions", "add_depth", "crop_like", "decode_latent", "encode_image", "pad_to_multiple",
]  # fmt: skip


class DecodingOptions(TypedDict, total=False):
    """Keywords of tasks for decoding.

    Attributes:
        on_latent: Called with the final latents (B, C, h, w) of the batch before they are decoded,
            in the UNet's scale: see `LatentDiffusion.denormalize`.
    """

    on_latent: Callable[[Tensor], object] | None


@torch.no_grad()
def encode_image(
    model: LatentDiffusion, image: Tensor, n: int, noise_source: NoiseSource
) -> Tensor:
    """Sample n latents (n, C, h, w) from the posterior of one image, padded to whole latent pixels.

    Args:
        image: (1, 3, H, W) in [-1, 1].
        noise_source: (like) -> standard normal noise in the shape of `like`.
    """
    image = pad_to_multiple(image.to(model.device), model.downscale_factor)
    posterior = model.autoencoder.encode(image)
    mean = posterior.mean.float().expand(n, -1, -1, -1)
    z = mean + posterior.std.float() * noise_source(torch.empty(mean.shape, device=mean.device))
    return check_finite(model.normalize(z), "the VAE")


def decode_latent(
    model: LatentDiffusion,
    z: Tensor,
    vae_tile: int | None,
    on_latent: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Decode z (B, C, h, w) to images (B, 3, H, W), or more channels with depth, in [-1, 1].

    Args:
        vae_tile: Side in latent pixels of overlapping tiles to decode; None = no tiles.
    """
    check_finite(z, "the UNet")
    if on_latent is not None:
        on_latent(z)
    images = model.decode(z, tile=vae_tile)
    return check_finite(images, "the VAE").clamp(-1, 1)


def add_depth(model: LatentDiffusion, image: Tensor, depth: Tensor | None) -> Tensor:
    """Append the depth to an input image for a model that reads it, see `ldm.imaging.rgbd`.

    Args:
        image: (1, 3, H, W), or with the channels of depth already.
        depth: (1, 1, H, W) in [0, 1], larger is nearer; None = no depth, or the image has it.
    """
    channels = model.autoencoder.in_channels
    if depth is None and image.shape[1] == channels:
        return image
    if channels == 3:
        raise ArgumentError(
            f"{quote_name(model)} makes images without depth, leave it out", "depth"
        )
    if image.shape[1] == channels:
        raise ArgumentError("the image has depth already, leave it out", "depth")
    if depth is None:
        raise MissingArgument(f"{quote_name(model)} also needs the depth of the image", "depth")
    if depth.shape[-2:] != image.shape[-2:]:
        sizes = ("{1}x{0}".format(*value.shape[-2:]) for value in (depth, image))
        raise ArgumentError("the depth is {}, the image {}".format(*sizes), "depth")
    return join_depth(image, depth.to(image), channels)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad an image (B, C, H, W) to multiples by repeating its last row and column."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def crop_like(padded: Tensor, image: Tensor, factor: int = 1) -> Tensor:
    """Crop an output to the size of `image`, the input before `pad_to_multiple`, times a factor."""
    return padded[..., : factor * image.shape[-2], : factor * image.shape[-1]]
