"""Read image files of all formats that Pillow itself decodes; only this module opens images.

`load_image` and `decode_srgb` convert to 8 bits in sRGB, upright; the latter keeps transparency and
logs no warnings. `load_stored` and `decode_stored` keep the values of the file, for masks and depth
maps. Errors for files that are damaged, too large or not images have one line.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageChops,
    ImageCms,
    ImageFile,
    PngImagePlugin,
    UnidentifiedImageError,
)

from ldm.runtime.errors import FileFormatError, MissingFile

__all__ = [
    "IMAGE_SUFFIXES", "StoredImage", "decode_srgb", "decode_stored", "flatten_on_white",
    "is_colored", "list_images", "load_image", "load_stored", "open_image", "read_size",
]  # fmt: skip

log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000  # a file of a few kilobytes can decompress to gigabytes
# Text chunks (workflows, XMP) may be longer than 1 MB uncompressed, at which Pillow refuses a PNG.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26
PngImagePlugin.MAX_TEXT_MEMORY = 2**27
# Formats that Pillow decodes itself; others run external programs or are only identified. TGA is
# last, as it has no magic number.
KNOWN_FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "QOI", "PSD", "ICO",
    "ICNS", "CUR", "DIB", "DDS", "PCX", "DCX", "SGI", "SUN", "IM", "MSP", "XBM", "XPM", "FITS",
    "FLI", "BLP", "FTEX", "GBR", "PIXAR", "TGA",
)  # fmt: skip
Image.init()
FORMATS = tuple(name for name in KNOWN_FORMATS if name in Image.OPEN)  # older versions have no AVIF
IMAGE_SUFFIXES = tuple(
    suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")
)
UNSUPPORTED_FORMATS = {  # description -> signatures in the first bytes of the file, in lower case
    "a web page, not an image": (b"<!doctype", b"<html"),
    "an SVG drawing: convert it to PNG": (b"<svg",),
    "a document, not an image": (b"%pdf", b"%!ps"),
    "a HEIC image: convert it to PNG": (b"ftypheic", b"ftypheix", b"ftypmif1"),
    "a JPEG XL image: convert it to PNG": (b"\xff\x0a", b"jxl \r\n"),
    "a raw photo: convert it to PNG": (b"\x10\0\0\0cr\2\0", b"fujifilmccd-raw", b"ftypcrx"),
    "an unsupported variant of TIFF: convert it to PNG": (b"ii*\0", b"mm\0*"),
    "an OpenEXR image: convert it to PNG": (b"v/1\1",),
    "a Radiance HDR image: convert it to PNG": (b"#?radiance", b"#?rgbe"),
    "a GIMP project: export it as PNG": (b"gimp xcf",),
    "a NumPy array: save it as PNG or TIFF": (b"\x93numpy",),
    "an archive, or a Krita document: export it as PNG": (b"pk\3\4",),
    "a video, not an image": (b"ftypisom", b"ftypmp4", b"ftypqt", b"\x1aE\xdf\xa3".lower()),
    "a Git LFS pointer, not the file itself": (b"version https://git-lfs",),
}
SRGB_GAMMA = 0.45455  # in the chunk gAMA of a PNG
Tag = ExifTags.Base  # tags of EXIF data and of TIFF files
Transpose = Image.Transpose
TRANSPOSES = {  # by EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}  # fmt: skip
TRANSPOSES_THAT_SWAP_SIDES = (
    Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
)  # fmt: skip
# PNGs of these raw modes: Pillow scales their pixels to 8 bits, but not their transparent color.
TRANSPARENT_COLOR_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


@dataclass(frozen=True)
class StoredImage:
    """The first frame of an image file, upright, with the values stored in the file.

    Attributes:
        name: File name, for messages.
        image: Image of any mode; "F" for values of more than 8 bits.
        white_level: The value of white in mode "F"; None = unknown.
        warnings: Warnings without the file name, such as "has several pages, the first is used".
    """

    name: str | Path
    image: Image.Image
    white_level: float | None = None
    warnings: list[str] = field(default_factory=list)

    def to_gray_array(self) -> np.ndarray:
        """Convert to gray values (H, W) float32, of 0 … `white_level`, or 0 … 255 for 8 bits."""
        image = self.image if self.image.mode == "F" else _to_rgb(self.image).convert("L")
        return np.asarray(image, np.float32)

    def get_alpha(self) -> Image.Image | None:
        """Return the opacity, "L"; None if the file has no transparency."""
        if self.image.mode == "F":
            if "transparency" not in self.image.info:
                return None
            is_opaque = self.to_gray_array() != self.image.info["transparency"]
            return Image.fromarray(is_opaque.astype(np.uint8) * 255)
        if not self.image.has_transparency_data:
            return None
        return _to_rgb(self.image).getchannel("A")

    def find_finite_range(self) -> tuple[float, float]:
        """Return the least and the greatest finite gray value; warn of NaN and infinity."""
        values = self.to_gray_array()
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise FileFormatError(f"`{self.name}` has no finite values")
        if finite.size < values.size:
            self._add_warning(
                f"has {values.size - finite.size} values that are NaN or infinite, left out"
            )
        return float(finite.min()), float(finite.max())

    def to_gray(self) -> Image.Image:
        """Convert to 8-bit gray values, "L"."""
        if self.image.mode != "F":
            return _to_rgb(self.image).convert("L")
        low, high = self.find_finite_range()
        if self.white_level is None:
            self._add_warning(f"has values from {low:g} to {high:g}, which become black and white")
            span = max(high - low, 1e-30)  # not 0, for an image of one value
        else:
            low, span = 0.0, self.white_level
        levels = np.nan_to_num((self.to_gray_array() - low) * (255 / span), nan=0.0)
        return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))

    def to_srgb(self) -> Image.Image:
        """Convert to 8 bits in sRGB, "RGB", or "RGBA" if the file has transparency."""
        image = self.to_gray() if self.image.mode == "F" else self.image
        rgb = _to_rgb(image).convert("RGB")
        profile = self.image.info.get("icc_profile")
        if profile and image.mode != "LAB":  # its values are absolute
            try:
                rgb = _apply_profile(image, rgb, profile)
            except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
                self._add_warning("has an ICC profile that is damaged or does not fit, ignored")
        elif "srgb" not in self.image.info:
            rgb = _apply_gamma(rgb, self.image.info.get("gamma", SRGB_GAMMA))
        alpha = self.get_alpha()
        if alpha is not None:
            rgb.putalpha(alpha)
        return rgb

    def log_warnings(self) -> None:
        """Log the warnings with the file name."""
        for text in self.warnings:
            log.warning("`%s` %s", self.name, text)

    def _add_warning(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def load_image(path: str | Path) -> Image.Image:
    """Load an image file as RGB; transparent parts are blended with white.

    Raises:
        MissingFile: There is no file.
        FileFormatError: The file is not an image, damaged or too large.
    """
    stored = load_stored(path)
    image = flatten_on_white(stored.to_srgb())
    stored.log_warnings()
    return image


def load_stored(path: str | Path) -> StoredImage:
    """Load an image file with its stored values; errors as for `load_image`."""
    return decode_stored(_find_file(path).read_bytes(), path)


def decode_srgb(data: bytes, name: str | Path) -> Image.Image:
    """Decode the bytes of an image file to "RGB" or "RGBA" in sRGB, upright.

    Args:
        name: File name, for messages.
    """
    return decode_stored(data, name).to_srgb()


def decode_stored(data: bytes, name: str | Path) -> StoredImage:
    """Decode the bytes of an image file with its stored values; arguments as for `decode_srgb`."""
    with open_image(BytesIO(data), name) as file:
        warning_texts = []
        # Other images in these formats are layers, previews and maps of the first one.
        if file.format not in ("PSD", "MPO") and getattr(file, "is_animated", False):
            warning_texts.append("is animated or has several pages, the first is used")
        if file.format == "PNG" and (space := _find_color_space(data)):
            warning_texts.append(
                f"has {space} colors (cICP), which are read as sRGB: convert it first"
            )
        _scale_transparent_color(file)
        if file.format == "TIFF" and _is_planar_16_bit(file):
            raise UnidentifiedImageError
        file.load()  # which turns a TIFF upright
        transpose = _find_transpose(file)
        image = file.copy() if transpose is None else file.transpose(transpose)
        has_alpha = file.format in ("BMP", "DIB", "TGA") and image.mode == "RGBA"
        if has_alpha and _is_fully_transparent(image):
            image = image.convert("RGB")  # some programs leave the unused alpha channel at 0
        if image.mode[0] not in "IF":  # "I", "I;16" and "F" have more than 8 bits
            return StoredImage(name, image, warnings=warning_texts)
        values, white_level = _read_values(file, image)
        float_image = Image.fromarray(values)
        float_image.info = image.info
        return StoredImage(name, float_image, white_level, warning_texts)


@contextmanager
def open_image(
    file: str | Path | BytesIO, name: str | Path | None = None
) -> Iterator[ImageFile.ImageFile]:
    """Open an image file like `Image.open`, without reading pixels, with one-line errors.

    Args:
        name: File name, for messages; None = its path.
    Raises:
        MissingFile: There is no file.
        FileFormatError: It is not an image, damaged or too large, or Pillow fails in the block.
        OSError: The operating system cannot read it, or reports another error in the block.
    """
    source = file if isinstance(file, BytesIO) else _find_file(file)
    name = name or str(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except Image.DecompressionBombError:
        raise FileFormatError(f"`{name}` has more than {MAX_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise FileFormatError(f"`{name}` is {_describe_content(source)}") from None
    except Exception as error:  # Pillow's readers raise errors of any kind on a damaged file
        if isinstance(error, OSError) and error.errno is not None:  # such as of permissions
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(f"`{name}` is damaged: {reason}") from error


def list_images(folder: str | Path, argument: str | None = None) -> list[Path]:
    """List the image files of a folder, sorted by name, without hidden ones.

    Args:
        argument: Name of the argument that `folder` comes from, for errors; None = unknown.
    Raises:
        MissingFile: There is no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise MissingFile(f"no folder `{folder}`", argument)
    files = (path for path in folder.glob("[!.]*") if path.is_file())
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise MissingFile(f"`{folder}` has no images", argument)
    return images


