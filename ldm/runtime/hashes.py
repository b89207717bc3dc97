"""SHA-256 of large files, cached on disk by path, size and modification time.

The cache is in the folder $LDM_CACHE, else $XDG_CACHE_HOME/ldm, else `~/.cache/ldm`.
"""

import json
import os
from pathlib import Path

from tqdm import tqdm

from ldm.runtime.files import compute_sha256, write_atomically
from ldm.runtime.types import JsonObject

__all__ = [
    "JsonCache",
    "cache_sha256",
    "find_cached_sha256",
    "find_paths_by_sha256",
    "get_cache_folder",
    "get_sha256",
]

LARGE_FILE_BYTES = 50_000_000  # hashing larger files shows a progress bar, and is cached


def get_cache_folder() -> Path:
    """Return the folder of the cache; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LDM_CACHE") or f"{base}/ldm").expanduser()


class JsonCache:
    """A JSON object in a file of the cache folder.

    Errors of reading and writing are ignored: programs work without the cache.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self) -> JsonObject:
        """Return all entries; {} if the file is missing or damaged."""
        try:
            content = json.loads(self._get_path().read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def set(self, key: str, value: object) -> None:
        """Add or replace an entry."""
        try:
            self._get_path().parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(self._get_path()) as temporary:
                temporary.write_text(json.dumps({**self.read(), key: value}, indent=1), "utf-8")
        except OSError:
            pass

    def _get_path(self) -> Path:
        return get_cache_folder() / self.name


HASHES = JsonCache("hashes.json")  # path -> [bytes, mtime in ns, SHA-256]


def get_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file; for large ones from the cache, or with a progress bar."""
    path = Path(path).expanduser()
    if digest := find_cached_sha256(path):
        return digest
    size = path.stat().st_size
    label = f"hashing {path.name}"
    disable = None if size >= LARGE_FILE_BYTES else True  # None: shown on a terminal only
    with tqdm(total=size, unit="B", unit_scale=True, desc=label, disable=disable) as bar:
        digest = compute_sha256(path, progress=bar.update)
    if size >= LARGE_FILE_BYTES:
        cache_sha256(path, digest)
    return digest


def find_cached_sha256(path: str | Path) -> str | None:
    """Return the cached SHA-256 of a file; None if it is not cached, or the file has changed."""
    path = Path(path).expanduser().absolute()
    entry = HASHES.read().get(str(path))
    return entry[2] if entry and path.is_file() and entry[:2] == _get_size_and_mtime(path) else None


def find_paths_by_sha256(digest: str) -> list[Path]:
    """Return the paths of cached files with this hash that have not changed since."""
    paths = [path for path, entry in HASHES.read().items() if entry[2] == digest]
    return [Path(path) for path in paths if find_cached_sha256(path)]


def cache_sha256(path: str | Path, digest: str) -> None:
    """Cache the hash of a file in its current state."""
    path = Path(path).expanduser().absolute()
    HASHES.set(str(path), [*_get_size_and_mtime(path), digest])


def _get_size_and_mtime(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
