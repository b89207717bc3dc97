"""Tiled processing: apply a function to overlapping tiles of a tensor, to need less memory.

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
    function: Callable[[Tensor], Tensor], x: Tensor, tile_size: int, factor: int = 1
) -> Tensor:
    """Apply a function to tiles of x, and blend the results.

    Args:
        function: (B, C, h, w) -> (B, C', h * factor, w * factor).
        x: (B, C, H, W); not split if it is not larger than a tile.
        tile_size: Side of the tiles, in pixels of x.
        factor: Side of the function's output relative to that of its input.
    """
    height, width = x.shape[-2:]
    if max(height, width) <= tile_size:
        return function(x)
    axes = get_circular_axes()
    # Along axes that are split, the function must not wrap around the edges of a tile.
    sides = {"x": width, "y": height}
    unsplit_axes = [axis for axis, side in sides.items() if axis in axes and side <= tile_size]
    output = weight_sum = torch.zeros(())
    for rows in _get_tile_indices(height, tile_size, "y" in axes):
        for columns in _get_tile_indices(width, tile_size, "x" in axes):
            with circular_padding("".join(unsplit_axes) or "none", replace=True):
                tile_output = function(x[..., rows[:, None], columns])
            if not output.dim():  # allocated here, as channels and dtype are the function's
                size = (height * factor, width * factor)
                output = tile_output.new_zeros(*tile_output.shape[:2], *size)
                weight_sum = tile_output.new_zeros(size)
            overlap = tile_size * factor // 4
            ramps = (_make_ramp(side, overlap) for side in tile_output.shape[-2:])
            # Weights of overlapping tiles do not sum to 1: the output is divided by their sum.
            weight = torch.outer(*ramps).to(tile_output)
            region = (..., _scale_indices(rows, factor)[:, None], _scale_indices(columns, factor))
            output[region] += tile_output * weight
            weight_sum[region] += weight
    return output / weight_sum


def _get_tile_indices(length: int, tile_size: int, is_circular: bool) -> list[Tensor]:
    """Return the indices of each tile along one axis, (min(length, tile_size),) each."""
    if length <= tile_size:
        return [torch.arange(length)]
    stride = max(tile_size * 3 // 4, 1)
    # The start of the last tile; along a circular axis, that is the first tile again.
    last_start = length if is_circular else length - tile_size
    count = math.ceil(last_start / stride)
    starts = [round(i * last_start / count) for i in range(count if is_circular else count + 1)]
    return [torch.arange(start, start + tile_size) % length for start in starts]


def _scale_indices(indices: Tensor, factor: int) -> Tensor:
    return (indices[:, None] * factor + torch.arange(factor)).flatten()


def _make_ramp(length: int, overlap: int) -> Tensor:
    """Return weights (length,) > 0 that rise over the first `overlap` and fall over the last."""
    rising = (torch.arange(length) + 0.5) / max(overlap, 1)
    return torch.minimum(rising, rising.flip(0)).clamp(max=1.0)