def read_size(file: str | Path | BytesIO) -> tuple[int, int]:
    """Read (width, height) of the upright image from the header; errors as `open_image`."""
    with open_image(file, None if isinstance(file, (str, Path)) else "the image") as image:
        # Pillow swaps the sides of a rotated TIFF itself.
        is_rotated = image.format != "TIFF" and _find_transpose(image) in TRANSPOSES_THAT_SWAP_SIDES
        return image.size[::-1] if is_rotated else image.size


def flatten_on_white(image: Image.Image) -> Image.Image:
    """Return an image as RGB; transparent parts are blended with white."""
    image = _to_rgb(image)
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def is_colored(image: Image.Image) -> bool:
    """Return whether any pixel is not gray."""
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels != pixels[..., :1]).any())


def _find_file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFile(f"no image `{path}`")
    return path


def _describe_content(source: Path | BytesIO) -> str:
    data = source.getvalue() if isinstance(source, BytesIO) else source.read_bytes()
    start = data[:512].lower()
    if not start:
        return "an empty file, not an image"
    for description, signatures in UNSUPPORTED_FORMATS.items():
        if any(signature in start for signature in signatures):
            return description
    return "something else, not an image"


def _find_transpose(image: ImageFile.ImageFile) -> Image.Transpose | None:
    """Return the transpose that makes an image upright, by valid EXIF data; else None."""
    try:
        return TRANSPOSES.get(image.getexif().get(Tag.Orientation, 1))
    except Exception:  # Pillow raises errors of any kind on damaged EXIF data; pixels are intact
        return None


