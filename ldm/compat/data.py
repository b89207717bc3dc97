"""`ldm.data.base` and `ldm.data.util` of the original: a dataset base class, inputs of MiDaS."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from ldm.compat import midas


class Txt2ImgIterableBaseDataset(IterableDataset[Any]):
    """Base class of iterable datasets, for `isinstance`.

    Args:
        num_records: Number of samples.
        valid_ids: Ids of the samples to use; None = no ids.
        size: Height and width of the images in pixels.
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


class AddMiDaS:
    """Adds `midas_in`, (3, H', W') numpy, to a sample, from `jpg`, (H, W, 3) in [-1, 1]."""

    def __init__(self, model_type: str) -> None:
        self.transform = midas.api.load_midas_transform(model_type)

    def pt2np(self, x: Tensor) -> Any:
        """Convert a tensor in [-1, 1] to numpy in [0, 1]."""
        return ((x + 1) * 0.5).detach().cpu().numpy()

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = self.transform({"image": self.pt2np(sample["jpg"])})
        sample["midas_in"] = image["image"]
        return sample
