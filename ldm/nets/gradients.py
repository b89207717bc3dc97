"""Layers with their gradients, to train on x86 CPUs: equal to torch's own up to rounding, faster.

    linear in float32 goes to MKL                     -> oneDNN, on weights as they lie
    3x3 convolution of few pixels rearranges a large  -> one matrix product of all patches
      weight in every call, in the backward pass twice
    3x3 convolution behind a nearest-neighbour        -> each of 9 taps by one matrix product on the
      doubling does 9 products per pixel of output       small map, 2.25 per pixel; then sums

When each is taken, `cpu.py` decides.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = ["Convolution", "DoubledConvolution", "Linear", "product"]


Gradients = tuple[Tensor | None, ...]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN. x: (…, K). weight: (N, K), of any strides, or packed. Returns (…, N)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """The same; with gradients of its own where gradients of gradients are asked for."""
    return F.linear(x, weight) if torch.is_grad_enabled() else product(x, weight)


class Linear(Function):
    """x W^T + b. x: (…, K). weight: (N, K)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (M, N)
        return _asked(
            ctx,
            lambda: _product(rows, weight.t()).view(x.shape),
            lambda: _product(rows.t(), x.flatten(0, -2).t()),
            lambda: rows.sum(0),
        )


class Convolution(Function):
    """3x3 convolution with padding 1 and a stride of x (B, C_in, h, w)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        patches = F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2)  # (B, P, 9 C_in)
        out = product(patches, weight.flatten(1), bias).transpose(1, 2)  # (B, C_out, P)
        height = (x.shape[2] - 1) // stride + 1
        return out.unflatten(2, (height, -1)).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.stride = inputs[3]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        columns = gradient.flatten(2).transpose(0, 1).flatten(1)  # (C_out, B P)

        def to_input() -> Tensor:
            patches = weight.flatten(1).t() @ columns  # (9 C_in, B P)
            patches = patches.unflatten(1, (len(x), -1)).transpose(0, 1)
            return F.fold(patches, x.shape[2:], 3, padding=1, stride=ctx.stride)

        def to_weight() -> Tensor:
            patches = F.unfold(x, 3, padding=1, stride=ctx.stride)
            return _product(columns, patches.transpose(0, 1).flatten(1)).view(weight.shape)

        return *_asked(ctx, to_input, to_weight, lambda: gradient.sum((0, 2, 3))), None


class DoubledConvolution(Function):
    """3x3 convolution with padding 1 of x (B, C_in, h, w) doubled: (B, C_out, 2h, 2w)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, _, height, width = x.shape
        taps = product(_pixels(x), _by_tap(weight)).view(batch, height, width, 3, 3, -1)
        out = x.new_empty(batch, height, 2, width, 2, len(weight))
        columns = [_doubled(taps[:, :, :, row].unbind(3), 2) for row in range(3)]
        for j, of_column in enumerate(zip(*columns, strict=True)):
            for i, value in enumerate(_doubled(of_column, 1)):
                out[:, :, i, :, j] = value
        if bias is not None:
            out += bias
        return out.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        pixels = gradient.permute(0, 2, 3, 1).contiguous()
        pairs = pixels.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h, 2, w, 2, C_out)
        columns = [_undoubled(row, 3) for row in _undoubled(pairs, 2)]
        taps = torch.stack([tap for row in columns for tap in row], 3).flatten(3).flatten(0, 2)

        def to_input() -> Tensor:
            out = _product(taps, _by_tap(weight).t()).view(*x.permute(0, 2, 3, 1).shape)
            return out.permute(0, 3, 1, 2).contiguous()

        def to_weight() -> Tensor:
            out = _product(taps.t(), _pixels(x).t())  # (9 C_out, C_in)
            return out.view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1).contiguous()

        return _asked(ctx, to_input, to_weight, lambda: gradient.sum((0, 2, 3)))


def _asked(ctx: Any, *gradients: Callable[[], Tensor]) -> Gradients:
    """Those gradients that are needed."""
    needed = ctx.needs_input_grad
    return tuple(g() if needed[k] else None for k, g in enumerate(gradients))


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C_in)


def _by_tap(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 0, 1).flatten(0, 2)  # (9 C_out, C_in)


def _doubled(taps: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Even and odd outputs along a doubled axis, from products with the small map by tap."""
    before, middle, after = taps
    return _shifted(before, dim, 1) + middle + after, before + middle + _shifted(after, dim, -1)


def _undoubled(pairs: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The transpose of `_doubled`, for pairs along `dim` of what lies along the axis before it."""
    even, odd = pairs.unbind(dim)
    return _shifted(even, dim - 1, -1) + odd, even + odd, even + _shifted(odd, dim - 1, 1)


def _shifted(x: Tensor, dim: int, by: int) -> Tensor:
    """x moved by one to higher (1) or lower (-1) places, with zeros where nothing comes from."""
    zeros = torch.zeros_like(x.narrow(dim, 0, 1))
    kept = x.narrow(dim, 0 if by == 1 else 1, x.shape[dim] - 1)
    return torch.cat((zeros, kept) if by == 1 else (kept, zeros), dim)
