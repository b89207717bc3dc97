"""Where batches come from: one endless numbered sequence, the same on any number of ranks.

    number      0    1    2    3    4    5   …
    rank        0    1    0    1    0    1          of 2 ranks, which read what one would have read

Batch `number` is a pure function of (seed, number, size), so nothing has to be saved to go on
exactly, here or on more or fewer ranks. A record that cannot be read is replaced by the next one,
and the batch names it under "broken".
"""

import itertools
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

__all__ = ["Broken", "Records", "Source", "Unreadable", "collate", "numbered"]

PATIENCE = 100  # records in a row that cannot be read before we give up


class Source(Protocol):
    """What a training run reads."""

    def batches(
        self, size: int, *, start: int = 0, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Batches start + rank, start + rank + world, … of the endless sequence.

        Tensors are stacked, everything else is a list ("jpg" or "z", "txt", …). workers: processes
        that read ahead, none = this one reads when it is asked.
        """

    def epoch(self, size: int) -> Fraction | None:
        """How many batches of a size are an epoch; None where nobody has counted the records."""

    def first(self, n: int) -> list[dict[str, Any]]:
        """n fixed samples with pictures ("jpg") of one size, for grids and statistics."""


class Unreadable(ValueError):
    """A record that cannot be read; `name` says which."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it can be pickled
        self.name = name

    def __str__(self) -> str:
        return str(self.args[1])


class Records:
    """A source of the records `dataset[epoch, index]`, each once in every epoch.

    dataset: has a length; if also `groups`, one number per record (the sizes of pictures), then
        every batch is of one group, and the last of a group in an epoch may be smaller.
    shown: the data set of pictures behind latents, for `first`.
    """

    def __init__(self, dataset: Any, seed: int = 0, *, shown: Any = None) -> None:
        self.dataset, self.seed = dataset, seed
        self.shown = dataset if shown is None else shown
        self._orders: dict[tuple[int, int], Any] = {}
        self._batches: dict[int, int] = {}  # in an epoch, by their size

    def batches(
        self, size: int, *, start: int = 0, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[dict[str, Any]]:
        return numbered(partial(self._read, size), start + rank, world, workers)

    def epoch(self, size: int) -> Fraction:
        groups = getattr(self.dataset, "groups", None)
        if groups is None:
            return Fraction(len(self.dataset), size)
        if size not in self._batches:
            counts = Counter(groups).values()
            self._batches[size] = sum(math.ceil(count / size) for count in counts)
        return Fraction(self._batches[size])

    def first(self, n: int) -> list[dict[str, Any]]:
        groups = getattr(self.shown, "groups", None)
        alike: Sequence[int] = range(len(self.shown))
        if groups is not None:
            most = Counter(groups).most_common(1)[0][0]
            alike = [index for index in alike if groups[index] == most]
        return [readable(self.shown, 0, alike[len(alike) * k // n], []) for k in range(n)]

    def keys(self, number: int, size: int) -> list[tuple[int, int]]:
        """(epoch, index) of the records of a batch."""
        groups = getattr(self.dataset, "groups", None)
        if groups is None:
            places = range(number * size, (number + 1) * size)
            epochs = [divmod(place, len(self.dataset)) for place in places]
            return [(epoch, int(self._order(epoch)[place])) for epoch, place in epochs]
        epoch, place = divmod(number, int(self.epoch(size)))
        order = self._order(epoch, size, partial(by_group, groups, size))
        return [(epoch, index) for index in order[place]]

    def _order(
        self, epoch: int, size: int = 0, arranged: Callable[[Tensor, int], Any] | None = None
    ) -> Any:
        """The permutation of an epoch, or the batches that are arranged of it; two are kept."""
        if (epoch, size) not in self._orders:
            seed = self.seed * 1_000_003 + epoch
            order = permutation(len(self.dataset), seed)
            self._orders[epoch, size] = arranged(order, seed) if arranged else order
            self._orders.pop((epoch - 2, size), None)
        return self._orders[epoch, size]

    def _read(self, size: int, first: int, step: int) -> Iterator[dict[str, Any]]:
        for number in itertools.count(first, step):
            broken: list[str] = []
            keys = self.keys(number, size)
            batch = collate([readable(self.dataset, *key, broken) for key in keys])
            yield {**batch, "broken": broken} if broken else batch


class Broken:
    """The files that could not be read, listed in the folder of a run, one line each.

    path: the list; every process may add to it.
    share: of the records seen that may be broken before the run stops.
    """

    def __init__(self, path: Path, share: float) -> None:
        self.path, self.share = path, share
        self.names: set[str] = set()  # that are listed, by whomever
        self.count = self.seen = 0

    def add(self, names: Sequence[str], seen: int) -> None:
        """Adds the names that are not listed yet.

            names: of one batch, from its "broken". seen: how many records that batch has.
        Raises ValueError if more than the share of at least 100 records was broken.
        """
        if not self.names.issuperset(names):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.names.update(self.path.read_text("utf-8").splitlines())
            new = [name for name in dict.fromkeys(names) if name not in self.names]
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{name}\n" for name in new)
            self.names.update(new)
        self.count, self.seen = self.count + len(names), self.seen + seen
        if self.seen >= 100 and self.count > self.share * self.seen:
            raise ValueError(
                f"{self.count} of {self.seen} records cannot be read, more than a share of"
                f" {self.share} (trainer.broken_share); they are listed in `{self.path}`"
            )


def permutation(length: int, seed: int) -> Tensor:
    """(length,) indices in an order of chance."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def by_group(groups: Sequence[int], size: int, order: Tensor, seed: int) -> list[list[int]]:
    """Batches of one group each, which together hold everything once, in an order of chance."""
    piles: dict[int, list[int]] = {}
    for index in order.tolist():
        piles.setdefault(groups[index], []).append(index)
    batches = [
        pile[start : start + size] for pile in piles.values() for start in range(0, len(pile), size)
    ]
    return [batches[place] for place in permutation(len(batches), seed).tolist()]


def readable(dataset: Any, epoch: int, index: int, broken: list[str]) -> dict[str, Any]:
    """The record, or the next one (of its group) that can be read; adds to the names of the broken.

    Raises ValueError if there is none among the next 100.
    """
    groups = getattr(dataset, "groups", None)
    following = itertools.chain(range(index, len(dataset)), range(index))
    alike = (other for other in following if groups is None or groups[other] == groups[index])
    for other in itertools.islice(alike, PATIENCE):
        try:
            sample: dict[str, Any] = dataset[epoch, other]
            return sample
        except Unreadable as error:
            broken.append(error.name)
            last = error
    raise ValueError(f"{len(broken)} records in a row cannot be read, the last: {last}")


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples with the same keys -> one batch; a sample within a sample becomes a batch as well."""
    joined: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key, values in joined.items():
        if isinstance(values[0], Tensor):
            joined[key] = torch.stack(values)
        elif isinstance(values[0], dict):
            joined[key] = collate(values)
    return joined


def numbered(
    read: Callable[[int, int], Iterator[dict[str, Any]]], first: int, step: int, workers: int
) -> Iterator[dict[str, Any]]:
    """What `read(first, step)` yields, read ahead by worker processes in the same order.

    read: (first, step) -> batches first, first + step, … without end; it is pickled.
    """
    if not workers:
        return read(first, step)
    loader: Any = DataLoader(
        _Share(read, first, step),
        batch_size=None,
        num_workers=workers,
        collate_fn=_same,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    return iter(loader)


class _Share(IterableDataset):
    """What one worker reads of the numbers that this process reads."""

    def __init__(
        self, read: Callable[[int, int], Iterator[dict[str, Any]]], first: int, step: int
    ) -> None:
        self.read, self.first, self.step = read, first, step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # are the run's; it ends its workers itself
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        worker: Any = get_worker_info()  # DataLoader takes from the workers in turn
        return self.read(self.first + worker.id * self.step, self.step * worker.num_workers)


def _same(batch: Any) -> Any:
    return batch
