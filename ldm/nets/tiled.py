"""Functions of an image, applied tile by tile where the whole does not fit into memory.

Tiles overlap by at least a quarter of their side and are blended linearly there, to show no seams.
With circular padding they also overlap across the edges that meet.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.nets.circular import circular_axes, circular_padding

__all__ = ["apply_tiled"]


def apply_tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, factor: int = 1
) -> Tensor:
    """Apply a function to tiles of x, and blend the results.

    Args:
        function: (B, C, h, w) -> (B, C', h * factor, w * factor).
        x: (B, C, H, W); if it is not larger than a tile, the function gets it whole.
        tile: Side of the tiles, in pixels of x.
    """
    height, width = x.shape[-2:]
    if max(height, width) <= tile:
        return function(x)
    axes = circular_axes()
    # Within a tile, edges along which there are several tiles do not meet.
    inside = "".join(a for a, side in (("x", width), ("y", height)) if a in axes and side <= tile)
    whole = total = torch.zeros(())
    for rows in _tile_indices(height, tile, "y" in axes):
        for columns in _tile_indices(width, tile, "x" in axes):
            with circular_padding(inside or "none", only=True):
                part = function(x[..., rows[:, None], columns])
            if not whole.dim():
                whole = part.new_zeros(*part.shape[:2], height * factor, width * factor)
                total = part.new_zeros(height * factor, width * factor)
            overlap = tile * factor // 4
            ramps = (_ramp(side, overlap) for side in part.shape[-2:])
            # Weights of neighbours need not add up to 1: the sum is divided by at the end.
            weight = torch.outer(*ramps).to(part)
            area = (..., _enlarge(rows, factor)[:, None], _enlarge(columns, factor))
            whole[area] += part * weight
            total[area] += weight
    return whole / total


def _tile_indices(length: int, tile: int, is_circular: bool) -> list[Tensor]:
    """Return the pixels of each tile along an axis; neighbours overlap by a quarter or more."""
    if length <= tile:
        return [torch.arange(length)]
    stride = max(tile * 3 // 4, 1)
    end = length if is_circular else length - tile  # of the starts
    count = -(-end // stride)
    starts = [round(i * end / count) for i in range(count if is_circular else count + 1)]
    return [torch.arange(start, start + tile) % length for start in starts]


def _enlarge(indices: Tensor, factor: int) -> Tensor:
    return (indices[:, None] * factor + torch.arange(factor)).flatten()


def _ramp(length: int, overlap: int) -> Tensor:
    """Return weights that rise over `overlap` pixels, and fall over as many; never 0."""
    up = (torch.arange(length) + 0.5) / max(overlap, 1)
    return torch.minimum(up, up.flip(0)).clamp(max=1.0)
