"""Linear layers and convolutions, each by the fastest path for its shape."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.cpu import gradients, products, winograd
from ldm.nets.cpu.products import apply_linear
from ldm.nets.cpu.support import applies, applies_to_layer
from ldm.nets.cpu.weight_cache import is_caching, reuse_output, transform_weight
from ldm.runtime.device import has_amx

# Minimum number of multiplications; below, call overhead dominates.
MIN_LINEAR_WORK = 5e7
MIN_CONV_WORK = 5e8
MIN_TAPS_WORK = 1e7  # with gradients
# A 3x3 convolution is one matrix product of all patches (im2col) with at most so many output pixels
# in the batch and at least so many weights, which torch's kernel would rearrange in every call.
MAX_IM2COL_PIXELS = 128
MAX_IM2COL_PIXELS_WITH_GRADIENTS = 64
MIN_IM2COL_WEIGHTS = 1e6
# A convolution after upsampling, with gradients, is computed tap by tap with at least so many
# channels and at most so many products, which are temporarily in memory.
MIN_TAPS_CHANNELS = 64
MAX_TAPS = 1 << 25
# Minimum number of channels. In float32, the transforms cost as much as they save with fewer; in
# bfloat16 they round once more, which adds 6 % to the rounding error of a UNet's output, and 15 to
# 40 % with fewer. With AMX, torch's channels-last convolutions are two to five times as fast.
MIN_WINOGRAD_CHANNELS = {torch.float32: 128, torch.bfloat16: math.inf if has_amx() else 640}
# Minimum number of output pixels of one image; with fewer, each product has a handful of rows, and
# takes the time of reading its matrix.
MIN_WINOGRAD_PIXELS = 64
# Memory per thread of the largest activation in a feed-forward layer, to stay in cache.
BLOCK_BYTES = 10 << 20
# Minimum number of output pixels to transform a weight for a single call, so that it costs a tenth
# of what it saves.
MIN_UNCACHED_PIXELS = {torch.float32: 1024, torch.bfloat16: 8192}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + b for x (…, D_in)."""
    rows = x.shape[:-1].numel()
    is_small = rows * weight.numel() < MIN_LINEAR_WORK
    if is_small or not applies_to_layer(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        # In float32, it is faster by 3 to 7 % only, for twice the memory.
        if x.dtype == torch.bfloat16 and is_caching(weight):
            weight = transform_weight(weight, "packed", products.pack)
        y = apply_linear(x.reshape(rows, -1), weight, bias)
    elif products.onednn_is_faster(rows):
        y = gradients.LinearFunction.apply(x.reshape(rows, -1), weight, bias)
    else:
        return F.linear(x, weight, bias)
    return y.view(*x.shape[:-1], -1)


def project_context(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W^T for a context x, which seldom changes: once within `cache_weights`."""
    if torch.is_grad_enabled() or not applies_to_layer(x, weight):
        return linear(x, weight, None)
    return reuse_output(x, weight, lambda x: linear(x, weight, None))


def apply_in_blocks(layer: Callable[[Tensor], Tensor], x: Tensor, features: int) -> Tensor:
    """Apply a layer that maps each position by itself to x (B, N, C), in blocks of positions.

    A UNet's feed-forward layer takes 10 to 30 % less time if its activations stay in cache.

    Args:
        layer: Called with (1, n, C) if there are several blocks.
        features: Those of the layer's largest activation.
    """
    positions = x.shape[:-1].numel()
    blocks = math.ceil(positions * features * x.itemsize / BLOCK_BYTES / torch.get_num_threads())
    if blocks <= 1 or not applies(x):
        return layer(x)
    parts = x.reshape(1, positions, -1).tensor_split(blocks, dim=1)
    return torch.cat([layer(part) for part in parts], 1).view(*x.shape[:-1], -1)


def conv2d(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolve x (B, C, h, w); some fast paths return channels last."""
    weight, bias = layer.weight, layer.bias
    if x.dim() != 4 or not applies_to_layer(x, weight):
        return nn.Conv2d.forward(layer, x)
    if not (x.shape[2] % 2 or x.shape[3] % 2):
        matrices = _transform_for_winograd(layer, len(x), x.shape[-2:].numel(), upsampled=False)
        if matrices is not None:
            return winograd.convolve(x, matrices, bias)
    if _should_use_im2col(layer, _count_pixels(x) // math.prod(layer.stride)):
        stride = layer.stride[0]
        pixels: Tensor = gradients.Conv3x3Function.apply(x, weight, bias, stride)
        maps = pixels.view(len(x), (x.shape[2] - 1) // stride + 1, -1, layer.out_channels)
        return maps.permute(0, 3, 1, 2).contiguous()
    # Torch's kernels are slow if x is channels last and the weight is not.
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    is_large = _count_pixels(x) * weight.numel() >= MIN_CONV_WORK
    is_faster = is_channels_last or (is_large and is_caching(weight))
    if torch.is_grad_enabled() or not is_faster or layer.padding_mode != "zeros":
        return nn.Conv2d.forward(layer, x)
    x = x.contiguous(memory_format=torch.channels_last)
    if _is_1x1(layer):
        return apply_linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    weight = transform_weight(weight, "channels last", _to_channels_last)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def upsample_conv2d(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolve x (B, C, h, w) after nearest-neighbor upsampling by 2: (B, C_out, 2h, 2w)."""
    weight, bias, pixels = layer.weight, layer.bias, _count_pixels(x)
    if _is_3x3(layer) and applies_to_layer(x, weight):
        if torch.is_grad_enabled():
            if _should_sum_taps(layer, pixels):
                y: Tensor = gradients.UpsampleConv3x3Function.apply(x, weight, bias)
                maps = y.view(len(x), 2 * x.shape[2], 2 * x.shape[3], layer.out_channels)
                return maps.permute(0, 3, 1, 2).contiguous()
        elif pixels * weight.numel() >= MIN_CONV_WORK:
            matrices = _transform_for_winograd(layer, len(x), 4 * pixels // len(x), upsampled=True)
            if matrices is not None:
                return winograd.convolve(x, matrices, bias)
            return _convolve_phases(x, transform_weight(weight, "phases", _merge_taps), bias)
    return nn.Conv2d.forward(layer, F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _count_pixels(x: Tensor) -> int:
    return len(x) * x.shape[-2:].numel()


def _to_channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _is_3x3(layer: nn.Conv2d, strides: Sequence[int] = (1,)) -> bool:
    return (
        layer.kernel_size == (3, 3)
        and layer.padding == layer.dilation == (1, 1)
        and layer.stride in [(stride, stride) for stride in strides]
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


def _is_1x1(layer: nn.Conv2d) -> bool:
    is_dense = layer.padding in ((0, 0), "valid") and layer.groups == 1
    return layer.kernel_size == layer.stride == (1, 1) and is_dense


def _should_use_im2col(layer: nn.Conv2d, pixels: int) -> bool:
    """Return whether one product of all patches (im2col) is fastest, for `pixels` of output."""
    limit = MAX_IM2COL_PIXELS_WITH_GRADIENTS if torch.is_grad_enabled() else MAX_IM2COL_PIXELS
    is_faster = layer.weight.numel() >= MIN_IM2COL_WEIGHTS and pixels <= limit
    return is_faster and _is_3x3(layer, strides=(1, 2))


def _should_sum_taps(layer: nn.Conv2d, pixels: int) -> bool:
    """Return whether `UpsampleConv3x3Function` is fastest, for `pixels` of input."""
    work, taps = pixels * layer.weight.numel(), 9 * pixels * layer.out_channels
    return work >= MIN_TAPS_WORK and taps <= MAX_TAPS and layer.out_channels >= MIN_TAPS_CHANNELS


def _transform_for_winograd(
    layer: nn.Conv2d, images: int, pixels_per_image: int, *, upsampled: bool
) -> list[Tensor] | None:
    """Transform the weight; None if Winograd is not faster. Pixels are those of the output."""
    weight, pixels = layer.weight, images * pixels_per_image
    is_narrow = min(layer.in_channels, layer.out_channels) < MIN_WINOGRAD_CHANNELS[weight.dtype]
    is_small = pixels_per_image < MIN_WINOGRAD_PIXELS or pixels * weight.numel() < MIN_CONV_WORK
    if torch.is_grad_enabled() or is_narrow or is_small or not _is_3x3(layer):
        return None
    if pixels < MIN_UNCACHED_PIXELS[weight.dtype] and not is_caching(weight):
        return None
    tiles = pixels // 4  # rows of the products
    packs = is_caching(weight) and not products.has_few_rows(tiles, weight.dtype)

    def transform(weight: Tensor) -> list[Tensor]:
        matrices = winograd.transform_kernel(weight, upsampled=upsampled).unbind()
        return [products.pack(matrix) if packs else matrix for matrix in matrices]

    return transform_weight(weight, "Winograd, upsampled" if upsampled else "Winograd", transform)


def _merge_taps(weight: Tensor) -> list[Tensor]:
    """Return 4 kernels (C_out, C_in, 2, 2), for outputs of even and odd rows and columns.

    After upsampling, each output pixel sees 2x2 pixels of x only.
    """
    g = weight.float()
    halves = [torch.stack(taps, 2) for taps in _merge_pairs(g.unbind(2))]  # (C_out, C_in, 2, 3)
    kernels = [torch.stack(taps, 3) for half in halves for taps in _merge_pairs(half.unbind(3))]
    return [_to_channels_last(kernel.to(weight.dtype)) for kernel in kernels]


def _merge_pairs(taps: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the taps on (x[i-1], x[i]) of even outputs, and on (x[i], x[i+1]) of odd ones."""
    return (taps[0], taps[1] + taps[2]), (taps[0] + taps[1], taps[2])


def _convolve_phases(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolve x (B, C, h, w) by the kernels of `_merge_taps`, and interleave the four outputs."""
    batch, _, height, width = x.shape
    out_channels = len(kernels[0])
    x = x.contiguous(memory_format=torch.channels_last)
    out = x.new_empty(batch, 2 * height, 2 * width, out_channels).permute(0, 3, 1, 2)
    for k, kernel in enumerate(kernels):
        row, column = divmod(k, 2)
        y = F.conv2d(x, kernel, bias, padding=1)  # (B, C_out, h + 1, w + 1)
        out[:, :, row::2, column::2] = y[:, :, row : row + height, column : column + width]
    return out  # (B, C_out, 2h, 2w)
