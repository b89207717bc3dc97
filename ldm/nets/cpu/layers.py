"""Linear layers and convolutions, each by the fastest algorithm for its shape."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.cpu import gradients, products, winograd
from ldm.nets.cpu.products import apply_linear
from ldm.nets.cpu.support import can_accelerate, can_accelerate_layer
from ldm.nets.cpu.weight_cache import get_cached_output, is_caching, transform_weight
from ldm.runtime.device import has_amx

# Minimum number of multiplications; with fewer, call overhead dominates.
MIN_LINEAR_WORK = 5e7
MIN_CONV_WORK = 5e8
MIN_TAPS_WORK = 1e7  # with gradients
# A 3x3 convolution is computed as one matrix product of all patches (im2col) for at most this many
# output pixels in the batch and at least this many weights, which torch's kernel would rearrange
# in every call.
MAX_IM2COL_PIXELS = 128
MAX_IM2COL_PIXELS_WITH_GRADIENTS = 64
MIN_IM2COL_WEIGHTS = 1e6
# With gradients, a convolution after upsampling is computed tap by tap for at least this many
# channels and at most this many products, which are temporarily in memory.
MIN_TAPS_CHANNELS = 64
MAX_TAP_PRODUCTS = 1 << 25
# Minimum number of channels. In float32, the transforms cost as much as they save with fewer; in
# bfloat16 they round once more, which adds 6 % to the rounding error of a UNet's output, and 15 to
# 40 % with fewer. With AMX, torch's channels-last convolutions are two to five times as fast.
MIN_WINOGRAD_CHANNELS = {torch.float32: 128, torch.bfloat16: math.inf if has_amx() else 640}
# Minimum number of output pixels of one image; with fewer, each product has few rows, and takes as
# long as reading its matrix.
MIN_WINOGRAD_PIXELS = 64
# Memory per thread of the largest activation in a feed-forward layer, to stay in cache.
BLOCK_BYTES = 10 << 20
# Minimum number of output pixels for which a weight is transformed for a single call: the transform
# then takes a tenth of the time that it saves.
MIN_UNCACHED_PIXELS = {torch.float32: 1024, torch.bfloat16: 8192}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + b for x (…, D_in)."""
    rows = x.shape[:-1].numel()
    is_small = rows * weight.numel() < MIN_LINEAR_WORK
    if is_small or not can_accelerate_layer(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        # In float32, packing saves only 3 to 7 % of the time, for twice the memory.
        if x.dtype == torch.bfloat16 and is_caching(weight):
            weight = transform_weight(weight, "packed", products.pack_weight)
        y = apply_linear(x.reshape(rows, -1), weight, bias)
    elif products.is_onednn_faster(rows):
        y = gradients.LinearFunction.apply(x.reshape(rows, -1), weight, bias)
    else:
        return F.linear(x, weight, bias)
    return y.view(*x.shape[:-1], -1)


def project_context(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W^T for a context x that seldom changes; cached within `cache_weights`."""
    if torch.is_grad_enabled() or not can_accelerate_layer(x, weight):
        return linear(x, weight, None)
    return get_cached_output(x, weight, lambda x: linear(x, weight, None))


def apply_in_blocks(layer: Callable[[Tensor], Tensor], x: Tensor, max_features: int) -> Tensor:
    """Apply a position-wise layer to x (B, N, C), in blocks of positions.

    A UNet's feed-forward layer takes 10 to 30 % less time if its activations stay in cache.

    Args:
        layer: Called with (1, n, C) if there are several blocks.
        max_features: Number of features of the layer's largest activation.
    """
    positions, num_threads = x.shape[:-1].numel(), torch.get_num_threads()
    num_blocks = math.ceil(positions * max_features * x.itemsize / BLOCK_BYTES / num_threads)
    if num_blocks <= 1 or not can_accelerate(x):
        return layer(x)
    blocks = x.reshape(1, positions, -1).tensor_split(num_blocks, dim=1)
    return torch.cat([layer(block) for block in blocks], 1).view(*x.shape[:-1], -1)


def conv2d(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolve x (B, C, h, w); the output may be channels last."""
    weight, bias = layer.weight, layer.bias
    if x.dim() != 4 or not can_accelerate_layer(x, weight):
        return nn.Conv2d.forward(layer, x)
    if not (x.shape[2] % 2 or x.shape[3] % 2):
        matrices = _transform_for_winograd(layer, len(x), x.shape[-2:].numel(), upsampled=False)
        if matrices is not None:
            return winograd.convolve(x, matrices, bias)
    if _should_use_im2col(layer, _count_pixels(x) // math.prod(layer.stride)):
        stride = layer.stride[0]
        rows: Tensor = gradients.Conv3x3Function.apply(x, weight, bias, stride)
        y_nhwc = rows.view(len(x), (x.shape[2] - 1) // stride + 1, -1, layer.out_channels)
        return y_nhwc.permute(0, 3, 1, 2).contiguous()
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
    if _is_3x3(layer) and can_accelerate_layer(x, weight):
        if torch.is_grad_enabled():
            if _should_sum_taps(layer, pixels):
                y: Tensor = gradients.UpsampleConv3x3Function.apply(x, weight, bias)
                y_nhwc = y.view(len(x), 2 * x.shape[2], 2 * x.shape[3], layer.out_channels)
                return y_nhwc.permute(0, 3, 1, 2).contiguous()
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
    """Return whether im2col is the fastest algorithm for a number of output pixels."""
    limit = MAX_IM2COL_PIXELS_WITH_GRADIENTS if torch.is_grad_enabled() else MAX_IM2COL_PIXELS
    is_faster = layer.weight.numel() >= MIN_IM2COL_WEIGHTS and pixels <= limit
    return is_faster and _is_3x3(layer, strides=(1, 2))


def _should_sum_taps(layer: nn.Conv2d, pixels: int) -> bool:
    """Return whether `UpsampleConv3x3Function` is the fastest for a number of input pixels."""
    has_few_products = 9 * pixels * layer.out_channels <= MAX_TAP_PRODUCTS
    is_large = pixels * layer.weight.numel() >= MIN_TAPS_WORK
    return is_large and has_few_products and layer.out_channels >= MIN_TAPS_CHANNELS


def _transform_for_winograd(
    layer: nn.Conv2d, images: int, pixels_per_image: int, *, upsampled: bool
) -> list[Tensor] | None:
    """Transform the weight for output images of a size; return None if Winograd is not faster."""
    weight, pixels = layer.weight, images * pixels_per_image
    is_narrow = min(layer.in_channels, layer.out_channels) < MIN_WINOGRAD_CHANNELS[weight.dtype]
    is_small = pixels_per_image < MIN_WINOGRAD_PIXELS or pixels * weight.numel() < MIN_CONV_WORK
    if torch.is_grad_enabled() or is_narrow or is_small or not _is_3x3(layer):
        return None
    if pixels < MIN_UNCACHED_PIXELS[weight.dtype] and not is_caching(weight):
        return None
    tiles = pixels // 4  # rows of the products
    should_pack = is_caching(weight) and not products.has_few_rows(tiles, weight.dtype)

    def transform(weight: Tensor) -> list[Tensor]:
        matrices = winograd.transform_kernel(weight, upsampled=upsampled).unbind()
        return [products.pack_weight(matrix) if should_pack else matrix for matrix in matrices]

    return transform_weight(weight, "Winograd, upsampled" if upsampled else "Winograd", transform)


def _merge_taps(weight: Tensor) -> list[Tensor]:
    """Return 4 kernels (C_out, C_in, 2, 2), for even and odd rows and columns of the output.

    After upsampling, each output pixel depends on only 2x2 pixels of x.
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
