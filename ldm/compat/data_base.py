"""`ldm.data.base` of the original: base class of iterable data sets."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset


class Txt2ImgIterableBaseDataset(IterableDataset[Any]):
    """Base class of iterable data sets, for `isinstance` in programs.

    Args:
        num_records: Number of samples.
        valid_ids: Ids of the samples to use; None for no ids.
        size: Side of the images in pixels.
    """

    def __init__(
        self, num_records: int = 0, valid_ids: Sequence[Any] | None = None, size: int = 256
    ) -> None:
        super().__init__()
        self.num_records = num_records
        self.valid_ids = valid_ids
        self.sample_ids = valid_ids
        self.size = size

    def __len__(self) -> int:
        return self.num_records

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError
