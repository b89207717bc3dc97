"""Files of pictures, masks and depth maps -> pictures: one loader, for whatever people have.

Turned as its EXIF says, first frame of an animation, transparency over white, 16 bits to 8, CMYK
and palettes to RGB; what is no picture, is cut off or is enormous is refused in one line.
"""

import logging
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = [
    "mask_of",
    "on_white",
    "open_depth",
    "open_mask",
    "open_picture",
    "picture_in",
    "save_depth",
    "size_in",
]

log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
# What Pillow may open; it has more, some of which run other programs.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
Box = tuple[int, int, int, int]


def open_picture(path: str | Path) -> Image.Image:
    """The picture in a file, RGB.

    Raises FileNotFoundError, or ValueError saying what is wrong with the file.
    """
    return on_white(_opened(path))


def on_white(picture: Image.Image) -> Image.Image:
    """The picture without transparency, RGB."""
    if "A" not in picture.getbands():
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")


def open_mask(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """The mask in a file, "L", white = paint anew; enlarged or shrunk to a picture's size.

    size: (width, height) of the picture.
    Raises ValueError if its proportions are others, so that it cannot belong to the picture.
    """
    mask = _opened(path).convert("L")
    if mask.size == size:
        return mask
    if abs(mask.width / mask.height * size[1] / size[0] - 1) > 0.02:
        raise ValueError(
            f"the mask `{path}` is {mask.width}x{mask.height}, the picture {size[0]}x{size[1]}"
        )
    log.warning("the mask `%s` is resized to %dx%d", path, *size)
    return mask.resize(size, Image.Resampling.NEAREST)


def mask_of(
    picture: str | Path,
    mask: str | Path | None = None,
    box: Box | None = None,
    *,
    grow: int = 0,
    blur: float = 0.0,
) -> Image.Image:
    """The mask of a picture, "L", white = paint anew: by a file, a box, or its transparent parts.

        box: (left, top, right, bottom) in pixels.
        grow: pixels that it reaches further. blur: radius of a soft edge.
    Raises ValueError if there is none, or it is empty.
    """
    opened = _opened(picture)
    if mask is not None:
        made = open_mask(mask, opened.size)
    elif box is not None:
        made = Image.new("L", opened.size)
        made.paste(255, box)
    elif "A" in opened.getbands():
        made = ImageOps.invert(opened.getchannel("A"))
    else:
        raise ValueError(f"`{picture}` is opaque: say what to paint anew with a mask file or a box")
    if made.getbbox() is None:
        raise ValueError(f"the mask of `{picture}` is empty: nothing would be painted")
    if grow:
        made = made.filter(ImageFilter.MaxFilter(2 * grow + 1))
    return made.filter(ImageFilter.GaussianBlur(blur)) if blur else made


def open_depth(path: str | Path, *, inverted: bool = False) -> Tensor:
    """The depth map in a file, (1, 1, H, W) float32 in [0, 1], near = large.

    inverted: in the file, white is far.
    """
    opened = _opened(path, deep=True)
    if opened.mode not in ("I", "I;16", "F"):
        opened = opened.convert("L")
    depth = torch.from_numpy(np.asarray(opened).astype(np.float32))[None, None]
    depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-6)
    return 1 - depth if inverted else depth


def save_depth(path: str | Path, depth: Tensor) -> None:
    """A depth map (1, 1, H, W) of any range as a 16-bit PNG, the nearest white."""
    low, high = depth.min(), depth.max()
    levels = ((depth - low) / (high - low).clamp(min=1e-6) * 65535).round()
    Image.fromarray(levels[0, 0].cpu().numpy().astype(np.uint16)).save(path, "PNG")


def picture_in(
    data: bytes, name: str | Path, *, deep: bool = False, warn: bool = False
) -> Image.Image:
    """The picture in the bytes of a file, upright, its first frame; transparency stays.

        name: how to call it in errors.
        deep: leave 16 bits as they are. warn: say that there are more frames.
    Raises ValueError saying what is wrong with it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if warn and getattr(file, "n_frames", 1) > 1:
                    log.warning("`%s` is animated: its first frame is used", name)
                picture = ImageOps.exif_transpose(file)
    except Image.DecompressionBombError:
        raise ValueError(f"`{name}` has more than {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise ValueError(f"`{name}` is {_looks(data)}, not a picture") from None
    except Exception as error:  # a damaged file makes Pillow's readers raise whatever comes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"`{name}` is damaged: {reason}") from error
    if picture.mode == "P":
        return picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if picture.mode.startswith("I") and not deep:
        values = np.asarray(picture).astype(np.float32)
        return Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8))
    return picture


def size_in(path: str | Path | BytesIO) -> tuple[int, int]:
    """(width, height) of the picture in a file as it will be seen, read from its header alone.

    Raises ValueError if it has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as file:
                turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                return (file.height, file.width) if turned else file.size
    except Exception as error:  # see above
        raise ValueError(f"`{path}` cannot be measured: {error}") from error


def _opened(path: str | Path, deep: bool = False) -> Image.Image:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no picture `{path}`")
    return picture_in(path.read_bytes(), path, deep=deep, warn=True)


def _looks(data: bytes) -> str:
    start = data[:512].lower()
    if not start:
        return "an empty file"
    return "a web page" if b"<html" in start or b"<!doctype" in start else "something else"
