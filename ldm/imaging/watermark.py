"""Embed and read invisible watermarks, compatible with the package invisible-watermark.

The bits of the payload are repeated over the 4 x 4 blocks of an image's U plane (of YUV) at half
resolution. Each block carries a bit in one number, which is quantized to a quarter (0) or three
quarters (1) of a step of 36: its largest coefficient after the first (`dwtDct`), or its largest
singular value (`dwtDctSvd`).

`dwtDct`, used by the Stable Diffusion scripts, is reproduced pixel for pixel with its defects: it
swaps two detail bands, truncates fractions, and rarely survives JPEG or flat colors. Our
`dwtDctSvd` changes nothing else, so it is 1 to 12 dB less visible than the package's, which can
read it. No DCT is needed: `dwtDct` has none, and an orthogonal transform does not change singular
values.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

import numpy as np
from PIL import Image

from ldm.runtime.errors import ArgumentError, make_unknown_name_error

__all__ = [
    "METHODS", "PAYLOADS", "Finding", "Method", "can_hold_watermark", "detect_watermarks",
    "embed_floats", "embed_or_warn", "embed_watermark", "measure_agreement", "read_bits",
]  # fmt: skip

log = logging.getLogger(__name__)

Method = Literal["dwtDctSvd", "dwtDct"]
METHODS: tuple[Method, ...] = ("dwtDctSvd", "dwtDct")
PAYLOADS = {
    "SDV2": b"SDV2",  # Stable Diffusion 2 scripts and demos
    "StableDiffusionV1": b"StableDiffusionV1",  # Stable Diffusion 1 scripts
    "SDXL": bytes.fromhex("B3EC907BB19E"),  # generative-models and diffusers
}
MIN_PIXELS = 256 * 256  # width x height; the package refuses smaller images
QUANTIZATION_STEP = 36.0
SQRT_HALF = 0.7071067811865476  # the taps of the Haar wavelet
SIGNIFICANCE = 1e-6  # p-value of random bits below which a damaged payload counts as present
# 8-bit YUV as in OpenCV: fixed point with 14 fractional bits, rounded, saturated.
SHIFT, ROUND, CENTER = 14, 1 << 13, 128 << 14


@dataclass(frozen=True)
class Finding:
    """The result of looking for a payload, written by a method, in an image.

    Attributes:
        payload: Name in PAYLOADS.
        method: A name in METHODS.
        agreement: Fraction of the payload's bits that are correct by a majority of their blocks.
        votes: Fraction of all blocks that carry the correct bit.
        verdict: `found` (all bits), `damaged` (more bits than by chance) or `absent`.
    """

    payload: str
    method: Method
    agreement: float
    votes: float
    verdict: Literal["found", "damaged", "absent"]


def embed_watermark(
    image: Image.Image, payload: bytes | Sequence[int], method: Method = "dwtDctSvd"
) -> Image.Image:
    """Embed a payload in a copy of the image.

    Args:
        image: RGB, at least 256 * 256 pixels.
        payload: Bytes, highest bit first, or bits.
    """
    _check_image(image, method)
    if image.mode != "RGB":
        raise ArgumentError(f"image has mode `{image.mode}`, a watermark needs `RGB`")
    write_bits = _write_dwt_dct if method == "dwtDct" else _write_dwt_dct_svd
    return Image.fromarray(write_bits(np.asarray(image), _to_bits(payload)))


def embed_floats(rgb: np.ndarray, payload: bytes | Sequence[int]) -> np.ndarray:
    """Embed `dwtDct` into float pixels, as SDXL's demo does; rounding them destroys some bits.

    U and V of floats have an offset of 0.5 and are not clipped, as in OpenCV.

    Args:
        rgb: (H, W, 3) float32, 0 … 255.
    """
    r, g, b = (rgb[..., k].astype(np.float32) for k in range(3))
    y = _fma(b, 0.114, _fma(g, 0.587, r * np.float32(0.299)))
    u, v = _fma(b - y, 0.492, np.float32(0.5)), _fma(r - y, 0.877, np.float32(0.5))
    _write_largest(u, _to_bits(payload))
    u, v = u - np.float32(0.5), v - np.float32(0.5)
    green = _fma(v, -0.581, _fma(u, -0.395, y))
    return np.stack([_fma(v, 1.140, y), green, _fma(u, 2.032, y)], -1)


def embed_or_warn(
    image: Image.Image, payload: bytes | Sequence[int], method: Method = "dwtDctSvd"
) -> Image.Image:
    """Embed a payload; log a warning if the image is too small or it cannot be read back."""
    if not can_hold_watermark(image.size):
        log.warning("%dx%d is too small for a watermark, saved without", *image.size)
        return image
    watermarked = embed_watermark(image, payload, method)
    if measure_agreement(watermarked, payload, method) < 1:
        log.warning("the %s watermark cannot be read back from this image", method)
    return watermarked


def can_hold_watermark(size: tuple[int, int]) -> bool:
    """Return whether an image of this size (width, height) is large enough for a watermark."""
    width, height = size
    return width * height >= MIN_PIXELS and min(width, height) >= 8


def read_bits(image: Image.Image, length: int, method: Method = "dwtDctSvd") -> np.ndarray:
    """Read a payload of `length` bits; without a watermark they are random.

    Returns:
        (length,) uint8 of 0 and 1; `numpy.packbits` converts them to bytes.
    """
    return _decode_majority(_read_votes(image, method), length)


def measure_agreement(
    image: Image.Image, payload: bytes | Sequence[int], method: Method = "dwtDctSvd"
) -> float:
    """Return the fraction of the payload's bits found in an image; about 0.5 without watermark."""
    bits = _to_bits(payload)
    return float((read_bits(image, len(bits), method) == bits).mean())


