"""`ldm.data.util` of the original: depth input of a sample."""

from typing import Any

from torch import Tensor

from ldm.compat import midas


class AddMiDaS:
    """Adds `midas_in`, (3, H', W') numpy, to a sample with an image `jpg`, (H, W, 3) in [-1, 1]."""

    def __init__(self, model_type: str) -> None:
        self.transform = midas.api.load_midas_transform(model_type)

    def pt2np(self, x: Tensor) -> Any:
        """Convert a tensor in [-1, 1] to numpy in [0, 1]."""
        return ((x + 1) * 0.5).detach().cpu().numpy()

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = self.transform({"image": self.pt2np(sample["jpg"])})
        sample["midas_in"] = image["image"]
        return sample
