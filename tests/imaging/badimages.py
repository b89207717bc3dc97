"""Files that are given as images and cannot be read as images."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def make_png(width, height, bits, color_type, rows, *chunks):
    """Make the bytes of a PNG file; `rows` are its scanlines, each after a filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    for chunk_type, data in chunks:
        crc = zlib.crc32(chunk_type + data)
        png += struct.pack(">I", len(data)) + chunk_type + data + struct.pack(">I", crc)
    return png


def write_truncated(path):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])


HUGE_PNG = make_png(40000, 25000, 8, 2, b"")  # 10^9 pixels
# Planar, 16 bits per sample, which Pillow would read as 8 bits.
PLANAR_TIFF = struct.pack(
    "<2sHIH" + "HHII" * 10 + "I" + "3H3I3I3H",
    b"II", 42, 8, 10,
    *(256, 4, 1, 1, 257, 4, 1, 1, 258, 3, 3, 134, 259, 4, 1, 1, 262, 4, 1, 2, 273, 4, 3, 140),
    *(277, 4, 1, 3, 278, 4, 1, 1, 279, 4, 3, 152, 284, 4, 1, 2),
    0,
    *(16, 16, 16), *(164, 166, 168), *(2, 2, 2), *(65535, 0, 0),  # from offset 134 on
)  # fmt: skip
# By name: function that writes the file, and the message about it.
UNREADABLE_FILES = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><html>no</html>"), "a web page"),
    "heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic"), "is a HEIC image: convert it"),
    "pointer": (lambda path: path.write_text("version https://git-lfs"), "is a Git LFS pointer"),
    "planes": (
        lambda path: path.write_bytes(PLANAR_TIFF),
        "is an unsupported variant of TIFF: convert it",
    ),
    "text": (lambda path: path.write_text("hello"), "not an image"),
    "cut": (write_truncated, "is damaged: "),
    "head": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "x.png` is "),
    "huge": (lambda path: path.write_bytes(HUGE_PNG), "more than 100000000 pixels"),
    "folder": (lambda path: path.mkdir(), "no image"),
    "absent": (lambda path: None, "no image"),
}