def detect_watermarks(image: Image.Image) -> list[Finding]:
    """Look for all payloads of all methods, best match first; [] for images that are too small."""
    findings = []
    for method in METHODS if can_hold_watermark(image.size) else ():
        votes = _read_votes(image, method)
        for name, payload in PAYLOADS.items():
            bits = _to_bits(payload)
            correct = int((_decode_majority(votes, len(bits)) == bits).sum())
            correct_votes = float((votes == np.resize(bits, votes.shape)).mean())
            verdict = _decide_verdict(correct, len(bits))
            findings.append(Finding(name, method, correct / len(bits), correct_votes, verdict))
    return sorted(
        findings,
        key=lambda finding: (finding.verdict != "absent", finding.agreement, finding.votes),
        reverse=True,
    )


def _decide_verdict(correct: int, length: int) -> Literal["found", "damaged", "absent"]:
    """Return the verdict for a number of correct bits of a payload of this length."""
    if correct == length:
        return "found"
    # Probability that as many of `length` random bits are correct.
    p_value = sum(comb(length, k) for k in range(correct, length + 1)) / 2**length
    return "damaged" if p_value < SIGNIFICANCE else "absent"


def _read_votes(image: Image.Image, method: Method) -> np.ndarray:
    """Return the bit that each block carries, (num_blocks,) bool."""
    _check_image(image, method)
    rgb = np.asarray(image.convert("RGB"))
    blocks = _split_blocks(_apply_haar(_crop_to_blocks(rgb_to_yuv(rgb)[1]))[0])  # (n, 4, 4)
    if method == "dwtDct":
        carriers = blocks.reshape(len(blocks), 16)[:, 1:].max(1)
    else:
        carriers = np.linalg.svd(blocks, compute_uv=False)[:, 0]
    return np.asarray(carriers % QUANTIZATION_STEP > QUANTIZATION_STEP / 2)


def _decode_majority(votes: np.ndarray, length: int) -> np.ndarray:
    """Return the majority of the blocks for each bit; a tie is 1, as in the package."""
    index = np.arange(len(votes)) % length
    ones = np.bincount(index, votes, length)
    return (2 * ones >= np.bincount(index, minlength=length)).astype(np.uint8)


