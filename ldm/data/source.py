"""An endless, resumable sequence of training batches, the same on any number of ranks.

    batch_index    0    1    2    3    4    5   …
    rank           0    1    0    1    0    1       with 2 ranks; a single one reads all

A batch is a pure function of (seed, batch_index, batch_size), so that a run resumes exactly, on
more or fewer ranks, with no state to save. An unreadable sample is replaced by another, the
next one if possible, and its name is listed in the batch under "unreadable".
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

__all__ = ["BatchSource", "DatasetSource", "collate", "derive_seed", "prefetch", "to_device"]

MAX_CANDIDATES = 100  # samples tried per bucket, including the unreadable one

Batch = dict[str, Any]
ReadBatches = Callable[[int, int], Iterator[Batch]]  # (start, stride) -> endless batches


class BatchSource(ABC):
    """An endless sequence of training batches."""

    def iter_batches(
        self,
        batch_size: int,
        *,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> Iterator[Batch]:
        """Yield batches start + rank, start + rank + world_size, … of the endless sequence."""
        return prefetch(partial(self.read_batches, batch_size), start + rank, world_size, workers)

    @abstractmethod
    def read_batches(self, batch_size: int, start: int, stride: int) -> Iterator[Batch]:
        """Yield batches start, start + stride, … endlessly, as `collate` returns them."""

    @abstractmethod
    def get_batches_per_epoch(self, batch_size: int) -> Fraction | None:
        """Return the batches per epoch, a fraction if epochs end within batches; None = unknown."""

    @abstractmethod
    def load_fixed_samples(self, n: int) -> list[Sample]:
        """Return n fixed samples with images ("jpg") of one size, for grids and statistics."""

    def count_names(self) -> Counter[str] | None:
        """Count how often each sample name occurs in an epoch; None if the names are unknown."""
        return None


class DatasetSource(BatchSource):
    """A source of the samples of a dataset, each once in every epoch.

    The last batch of a bucket (`dataset.bucket_ids`) in an epoch may be smaller.

    Args:
        images: Images that latents were encoded from, for `load_fixed_samples`; None = `dataset`.
    """

    def __init__(
        self, dataset: SampleDataset, seed: int = 0, *, images: SampleDataset | None = None
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.images = dataset if images is None else images
        self._orders: dict[tuple[int, int], Any] = {}

    def get_batches_per_epoch(self, batch_size: int) -> Fraction:
        if self.dataset.bucket_ids is None:
            return Fraction(len(self.dataset), batch_size)
        return Fraction(sum(math.ceil(count / batch_size) for count in self._bucket_counts))

    def load_fixed_samples(self, n: int) -> list[Sample]:
        bucket_ids = self.images.bucket_ids
        indices: Sequence[int] = range(len(self.images))
        if bucket_ids is not None:
            indices = _find_largest_bucket(bucket_ids)
        evenly_spaced = (indices[len(indices) * k // n] for k in range(n))
        return [read_or_substitute(self.images, 0, index, []) for index in evenly_spaced]

    def count_names(self) -> Counter[str]:
        return Counter(self.dataset.iter_names())

    def get_sample_indices(self, batch_index: int, batch_size: int) -> list[tuple[int, int]]:
        """Return (epoch, index) of the samples of a batch."""
        bucket_ids = self.dataset.bucket_ids
        if bucket_ids is None:
            sample_numbers = range(batch_index * batch_size, (batch_index + 1) * batch_size)
            positions = [divmod(number, len(self.dataset)) for number in sample_numbers]
            return [(epoch, int(self._get_order(epoch)[position])) for epoch, position in positions]
        epoch, position = divmod(batch_index, int(self.get_batches_per_epoch(batch_size)))
        return [(epoch, index) for index in self._get_order(epoch, batch_size)[position]]

    @cached_property
    def _bucket_counts(self) -> list[int]:
        return list(Counter(self.dataset.bucket_ids).values())

    def _get_order(self, epoch: int, batch_size: int = 0) -> Any:
        """Return the order of an epoch, or with buckets its batches; cached for two epochs."""
        if (epoch, batch_size) not in self._orders:
            seed, bucket_ids = derive_seed(self.seed, epoch), self.dataset.bucket_ids
            order: Any = draw_permutation(len(self.dataset), seed)
            if bucket_ids is not None:
                order = make_bucket_batches(bucket_ids, batch_size, order, seed)
            self._orders[epoch, batch_size] = order
            self._orders.pop((epoch - 2, batch_size), None)
        return self._orders[epoch, batch_size]

    def read_batches(self, batch_size: int, start: int, stride: int) -> Iterator[Batch]:
        for batch_index in itertools.count(start, stride):
            unreadable: list[str] = []
            indices = self.get_sample_indices(batch_index, batch_size)
            batch = collate([read_or_substitute(self.dataset, *key, unreadable) for key in indices])
            yield {**batch, "unreadable": unreadable} if unreadable else batch


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of an epoch or batch, which fits 64 bits for seeds of up to ±10^12.

    Different seeds never give the same result for indices below 1_000_003.
    """
    return seed * 1_000_003 + index


