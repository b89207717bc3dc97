"""A function of an image, applied patch by patch where the whole would not fit into memory.

Patches overlap by a quarter of their side and are blended linearly where they do, so that no edge
shows. The function may look at any number of channels and may enlarge.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["tiled"]


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, factor: int = 1) -> Tensor:
    """What function(x) gives, put together from patches of at most tile x tile.

    function: (B, C, h, w) -> (B, C', h factor, w factor).
    x: (B, C, H, W); one that is no larger than a patch is passed on whole.
    """
    height, width = x.shape[-2:]
    if max(height, width) <= tile:
        return function(x)
    whole = total = torch.zeros(())
    for top in _starts(height, tile):
        for left in _starts(width, tile):
            part = function(x[..., top : top + tile, left : left + tile])
            if not whole.dim():
                whole = part.new_zeros(*part.shape[:2], height * factor, width * factor)
                total = part.new_zeros(height * factor, width * factor)
            rows, columns = part.shape[-2:]
            overlap = tile * factor // 4
            weight = torch.outer(_ramp(rows, overlap), _ramp(columns, overlap)).to(part)
            top_, left_ = top * factor, left * factor
            where = (..., slice(top_, top_ + rows), slice(left_, left_ + columns))
            whole[where] += part * weight
            total[where] += weight
    return whole / total


def _starts(length: int, tile: int) -> list[int]:
    """First pixels of tiles that cover `length`, each overlapping the next by a quarter or more."""
    if length <= tile:
        return [0]
    count = 1 + -(-(length - tile) // max(tile * 3 // 4, 1))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, overlap: int) -> Tensor:
    """Rises over `overlap` pixels, and falls over as many; never 0."""
    up = (torch.arange(length) + 0.5) / max(overlap, 1)
    return torch.minimum(up, up.flip(0)).clamp(max=1.0)
