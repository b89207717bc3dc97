"""Layers on x86 CPUs: equal to torch's own up to rounding, and faster.

    3x3 convolution: 9 products per pixel and pair of channels -> `winograd`: 4
    the same after nearest-neighbour upsampling by 2           -> 2.25, or 4
    3x3 convolution of few pixels                              -> one product of all patches
    float32 products go to MKL, slow on some processors        -> oneDNN there (`products`)
    weights are transformed in every call                      -> once in a `cache_weights` block
    glibc returns large buffers after every use                -> `keep_memory`

All this applies to plain CPU tensors of the dtype of the weights, never under autocast,
torch.compile or torch.func, nor after `enable(False)`; everything else takes torch's ordinary path.
Switch it off to count operations or to batch gradients (`is_grads_batched`), which know ordinary
operators only.
"""

from ldm.nets.cpu.group_norm import group_norm
from ldm.nets.cpu.layers import conv2d, conv2d_doubled, linear
from ldm.nets.cpu.support import applies, enable
from ldm.nets.cpu.weight_cache import cache_weights
from ldm.runtime.device import keep_memory

__all__ = [
    "applies",
    "cache_weights",
    "conv2d",
    "conv2d_doubled",
    "enable",
    "group_norm",
    "keep_memory",
    "linear",
]