def _find_color_space(data: bytes) -> str | None:
    """Return the color space in a PNG's chunk cICP (ITU-T H.273); None for sRGB."""
    start = data.find(b"cICP", 0, data.find(b"IDAT"))
    if start < 0:
        return None
    primaries, transfer = data[start + 4], data[start + 5]
    hdr = {16: "HDR (PQ)", 18: "HDR (HLG)"}.get(transfer)
    is_wide = primaries not in (1, 2)  # 1 = those of sRGB, 2 = unspecified
    return hdr or ("wide-gamut" if is_wide else None)


def _is_planar_16_bit(file: ImageFile.ImageFile) -> bool:
    """Return whether each color has a plane of more than 8 bits, which Pillow reads as 8 bits."""
    tags = getattr(file, "tag_v2", {})
    is_planar = tags.get(Tag.PlanarConfiguration) == 2
    return is_planar and max(tags.get(Tag.BitsPerSample, (8,))) > 8


def _is_fully_transparent(image: Image.Image) -> bool:
    return image.getchannel("A").getextrema() == (0, 0)


def _scale_transparent_color(file: ImageFile.ImageFile) -> None:
    """Scale the transparent color of a PNG to 8 bits, in place."""
    color = file.info.get("transparency")
    if color is None or not file.tile or file.format != "PNG":
        return
    if scale := TRANSPARENT_COLOR_SCALES.get(str(file.tile[0][3])):
        scaled = [int(value * scale) for value in (color if isinstance(color, tuple) else (color,))]
        file.info["transparency"] = tuple(scaled) if isinstance(color, tuple) else scaled[0]


