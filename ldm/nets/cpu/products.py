"""Matrix products by the fastest of torch's kernels on this processor."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.runtime.device import is_intel

# Kernels rearrange the right operand in every call. For at most MAX_FEW_ROWS rows of x, a multiple
# of ROW_MULTIPLE, x is the better right operand than the weight: by 20 to 50 % in bfloat16, 10 to
# 30 % in float32.
MAX_FEW_ROWS = {torch.float32: 64, torch.bfloat16: 128}
ROW_MULTIPLE = 16
MAX_ONEDNN_ROWS = 512  # on Intel's processors; with more rows, MKL is faster


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + b without gradients; weight: (N, K) of any strides, or packed."""
    if weight.is_mkldnn or (x.dtype == torch.float32 and is_onednn_faster(x.shape[:-1].numel())):
        return _apply_linear_by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def apply_linear_any_strides(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + b as `apply_linear`, for a matrix x; the output may have any strides."""
    if weight.is_mkldnn or not has_few_rows(len(x), x.dtype):
        return apply_linear(x, weight, bias)
    y = apply_linear(weight, x).t()
    return y if bias is None else y + bias


def has_few_rows(rows: int, dtype: torch.dtype) -> bool:
    """Return whether x with so few rows should be the right operand, and the weight not packed."""
    return rows <= MAX_FEW_ROWS[dtype] and rows % ROW_MULTIPLE == 0


def pack_weight(weight: Tensor) -> Tensor:
    """Pack a weight (N, K) for oneDNN's kernels if they are faster with it."""
    # By 10 to 40 % in bfloat16, by 3 to 7 % in float32.
    if not (_has_onednn() if weight.dtype == torch.bfloat16 else is_onednn_faster(1)):
        return weight
    # The number of rows is a hint: the packed matrix fits any number.
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, MAX_ONEDNN_ROWS)
    return packed


def is_onednn_faster(rows: int) -> bool:
    """Return whether oneDNN multiplies this many float32 rows faster than MKL (`F.linear`)."""
    return rows <= _find_max_onednn_rows()


@functools.cache
def _find_max_onednn_rows() -> float:
    # MKL uses AVX-512 on Intel's processors only, and has half of oneDNN's rate on others; on
    # Intel's, oneDNN leads by 5 % with few rows; with AVX2 alone, MKL is as fast or faster.
    # Decided by the processor, not by a measurement, so that results are reproducible.
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _has_onednn():
        return 0
    return MAX_ONEDNN_ROWS if is_intel() else math.inf


def _apply_linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Private in torch. The public way to oneDNN in float32, a 1x1 convolution, rearranges its
    # weight in every call and has 70 to 80 % of this rate for the shapes of a text encoder; there
    # is no public way to pack a matrix.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


@functools.cache
def _has_onednn() -> bool:
    weight = torch.ones(16, 16)
    try:
        _apply_linear_by_onednn(
            weight, torch.ops.mkldnn._reorder_linear_weight(weight, MAX_ONEDNN_ROWS), None
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True
