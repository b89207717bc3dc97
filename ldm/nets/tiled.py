"""Tiled processing: apply a function to overlapping tiles of a tensor too large for memory.

Tiles overlap by at least a quarter of their side and are blended linearly there, so that no seams
show. With circular padding, see `ldm.nets.circular`, they also wrap around the edges of the tensor.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.nets.circular import circular_padding, get_circular_axes

__all__ = ["apply_tiled"]


def apply_tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, factor: int = 1
) -> Tensor:
    """Apply a function to tiles of x, and blend the results.

    Args:
        function: (B, C, h, w) -> (B, C', h * factor, w * factor).
        x: (B, C, H, W); not split if it is no larger than a tile.
        tile: Side of the tiles, in pixels of x.
        factor: Scale of the function's output relative to its input.
    """
    height, width = x.shape[-2:]
    if max(height, width) <= tile:
        return function(x)
    axes = get_circular_axes()
    # Where tiles are smaller than x, the function must not wrap around their edges.
    sides = {"x": width, "y": height}
    circular_tile_axes = [axis for axis, side in sides.items() if axis in axes and side <= tile]
    output = weight_sum = torch.zeros(())
    for rows in _tile_indices(height, tile, "y" in axes):
        for columns in _tile_indices(width, tile, "x" in axes):
            with circular_padding("".join(circular_tile_axes) or "none", replace=True):
                tile_output = function(x[..., rows[:, None], columns])
            if not output.dim():  # allocated here, as channels and dtype are the function's
                size = (height * factor, width * factor)
                output = tile_output.new_zeros(*tile_output.shape[:2], *size)
                weight_sum = tile_output.new_zeros(size)
            overlap = tile * factor // 4
            ramps = (_make_ramp(side, overlap) for side in tile_output.shape[-2:])
            # Weights do not add up to 1 where tiles overlap, so the output is divided by their sum.
            weight = torch.outer(*ramps).to(tile_output)
            region = (..., _scale_indices(rows, factor)[:, None], _scale_indices(columns, factor))
            output[region] += tile_output * weight
            weight_sum[region] += weight
    return output / weight_sum


def _tile_indices(length: int, tile: int, is_circular: bool) -> list[Tensor]:
    """Return the indices along one axis of each tile, (min(tile, length),) each."""
    if length <= tile:
        return [torch.arange(length)]
    stride = max(tile * 3 // 4, 1)
    # Along a plain axis the last tile starts at `end`; along a circular one the first tile starts
    # again there.
    end = length if is_circular else length - tile
    count = math.ceil(end / stride)
    starts = [round(i * end / count) for i in range(count if is_circular else count + 1)]
    return [torch.arange(start, start + tile) % length for start in starts]


def _scale_indices(indices: Tensor, factor: int) -> Tensor:
    return (indices[:, None] * factor + torch.arange(factor)).flatten()


def _make_ramp(length: int, overlap: int) -> Tensor:
    """Return weights (length,) > 0, rising over the first and falling over the last `overlap`."""
    rising = (torch.arange(length) + 0.5) / max(overlap, 1)
    return torch.minimum(rising, rising.flip(0)).clamp(max=1.0)
