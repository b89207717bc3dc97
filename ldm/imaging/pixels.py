"""Convert tensors (B, 3, H, W) in [-1, 1] to 8-bit PIL images and back; resize and tile images.

Pixels are rounded to the nearest value; with `truncate` fractions are dropped, as in the original.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.runtime.errors import ArgumentError

__all__ = [
    "make_grid", "resize_and_center_crop", "resize_to", "resize_to_multiple", "to_pil",
    "to_tensor", "to_uint8",
]  # fmt: skip

GRID_PADDING = 2  # pixels between and around the images of a grid


def to_uint8(images: Tensor, truncate: bool = False) -> np.ndarray:
    """Convert a batch of images to 8-bit arrays.

    Args:
        images: (B, 3, H, W) in [-1, 1]; other values are clamped.
        truncate: Whether to drop fractions, as the original does, instead of rounding.
    Returns:
        (B, H, W, 3) uint8.
    Raises:
        ValueError: An image contains NaN.
    """
    normalized = ((images.detach().float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)  # (B, H, W, 3)
    # `clamp` keeps NaN, whose conversion to uint8 is undefined.
    if normalized.isnan().any():
        raise ValueError("the image contains NaN: it cannot be converted to 8 bits")
    pixels = normalized * 255 if truncate else (normalized * 255).round()
    return pixels.to(torch.uint8).cpu().numpy()


def to_pil(images: Tensor, truncate: bool = False) -> list[Image.Image]:
    """Convert each image of a batch to a PIL image, "RGB"; arguments as for `to_uint8`."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images, truncate)]


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an 8-bit image of any mode to (1, 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)
    return (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).contiguous()  # (1, 3, H, W)


def make_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange images of one size in rows, as torchvision's make_grid does.

    Args:
        columns: Images per row; fewer if there are fewer images.
    Returns:
        An RGB image with two black pixels around each image; a single image has no border.
    """
    if not images or columns < 1:
        raise ArgumentError(f"cannot make a grid of {len(images)} images in {columns} columns")
    width, height = images[0].size
    if any(image.size != (width, height) for image in images):
        sizes = sorted({image.size for image in images})
        raise ArgumentError(f"a grid needs images of one size, got {sizes}")
    if len(images) == 1:
        return images[0].convert("RGB")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_width, cell_height = width + GRID_PADDING, height + GRID_PADDING
    grid_size = (columns * cell_width + GRID_PADDING, rows * cell_height + GRID_PADDING)
    grid = Image.new("RGB", grid_size)
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        grid.paste(image, (column * cell_width + GRID_PADDING, row * cell_height + GRID_PADDING))
    return grid


def resize_to_multiple(image: Image.Image, multiple: int, filter_name: str) -> Image.Image:
    """Resize an image to sides rounded down to multiples, as the original did; may distort it.

    Args:
        filter_name: Name in `PIL.Image.Resampling`.
    """
    width, height = (side - side % multiple for side in image.size)
    if not width or not height:
        raise ArgumentError(
            f"an image of {image.width}x{image.height} pixels is too small: each side needs at "
            f"least {multiple}"
        )
    return image.resize((width, height), Image.Resampling[filter_name])


def resize_and_center_crop(
    image: Image.Image, size: int, *, round_side: Callable[[float], int] = int
) -> Image.Image:
    """Resize the shorter side of an image to `size`, bicubic, and crop the center, as for CLIP.

    Args:
        round_side: Rounds sides to whole pixels; the default truncates, as transformers does.
    """
    shorter = min(image.size)
    width, height = (round_side(size * side / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize_to(
    image: Image.Image, size: tuple[int | None, int | None], mode: str = "crop"
) -> Image.Image:
    """Resize an image to (height, width).

    Args:
        size: A side that is None follows from the other and the aspect ratio, rounded to a multiple
            of 8; if both are None, the image is returned as it is.
        mode: For an image of another aspect ratio: "crop", "stretch", or "pad" by repeating the
            edge.
    """
    height, width = size
    if height is None:
        if width is None:
            return image
        height = max(round(image.height * width / image.width / 8), 1) * 8
    elif width is None:
        width = max(round(image.width * height / image.height / 8), 1) * 8
    if mode == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if mode == "pad":
        scaled = ImageOps.contain(image, (width, height), Image.Resampling.LANCZOS)
        return _pad(scaled, height, width)
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
    """Pad an image evenly on both sides by repeating its edge."""
    top, left = (height - image.height) // 2, (width - image.width) // 2
    row_indices = np.arange(height).clip(top, top + image.height - 1) - top
    column_indices = np.arange(width).clip(left, left + image.width - 1) - left
    return Image.fromarray(np.asarray(image)[row_indices[:, None], column_indices])
