"""Files that are given as pictures and are none."""

import struct
import zlib

import numpy as np
from PIL import Image


def enormous(path):
    """The header of a PNG of 10^9 pixels."""
    header = struct.pack(">IIBBBBB", 40000, 25000, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in chunks:
        size, crc = (struct.pack(">I", number) for number in (len(chunk) - 4, zlib.crc32(chunk)))
        content += size + chunk + crc
    path.write_bytes(content)


def damaged(path, share):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".whole.png"))
    content = path.with_suffix(".whole.png").read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


REFUSED = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><html>no</html>"), "a web page"),
    "text": (lambda path: path.write_text("hello"), "not a picture"),
    "cut": (lambda path: damaged(path, 0.5), "is damaged: "),
    "head": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "x.png` is "),
    "huge": (enormous, "more than 100000000 pixels"),
    "folder": (lambda path: path.mkdir(), "no picture"),
    "absent": (lambda path: None, "no picture"),
}
