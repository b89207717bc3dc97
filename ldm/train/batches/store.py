"""Tensors kept on disk under keys that say all they depend on, so that none is ever out of date.

    DIR/latents-3f2a….pt    {"keys": [key, …], "z": (n, C, h, w), …}    up to PER_FILE of one shape

A key is a digest of what a tensor was made of. Whoever changes that asks for another key; what has
not changed is found again. Files are written whole or not at all, so a filling that was interrupted
goes on where it stopped.
"""

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

__all__ = ["Store", "digest", "digest_of_weights"]

log = logging.getLogger(__name__)

PER_FILE = 256
WAITING = 4  # so many files' worth of all kinds may be lost when a filling is interrupted
T = TypeVar("T")
Pile = list[tuple[list[str], Mapping[str, Tensor]]]  # keys, and their rows by name


class Store:
    """What is kept in the files of a folder whose names begin with `prefix`.

    `store[key]` is a dict of tensors, read when it is asked for.
    """

    def __init__(self, folder: str | Path, prefix: str) -> None:
        self.folder, self.prefix = Path(folder), prefix
        self._files: dict[Path, dict[str, Any]] = {}  # their tensors stay on disk until used
        self._places: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob(f"{prefix}-*.pt")):
            self._enter(path)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        path, row = self._places[key]
        return {k: v[row] for k, v in self._files[path].items() if isinstance(v, Tensor)}

    def __reduce__(self) -> Any:
        return Store, (self.folder, self.prefix)  # another process maps the files itself

    @property
    def files(self) -> set[str]:
        """The names of all files."""
        return {path.name for path in self._files}

    def fill(
        self,
        wanted: Iterable[tuple[str, T]],
        make: Callable[[Sequence[T]], tuple[Sequence[int], Mapping[str, Tensor]]],
        *,
        batch: int = 32,
        kind: Callable[[T], Any] = lambda _: None,
        unit: str = "picture",
    ) -> int:
        """Makes and writes what lacks of `wanted`, pairs of a key and what it is made of.

            wanted: if it is no collection it is read once, and only what waits for a batch is kept.
            make: up to `batch` things of one kind -> the places of those that could be made, and
                tensors (n, …) by name, one row for each of these.
        Returns how many could not be made.
        """
        counted, failed = isinstance(wanted, Collection), 0
        total = len({key for key, _ in wanted if key not in self}) if counted else None
        if total == 0:
            return 0
        if counted:
            log.info("%d of `%s` to be made for `%s`", total, self.prefix, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        lacking = self._lacking(wanted)
        piles: dict[Any, Pile] = {}
        with tqdm(total=total, unit=unit, dynamic_ncols=True, mininterval=2,
                  disable=not counted) as bar:  # fmt: skip
            for some in _alike(lacking, batch, lambda item: kind(item[1])):
                places, made = make([thing for _, thing in some])
                failed += len(some) - len(places)
                pile = piles.setdefault(kind(some[0][1]), [])
                if places:
                    pile.append(([some[place][0] for place in places], made))
                if _length(pile) >= PER_FILE:
                    self._write(piles.pop(kind(some[0][1])))
                elif sum(map(_length, piles.values())) >= WAITING * PER_FILE:
                    self._write_all(piles)
                bar.update(len(some))
        self._write_all(piles)
        return failed

    def _lacking(self, wanted: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """What is not there yet, each key once."""
        asked = set[str]()
        for key, thing in wanted:
            if key not in self and key not in asked:
                asked.add(key)
                yield key, thing

    def _write_all(self, piles: dict[Any, Pile]) -> None:
        while piles:
            self._write(piles.pop(next(iter(piles))))

    def _write(self, pile: Pile) -> None:
        keys = [key for part, _ in pile for key in part]
        if not keys:
            return
        content: dict[str, Any] = {"keys": keys}
        for name in pile[0][1]:
            content[name] = torch.cat([made[name].cpu() for _, made in pile])
        path = self.folder / f"{self.prefix}-{digest(keys)[:16]}.pt"
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        self._enter(path)

    def _enter(self, path: Path) -> None:
        try:
            content = torch.load(path, weights_only=True, mmap=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            log.warning("`%s` is damaged and will be made anew: %s", path, error)
            return
        if "keys" in content:  # older versions wrote other files
            self._files[path] = content
            self._places |= {key: (path, row) for row, key in enumerate(content["keys"])}


def _length(pile: Pile) -> int:
    return sum(len(keys) for keys, _ in pile)


def _alike(things: Iterable[T], size: int, kind: Callable[[T], Any]) -> Iterator[list[T]]:
    """Batches of one kind each, as soon as they are complete; incomplete ones at the end."""
    waiting: dict[Any, list[T]] = {}
    for thing in things:
        some = waiting.setdefault(kind(thing), [])
        some.append(thing)
        if len(some) == size:
            yield waiting.pop(kind(thing))
    yield from waiting.values()


def digest(*facts: Any) -> str:
    """A name for some facts: bytes, or whatever has a JSON form or an exact `repr`."""
    total = hashlib.sha256()
    for fact in facts:
        data = fact if isinstance(fact, bytes) else json.dumps(fact, default=repr).encode()
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()


def digest_of_weights(*modules: nn.Module) -> str:
    """A name for the weights of modules, whatever device they are on."""
    total = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            total.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return total.hexdigest()
