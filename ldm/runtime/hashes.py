"""SHA-256 of large files, cached on disk by path, size and modification time.

The cache is in `~/.cache/ldm` ($XDG_CACHE_HOME/ldm, or $LDM_CACHE).
"""

import json
import os
from pathlib import Path

from tqdm import tqdm

from ldm.runtime.files import replace_when_written, sha256_of_file
from ldm.runtime.types import JsonObject

__all__ = [
    "CachedDict", "cache_folder", "hash_file", "known_sha256", "paths_with_sha256",
    "remember_sha256",
]  # fmt: skip

LARGE = 50_000_000  # bytes from which hashing shows a progress bar, and is cached


def cache_folder() -> Path:
    """Return the folder of the cache; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LDM_CACHE") or f"{base}/ldm").expanduser()


class CachedDict:
    """A dict stored as JSON in the cache folder; errors of reading and writing are ignored."""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self) -> JsonObject:
        """Return all entries; {} if the file is missing or damaged."""
        try:
            content = json.loads(self._path().read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def set(self, key: str, value: object) -> None:
        """Add or replace an entry."""
        try:
            self._path().parent.mkdir(parents=True, exist_ok=True)
            with replace_when_written(self._path()) as part:
                part.write_text(json.dumps({**self.read(), key: value}, indent=1), "utf-8")
        except OSError:
            pass

    def _path(self) -> Path:
        return cache_folder() / self.name


HASHES = CachedDict("hashes.json")  # path -> [bytes, mtime in ns, SHA-256]


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file; for large ones from the cache, or with a progress bar."""
    path = Path(path).expanduser()
    if digest := known_sha256(path):
        return digest
    size = path.stat().st_size
    label, hidden = f"hashing {path.name}", None if size >= LARGE else True
    with tqdm(total=size, unit="B", unit_scale=True, desc=label, disable=hidden) as bar:
        digest = sha256_of_file(path, progress=bar.update)
    if size >= LARGE:
        remember_sha256(path, digest)
    return digest


def known_sha256(path: str | Path) -> str | None:
    """Return the cached SHA-256 of a file; None if there is none, or the file has changed."""
    path = Path(path).expanduser().absolute()
    entry = HASHES.read().get(str(path))
    return entry[2] if entry and path.is_file() and entry[:2] == _state(path) else None


def paths_with_sha256(digest: str) -> list[Path]:
    """List cached files with this hash that have not changed since."""
    paths = [path for path, entry in HASHES.read().items() if entry[2] == digest]
    return [Path(path) for path in paths if known_sha256(path)]


def remember_sha256(path: str | Path, digest: str) -> None:
    """Cache the hash of a file in its current state."""
    path = Path(path).expanduser().absolute()
    HASHES.set(str(path), [*_state(path), digest])


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