def draw_permutation(length: int, seed: int) -> Tensor:
    """Return (length,) indices in random order."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def make_bucket_batches(
    bucket_ids: Sequence[int], batch_size: int, order: Tensor, seed: int
) -> list[list[int]]:
    """Split the indices in `order` into batches of one bucket each, and shuffle the batches."""
    indices_by_bucket: dict[int, list[int]] = {}
    for index in order.tolist():
        indices_by_bucket.setdefault(bucket_ids[index], []).append(index)
    batches = [
        indices[start : start + batch_size]
        for indices in indices_by_bucket.values()
        for start in range(0, len(indices), batch_size)
    ]
    return [batches[position] for position in draw_permutation(len(batches), seed).tolist()]


def read_or_substitute(
    dataset: SampleDataset, epoch: int, index: int, unreadable: list[str]
) -> Sample:
    """Read a sample, or another one in its place if it cannot be read.

    Args:
        unreadable: Names of unreadable samples are appended to it.
    Raises:
        ValueError: Neither the sample nor any substitute can be read.
    """
    attempts = 0
    for candidate in iter_candidates(dataset, epoch, index):
        attempts += 1
        try:
            return dataset[epoch, candidate]
        except UnreadableSample as error:
            unreadable.append(error.name)
            last_error = error
    raise ValueError(
        f"none of {attempts} samples that were tried can be read, the last: {last_error}"
    )


def iter_candidates(dataset: SampleDataset, epoch: int, index: int) -> Iterator[int]:
    """Yield an index, then the indices to try in its place.

    These are the following samples, then random ones, as neighbors are often damaged together; all
    of the same bucket, so that a batch has one size. If these are the whole bucket, random ones of
    the largest other bucket follow. The batch still has one size: they are used only if no sample
    of the bucket can be read, so all samples of the batch are replaced from that other bucket.
    """
    bucket_ids = dataset.bucket_ids
    rng = Random(f"{epoch} {index}")  # Random cannot be seeded with a tuple
    indices = itertools.chain(range(index, len(dataset)), range(index))
    same_bucket = (k for k in indices if bucket_ids is None or bucket_ids[k] == bucket_ids[index])
    yield from itertools.islice(same_bucket, MAX_CANDIDATES // 2)
    remaining = list(same_bucket)
    yield from rng.sample(remaining, min(len(remaining), MAX_CANDIDATES // 2))
    if bucket_ids is not None and len(remaining) <= MAX_CANDIDATES // 2:
        fallbacks = _find_largest_bucket(bucket_ids, excluded=bucket_ids[index])
        yield from rng.sample(fallbacks, min(len(fallbacks), MAX_CANDIDATES))


def _find_largest_bucket(bucket_ids: Sequence[int], excluded: int | None = None) -> list[int]:
    """Return the sample indices of the largest bucket; [] if no bucket is left.

    Of equally large buckets, it is the one whose first sample comes first.

    Args:
        excluded: Id of a bucket to leave out; None = all are counted.
    """
    counts = Counter(bucket_id for bucket_id in bucket_ids if bucket_id != excluded)
    largest_id = max(counts, key=lambda bucket_id: counts[bucket_id], default=None)
    return [index for index, bucket_id in enumerate(bucket_ids) if bucket_id == largest_id]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack tensors, list other values, and collate nested samples; all must have the same keys."""
    batch: Batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key, values in batch.items():
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], dict):
            batch[key] = collate(values)
    return batch


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """Return the batch with its tensors on a device; nested batches are not moved."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def prefetch(read: ReadBatches, start: int, stride: int, workers: int) -> Iterator[Batch]:
    """Yield the batches of `read(start, stride)`, prefetched by worker processes.

    Args:
        read: (start, stride) -> batches start, start + stride, … without end; it is pickled.
        workers: Number of processes; 0 = read in this process, on demand.
    """
    if not workers:
        return read(start, stride)
    loader: DataLoader[Batch] = DataLoader(
        _WorkerBatches(read, start, stride),
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else DataLoader draws its seed from torch's global generator
    )
    batches = iter(loader)
    _RUNNING_ITERATORS.add(batches)
    return _reraise_errors(batches)


_RUNNING_ITERATORS: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators with running workers


def _reraise_errors(batches: Any) -> Iterator[Batch]:
    try:
        for batch in batches:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    finally:  # not left to garbage collection: a traceback may keep the iterator alive
        batches._shutdown_workers()


@atexit.register
def _end_workers() -> None:
    """Shut down the workers at exit: they ignore SIGTERM, so Python would wait forever."""
    for batches in list(_RUNNING_ITERATORS):
        batches._shutdown_workers()


class _WorkerBatches(IterableDataset[Any]):
    """The batches of one worker: every num_workers-th, as DataLoader asks workers in turn."""

    def __init__(self, read: ReadBatches, start: int, stride: int) -> None:
        self.read, self.start, self.stride = read, start, stride

    def __iter__(self) -> Iterator[Batch | ValueError]:
        worker = get_worker_info()
        assert worker is not None
        try:
            start = self.start + worker.id * self.stride
            yield from self.read(start, self.stride * worker.num_workers)
        except ValueError as error:  # DataLoader would wrap it in a long traceback
            yield ValueError(str(error))


def _ignore_signals(worker: int) -> None:
    """Ignore signals in a worker; the main process shuts workers down."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # SIGUSR1 is missing on Windows
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _identity(batch: Any) -> Any:
    return batch
