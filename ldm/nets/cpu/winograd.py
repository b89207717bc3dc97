"""3x3 convolution as matrix products, with 2.25 or 4 times fewer multiplications.

A tile of 4x4 inputs d gives 2x2 outputs

    Y = A^T M A,    M = U * V,    U = G g G^T,    V = B^T d B

by 16 products instead of 36; summed over channels, each entry of M is a matrix product over all
tiles. After nearest-neighbor upsampling by 2, the middle rows of a tile are equal, so that a row of
B^T d is zero and one of G unused: 9 products remain. As sums are shorter than in a direct
convolution, the rounding error in float32 is about the same.

Lavin and Gray 2016 (arXiv:1509.09308), F(2x2, 3x3), equation 8.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.nets.cpu.products import apply_linear_any_strides

G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
UPSAMPLED_G = ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0))  # without the unused row
# Products are computed in chunks of tiles, which are their rows: as many as keep V in cache (bytes
# per thread), at least MIN_CHUNK_TILES. With 64 instead of 128, a convolution takes 1.4 times as
# long.
CHUNK_BYTES = 8 << 20
MIN_CHUNK_TILES = 192


def transform_kernel(weight: Tensor, *, upsampled: bool) -> Tensor:
    """Compute U of a (C_out, C_in, 3, 3) kernel: 16 (9 if upsampled) matrices (C_out, C_in)."""
    g = torch.tensor(UPSAMPLED_G if upsampled else G)
    matrices = torch.kron(g, g) @ weight.float().reshape(-1, 9).t()
    return matrices.view(-1, *weight.shape[:2]).to(weight.dtype)


def convolve(x: Tensor, matrices: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolve x (B, C_in, h, w) with padding 1; h and w are even.

    With 9 matrices, x is first upsampled by 2, nearest neighbor; h and w may be odd.

    Args:
        matrices: The output of `transform_kernel`, possibly packed.

    Returns:
        (B, C_out, h, w), or (B, C_out, 2h, 2w) after upsampling, channels last.
    """
    is_upsampled = len(matrices) == 9
    # Along each axis, a tile has n entries of U and V, and the next one starts `step` pixels later.
    n, step = (3, 1) if is_upsampled else (4, 2)
    transform_input = _transform_upsampled_input if is_upsampled else _transform_input
    transform_output: Callable[..., Sequence[Tensor]] = (
        _transform_upsampled_output if is_upsampled else _transform_output
    )
    batch, in_channels, height, width = x.shape
    out_channels = matrices[0].shape[0]
    tiles_down, tiles_across = height // step, width // step
    padded = _pad(x.permute(0, 2, 3, 1))  # (B, h + 2, w + 2, C_in)
    out = x.new_empty(batch, tiles_down, 2, tiles_across, 2, out_channels)
    row_bytes = 4 * n * n * tiles_across * max(in_channels, out_channels)
    chunk_rows = CHUNK_BYTES * torch.get_num_threads() // row_bytes  # rows of tiles
    chunk_rows = max(chunk_rows, math.ceil(MIN_CHUNK_TILES / tiles_across))
    images = max(1, chunk_rows // tiles_down)  # small images together: a product reads its matrix
    num_chunks = math.ceil(tiles_down / chunk_rows)
    chunk_rows = math.ceil(tiles_down / num_chunks)  # equal chunks: no small last one
    for x_images, out_images in zip(padded.split(images), out.split(images), strict=True):
        for top in range(0, tiles_down, chunk_rows):
            end = min(top + chunk_rows, tiles_down)
            x_rows = x_images[:, step * top : step * end + 2]
            d_rows = transform_input(x_rows, 1)  # n times (b, rows, w + 2, C_in)
            v = [
                entry.reshape(-1, in_channels)
                for row in d_rows
                for entry in transform_input(row, 2)
            ]
            m = _multiply_entries(v, matrices, bias)  # n * n times (b * rows * tiles, C_out)
            m_columns = [transform_output(*m[k::n]) for k in range(n)]
            for i in range(2):
                for j, y in enumerate(transform_output(*(column[i] for column in m_columns))):
                    y = y.view(len(x_images), -1, tiles_across, out_channels)
                    out_images[:, top:end, i, :, j] = y
    return out.view(batch, 2 * tiles_down, 2 * tiles_across, out_channels).permute(0, 3, 1, 2)


def _pad(x: Tensor) -> Tensor:
    """Pad x (B, h, w, C) by a border of zeros; `F.pad` would write the inner pixels twice."""
    batch, height, width, channels = x.shape
    padded = x.new_empty(batch, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x
    padded[:, :: height + 1] = 0  # the first and the last row
    padded[:, :, :: width + 1] = 0
    return padded


def _multiply_entries(
    v: list[Tensor], matrices: Sequence[Tensor], bias: Tensor | None
) -> list[Tensor]:
    """Compute the entries of M, with the bias of Y."""
    # Entry (1, 1) of M has the coefficient 1 in all four outputs of a tile.
    bias_index = 5 if len(matrices) == 16 else 4
    return [
        apply_linear_any_strides(x, matrix, bias if k == bias_index else None)
        for k, (x, matrix) in enumerate(zip(v, matrices, strict=True))
    ]


def _transform_input(x: Tensor, dim: int) -> Sequence[Tensor]:
    """Compute B^T d along one axis: 2 n + 2 entries -> 4 times n."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)  # n + 1 entries each
    n = even.shape[dim] - 1
    d0, d2 = even.narrow(dim, 0, n), even.narrow(dim, 1, n)
    d1, d3 = odd.narrow(dim, 0, n), odd.narrow(dim, 1, n)
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


def _transform_upsampled_input(x: Tensor, dim: int) -> Sequence[Tensor]:
    """Compute B^T d along one axis of upsampled x: n + 2 entries -> 3 times n."""
    n = x.shape[dim] - 2
    before, middle, after = (x.narrow(dim, k, n) for k in range(3))
    return before - middle, middle, middle - after


def _transform_output(m0: Tensor, m1: Tensor, m2: Tensor, m3: Tensor) -> Sequence[Tensor]:
    """Compute A^T m along one axis; overwrites m1."""
    first = (m1 + m2).add_(m0)
    return first, m1.sub_(m2).sub_(m3)


def _transform_upsampled_output(m0: Tensor, m1: Tensor, m2: Tensor) -> Sequence[Tensor]:
    return m0 + m1, m1 - m2
