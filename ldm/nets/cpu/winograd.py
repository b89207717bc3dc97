"""3x3 convolution as matrix products, with 2.25 or 4 times fewer multiplications.

A tile of 4x4 inputs d gives 2x2 outputs  A^T [(G g G^T) * (B^T d B)] A  by 16 products instead of
36; summed over channels these are 16 matrix products over all tiles. After nearest-neighbor
upsampling by 2, the middle rows of a tile are equal, so that a row of B^T d is zero and one of G
unused: 9 products remain. Sums are shorter than in a direct convolution, so that in float32 the
rounding error is about the same. Lavin & Gray 2016 (arXiv:1509.09308), F(2x2, 3x3).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nets.cpu.products import product_in_any_layout

G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
DOUBLED_G = ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0))  # without the unused row
CHUNK_BYTES = 4 << 20  # of transformed input per thread at a time, to stay in cache


def transform(weight: Tensor, *, doubled: bool) -> Tensor:
    """Compute G g G^T: a (C_out, C_in, 3, 3) kernel as 16 (9 if doubled) matrices (C_out, C_in)."""
    g = torch.tensor(DOUBLED_G if doubled else G)
    matrices = torch.kron(g, g) @ weight.float().reshape(-1, 9).t()
    return matrices.view(-1, *weight.shape[:2]).to(weight.dtype)


def convolve(x: Tensor, matrices: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolve x (B, C_in, h, w) with padding 1; h and w are even.

    With 9 matrices, x is upsampled by 2, nearest neighbor, before that; h and w may be odd.
    Returns (B, C_out, h, w), or of twice the size, channels last.
    """
    n = 3 if len(matrices) == 9 else 4
    split, join, step = (_split_doubled, _join_doubled, 1) if n == 3 else (_split, _join, 2)
    batch, channels, height, width = x.shape
    tiles_down, tiles_across = height // step, width // step
    features = matrices[0].shape[0]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, h + 2, w + 2, C_in)
    out = x.new_empty(batch, tiles_down, 2, tiles_across, 2, features)
    row_bytes = 4 * n * n * tiles_across * max(channels, features)
    chunk = max(1, CHUNK_BYTES * torch.get_num_threads() // row_bytes)  # rows of tiles
    images = max(1, chunk // tiles_down)  # at once: each product reads its matrix
    for x, y in zip(padded.split(images), out.split(images), strict=True):
        for top in range(0, tiles_down, chunk):
            end = min(top + chunk, tiles_down)
            tiles = split(x[:, step * top : step * end + 2], 1)  # n times (b, rows, w + 2, C_in)
            tokens = [part.reshape(-1, channels) for line in tiles for part in split(line, 2)]
            m = _products(tokens, matrices, bias)  # n * n times (b * rows * tiles, C_out)
            lines = [join(*m[k::n]) for k in range(n)]
            for i in range(2):
                for j, value in enumerate(join(*(line[i] for line in lines))):
                    y[:, top:end, i, :, j] = value.view(len(x), -1, tiles_across, features)
    return out.view(batch, 2 * tiles_down, 2 * tiles_across, features).permute(0, 3, 1, 2)


def _products(
    tokens: list[Tensor], matrices: Sequence[Tensor], bias: Tensor | None
) -> list[Tensor]:
    # Entry (1, 1) of the products contributes to all four outputs of a tile with weight 1.
    biased = 5 if len(matrices) == 16 else 4
    return [
        product_in_any_layout(x, matrix, bias if k == biased else None)
        for k, (x, matrix) in enumerate(zip(tokens, matrices, strict=True))
    ]


def _split(x: Tensor, dim: int) -> Sequence[Tensor]:
    """Compute B^T d along one axis: 2 n + 2 entries -> 4 times n."""
    a, b = x.unflatten(dim, (-1, 2)).unbind(dim + 1)  # even and odd entries, n + 1 of each
    n = a.shape[dim] - 1
    d0, d2 = a.narrow(dim, 0, n), a.narrow(dim, 1, n)
    d1, d3 = b.narrow(dim, 0, n), b.narrow(dim, 1, n)
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


def _split_doubled(x: Tensor, dim: int) -> Sequence[Tensor]:
    """Compute B^T d along one axis of upsampled x: n + 2 entries -> 3 times n."""
    n = x.shape[dim] - 2
    before, middle, after = (x.narrow(dim, k, n) for k in range(3))
    return before - middle, middle, middle - after


def _join(m0: Tensor, m1: Tensor, m2: Tensor, m3: Tensor) -> Sequence[Tensor]:
    """Compute A^T m along one axis; overwrites m1."""
    first = (m1 + m2).add_(m0)
    return first, m1.sub_(m2).sub_(m3)


def _join_doubled(m0: Tensor, m1: Tensor, m2: Tensor) -> Sequence[Tensor]:
    return m0 + m1, m1 - m2
