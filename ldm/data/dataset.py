"""Datasets: samples by (epoch, index), and the aspect-ratio bucket of each sample."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from random import Random
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.transforms import Transform
from ldm.imaging.reading import decode_srgb, read_size
from ldm.runtime.errors import ArgumentError

__all__ = ["DreamBoothDataset", "ImageDataset", "Sample", "SampleDataset", "UnreadableSample"]

Sample = dict[str, Any]


class UnreadableSample(ValueError):
    """A sample that cannot be read; `name` is one of its dataset's `iter_names()`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it can be pickled
        self.name = name

    def __str__(self) -> str:
        return str(self.args[1])


class SampleDataset(Dataset[Sample], ABC):
    """Base class of datasets; `dataset[epoch, index]` is a sample or raises UnreadableSample."""

    # Bucket of each sample; a batch holds samples of one bucket. None = one size for all.
    bucket_ids: Sequence[int] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, key: tuple[int, int]) -> Sample: ...

    @abstractmethod
    def iter_names(self) -> Iterator[str]:
        """Yield the names of all samples, which UnreadableSample and `broken.txt` use."""


class ImageDataset(SampleDataset):
    """Base class of datasets of images with metadata.

    The random choices in a sample are a function of (seed, epoch, index) only.
    """

    def __init__(self, transform: Transform, seed: int) -> None:
        self.transform, self.seed = transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        return self.transform(self.load(index), Random(f"{self.seed} {epoch} {index}"))

    def load(self, index: int) -> Sample:
        """Load a sample: its metadata and the decoded `image`.

        Raises:
            UnreadableSample: The image or the caption is missing or damaged.
        """
        row = self.read_row(index)
        try:
            return {**row, "image": decode_srgb(self.read_bytes(index), self.get_name(index))}
        except (OSError, ValueError) as error:
            raise UnreadableSample(self.get_name(index), str(error)) from error

    @abstractmethod
    def get_name(self, index: int) -> str:
        """Return the name of a sample in messages."""

    @abstractmethod
    def read_row(self, index: int) -> Mapping[str, Any]:
        """Return the metadata of a sample, with its captions as `text`.

        Raises:
            UnreadableSample: The caption is in a file that cannot be read.
        """

    @abstractmethod
    def read_bytes(self, index: int) -> bytes:
        """Read the bytes of a sample's image file; empty if it has none."""

    def iter_names(self) -> Iterator[str]:
        return map(self.get_name, range(len(self)))

    def iter_metadata(self) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of all samples whose caption can be read."""
        for index in range(len(self)):
            with suppress(UnreadableSample):
                yield self.read_row(index)

    def _read_size(self, index: int) -> tuple[int, int]:
        return read_size(BytesIO(self.read_bytes(index)))

    def _assign_buckets(self) -> None:
        """Set `bucket_ids`, if the transform has buckets.

        Unreadable images are assigned to the largest bucket, which has the most substitutes.
        """
        if self.transform.buckets is None:
            return
        buckets: dict[str, int | None] = {}  # by name: a file may be several samples
        names = list(self.iter_names())
        for index, name in enumerate(tqdm(names, "Measuring", delay=5, dynamic_ncols=True)):
            if name not in buckets:
                try:
                    buckets[name] = self.transform.buckets.find_nearest(*self._read_size(index))
                except (OSError, ValueError):
                    buckets[name] = None
        bucket_ids = [buckets[name] for name in names]
        counts = Counter(bucket for bucket in bucket_ids if bucket is not None)
        largest_bucket = max(counts, key=lambda bucket: counts[bucket], default=0)
        self.bucket_ids = [largest_bucket if bucket is None else bucket for bucket in bucket_ids]


class DreamBoothDataset(SampleDataset):
    """Samples, each with a class image as `prior`, for DreamBooth's prior preservation.

    Ruiz et al. 2022 (arXiv:2208.12242).

    Raises:
        ArgumentError: The class images have buckets; each of them is used with any sample.
    """

    def __init__(self, dataset: SampleDataset, class_images: SampleDataset) -> None:
        if class_images.bucket_ids is not None:
            raise ArgumentError("class images must have one size, not `buckets`")
        self.dataset, self.class_images = dataset, class_images
        self.bucket_ids = dataset.bucket_ids

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        class_epoch, class_index = divmod(epoch * len(self) + index, len(self.class_images))
        sample = self.dataset[key]
        try:
            return {**sample, "prior": self.class_images[class_epoch, class_index]}
        except UnreadableSample as error:
            raise UnreadableSample(f"prior/{error.name}", str(error)) from error

    def iter_names(self) -> Iterator[str]:
        yield from self.dataset.iter_names()
        # Both datasets may have files of the same name.
        yield from (f"prior/{name}" for name in self.class_images.iter_names())