def _write_dwt_dct(rgb: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Write `dwtDct` with the same floating-point operations as the package."""
    y, u, v = rgb_to_yuv(rgb)
    _write_largest(u, bits)
    return yuv_to_rgb(y, u, v)


def _write_largest(u: np.ndarray, bits: np.ndarray) -> None:
    """Write bits into the largest coefficient of each block of a U plane, in place."""
    plane = _crop_to_blocks(u)
    low, rows, columns, diagonal = _apply_haar(plane)
    blocks = _split_blocks(low)
    coefficients = blocks.reshape(len(blocks), 16)
    block_indices = np.arange(len(coefficients))
    largest = np.abs(coefficients[:, 1:]).argmax(1) + 1
    values = coefficients[block_indices, largest]
    coefficients[block_indices, largest] = np.copysign(_quantize(np.abs(values), bits), values)
    _write_blocks(low, coefficients.reshape(blocks.shape))
    # The package's defects: rows and columns are swapped, and fractions are cut off in uint8.
    plane[:] = _invert_haar(low, columns, rows, diagonal)


def _fma(a: np.ndarray, factor: float, b: np.ndarray | np.float32) -> np.ndarray:
    """Compute a * factor + b in float32 with a single rounding, as OpenCV does."""
    product = a.astype(np.float64) * float(np.float32(factor))
    return np.asarray((product + b).astype(np.float32))


def _write_dwt_dct_svd(rgb: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Write `dwtDctSvd`: change only U, by adding to blue and green so that Y and V stay."""
    low = _apply_haar(_crop_to_blocks(rgb_to_yuv(rgb)[1]))[0]
    blocks = _split_blocks(low)
    left, values, right = np.linalg.svd(blocks)
    change = _quantize(values[:, 0], bits) - values[:, 0]
    delta = np.zeros_like(low)
    _write_blocks(delta, change[:, None, None] * left[:, :, :1] * right[:, :1, :])
    delta = (delta / 2).repeat(2, 0).repeat(2, 1)[..., None]  # the inverse Haar transform
    out: np.ndarray = rgb.copy()
    area = out[: delta.shape[0], : delta.shape[1]]
    # The factors of U in green and blue, see `yuv_to_rgb`.
    area[:] = np.rint(area + delta * (0, -6472 / 2**SHIFT, 33292 / 2**SHIFT)).clip(0, 255)
    return out


def _quantize(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Move each value to a quarter (bit 0) or three quarters (bit 1) of its quantization step."""
    offsets = 0.25 + 0.5 * np.resize(bits, values.shape)
    return np.asarray((values // QUANTIZATION_STEP + offsets) * QUANTIZATION_STEP)


def _crop_to_blocks(plane: np.ndarray) -> np.ndarray:
    """Return a view whose sides are multiples of 4."""
    return plane[: plane.shape[0] // 4 * 4, : plane.shape[1] // 4 * 4]


def _split_blocks(band: np.ndarray) -> np.ndarray:
    """Return the complete 4 x 4 blocks of a band in raster order: (h, w) -> (n, 4, 4)."""
    h, w = band.shape[0] // 4, band.shape[1] // 4
    blocks: np.ndarray = band[: h * 4, : w * 4].reshape(h, 4, w, 4).swapaxes(1, 2)
    return blocks.reshape(h * w, 4, 4)


def _write_blocks(band: np.ndarray, blocks: np.ndarray) -> None:
    """Write the blocks of `_split_blocks` into a band, in place."""
    h, w = band.shape[0] // 4, band.shape[1] // 4
    band[: h * 4, : w * 4] = blocks.reshape(h, w, 4, 4).swapaxes(1, 2).reshape(h * 4, w * 4)


def _apply_haar(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the low band, and details along rows, columns and the diagonal, of a Haar transform.

    The order of sums is PyWavelets', because `dwtDct` truncates fractions in the end.
    """
    scaled = plane * SQRT_HALF
    mean = (scaled[0::2] + scaled[1::2]) * SQRT_HALF
    detail = (scaled[0::2] - scaled[1::2]) * SQRT_HALF
    low, columns = mean[:, 0::2] + mean[:, 1::2], mean[:, 0::2] - mean[:, 1::2]
    rows, diagonal = detail[:, 0::2] + detail[:, 1::2], detail[:, 0::2] - detail[:, 1::2]
    return low, rows, columns, diagonal


def _invert_haar(
    low: np.ndarray, rows: np.ndarray, columns: np.ndarray, diagonal: np.ndarray
) -> np.ndarray:
    mean = _interleave(low, columns, 2).reshape(len(low), -1)
    detail = _interleave(rows, diagonal, 2).reshape(len(rows), -1)
    return _interleave(mean, detail, 1).reshape(-1, mean.shape[1])


def _interleave(mean: np.ndarray, detail: np.ndarray, axis: int) -> np.ndarray:
    mean, detail = mean * SQRT_HALF, detail * SQRT_HALF
    return np.stack([mean + detail, mean - detail], axis)


def rgb_to_yuv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Convert (H, W, 3) uint8 to Y, U and V, (H, W) uint8 each, as OpenCV's RGB2YUV."""
    r, g, b = (rgb[..., k].astype(np.int32) for k in range(3))
    # 0.299, 0.587, 0.114, then 0.492 and 0.877, in units of 2 ** -14
    y = (4899 * r + 9617 * g + 1868 * b + ROUND) >> SHIFT
    u = (8061 * (b - y) + CENTER + ROUND) >> SHIFT
    v = (14369 * (r - y) + CENTER + ROUND) >> SHIFT
    return _saturate(y), _saturate(u), _saturate(v)


def yuv_to_rgb(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Convert Y, U and V to (H, W, 3) uint8, as OpenCV's YUV2RGB."""
    y, u, v = y.astype(np.int32), u.astype(np.int32) - 128, v.astype(np.int32) - 128
    # 1.140, -0.395, -0.581 and 2.032, in units of 2 ** -14
    r = y + ((18678 * v + ROUND) >> SHIFT)
    g = y + ((-6472 * u - 9519 * v + ROUND) >> SHIFT)
    b = y + ((33292 * u + ROUND) >> SHIFT)
    return _saturate(np.stack([r, g, b], -1))


def _saturate(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


def _to_bits(payload: bytes | Sequence[int]) -> np.ndarray:
    if isinstance(payload, bytes):
        bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    else:
        bits = np.asarray(payload)
    if bits.ndim != 1 or not len(bits) or not np.isin(bits, (0, 1)).all():
        raise ArgumentError("a watermark's payload must be bytes or a list of bits, not empty")
    return bits.astype(np.uint8)


def _check_image(image: Image.Image, method: Method) -> None:
    if not can_hold_watermark(image.size):
        size = f"{image.width}x{image.height}"
        raise ArgumentError(f"image too small for a watermark: {size}, needs 256x256 pixels")
    if method not in METHODS:
        raise make_unknown_name_error("watermark", method, METHODS)
