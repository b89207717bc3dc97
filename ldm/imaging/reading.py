"""Read image, mask and depth files of all common kinds.

Images are rotated as their EXIF says; of an animation the first frame is used; transparency becomes
white, 16 bits become 8, CMYK and palettes RGB. The error for a file that is damaged, enormous or
not an image is one line.
"""

import logging
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.runtime.errors import ArgumentError, FileFormatError, MissingFile

__all__ = [
    "decode_image",
    "flatten_on_white",
    "load_depth",
    "load_image",
    "load_mask",
    "make_mask",
    "read_size",
    "save_depth",
]

log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
# What Pillow may open; it has more, some of which run other programs.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
Box = tuple[int, int, int, int]


def load_image(path: str | Path) -> Image.Image:
    """The image in a file, RGB.

    Raises:
        MissingFile: there is no file.
        FileFormatError: the file is not an image, damaged or enormous.
    """
    return flatten_on_white(_load(path))


def flatten_on_white(image: Image.Image) -> Image.Image:
    """The image without transparency, RGB."""
    if "A" not in image.getbands():
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def load_mask(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """The mask in a file, "L", white = inpaint; resized to the size of its image.

    Args:
        size: (width, height) of the image.
    Raises:
        ArgumentError: its aspect ratio is not that of the image.
    """
    mask = _load(path).convert("L")
    if mask.size == size:
        return mask
    if abs(mask.width / mask.height * size[1] / size[0] - 1) > 0.02:
        raise ArgumentError(
            f"the mask `{path}` is {mask.width}x{mask.height}, the image {size[0]}x{size[1]}"
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
    """The mask of an image file, "L", white = inpaint: a file, a box, or the transparent parts.

    Args:
        box: (left, top, right, bottom) in pixels.
        grow: pixels by which the mask is dilated.
        blur: radius of the mask blur, pixels.
    Raises:
        ArgumentError: there is no mask, or it is empty.
    """
    source = _load(image)
    if mask is not None:
        result = load_mask(mask, source.size)
    elif box is not None:
        result = Image.new("L", source.size)
        result.paste(255, box)
    elif "A" in source.getbands():
        result = ImageOps.invert(source.getchannel("A"))
    else:
        raise ArgumentError(f"`{image}` has no transparency: a mask file or a box is needed")
    if result.getbbox() is None:
        raise ArgumentError(f"the mask of `{image}` is empty: nothing would be inpainted")
    if grow:
        result = result.filter(ImageFilter.MaxFilter(2 * grow + 1))
    return result.filter(ImageFilter.GaussianBlur(blur)) if blur else result


def load_depth(path: str | Path, *, inverted: bool = False) -> Tensor:
    """The depth map in a file, (1, 1, H, W) float32 in [0, 1], near = large.

    Args:
        inverted: in the file, white is far.
    """
    image = _load(path, keep_16_bit=True)
    if image.mode not in ("I", "I;16", "F"):
        image = image.convert("L")
    depth = torch.from_numpy(np.asarray(image).astype(np.float32))[None, None]
    depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-6)
    return 1 - depth if inverted else depth


def save_depth(path: str | Path, depth: Tensor) -> None:
    """Write a depth map (1, 1, H, W) of any range as a 16-bit PNG, the nearest white."""
    low, high = depth.min(), depth.max()
    levels = ((depth - low) / (high - low).clamp(min=1e-6) * 65535).round()
    Image.fromarray(levels[0, 0].cpu().numpy().astype(np.uint16)).save(path, "PNG")


def decode_image(
    data: bytes, name: str | Path, *, keep_16_bit: bool = False, warn: bool = False
) -> Image.Image:
    """Decode the bytes of an image file: upright, the first frame, with its transparency.

    Args:
        name: of the file, for messages.
        keep_16_bit: do not reduce 16 bits to 8.
        warn: log a warning if only the first of several frames is used.
    Raises:
        FileFormatError: the file is not an image, damaged or enormous.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if warn and getattr(file, "n_frames", 1) > 1:
                    log.warning("`%s` is animated: its first frame is used", name)
                image = ImageOps.exif_transpose(file)
    except Image.DecompressionBombError:
        raise FileFormatError(f"`{name}` has more than {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise FileFormatError(f"`{name}` is {_describe_content(data)}, not an image") from None
    except Exception as error:  # Pillow's readers raise errors of any kind on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(f"`{name}` is damaged: {reason}") from error
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode.startswith("I") and not keep_16_bit:
        values = np.asarray(image).astype(np.float32)
        return Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8))
    return image


def read_size(file: str | Path | BytesIO) -> tuple[int, int]:
    """(width, height) of the upright image in a file, read from its header alone.

    Raises:
        FileFormatError: the header cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                return (image.height, image.width) if is_turned else image.size
    except Exception as error:  # of any kind, see `decode_image`
        raise FileFormatError(f"the size of `{file}` cannot be read: {error}") from error


def _load(path: str | Path, keep_16_bit: bool = False) -> Image.Image:
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFile(f"no image `{path}`")
    return decode_image(path.read_bytes(), path, keep_16_bit=keep_16_bit, warn=True)


def _describe_content(data: bytes) -> str:
    start = data[:512].lower()
    if not start:
        return "an empty file"
    return "a web page" if b"<html" in start or b"<!doctype" in start else "something else"
