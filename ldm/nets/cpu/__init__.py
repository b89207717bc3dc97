"""Layers on x86 CPUs: equal to torch's own up to rounding, and faster.

    torch                                                      -> this package
    3x3 convolution: 9 products per pixel and pair of channels -> 4 products (`winograd`)
    the same after nearest-neighbor upsampling by 2            -> 2.25 or 4 products
    3x3 convolution of few pixels                              -> one product of all patches
    float32 products by MKL, slow on some processors           -> by oneDNN there (`products`)
    feed-forward layer of many tokens                          -> in blocks that stay in cache
    weights transformed, contexts projected in every call      -> once within `cache_weights`
    large buffers returned to the system after every use       -> `keep_freed_memory`

It accelerates plain CPU tensors in the dtype of the weights, but not under autocast, torch.compile
or torch.func; all others use torch's own operators. Switch it off by `set_enabled(False)` to count
operations or to batch gradients (`is_grads_batched`), which only these operators support.
"""

from ldm.nets.cpu.group_norm import group_norm
from ldm.nets.cpu.layers import (
    apply_in_blocks,
    conv2d,
    linear,
    project_context,
    upsample_conv2d,
)
from ldm.nets.cpu.support import can_accelerate, set_enabled
from ldm.nets.cpu.weight_cache import cache_weights
from ldm.runtime.device import keep_freed_memory

__all__ = [
    "apply_in_blocks", "cache_weights", "can_accelerate", "conv2d", "group_norm",
    "keep_freed_memory", "linear", "project_context", "set_enabled", "upsample_conv2d",
]  # fmt: skip
