"""Circular padding: within a block, convolutions take opposite edges of an image to meet.

    with circular_padding("x"):
        z = unet(…)     # the first column is the neighbour of the last one

The networks see no other edges, so that an image of such latents has no seam there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.runtime.errors import ArgumentError

__all__ = ["circular_axes", "circular_padding", "crop", "pad_end", "pad_reflect", "wrap"]

DIMS = {"x": 3, "y": 2}

_axes: ContextVar[frozenset[str]] = ContextVar("axes", default=frozenset())


def circular_axes() -> frozenset[str]:
    """Return the axes whose edges meet: "x" left and right, "y" top and bottom."""
    return _axes.get()


@contextmanager
def circular_padding(tiling: str, *, only: bool = False) -> Iterator[None]:
    """Let edges meet within a block.

    Args:
        tiling: "x", "y", "xy" or "none".
        only: replace the axes of a block around this one; otherwise they are added.
    """
    axes = frozenset(() if tiling == "none" else tiling)
    if not axes <= DIMS.keys():
        raise ArgumentError(f"unknown tiling `{tiling}`, choose none, x, y or xy", "tiling")
    token = _axes.set(axes if only else axes | _axes.get())
    try:
        yield
    finally:
        _axes.reset(token)


def wrap(x: Tensor, margin: int) -> Tensor:
    """Append pixels of the opposite edge to both sides of x (B, C, h, w) along circular axes."""
    for axis in circular_axes():
        side = x.shape[DIMS[axis]]
        places = torch.arange(-margin, side + margin, device=x.device) % side
        x = x.index_select(DIMS[axis], places)
    return x


def crop(x: Tensor, margin: int) -> Tensor:
    """Cut off what `wrap` has appended."""
    for axis in circular_axes():
        x = x.narrow(DIMS[axis], margin, x.shape[DIMS[axis]] - 2 * margin)
    return x


def pad_reflect(x: Tensor, margin: int) -> Tensor:
    """Append pixels to all sides: of the opposite edge along circular axes, else mirrored ones."""
    wide, high = (0 if axis in circular_axes() else margin for axis in ("x", "y"))
    x = wrap(x, margin)
    return F.pad(x, (wide, wide, high, high), "reflect") if wide or high else x


def pad_end(x: Tensor) -> Tensor:
    """Append a column at the right and a row at the bottom: zeros, or the first along an axis."""
    for axis, pad in {"x": (0, 1), "y": (0, 0, 0, 1)}.items():
        if axis in circular_axes():
            x = torch.cat([x, x.narrow(DIMS[axis], 0, 1)], dim=DIMS[axis])
        else:
            x = F.pad(x, pad)
    return x
