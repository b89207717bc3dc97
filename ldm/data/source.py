"""Where batches come from: one endless numbered sequence, the same on any number of ranks.

    number      0    1    2    3    4    5   …
    rank        0    1    0    1    0    1          of 2 ranks, which read what one would have read

Batch `number` is a pure function of (seed, number, size), so nothing has to be saved to go on
exactly, here or on more or fewer ranks. A record that cannot be read is replaced by another, the
next if possible, and the batch names it under "broken".
"""

import atexit
import itertools
import math
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

__all__ = ["Broken", "Records", "Source", "Unreadable", "collate", "numbered"]

PATIENCE = 100  # records that are tried in the place of one before we give up
READING: Any = weakref.WeakSet()  # loaders whose worker processes live
ENOUGH = 1000  # records seen before their share is judged, if nobody knows how many there are


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

    def names(self) -> Counter[str]:
        """How many records have each name, the pictures of a class (`WithPrior`) included."""
        counts = Counter(map(self.shown.name, range(len(self.shown))))
        counts.update(getattr(self.dataset, "names_of_others", tuple)())
        return counts

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

    path: the list; every process adds to it, and learns from it what the others found.
    share: of all records that may be damaged before the run stops.
    source: what is read; None = nobody knows how many records there are.
    """

    def __init__(self, path: Path, share: float, source: Source | None = None) -> None:
        self.path, self.share, self.source = path, Fraction(str(share)), source
        epoch = None if source is None else source.epoch(1)
        self.number = None if epoch is None else int(epoch)  # of records
        # What an earlier start of the run listed may be mended by now: it counts when found again.
        self.before = self._listed()
        self.known: set[str] = set()  # found damaged since, by whomever
        self.times: Counter[str] | None = None  # how many records a name stands for, else one
        self.damaged = self.met = self.seen = 0  # known; that came here, among all that came

    def add(self, names: Sequence[str], seen: int) -> None:
        """Adds the names that are not listed yet.

            names: of one batch, from its "broken". seen: how many records that batch has.
        Raises ValueError if more than the share of all records is known to be damaged; where their
        number is not known, if so many of those seen here are that it can hardly be chance.
        """
        if not self.known.issuperset(names):
            self._exchange(names)
            self._count()
        self.met, self.seen = self.met + len(names), self.seen + seen
        if self.number is not None and self.damaged > self.share * self.number:
            raise self._too_many(f"{self.damaged} of {self.number} records")
        expected = float(self.share * self.seen)
        chance = 3 * math.sqrt(expected)  # standard deviations of a rare thing's count
        if self.number is None and self.seen >= ENOUGH and self.met > expected + chance:
            raise self._too_many(f"{self.met} of the {self.seen} records seen")

    def _too_many(self, what: str) -> ValueError:
        return ValueError(
            f"{what} cannot be read, more than a share of {float(self.share):g}"
            f" (trainer.broken_share); they are listed in `{self.path}`"
        )

    def _exchange(self, names: Sequence[str]) -> None:
        """Tells the others of names, and only then asks, so that one of them knows of all."""
        listed = self._listed()
        new = [name for name in dict.fromkeys(names) if name not in listed]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in new)
        self.known.update(names, self._listed() - self.before)

    def _listed(self) -> set[str]:
        if not self.path.exists():
            return set()
        text = self.path.read_text("utf-8", errors="surrogateescape")
        return set(text.split("\n")) - {""}

    def _count(self) -> None:
        """A file that is shown ten times in an epoch is ten records, and all are damaged."""
        if isinstance(self.source, Records) and self.times is None:
            self.times = self.source.names()
            self.number = self.times.total()
        times = self.times
        self.damaged = sum(1 if times is None else times[name] for name in self.known)


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
    """The record, or another one that can be read; adds to the names of the broken.

    Raises ValueError if none of those that are tried can be read.
    """
    tried = 0
    for other in substitutes(dataset, epoch, index):
        tried += 1
        try:
            sample: dict[str, Any] = dataset[epoch, other]
            return sample
        except Unreadable as error:
            broken.append(error.name)
            last = error
    raise ValueError(f"{tried} records in a row cannot be read, the last: {last}")


def substitutes(dataset: Any, epoch: int, index: int) -> Iterator[int]:
    """The record, those that follow, and others from anywhere: damaged ones are often neighbours.

    All are of its group; the greatest other one follows only if that has no more, so that records
    of a batch, which see the same groups damaged, still have one size.
    """
    groups, rng = getattr(dataset, "groups", None), Random(f"{epoch} {index}")
    following = itertools.chain(range(index, len(dataset)), range(index))
    alike = (other for other in following if groups is None or groups[other] == groups[index])
    yield from itertools.islice(alike, PATIENCE // 2)
    rest = list(alike)
    yield from rng.sample(rest, min(len(rest), PATIENCE // 2))
    if groups is not None and len(rest) <= PATIENCE // 2:
        counts = Counter(group for group in groups if group != groups[index])
        greatest = max(counts, key=lambda group: counts[group], default=None)
        rest = [other for other, group in enumerate(groups) if group == greatest]
        yield from rng.sample(rest, min(len(rest), PATIENCE))


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
    begun = iter(loader)
    READING.add(begun)
    return _read_ahead(begun)


def _read_ahead(loader: Any) -> Iterator[dict[str, Any]]:
    try:
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    finally:
        loader._shutdown_workers()


@atexit.register
def _end_workers() -> None:
    """They ignore the signal by which Python would end them, so it would wait for them forever."""
    for loader in list(READING):
        loader._shutdown_workers()


class _Share(IterableDataset):
    """What one worker reads of the numbers that this process reads."""

    def __init__(
        self, read: Callable[[int, int], Iterator[dict[str, Any]]], first: int, step: int
    ) -> None:
        self.read, self.first, self.step = read, first, step

    def __iter__(self) -> Iterator[dict[str, Any] | ValueError]:
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # are the run's; it ends its workers itself
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        worker: Any = get_worker_info()  # DataLoader takes from the workers in turn
        try:
            yield from self.read(self.first + worker.id * self.step, self.step * worker.num_workers)
        except ValueError as error:  # DataLoader would make pages of its one line
            yield ValueError(str(error))


def _same(batch: Any) -> Any:
    return batch
