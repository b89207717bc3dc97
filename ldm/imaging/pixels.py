"""Image tensors in [-1, 1] to pictures of eight bits, and back.

An image is a (B, 3, H, W) float tensor, a picture is a PIL image. Pixels are rounded to the
nearest value; the original cut them off, which `truncate` brings back.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["fitted", "grid", "squeezed", "to_pil", "to_tensor", "to_uint8"]

PADDING = 2  # pixels between and around the pictures of a grid


def to_uint8(image: Tensor, truncate: bool = False) -> np.ndarray:
    """Pixels of an image.

    image: (B, 3, H, W) in [-1, 1]; what lies outside is clamped.
    truncate: cut fractions off, as the original does, instead of rounding.
    Returns (B, H, W, 3) uint8.
    Raises ValueError if the image holds NaN.
    """
    unit = ((image.detach().float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)  # (B, H, W, 3)
    if unit.isnan().any():
        raise ValueError("the image holds NaN, there are no pixels to save")
    pixels = unit * 255 if truncate else (unit * 255).round()
    return pixels.to(torch.uint8).cpu().numpy()


def to_pil(image: Tensor, truncate: bool = False) -> list[Image.Image]:
    """One RGB picture per image of the batch; arguments as `to_uint8`."""
    return [Image.fromarray(pixels) for pixels in to_uint8(image, truncate)]


def to_tensor(picture: Image.Image) -> Tensor:
    """The picture as a (1, 3, H, W) float32 image in [-1, 1]; other modes become RGB first."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))  # (H, W, 3)
    return (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).contiguous()  # (1, 3, H, W)


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, in reading order, as torchvision's make_grid.

    columns: pictures per row; fewer where there are not as many.
    Returns an RGB picture with two black pixels around each; a single picture has none.
    Raises ValueError without pictures, for sizes that differ and for columns below 1.
    """
    if not pictures or columns < 1:
        raise ValueError(f"no grid of {len(pictures)} pictures in {columns} columns")
    width, height = pictures[0].size
    if any(picture.size != (width, height) for picture in pictures):
        sizes = sorted({picture.size for picture in pictures})
        raise ValueError(f"a grid needs pictures of one size, got {sizes}")
    if len(pictures) == 1:
        return pictures[0].convert("RGB")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_width, cell_height = width + PADDING, height + PADDING
    sheet = Image.new("RGB", (columns * cell_width + PADDING, rows * cell_height + PADDING))
    for k, picture in enumerate(pictures):
        row, column = divmod(k, columns)
        sheet.paste(picture, (column * cell_width + PADDING, row * cell_height + PADDING))
    return sheet


def squeezed(picture: Image.Image, multiple: int) -> Image.Image:
    """The picture at the nearest smaller size whose sides are multiples, proportions not kept.

    What the original did to pictures that did not fit.
    """
    width, height = (side - side % multiple for side in picture.size)
    if not width or not height:
        raise ValueError(
            f"a picture of {picture.width}x{picture.height} is smaller than {multiple}"
        )
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def fitted(picture: Image.Image, size: tuple[int | None, int | None]) -> Image.Image:
    """The picture at (height, width), scaled to cover it, the rest cut off evenly.

    size: a side that is None follows from the other, as a multiple of 8.
    """
    height, width = size
    if height is None and width is None:
        return picture
    if height is None:
        height = max(round(picture.height * (width or 1) / picture.width / 8), 1) * 8
    if width is None:
        width = max(round(picture.width * height / picture.height / 8), 1) * 8
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
