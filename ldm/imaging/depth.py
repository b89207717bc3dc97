"""Load and save depth maps."""

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.imaging.reading import StoredImage, is_colored, load_stored
from ldm.runtime.errors import ArgumentError
from ldm.runtime.files import disk_errors_about

__all__ = ["load_depth", "load_unnormalized_depth", "save_depth"]

log = logging.getLogger(__name__)


def load_depth(path: str | Path, *, inverted: bool = False) -> Tensor:
    """Load a depth map, normalized to [0, 1], larger is nearer: (1, 1, H, W) float32.

    NaN and -inf become 0, inf becomes 1; they do not affect the range.

    Args:
        inverted: Whether larger values are farther in the file.
    """
    stored = _load_stored_depth(path)
    low, high = stored.find_finite_range()
    stored.log_warnings()
    depth = torch.tensor(stored.to_gray_array())[None, None]
    # At least 1e-6, so that a constant map becomes 0, not NaN.
    depth = ((depth - low) / torch.tensor(high - low).clamp(min=1e-6)).nan_to_num(0, 1, 0)
    return 1 - depth if inverted else depth


def load_unnormalized_depth(path: str | Path) -> Image.Image:
    """Load a depth map as "F" in [0, 1] by its white level: 1 is 255, 65535 or 1.0 in the file.

    Raises:
        ArgumentError: A value is not finite, or a float outside 0 … 1.
    """
    stored = _load_stored_depth(path)
    stored.log_warnings()
    white_level = stored.white_level if stored.image.mode == "F" else 255.0
    values = stored.to_gray_array()
    if white_level is None or not np.isfinite(values).all():
        low, high = values.min(), values.max()
        raise ArgumentError(f"the depth `{path}` has values {low:g} … {high:g}, not 0 … 1", "depth")
    return Image.fromarray(values / np.float32(white_level))


def _load_stored_depth(path: str | Path) -> StoredImage:
    stored = load_stored(path)
    if stored.image.mode != "F" and is_colored(stored.image):
        log.warning("the depth map `%s` has colors: their gray values are used as depth", path)
    return stored


def save_depth(path: str | Path, depth: Tensor) -> None:
    """Write a depth map (1, 1, H, W) of any range as a 16-bit PNG; larger values are brighter."""
    low, high = depth.min(), depth.max()
    levels = ((depth - low) / (high - low).clamp(min=1e-6) * 65535).round()
    with disk_errors_about(path):
        Image.fromarray(levels[0, 0].cpu().numpy().astype(np.uint16)).save(path, "PNG")
