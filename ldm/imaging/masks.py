"""Make masks for inpainting: from a file, a box, or the transparent parts of an image.

The area that a mask file selects is determined by the first of these rules that applies:

    partly transparent              opaque pixels; if these are black and white, the white ones
    two values                      the higher value
    a palette of colors             all but the darkest color
    class labels, 255 = "ignored"   the labels 1 … MAX_LABEL
    anything else                   its values, 0 … 255; from THRESHOLD on they are inpainted
"""

import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ldm.imaging.reading import StoredImage, is_colored, load_stored
from ldm.runtime.errors import ArgumentError

__all__ = ["load_mask", "make_mask"]

log = logging.getLogger(__name__)

THRESHOLD = 128  # pixels with at least this value are inpainted
MAX_LABEL = 32  # maximum class label (VOC has 20); 255 means "ignored" in such masks
MAX_GRAY_DIFFERENCE = 48  # maximum difference of the channels of a gray pixel
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def load_mask(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """Load a mask, "L", white = inpaint, resized to the size of its image.

    Args:
        size: (width, height) of the image.
    Raises:
        ArgumentError: Aspect ratios of mask and image differ.
    """
    stored = load_stored(path)
    mask = _find_masked_area(stored)
    stored.log_warnings()
    if mask.size == size:
        return mask
    # A tolerance of 2 %, as the sides of a smaller mask are rounded.
    if abs(mask.width / mask.height * size[1] / size[0] - 1) > 0.02:
        raise ArgumentError(
            f"the mask `{path}` is {mask.width}x{mask.height}, the image {size[0]}x{size[1]}:"
            " their aspect ratios differ"
        )
    log.warning("the mask `%s` is resized to %dx%d", path, *size)
    return mask.resize(size, Image.Resampling.NEAREST)


def make_mask(
    image: str | Path,
    mask: str | Path | None = None,
    box: Box | None = None,
    *,
    grow: int = 0,
    blur: float = 0.0,
) -> Image.Image:
    """Make the mask of an image file, "L", white = inpaint.

    Args:
        mask: A mask file; None = the box, else the transparent parts of the image.
        box: (left, top, right, bottom) in pixels; ignored if `mask` is given.
        grow: Pixels by which the mask is dilated.
        blur: Standard deviation of a Gaussian blur of the mask, in pixels.
    Raises:
        ArgumentError: There is no mask, or it is empty.
    """
    source = load_stored(image)
    alpha = source.get_alpha()
    if mask is not None:
        result = load_mask(mask, source.image.size)
    elif box is not None:
        result = Image.new("L", source.image.size)
        result.paste(255, box)
    elif alpha is not None:
        result = ImageOps.invert(alpha)
    else:
        raise ArgumentError(
            f"`{image}` has no transparency: a mask file or a box is needed", "mask"
        )
    highest = np.asarray(result).max()
    if highest < THRESHOLD:
        raise ArgumentError(
            f"the mask of `{image}` is empty: nothing would be inpainted"
            + (f", its highest value is {highest} of 255" if highest else "")
        )
    if grow:
        result = result.filter(ImageFilter.MaxFilter(2 * grow + 1))
    return result.filter(ImageFilter.GaussianBlur(blur)) if blur else result


def _find_masked_area(stored: StoredImage) -> Image.Image:
    """Return the masked area, "L", white = inpaint, by the rules at the top of this file."""
    alpha = stored.get_alpha()
    if alpha is not None:
        opacity = np.asarray(alpha)
        # A constant alpha channel, or one without transparency, is not a mask.
        if opacity.min() < min(THRESHOLD, opacity.max()):
            values = np.asarray(stored.to_gray())
            if _is_black_and_white(values[opacity >= THRESHOLD]):
                return Image.fromarray(np.where(opacity >= THRESHOLD, values, 0).astype(np.uint8))
            stored = StoredImage(stored.name, alpha)
    values, (low, high) = stored.to_gray_array(), stored.find_finite_range()
    has_two_values = low < high and np.isin(values[np.isfinite(values)], (low, high)).all()
    if has_two_values or (stored.image.mode in ("P", "PA") and is_colored(stored.image)):
        return Image.fromarray((values > low).astype(np.uint8) * 255)
    gray = stored.to_gray()
    histogram = np.bincount(np.asarray(gray).ravel(), minlength=256)
    num_labeled, num_ignored = histogram[1 : MAX_LABEL + 1].sum(), histogram[255]
    if num_labeled > num_ignored > 0 and not histogram[MAX_LABEL + 1 : 255].any():
        log.warning(
            "the mask `%s` looks like class labels with 255 for ignored pixels: "
            "labels are inpainted, 255 is not", stored.name,
        )  # fmt: skip
        return gray.point(lambda value: 255 * (0 < value <= MAX_LABEL))
    if stored.image.mode != "F" and _has_many_colored_pixels(stored.image):
        log.warning(
            "the mask `%s` is a color image: bright areas are inpainted; use a black and white "
            "mask if you do not want that", stored.name,
        )  # fmt: skip
    return gray


def _has_many_colored_pixels(image: Image.Image) -> bool:
    """Return whether over 2 % of the pixels are colored, more than by JPEG compression of gray."""
    rgb = np.asarray(image.convert("RGB"), np.int16)
    return bool((np.ptp(rgb, axis=-1) > MAX_GRAY_DIFFERENCE).mean() > 0.02)


def _is_black_and_white(values: np.ndarray) -> bool:
    """Return whether 8-bit values are black and white, except for soft edges."""
    num_black, num_white = (values < 26).sum(), (values > 229).sum()  # 10 % and 90 % of 255
    return bool(num_black and num_white and num_black + num_white > 0.9 * values.size)