def _read_values(file: ImageFile.ImageFile, image: Image.Image) -> tuple[np.ndarray, float | None]:
    """Return values of more than 8 bits, (H, W) float32, and the white level; None = unknown.

    Args:
        file: The file, for its mode and tags.
        image: Its upright image.
    """
    values = np.asarray(image)
    tags = getattr(file, "tag_v2", {})
    is_unsigned = tags.get(Tag.SampleFormat, (1,)) == (1,)
    if file.mode == "I" and tags.get(Tag.BitsPerSample) == (32,) and is_unsigned:
        values = values.view(np.uint32)  # Pillow reads them as signed
    values = values.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
    if file.mode.startswith("I;16"):
        candidates = [2 ** tags.get(Tag.BitsPerSample, (16,))[0] - 1]
    elif file.mode == "F":
        is_integral = (finite == finite.round()).all()  # then 8 or 16 bits in a wider container
        candidates = [1, 255, 65535] if is_integral else [1]
    else:  # 32 bits of a TIFF, or the 16 bits of another format
        candidates = [255, 65535] if tags else [65535]
    white_level = next((value for value in candidates if low >= 0 and high <= value), None)
    if tags.get(Tag.PhotometricInterpretation) == 0:  # white is 0, which Pillow leaves as it is
        values = (white_level or 0) - values
    return values, white_level


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of 8 bits to RGB, or to RGBA if the image has transparency."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _apply_profile(image: Image.Image, rgb: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image with an ICC profile to sRGB; raises Pillow's errors.

    Args:
        image: The image in its stored mode.
        rgb: The image converted to RGB without the profile.
    """
    space, transform = _build_transform(profile)
    if space == "GRAY" and image.mode in ("1", "L", "LA"):
        rgb = image.convert("L")
    elif space == "CMYK" and image.mode == "CMYK":
        rgb = image
    elif space != "RGB " or image.mode == "CMYK":
        raise ValueError("a profile of another color space")
    return rgb.convert("RGB") if transform is None else transform.apply(rgb)


def _apply_gamma(rgb: Image.Image, gamma: float) -> Image.Image:
    """Convert to sRGB from values that are linear light to the power of `gamma`, PNG's gAMA."""
    if not 0 < gamma < 10 or abs(gamma / SRGB_GAMMA - 1) < 0.05:
        return rgb
    linear = (np.arange(256) / 255) ** (1 / gamma)
    # The transfer function of sRGB (IEC 61966-2-1).
    levels = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return rgb.point((levels * 255).round().astype(int).tolist() * 3)


@lru_cache(maxsize=16)
def _build_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the color space of a profile, and the transform to sRGB if it changes anything."""
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space = source.profile.xcolor_space
    mode = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}.get(space, "")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "CMYK":
        # Most profiles are sRGB under some name; converting would only change pixels by rounding.
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        probe = Image.fromarray(cube).convert(mode)
        change = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
        if np.asarray(change).max() <= 1:
            return space, None
    return space, transform
