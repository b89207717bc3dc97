"""Files that are given as images and are none."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def write_enormous(path):
    """The header of a PNG of 10^9 pixels."""
    header = struct.pack(">IIBBBBB", 40000, 25000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(b"")):
        size, crc = (struct.pack(">I", number) for number in (len(chunk) - 4, zlib.crc32(chunk)))
        content += size + chunk + crc
    path.write_bytes(content)


def write_cut(path):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])


REFUSED = {  # name: (what writes the file, message)
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><html>no</html>"), "a web page"),
    "text": (lambda path: path.write_text("hello"), "not an image"),
    "cut": (write_cut, "is damaged: "),
    "head": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "x.png` is "),
    "huge": (write_enormous, "more than 100000000 pixels"),
    "folder": (lambda path: path.mkdir(), "no image"),
    "absent": (lambda path: None, "no image"),
}
