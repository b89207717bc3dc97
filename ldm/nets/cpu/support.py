"""Conditions of acceleration: processor, tensors, and state of torch."""

import functools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ldm.runtime.device import has_fast_bf16

_enabled = True


def set_enabled(is_enabled: bool) -> None:
    """Switch the acceleration of all layers on or off."""
    global _enabled
    _enabled = is_enabled


def can_accelerate(x: Tensor) -> bool:
    """Return whether operations on x without gradients can be accelerated."""
    return not torch.is_grad_enabled() and _is_plain(x)


def can_accelerate_layer(x: Tensor, weight: Tensor) -> bool:
    """Return whether a layer with input x can be accelerated; with gradients, only in float32."""
    return (
        x.dtype == weight.dtype
        and (x.dtype == torch.float32 or not torch.is_grad_enabled())
        and weight.is_contiguous()
        and _is_plain(x)
        and _is_plain(weight)
    )


@functools.cache
def get_fast_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes in which this processor has fast matrix products."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return ()
    return (torch.float32, torch.bfloat16) if has_fast_bf16() else (torch.float32,)


def _is_plain(x: Tensor) -> bool:
    """Return whether x is a plain CPU tensor that nothing traces, wraps or casts."""
    return (
        _enabled
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in get_fast_dtypes()
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch.func.debug_unwrap(x) is x
        and forward_ad.unpack_dual(x).tangent is None
    )
