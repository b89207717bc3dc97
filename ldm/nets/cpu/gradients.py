"""Autograd functions for training on x86 CPUs: equal to torch's up to rounding, and faster.

linear                               oneDNN where MKL is slow
3x3 convolution of few pixels        one matrix product of all patches; the weight is not copied
3x3 convolution after upsampling     9 products per input pixel: 2.25 instead of 9 per output pixel
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ldm.nets.cpu.products import apply_linear, apply_linear_any_strides

Gradients = tuple[Tensor | None, ...]


def _apply_linear_to_grad(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W^T for a gradient, differentiably for double backward (create_graph=True)."""
    return F.linear(x, weight) if torch.is_grad_enabled() else apply_linear(x, weight)


class _WeightFunction(Function):
    """An autograd function of (x, weight, bias, …) that saves only what its gradients need."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight = inputs[:2]
        needs_grad_x, needs_grad_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_grad_weight else None, weight if needs_grad_x else None)
        ctx.shapes, ctx.options = (x.shape, weight.shape), inputs[3:]


class LinearFunction(_WeightFunction):
    """x W^T + b. x: (M, K). weight: (N, K). Returns (M, N)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return apply_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        return _compute_needed_gradients(
            ctx,
            lambda: _apply_linear_to_grad(grad_output, weight.t()),
            lambda: _apply_linear_to_grad(grad_output.t(), x.t()),
            lambda: grad_output.sum(0),
        )


class Conv3x3Function(_WeightFunction):
    """3x3 convolution of x (B, C_in, h, w), padding 1: P output pixels per image, (B P, C_out)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        patches = F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2)  # (B, P, 9 C_in)
        return apply_linear_any_strides(patches.flatten(0, 1), weight.flatten(1), bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        (batch, _, *size), weight_shape = ctx.shapes
        stride = ctx.options[0]
        # With so few pixels, torch's product is as fast as oneDNN's.
        grad_by_channel = grad_output.t()  # (C_out, B P)

        def compute_grad_x() -> Tensor:
            grad_patches = weight.flatten(1).t() @ grad_by_channel  # (9 C_in, B P)
            grad_patches = grad_patches.unflatten(1, (batch, -1)).transpose(0, 1)
            return F.fold(grad_patches, size, 3, padding=1, stride=stride)

        def compute_grad_weight() -> Tensor:
            patches = F.unfold(x, 3, padding=1, stride=stride)
            grad = grad_by_channel @ patches.transpose(0, 1).flatten(1).t()  # (C_out, 9 C_in)
            return grad.view(weight_shape)

        return *_compute_needed_gradients(
            ctx, compute_grad_x, compute_grad_weight, lambda: grad_output.sum(0)
        ), None


class UpsampleConv3x3Function(_WeightFunction):
    """3x3 convolution, padding 1, after nearest-neighbor upsampling of x (B, C_in, h, w) by 2.

    Returns (B, h, 2, w, 2, C_out), which the caller reshapes: each pixel of x becomes two rows and
    two columns.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, _, height, width = x.shape
        # The product of each input pixel with each of the 3x3 taps, (B, h, w, 3, 3, C_out)
        taps = apply_linear(_flatten_spatial(x), _group_by_tap(weight)).view(
            batch, height, width, 3, 3, -1
        )
        out = x.new_empty(batch, height, 2, width, 2, len(weight))
        # Sum the taps along the width, for even and odd columns, then along the height.
        by_kernel_row = [_sum_taps(taps[:, :, :, row].unbind(3), 2) for row in range(3)]
        for j, column_taps in enumerate(zip(*by_kernel_row, strict=True)):
            for i, value in enumerate(_sum_taps(column_taps, 1)):
                out[:, :, i, :, j] = value
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        (batch, in_channels, height, width), weight_shape = ctx.shapes
        rows = [_spread_to_taps(row, 3) for row in _spread_to_taps(grad_output.contiguous(), 2)]
        grad_taps = torch.stack([tap for row in rows for tap in row], 3)
        grad_taps = grad_taps.flatten(3).flatten(0, 2)  # (B h w, 9 C_out)

        def compute_grad_x() -> Tensor:
            grad = _apply_linear_to_grad(grad_taps, _group_by_tap(weight).t())  # (B h w, C_in)
            grad_nhwc = grad.view(batch, height, width, in_channels)
            return grad_nhwc.permute(0, 3, 1, 2).contiguous()

        def compute_grad_weight() -> Tensor:
            grad = _apply_linear_to_grad(grad_taps.t(), _flatten_spatial(x).t())  # (9 C_out, C_in)
            return grad.view(3, 3, *weight_shape[:2]).permute(2, 3, 0, 1).contiguous()

        return _compute_needed_gradients(
            ctx, compute_grad_x, compute_grad_weight, lambda: grad_output.sum((0, 1, 2, 3, 4))
        )


def _compute_needed_gradients(ctx: Any, *gradients: Callable[[], Tensor]) -> Gradients:
    """Compute the gradients of x, weight and bias that autograd needs."""
    is_needed = ctx.needs_input_grad
    return tuple(grad() if is_needed[k] else None for k, grad in enumerate(gradients))


def _flatten_spatial(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C_in)


def _group_by_tap(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 0, 1).flatten(0, 2)  # (9 C_out, C_in)


def _sum_taps(taps: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Compute even and odd outputs along an upsampled axis from the products of each tap."""
    before, middle, after = taps
    return _shift(before, dim, 1) + middle + after, before + middle + _shift(after, dim, -1)


def _spread_to_taps(grad_output: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the adjoint of `_sum_taps`: return the gradients of the three taps.

    `dim` has size 2, even and odd outputs; `dim - 1` is their spatial axis.
    """
    even, odd = grad_output.unbind(dim)
    return _shift(even, dim - 1, -1) + odd, even + odd, even + _shift(odd, dim - 1, 1)


def _shift(x: Tensor, dim: int, step: int) -> Tensor:
    """Shift x by one to higher (step 1) or lower (-1) indices, and fill with zeros."""
    zeros = torch.zeros_like(x.narrow(dim, 0, 1))
    shifted = x.narrow(dim, 0 if step == 1 else 1, x.shape[dim] - 1)
    return torch.cat((zeros, shifted) if step == 1 else (shifted, zeros), dim)
