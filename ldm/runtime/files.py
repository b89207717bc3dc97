"""Files: find those that ship, read text, hash, and write a file whole or not at all."""

import codecs
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path

from ldm.runtime.errors import FileFormatError, MissingFile

__all__ = [
    "decode_text",
    "find_file",
    "flush_to_disk",
    "read_text",
    "replace_when_written",
    "sha256_of_file",
]

PACKAGE = Path(__file__).resolve().parents[1]
BLOCK = 1 << 22  # bytes read at once


def find_file(path: str | Path) -> Path:
    """Find a file as given, or beneath the project root, or beneath the installed package.

    Raises:
        MissingFile: it is in none of these places; the message names them.
    """
    places = [Path(path).expanduser(), PACKAGE.parent / path, PACKAGE / path]
    for place in places:
        if place.is_file():
            return place
    tried = ", ".join(f"`{place}`" for place in dict.fromkeys(map(str, places)))
    raise MissingFile(f"no file `{path}` (tried {tried})")


def read_text(path: str | Path) -> str:
    """Read a text of the user's: UTF-8 with or without byte order marks, or UTF-16 with one.

    Raises:
        FileFormatError: it is neither; the message has file and line.
    """
    return decode_text(Path(path).expanduser().read_bytes(), path)


def decode_text(content: bytes, name: str | Path) -> str:
    """Decode the bytes of a text; encodings and errors as `read_text`.

    Args:
        name: of its file, for messages.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    try:
        text = content.decode(encoding)
        wrong = text.find("\0")  # UTF-16 without a mark is valid UTF-8, but full of zeros
    except UnicodeDecodeError as error:
        text = error.object[: error.start].decode(encoding)
        wrong = len(text)
    if wrong < 0:
        return io.StringIO(text.replace("\ufeff", ""), newline=None).read()
    line = text.count("\n", 0, wrong) + 1
    message = "neither UTF-8 nor UTF-16 with a byte order mark: save it as UTF-8"
    raise FileFormatError(f"{name}:{line}: {message}")


def sha256_of_file(*paths: str | Path, progress: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of one file, or of several one after the other, in hexadecimal.

    A file that has not changed since is not read again. `progress` is called with the bytes read.
    """
    files = tuple(Path(path).expanduser().resolve() for path in paths)
    stats = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _sha256(files, stats, progress)


@contextmanager
def replace_when_written(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path, which takes the place of `path` when the block ends without error.

    So nobody sees half a file, and a failure leaves what was there.

    Args:
        sync: wait until the file is on disk, so that it also survives a power failure.
    """
    path = Path(path)
    # In the same folder, as renaming replaces at once within one file system only.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        if sync:
            flush_to_disk(part)
        try:
            part.replace(path)
        except (PermissionError, FileExistsError):  # Windows, while a program has the old one open
            old = path.with_name(f".{path.name}.old")
            with suppress(OSError):
                old.unlink(missing_ok=True)
            path.replace(old)
            part.replace(path)
            with suppress(OSError):
                old.unlink()
    finally:
        part.unlink(missing_ok=True)
    if sync:
        flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder where these can be flushed, are on disk."""
    is_folder = path.is_dir()
    with suppress(OSError) if is_folder else nullcontext():  # Windows opens no folder
        # Windows flushes only what is open for writing.
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@lru_cache(maxsize=64)
def _sha256(
    files: tuple[Path, ...],
    stats: tuple[tuple[int, int], ...],
    progress: Callable[[int], object] | None,
) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                if progress is not None:
                    progress(len(block))
    return digest.hexdigest()
