"""Tensors cached on disk, under keys that are digests of everything they depend on.

    DIR/latents-3f2a….pt    {"keys": [key, …], "z": (n, C, h, w), …}

with up to ENTRIES_PER_FILE entries of the same shapes.

Entries are never stale, as any change gives another key. Files are written atomically, and an
interrupted `fill` continues where it stopped.
"""

import hashlib
import json
import logging
import pickle
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.data.shards import Shards
from ldm.runtime.files import disk_errors_about, write_atomically

__all__ = ["TensorStore", "digest", "digest_weights", "fill_from_shards"]

log = logging.getLogger(__name__)

ENTRIES_PER_FILE = 256
MAX_PENDING_FILES = 4  # of unwritten entries, which an interruption would lose
T = TypeVar("T")
Entry = dict[str, Tensor]  # tensors by name


class TensorStore:
    """Dicts of tensors by key, in the files PREFIX-*.pt of a folder."""

    def __init__(self, folder: str | Path, prefix: str) -> None:
        self.folder = Path(folder)
        self.prefix = prefix
        self._files: dict[Path, dict[str, Tensor]] = {}  # memory-mapped
        self._entries: dict[str, tuple[Path, int]] = {}  # key -> (file, index in its tensors)
        for path in sorted(self.folder.glob(f"{prefix}-*.pt")):
            self._open(path)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, key: str) -> Entry:
        path, index = self._entries[key]
        return {name: values[index] for name, values in self._files[path].items()}

    def __reduce__(self) -> tuple[type["TensorStore"], tuple[Path, str]]:
        return TensorStore, (self.folder, self.prefix)  # other processes map the files themselves

    @property
    def files(self) -> set[str]:
        """Names of all files."""
        return {path.name for path in self._files}

    def fill(
        self,
        items: Iterable[tuple[str, T]],
        compute: Callable[[Sequence[T]], Iterable[Entry | None]],
        *,
        batch_size: int = 32,
        group: Callable[[T], Hashable] = lambda _: None,
        unit: str = "image",
    ) -> int:
        """Compute and write the missing entries; return the number that could not be computed.

        Args:
            items: Pairs of key and input. Of an iterator, only incomplete batches are in memory.
            compute: Up to `batch_size` inputs of one group -> the entry of each, None for one that
                cannot be computed.
            group: Input -> group; entries of a group have the same shapes.
            unit: Unit of the progress bar.
        """
        has_length = isinstance(items, Collection)
        total = len({key for key, _ in items if key not in self}) if has_length else None
        if total == 0:
            return 0
        if has_length:
            log.info("computing %d %s for `%s`", total, self.prefix, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        num_failed = 0
        pending: dict[Hashable, list[tuple[str, Entry]]] = {}  # not written yet, by group
        with tqdm(
            total=total, unit=unit, dynamic_ncols=True, mininterval=2, disable=not has_length
        ) as bar:
            missing = self._select_missing(items)
            for batch in _group_batches(missing, batch_size, lambda item: group(item[1])):
                inputs = [value for _, value in batch]
                batch_group = group(inputs[0])
                entries = pending.setdefault(batch_group, [])
                for (key, _), entry in zip(batch, compute(inputs), strict=True):
                    if entry is None:
                        num_failed += 1
                    else:
                        entries.append((key, entry))
                if len(entries) >= ENTRIES_PER_FILE:
                    self._write(pending.pop(batch_group))
                elif sum(map(len, pending.values())) >= MAX_PENDING_FILES * ENTRIES_PER_FILE:
                    self._write_all(pending)
                bar.update(len(batch))
        self._write_all(pending)
        return num_failed

    def _select_missing(self, items: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Yield items without an entry, each key once."""
        keys = set[str]()
        for key, value in items:
            if key not in self and key not in keys:
                keys.add(key)
                yield key, value

    def _write_all(self, pending: dict[Hashable, list[tuple[str, Entry]]]) -> None:
        while pending:
            self._write(pending.popitem()[1])

    def _write(self, entries: Sequence[tuple[str, Entry]]) -> None:
        if not entries:  # all of a group have failed
            return
        keys = [key for key, _ in entries]
        _, first_entry = entries[0]
        tensors = {n: torch.stack([entry[n] for _, entry in entries]) for n in first_entry}
        path = self.folder / f"{self.prefix}-{digest(keys)[:16]}.pt"
        with write_atomically(path, sync=True) as temporary, temporary.open("wb") as file:
            torch.save({"keys": keys, **tensors}, file)
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            content = torch.load(path, weights_only=True, mmap=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            log.warning("`%s` is damaged, its entries are computed again: %s", path, error)
            return
        if "keys" in content:  # files of older versions have none
            self._files[path] = {k: v for k, v in content.items() if isinstance(v, Tensor)}
            self._entries |= {key: (path, k) for k, key in enumerate(content["keys"])}


def fill_from_shards(
    store: TensorStore, shards: Shards, dependencies: Sequence[object], fill: Callable[[], int]
) -> None:
    """Fill a store from shards, unless that was done for the same shards and dependencies.

    Args:
        dependencies: Everything but the shards that entries depend on.
        fill: Reads the shards; returns the number of entries that could not be computed.
    """
    stats = [(url, _stat_file(url)) for url in shards.urls]
    fill_digest = digest(*dependencies, sorted(shards.limits.items()), stats)
    path = store.folder / f"shards-{fill_digest[:16]}.json"
    summary = None
    if all(stat is not None for _, stat in stats):
        summary = _read_summary(path, store.files)
    if summary is None:
        log.info("reading %d shards for their %s", len(shards.urls), store.prefix)
        summary = {"damaged": fill(), "files": sorted(store.files)}
        with disk_errors_about(path):
            path.write_text(json.dumps(summary), "utf-8")
    if summary["damaged"]:
        message = "%d %s could not be computed; delete `%s` to try again"
        log.warning(message, summary["damaged"], store.prefix, path)


def _stat_file(url: str) -> tuple[int, ...] | None:
    """Return size and times of a file; None for a remote one, whose changes are not detected."""
    if not Path(url).is_file():
        return None
    status = Path(url).stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_summary(path: Path, files: set[str]) -> dict[str, Any] | None:
    """Read the summary of an earlier fill; None if a cache file of that time is missing."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return summary if files.issuperset(summary["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _group_batches(
    items: Iterable[T], batch_size: int, group: Callable[[T], Hashable]
) -> Iterator[list[T]]:
    """Yield batches of one group each when they are full, and incomplete ones at the end."""
    incomplete: dict[Hashable, list[T]] = {}
    for item in items:
        batch = incomplete.setdefault(group(item), [])
        batch.append(item)
        if len(batch) == batch_size:
            yield incomplete.pop(group(item))
    yield from incomplete.values()


def digest(*values: Any) -> str:
    """Return the SHA-256 of values: bytes, or values with a JSON form or an exact `repr`."""
    sha256 = hashlib.sha256()
    for value in values:
        data = value if isinstance(value, bytes) else json.dumps(value, default=repr).encode()
        sha256.update(hashlib.sha256(data).digest())
    return sha256.hexdigest()


def digest_weights(*modules: nn.Module) -> str:
    """Return the SHA-256 of the weights of modules, the same on every device."""
    sha256 = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            sha256.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            sha256.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return sha256.hexdigest()
