"""Layers with gradients, for training on x86 CPUs: equal to torch's up to rounding, and faster.

linear                               oneDNN where MKL is slow
3x3 convolution of few pixels        one matrix product of all patches; the weight is not copied
3x3 convolution after upsampling     each tap by one product before upsampling: 2.25 per pixel
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ldm.nets.cpu.products import product, product_in_any_layout

Gradients = tuple[Tensor | None, ...]


def _differentiable(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W^T by operators that torch can differentiate, for gradients of gradients."""
    return F.linear(x, weight) if torch.is_grad_enabled() else product(x, weight)


class _Layer(Function):
    """A layer of (x, weight, bias, …); it saves only what its gradients need."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight = inputs[:2]
        to_input, to_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if to_weight else None, weight if to_input else None)
        ctx.shapes, ctx.options = (x.shape, weight.shape), inputs[3:]


class Linear(_Layer):
    """x W^T + b. x: (M, K). weight: (N, K). Returns (M, N)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        return _needed_gradients(
            ctx,
            lambda: _differentiable(gradient, weight.t()),
            lambda: _differentiable(gradient.t(), x.t()),
            lambda: gradient.sum(0),
        )


class Convolution(_Layer):
    """3x3 convolution of x (B, C_in, h, w), padding 1: P output pixels per image, (B P, C_out)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        patches = F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2)  # (B, P, 9 C_in)
        return product_in_any_layout(patches.flatten(0, 1), weight.flatten(1), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        (batch, _, *size), shape = ctx.shapes
        stride = ctx.options[0]
        columns = gradient.t()  # (C_out, B P); with so few, torch's product is as fast as oneDNN's

        def to_input() -> Tensor:
            patches = weight.flatten(1).t() @ columns  # (9 C_in, B P)
            patches = patches.unflatten(1, (batch, -1)).transpose(0, 1)
            return F.fold(patches, size, 3, padding=1, stride=stride)

        def to_weight() -> Tensor:
            patches = F.unfold(x, 3, padding=1, stride=stride)
            return (columns @ patches.transpose(0, 1).flatten(1).t()).view(shape)

        return *_needed_gradients(ctx, to_input, to_weight, lambda: gradient.sum(0)), None


class DoubledConvolution(_Layer):
    """3x3 convolution, padding 1, after nearest upsampling: (B, h, 2, w, 2, C_out)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, _, height, width = x.shape
        taps = product(_pixels(x), _by_tap(weight)).view(batch, height, width, 3, 3, -1)
        out = x.new_empty(batch, height, 2, width, 2, len(weight))
        columns = [_double(taps[:, :, :, row].unbind(3), 2) for row in range(3)]
        for j, of_column in enumerate(zip(*columns, strict=True)):
            for i, value in enumerate(_double(of_column, 1)):
                out[:, :, i, :, j] = value
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        (batch, inputs, height, width), shape = ctx.shapes
        columns = [
            _transposed_double(row, 3) for row in _transposed_double(gradient.contiguous(), 2)
        ]
        taps = torch.stack([tap for row in columns for tap in row], 3).flatten(3).flatten(0, 2)

        def to_input() -> Tensor:
            out = _differentiable(taps, _by_tap(weight).t()).view(batch, height, width, inputs)
            return out.permute(0, 3, 1, 2).contiguous()

        def to_weight() -> Tensor:
            out = _differentiable(taps.t(), _pixels(x).t())  # (9 C_out, C_in)
            return out.view(3, 3, *shape[:2]).permute(2, 3, 0, 1).contiguous()

        return _needed_gradients(ctx, to_input, to_weight, lambda: gradient.sum((0, 1, 2, 3, 4)))


def _needed_gradients(ctx: Any, *gradients: Callable[[], Tensor]) -> Gradients:
    needed = ctx.needs_input_grad
    return tuple(g() if needed[k] else None for k, g in enumerate(gradients))


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C_in)


def _by_tap(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 0, 1).flatten(0, 2)  # (9 C_out, C_in)


def _double(taps: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Compute even and odd outputs along an upsampled axis, from products by tap."""
    before, middle, after = taps
    return _shift(before, dim, 1) + middle + after, before + middle + _shift(after, dim, -1)


def _transposed_double(pairs: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the transpose of `_double`: pairs are along `dim`, their axis is dim - 1."""
    even, odd = pairs.unbind(dim)
    return _shift(even, dim - 1, -1) + odd, even + odd, even + _shift(odd, dim - 1, 1)


def _shift(x: Tensor, dim: int, by: int) -> Tensor:
    """Shift x by one to higher (1) or lower (-1) indices, and fill with zeros."""
    zeros = torch.zeros_like(x.narrow(dim, 0, 1))
    rest = x.narrow(dim, 0 if by == 1 else 1, x.shape[dim] - 1)
    return torch.cat((zeros, rest) if by == 1 else (rest, zeros), dim)
