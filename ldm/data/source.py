"""Where batches come from: one endless numbered sequence, the same on any number of ranks.

    number      0    1    2    3    4    5   …
    rank        0    1    0    1    0    1          with 2 ranks; together they read what one would

Batch `number` is a pure function of (seed, number, size), so that a run resumes exactly, on more or
fewer ranks, with no state to save. A sample that cannot be read is replaced by another, the next
one if possible, and the batch names it under "broken".
"""

import atexit
import itertools
import math
import signal
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, partial
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm.data.dataset import Sample, SampleDataset, UnreadableSample

__all__ = ["DatasetSource", "Source", "collate", "read_ahead", "to_device"]

MAX_SUBSTITUTES = 100  # tried in the place of a sample, in its bucket and in another one

Batch = dict[str, Any]
ReadBatches = Callable[[int, int], Iterator[Batch]]  # (first, step) -> batches without end


class Source(ABC):
    """An endless sequence of training batches."""

    def batches(
        self, size: int, *, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Read batches start + rank, start + rank + world_size, … of the endless sequence.

        Args:
            workers: processes that read ahead; 0 = read in this process, on demand.
        """
        return read_ahead(partial(self.read, size), start + rank, world_size, workers)

    @abstractmethod
    def read(self, size: int, first: int, step: int) -> Iterator[Batch]:
        """Read batches first, first + step, …: stacked or listed by `collate`."""

    @abstractmethod
    def batches_per_epoch(self, size: int) -> Fraction | None:
        """Count the batches in an epoch; None where the number of samples is unknown."""

    @abstractmethod
    def fixed_samples(self, n: int) -> list[Sample]:
        """Return n fixed samples with images ("jpg") of one size, for grids and statistics."""

    def counts_by_name(self) -> Counter[str] | None:
        """Count the samples of an epoch by name; None where that is unknown."""
        return None


class DatasetSource(Source):
    """A source of the samples of a data set, each once in every epoch.

    The last batch of a bucket (`dataset.groups`) in an epoch may be smaller.

    Args:
        images: the data set of images behind latents, for `fixed_samples`.
    """

    def __init__(
        self, dataset: SampleDataset, seed: int = 0, *, images: SampleDataset | None = None
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.images = dataset if images is None else images
        self._orders: dict[tuple[int, int], Any] = {}

    def batches_per_epoch(self, size: int) -> Fraction:
        if self.dataset.groups is None:
            return Fraction(len(self.dataset), size)
        return Fraction(sum(math.ceil(count / size) for count in self._group_sizes))

    def fixed_samples(self, n: int) -> list[Sample]:
        groups = self.images.groups
        indices: Sequence[int] = range(len(self.images))
        if groups is not None:
            indices = _largest_group(groups)
        spread = (indices[len(indices) * k // n] for k in range(n))
        return [read_or_replace(self.images, 0, index, []) for index in spread]

    def counts_by_name(self) -> Counter[str]:
        return Counter(self.dataset.names())

    def sample_indices(self, batch_index: int, size: int) -> list[tuple[int, int]]:
        """Return (epoch, index) of the samples of a batch."""
        groups = self.dataset.groups
        if groups is None:
            numbers = range(batch_index * size, (batch_index + 1) * size)
            positions = [divmod(number, len(self.dataset)) for number in numbers]
            return [(epoch, int(self._order(epoch)[position])) for epoch, position in positions]
        epoch, position = divmod(batch_index, int(self.batches_per_epoch(size)))
        order = self._order(epoch, size, partial(group_batches, groups, size))
        return [(epoch, index) for index in order[position]]

    @cached_property
    def _group_sizes(self) -> list[int]:
        return list(Counter(self.dataset.groups).values())

    def _order(
        self, epoch: int, size: int = 0, arrange: Callable[[Tensor, int], Any] | None = None
    ) -> Any:
        """Return the permutation of an epoch, or batches made from it; cached for two epochs."""
        if (epoch, size) not in self._orders:
            seed = self.seed * 1_000_003 + epoch
            order = permutation(len(self.dataset), seed)
            self._orders[epoch, size] = arrange(order, seed) if arrange else order
            self._orders.pop((epoch - 2, size), None)
        return self._orders[epoch, size]

    def read(self, size: int, first: int, step: int) -> Iterator[Batch]:
        for number in itertools.count(first, step):
            broken: list[str] = []
            indices = self.sample_indices(number, size)
            batch = collate([read_or_replace(self.dataset, *each, broken) for each in indices])
            yield {**batch, "broken": broken} if broken else batch


def permutation(length: int, seed: int) -> Tensor:
    """Return (length,) indices in random order."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def group_batches(groups: Sequence[int], size: int, order: Tensor, seed: int) -> list[list[int]]:
    """Return batches of one group each that hold every index once, in random order."""
    by_group: dict[int, list[int]] = {}
    for index in order.tolist():
        by_group.setdefault(groups[index], []).append(index)
    batches = [
        indices[start : start + size]
        for indices in by_group.values()
        for start in range(0, len(indices), size)
    ]
    return [batches[position] for position in permutation(len(batches), seed).tolist()]


def read_or_replace(dataset: SampleDataset, epoch: int, index: int, broken: list[str]) -> Sample:
    """Read a sample, or another one in its place if it cannot be read.

    Args:
        broken: the names of unreadable samples are added to it.
    Raises:
        ValueError: none of the samples that were tried can be read.
    """
    tries = 0
    for other in candidates(dataset, epoch, index):
        tries += 1
        try:
            return dataset[epoch, other]
        except UnreadableSample as error:
            broken.append(error.name)
            last = error
    raise ValueError(f"none of {tries} samples that were tried can be read, the last: {last}")


def candidates(dataset: SampleDataset, epoch: int, index: int) -> Iterator[int]:
    """Yield the index, the following ones, and random ones: neighbours are often damaged together.

    Only samples of the same bucket, so that a batch has one size. If the whole bucket is
    unreadable, samples of the largest other one: the rest of the batch falls back to it, too.
    """
    groups, rng = dataset.groups, Random(f"{epoch} {index}")
    following = itertools.chain(range(index, len(dataset)), range(index))
    same_group = (other for other in following if groups is None or groups[other] == groups[index])
    yield from itertools.islice(same_group, MAX_SUBSTITUTES // 2)
    rest = list(same_group)
    yield from rng.sample(rest, min(len(rest), MAX_SUBSTITUTES // 2))
    if groups is not None and len(rest) <= MAX_SUBSTITUTES // 2:
        rest = _largest_group(groups, without=groups[index])
        yield from rng.sample(rest, min(len(rest), MAX_SUBSTITUTES))


def _largest_group(groups: Sequence[int], without: int | None = None) -> list[int]:
    """Return the indices of the most frequent group, the first of several; [] if there is none."""
    counts = Counter(group for group in groups if group != without)
    largest = max(counts, key=lambda group: counts[group], default=None)
    return [index for index, group in enumerate(groups) if group == largest]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples with the same keys; a sample within a sample becomes a batch as well."""
    batch: Batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key, values in batch.items():
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], dict):
            batch[key] = collate(values)
    return batch


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """Return the batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def read_ahead(read: ReadBatches, first: int, step: int, workers: int) -> Iterator[Batch]:
    """Yield what `read(first, step)` does, read ahead by worker processes.

    Args:
        read: (first, step) -> batches first, first + step, … without end; it is pickled.
    """
    if not workers:
        return read(first, step)
    loader: DataLoader[Batch] = DataLoader(
        _WorkerBatches(read, first, step),
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    batches = iter(loader)
    _RUNNING.add(batches)
    return _until_error(batches)


_RUNNING: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators with running workers


def _until_error(batches: Any) -> Iterator[Batch]:
    try:
        for batch in batches:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    finally:  # now, not when garbage-collected: a traceback may keep the iterator alive
        batches._shutdown_workers()


@atexit.register
def _end_workers() -> None:
    """Shut down the workers at exit: they ignore SIGTERM, so Python would wait forever."""
    for batches in list(_RUNNING):
        batches._shutdown_workers()


class _WorkerBatches(IterableDataset[Any]):
    """The batches of one worker: every num_workers-th; DataLoader takes from workers in turn."""

    def __init__(self, read: ReadBatches, first: int, step: int) -> None:
        self.read, self.first, self.step = read, first, step

    def __iter__(self) -> Iterator[Batch | ValueError]:
        worker = get_worker_info()
        assert worker is not None
        try:
            yield from self.read(self.first + worker.id * self.step, self.step * worker.num_workers)
        except ValueError as error:  # DataLoader would wrap it in a long traceback
            yield ValueError(str(error))


def _ignore_signals(worker: int) -> None:
    """Ignore signals in a worker; the main process shuts workers down."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # SIGUSR1 is missing on Windows
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _identity(batch: Any) -> Any:
    return batch
