"""Files: find those that ship, hash them, and write one whole or not at all."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from ldm.runtime.errors import MissingFile

__all__ = ["find_file", "replace_when_written", "sha256_of_file"]

PACKAGE = Path(__file__).resolve().parents[1]
BLOCK = 1 << 22  # bytes read at once


def find_file(path: str | Path) -> Path:
    """A file as given, or beneath the project root, or beneath the installed package.

    Raises:
        MissingFile: it is in none of these places; the message names them.
    """
    places = [Path(path).expanduser(), PACKAGE.parent / path, PACKAGE / path]
    for place in places:
        if place.is_file():
            return place
    tried = ", ".join(f"`{place}`" for place in dict.fromkeys(map(str, places)))
    raise MissingFile(f"no file `{path}` (tried {tried})")


def sha256_of_file(*paths: str | Path) -> str:
    """SHA-256 of the bytes of one file, or of several one after the other, in hexadecimal.

    A file that has not changed since is not read again.
    """
    files = tuple(Path(path).expanduser().resolve() for path in paths)
    stats = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _sha256(files, stats)


@contextmanager
def replace_when_written(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends without error.

    So nobody sees half a file, and a failure leaves what was there.

    Args:
        sync: wait until the file is on disk, so that it also survives a power failure.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        if sync:
            _sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if sync and os.name == "posix":
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@lru_cache(maxsize=64)
def _sha256(files: tuple[Path, ...], stats: tuple[tuple[int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
