"""Circular padding, for seamless (tileable) images: convolutions wrap around the edges.

    with circular_padding("x"):
        z = unet(…)     # the first column is next to the last one

The axis "x" connects the left and right edges, "y" top and bottom.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.runtime.errors import ArgumentError

__all__ = [
    "circular_padding", "crop_circular", "get_circular_axes", "pad_bottom_right", "pad_circular",
    "pad_reflect",
]  # fmt: skip

DIMS = {"x": 3, "y": 2}  # of (B, C, h, w)

_axes: ContextVar[frozenset[str]] = ContextVar("axes", default=frozenset())


def get_circular_axes() -> frozenset[str]:
    """Return the axes, "x" and "y", that are circular in the current context."""
    return _axes.get()


@contextmanager
def circular_padding(tiling: str, *, replace: bool = False) -> Iterator[None]:
    """Make convolutions circular within the context.

    Args:
        tiling: "x", "y", "xy" or "none".
        replace: Whether to replace the axes of an enclosing context, instead of adding to them.
    """
    axes = frozenset(() if tiling == "none" else tiling)
    if not axes <= DIMS.keys():
        raise ArgumentError(f"unknown tiling `{tiling}`, choose none, x, y or xy", "tiling")
    token = _axes.set(axes if replace else axes | _axes.get())
    try:
        yield
    finally:
        _axes.reset(token)


def pad_circular(x: Tensor, padding: int) -> Tensor:
    """Pad both sides of x (B, C, h, w) along circular axes with pixels of the opposite edge."""
    for axis in get_circular_axes():
        length = x.shape[DIMS[axis]]
        indices = torch.arange(-padding, length + padding, device=x.device) % length
        x = x.index_select(DIMS[axis], indices)
    return x


def crop_circular(x: Tensor, padding: int) -> Tensor:
    """Remove `padding` pixels from both sides of x (B, C, h, w) along circular axes."""
    for axis in get_circular_axes():
        x = x.narrow(DIMS[axis], padding, x.shape[DIMS[axis]] - 2 * padding)
    return x


def pad_reflect(x: Tensor, padding: int) -> Tensor:
    """Pad all sides of x (B, C, h, w): circularly along circular axes, else by reflection."""
    pad_x, pad_y = (0 if axis in get_circular_axes() else padding for axis in ("x", "y"))
    x = pad_circular(x, padding)
    return F.pad(x, (pad_x, pad_x, pad_y, pad_y), "reflect") if pad_x or pad_y else x


def pad_bottom_right(x: Tensor) -> Tensor:
    """Pad x (B, C, h, w) by a row below and a column at the right, circularly or with zeros."""
    for axis, pad in {"x": (0, 1), "y": (0, 0, 0, 1)}.items():
        if axis in get_circular_axes():
            x = torch.cat([x, x.narrow(DIMS[axis], 0, 1)], dim=DIMS[axis])
        else:
            x = F.pad(x, pad)
    return x
