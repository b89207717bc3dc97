"""Read segmentation maps: images whose values are class labels."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.imaging.reading import open_image
from ldm.runtime.errors import FileFormatError

__all__ = ["load_segmentation"]

LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's modes of one channel of integers


def load_segmentation(path: str | Path) -> Tensor:
    """Load a segmentation map, (1, 1, H, W) int64; palettes are ignored.

    Raises:
        FileFormatError: The file is not an image, or has several channels.
    """
    with open_image(path) as image:
        mode, labels = image.mode, np.asarray(image)
    if mode not in LABEL_MODES:
        allowed = "one channel of class labels, or a palette"
        raise FileFormatError(f"`{path}` has the channels {mode}, not {allowed}")
    return torch.from_numpy(labels.astype(np.int64))[None, None]
