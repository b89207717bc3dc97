"""SHA-256 of large files and folders, cached on disk by path, size and modification time.

The cache is in the folder $LDM_CACHE, else $XDG_CACHE_HOME/ldm, else `~/.cache/ldm`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.runtime.files import compute_sha256, write_atomically
from ldm.runtime.types import JsonObject

__all__ = [
    "JsonCache", "cache_sha256", "find_cached_sha256", "find_paths_by_sha256", "get_cache_folder",
    "get_sha256",
]  # fmt: skip

LARGE_FILE_BYTES = 50_000_000  # hashing larger files shows a progress bar, and is cached


def get_cache_folder() -> Path:
    """Return the folder of the cache; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LDM_CACHE") or f"{base}/ldm").expanduser()


class JsonCache:
    """A JSON object in a file of the cache folder.

    Errors of reading and writing are ignored: programs work without the cache.
    """

    def __init__(self, file_name: str) -> None:
        self.file_name = file_name

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
        return get_cache_folder() / self.file_name


# Paths on separate lines -> [*`_get_size_and_mtime`, SHA-256]
HASH_CACHE = JsonCache("hashes.json")


def get_sha256(*paths: str | Path) -> str:
    """Return the SHA-256 of a file, or of several concatenated.

    That of large files is read from the cache, or computed with a progress bar and cached.
    """
    if digest := find_cached_sha256(*paths):
        return digest
    size = sum(Path(path).expanduser().stat().st_size for path in paths)
    label = f"hashing {Path(paths[0]).name if len(paths) == 1 else f'{len(paths)} files'}"
    disable = None if size >= LARGE_FILE_BYTES else True  # None: shown on a terminal only
    with tqdm(total=size, unit="B", unit_scale=True, desc=label, disable=disable) as bar:
        digest = compute_sha256(*paths, progress=bar.update)
    if size >= LARGE_FILE_BYTES:
        cache_sha256(digest, *paths)
    return digest


def find_cached_sha256(*paths: str | Path) -> str | None:
    """Return the cached SHA-256 of files; None if it is not cached or a file has changed."""
    files = [Path(path).expanduser().absolute() for path in paths]
    entry = HASH_CACHE.read().get(_make_key(files))
    if not entry or not all(map(Path.is_file, files)) or entry[:2] != _get_size_and_mtime(files):
        return None
    return str(entry[2])


def find_paths_by_sha256(digest: str) -> list[Path]:
    """Return the paths of cached files with this hash that have not changed since."""
    paths = [path for path, entry in HASH_CACHE.read().items() if entry[2] == digest]
    return [Path(path) for path in paths if find_cached_sha256(path)]


def cache_sha256(digest: str, *paths: str | Path) -> None:
    """Cache the hash of files in their current state."""
    files = [Path(path).expanduser().absolute() for path in paths]
    HASH_CACHE.set(_make_key(files), [*_get_size_and_mtime(files), digest])


def _make_key(files: Sequence[Path]) -> str:
    return "\n".join(map(str, files))


def _get_size_and_mtime(files: Sequence[Path]) -> list[Any]:
    """Return [bytes, mtime in ns] of a file; of several files, [list of bytes, list of mtimes]."""
    stats = [file.stat() for file in files]
    sizes, times = [stat.st_size for stat in stats], [stat.st_mtime_ns for stat in stats]
    return [sizes[0], times[0]] if len(files) == 1 else [sizes, times]
