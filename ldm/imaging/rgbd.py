"""Join and split color and depth in one tensor, as LDM3D's autoencoders read and write them.

    (B, 4, H, W)    red, green, blue, depth
    (B, 6, H, W)    red, green, blue, unused, high byte and low byte of the depth

All channels are in [-1, 1]. Depth is relative, without a unit; larger is nearer.
Stan et al. 2023 (arXiv:2305.10853).
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["join_depth", "join_side_by_side", "split_color", "split_depth"]

NUM_COLORS = 3
MAX_DEPTH_LEVEL = 65535  # of 16 bits


def join_depth(images: Tensor, depth: Tensor, channels: int) -> Tensor:
    """Append the depth to images: (B, channels, H, W).

    Args:
        images: (B, 3, H, W) in [-1, 1].
        depth: (B, 1, H, W) in [0, 1].
        channels: Channels of the result, 4 or 6; the unused channel is -1.
    """
    if channels == NUM_COLORS + 1:
        return torch.cat([images, depth * 2 - 1], dim=1)
    # Channels of this autoencoder have 8 bits each: two hold the 16 bits of the depth.
    levels = (depth * MAX_DEPTH_LEVEL).round()
    high = (levels / 256).floor()
    encoded = torch.cat([torch.zeros_like(high), high, levels - 256 * high], dim=1) / 127.5 - 1
    return torch.cat([images, encoded], dim=1)


def split_color(images: Tensor) -> Tensor:
    """Return the colors (B, 3, H, W) of images with or without depth."""
    return images[:, :NUM_COLORS]


def split_depth(images: Tensor) -> list[Image.Image]:
    """Return the depth of each image, "I;16"; an empty list for images without depth.

    As in the original, bytes are rounded with 6 channels, and depth is truncated with 4.
    """
    channels = images.shape[1] - NUM_COLORS
    if not channels:
        return []
    normalized = (images[:, NUM_COLORS:].detach().float() / 2 + 0.5).clamp(0, 1).cpu().numpy()
    if channels == 1:
        levels = normalized[:, 0] * MAX_DEPTH_LEVEL
    else:
        high, low = (normalized[:, 1] * 255).round(), (normalized[:, 2] * 255).round()
        levels = high * 256 + low
    return [Image.fromarray(level) for level in levels.astype(np.uint16)]


def join_side_by_side(image: Image.Image, depth: Image.Image) -> Image.Image:
    """Return an RGB image with the image on the left and its depth, in 8 bits, on the right."""
    canvas = Image.new("RGB", (2 * image.width, image.height))
    canvas.paste(image)
    canvas.paste(Image.fromarray((np.asarray(depth) >> 8).astype(np.uint8)), (image.width, 0))
    return canvas
