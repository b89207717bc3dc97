"""The old `ldm.data.base`: base class of data sets that are read in order."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset


class Txt2ImgIterableBaseDataset(IterableDataset[Any]):
    """Base class of data sets that are read in order.

    Args:
        num_records: Number of samples.
        valid_ids: Those of them that are used.
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
