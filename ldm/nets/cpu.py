"""Layers on x86 CPUs: equal to torch's own up to rounding, faster. Without gradients:

    torch rearranges weights for its kernels in every call    -> once, and keeps them (packs)
    linear in float32 goes to MKL, slow on some CPUs          -> oneDNN
    3x3 convolution does 9 products per pixel and channels    -> winograd.py, 4 products
    3x3 convolution behind a nearest-neighbour doubling       -> 2.25 products, or 4
    glibc returns large buffers after every use               -> `keep_memory`

With gradients, in float32, some layers are those of gradients.py, which keeps nothing. All this is
for plain CPU tensors of the dtype of the weights, and never under autocast or torch.compile;
everything else takes torch's ordinary way, as does all after `enable(False)`: use that to count
operations or to batch gradients (`is_grads_batched`), which know ordinary operators only.

Packs more than double the memory of weights (convolutions by winograd.py take 1.8 times theirs).
They are made at the first use of a weight, and only while half of the free memory would remain.
`.to()` and any change of the weights drops them; copies and pickles of a layer are without. Changes
are noticed by address, by version and, as writing through `.data` changes neither, by a few of the
values.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ldm.nets import gradients, winograd
from ldm.nets.gradients import product

PIXELS = 4096  # whose moments float32 sums well
ROWS = 512  # that a pack is made for; it serves any number
# Multiplications; below, the overhead of the calls shows.
LINEAR_WORK = 5e7
CONV_WORK = 5e8
DOUBLED_WORK = 1e7  # with gradients
# Where a convolution with gradients is one matrix product: at most so many pixels of output, in
# all pictures, and at least so many weights.
FEW_PIXELS, MANY_WEIGHTS = 64, 1e6
# Where one behind a doubling goes tap by tap: from so many channels on, and with at most so many
# products, which are in memory for a short time.
TAPS_WIDTH, TAPS = 64, 1 << 25
# Channels. In float32, with fewer the transforms cost as much as they save; in bfloat16 they round
# once more, which adds 6 % to the rounding error of a UNet's output, but 15 to 40 % with fewer.
WINOGRAD_WIDTH = {torch.float32: 128, torch.bfloat16: 640}
SAMPLES = 16

_enabled = True


def enable(on: bool = True) -> None:
    """Switch the fast paths of all layers on or off."""
    global _enabled
    _enabled = on


def keep_memory() -> bool:
    """Let glibc keep freed buffers for the next layer, in this whole process; False if it cannot.

    Without it every large activation is mapped, faulted in page by page, and unmapped again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_… of malloc.h
    sizes = (1 << 30, 32 << 20)  # older versions refuse more than 32 MiB
    return any(mallopt(mmap_threshold, size) for size in sizes) and bool(
        mallopt(trim_threshold, (1 << 31) - 1)
    )


class Packs:
    """What was made of one weight; empty again in a copy or pickle of its layer."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.state: tuple[int, int, Tensor] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Packs, ()

    def get(self, kind: str, weight: Tensor, make: Callable[[Tensor], Any]) -> Any:
        """The pack of this kind, None where it does not fit.

        It is made at the first use, even if there were no other: packed or not, the last digits
        differ, and a picture must not depend on what its model did before.
        """
        self._forget_if_changed(weight)
        if kind not in self.made:
            if not _fits(2 * weight.nbytes):
                return None
            self.made[kind] = make(weight.detach())
        return self.made[kind]

    def _forget_if_changed(self, weight: Tensor) -> None:
        address = weight.data_ptr()
        version = 0 if weight.is_inference() else weight._version
        some = weight.detach().as_strided((SAMPLES,), (weight.numel() // SAMPLES,))
        if self.state is not None:
            old_address, old_version, old = self.state
            if (address, version) == (old_address, old_version) and torch.equal(some, old):
                return
        self.made.clear()
        self.state = address, version, some.clone()


def linear(packs: Packs, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b. x: (…, D_in). Returns (…, D_out)."""
    rows = x.shape[:-1].numel()
    if rows * weight.numel() >= LINEAR_WORK and _learns(x, weight):
        y: Tensor = gradients.Linear.apply(x.reshape(rows, -1), weight, bias)
        return y.view(*x.shape[:-1], -1)
    if not _applies(x, weight, rows / LINEAR_WORK):
        return F.linear(x, weight, bias)
    packed = packs.get("linear", weight, _pack_linear)
    return product(x, weight if packed is None else packed, bias)


def conv2d(packs: Packs, x: Tensor, layer: nn.Conv2d) -> Tensor:
    """The convolution `layer` of x (B, C, h, w); channels last where a fast path was taken."""
    weight = layer.weight
    *batch, _, height, width = x.shape
    rows = math.prod(batch) * height * width
    if _is_one_product(x, layer) and _learns(x, weight):
        stride = layer.stride[0]
        pixels: Tensor = gradients.Convolution.apply(x, weight, layer.bias, stride)
        maps = pixels.view(len(x), (height - 1) // stride + 1, -1, layer.out_channels)
        return maps.permute(0, 3, 1, 2).contiguous()
    simple = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    # Torch's own kernels are slow where x, but not the weight, is channels last: stay on this path.
    follows = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not (simple and _applies(x, weight, 1.0 if follows else rows / CONV_WORK)):
        return layer._conv_forward(x, weight, layer.bias)
    if not (height % 2 or width % 2) and _suits_winograd(layer, rows):
        matrices = packs.get("winograd", weight, _pack_winograd)
        if matrices is not None:
            return winograd.convolve(x, matrices, layer.bias, product)
        return layer._conv_forward(x, weight, layer.bias)
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    packed = packs.get("conv", weight, lambda w: _pack_conv(w, *geometry, list(x.shape)))
    if packed is None:
        return layer._conv_forward(x, weight, layer.bias)
    return _convolution(x, packed, layer.bias, *geometry)


def conv2d_doubled(packs: Packs, x: Tensor, layer: nn.Conv2d) -> Tensor:
    """conv2d(layer) of x doubled by nearest neighbour. Returns (B, C_out, 2h, 2w)."""
    rows = x.shape[0] * x.shape[-2:].numel()
    if _suits_taps(layer, rows) and _learns(x, layer.weight):
        pixels: Tensor = gradients.DoubledConvolution.apply(x, layer.weight, layer.bias)
        maps = pixels.view(len(x), 2 * x.shape[2], 2 * x.shape[3], layer.out_channels)
        return maps.permute(0, 3, 1, 2).contiguous()
    if _is_3x3(layer) and _applies(x, layer.weight, rows / CONV_WORK):
        if _suits_winograd(layer, 4 * rows):
            matrices = packs.get("doubled", layer.weight, _pack_doubled)
            if matrices is not None:
                return winograd.convolve(x, matrices, layer.bias, product)
        else:
            phases = packs.get("phases", layer.weight, lambda w: _pack_phases(w, x.shape))
            if phases is not None:
                return _convolve_phases(x, phases, layer.bias)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return layer._conv_forward(x, layer.weight, layer.bias)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm; with moments summed in blocks where torch's would lose digits.

    Its kernel for channels last adds up all pixels in one float32 number: at 512 x 512 the error is
    3e-5, six hundred times that of its other kernel. Here moments of blocks are put together.
    """
    height, width = x.shape[-2:]
    large = x.dim() == 4 and height * width > PIXELS and x.dtype == torch.float32
    if not (large and x.is_contiguous(memory_format=torch.channels_last) and applies(x)):
        return F.group_norm(x, groups, weight, bias, eps)
    batch, channels = x.shape[:2]
    rows = next(n for n in range(max(1, PIXELS // width), 0, -1) if height % n == 0)
    pixels = x.permute(0, 2, 3, 1)  # (B, h, w, C)
    blocks = pixels.reshape(-1, rows, width, channels).permute(0, 3, 1, 2)
    moments = (_moments(block, groups) for block in blocks.split(1))
    means, variances = (torch.cat(m).view(batch, -1, groups) for m in zip(*moments, strict=True))
    mean = means.mean(1, keepdim=True)  # (B, 1, groups), float64
    variance = (variances + (means - mean).square()).mean(1, keepdim=True)
    scale = weight.view(groups, -1) * (variance + eps).rsqrt().view(batch, groups, 1)
    shift = bias.view(groups, -1) - scale * mean.view(batch, groups, 1)
    scale, shift = (y.to(x.dtype).view(batch, 1, 1, channels) for y in (scale, shift))
    return torch.addcmul(shift, pixels, scale).permute(0, 3, 1, 2)


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of one block, in float64."""
    tiny = 1e-12
    pixels = x.shape[-2:].numel()
    _, mean, rstd = torch.native_group_norm(x, None, None, 1, x.shape[1], pixels, groups, tiny)
    return mean.double(), rstd.double() ** -2 - tiny


def applies(x: Tensor) -> bool:
    """Whether fast paths are on and may be taken with this input."""
    return not torch.is_grad_enabled() and _is_plain(x)


def _applies(x: Tensor, weight: Tensor, share: float) -> bool:
    return (
        share * weight.numel() >= 1.0
        and applies(x)
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == x.dtype
        and weight.is_contiguous()
    )


def _learns(x: Tensor, weight: Tensor) -> bool:
    """Whether the layers of gradients.py may be taken."""
    return (
        torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and _is_plain(x)
    )


def _is_plain(x: Tensor) -> bool:
    return (
        _enabled
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and x.dtype in _dtypes()
    )


@functools.cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """Those that oneDNN computes fast here; the operators needed are private: tried once."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return ()
    with torch.random.fork_rng(devices=[]):  # initialising a layer draws numbers
        x, layer = torch.ones(2, 16), nn.Conv2d(16, 16, 3, padding=1)
    try:
        product(x, _pack_linear(torch.ones(16, 16)), None)
        geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        packed = _pack_conv(layer.weight.detach(), *geometry, [1, 16, 2, 2])
        _convolution(torch.ones(1, 16, 2, 2), packed, layer.bias, *geometry)
        bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError, TypeError):
        return ()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


def _fits(nbytes: int) -> bool:
    """Whether half of the free memory, of the machine and of a container, would remain."""
    free = [nbytes * 2]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) << 10)
        limit, used = (
            Path("/sys/fs/cgroup", f"memory.{x}").read_text() for x in ("max", "current")
        )
        free.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no such file, or a limit of "max"
    return nbytes <= min(free[1:], default=free[0]) // 2


def _is_3x3(layer: nn.Conv2d, strides: Sequence[int] = (1,)) -> bool:
    return (
        layer.kernel_size == (3, 3)
        and layer.padding == layer.dilation == (1, 1)
        and layer.stride in [(stride, stride) for stride in strides]
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


def _is_one_product(x: Tensor, layer: nn.Conv2d) -> bool:
    """Whether that serves a convolution with gradients best."""
    pixels = len(x) * x.shape[-2:].numel() / math.prod(layer.stride)
    large = layer.weight.numel() >= MANY_WEIGHTS and pixels <= FEW_PIXELS
    return large and x.dim() == 4 and _is_3x3(layer, strides=(1, 2))


def _suits_taps(layer: nn.Conv2d, rows: int) -> bool:
    """The same of a convolution tap by tap, behind a doubling of `rows` pixels."""
    work, taps = rows * layer.weight.numel(), 9 * rows * layer.out_channels
    is_wide = layer.out_channels >= TAPS_WIDTH
    return work >= DOUBLED_WORK and taps <= TAPS and is_wide and _is_3x3(layer)


def _suits_winograd(layer: nn.Conv2d, rows: int) -> bool:
    return (
        _is_3x3(layer)
        and min(layer.in_channels, layer.out_channels) >= WINOGRAD_WIDTH[layer.weight.dtype]
        and rows * layer.weight.numel() >= CONV_WORK
    )


def _pack_linear(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def _convolution(x: Tensor, packed: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    convolution = torch.ops.mkldnn._convolution_pointwise
    out: Tensor = convolution(x, packed, bias, *geometry, "none", [], "")
    return out


def _pack_conv(weight: Tensor, *geometry_and_size: Any) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry_and_size)
    return packed


def _pack_winograd(weight: Tensor) -> list[Tensor]:
    return _packed_matrices(weight, doubled=False)


def _pack_doubled(weight: Tensor) -> list[Tensor]:
    return _packed_matrices(weight, doubled=True)


def _packed_matrices(weight: Tensor, *, doubled: bool) -> list[Tensor]:
    matrices = winograd.transform(weight.float(), doubled=doubled)
    return [_pack_linear(matrix.to(weight.dtype)) for matrix in matrices]


def _pack_phases(weight: Tensor, size: torch.Size) -> list[Tensor]:
    """Each output pixel of a doubled picture sees 2x2 pixels of x: four 2x2 kernels."""
    g = weight.float()
    rows = [torch.stack(two, 2) for two in _merged(g.unbind(2))]  # (C_out, C_in, 2, 3) each
    kernels = [torch.stack(two, 3) for row in rows for two in _merged(row.unbind(3))]
    return [_pack_conv(k.to(weight.dtype), (1, 1), (1, 1), (1, 1), 1, list(size)) for k in kernels]


def _merged(taps: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Taps on (x[i-1], x[i]) of even outputs, and on (x[i], x[i+1]) of odd ones."""
    return (taps[0], taps[1] + taps[2]), (taps[0] + taps[1], taps[2])


def _convolve_phases(x: Tensor, phases: list[Tensor], bias: Tensor | None) -> Tensor:
    batch, _, height, width = x.shape
    features = phases[0].shape[0]
    out = x.new_empty(batch, 2 * height, 2 * width, features).permute(0, 3, 1, 2)
    for k, packed in enumerate(phases):
        row, column = divmod(k, 2)
        y = _convolution(x, packed, bias, (1, 1), (1, 1), (1, 1), 1)  # (B, C_out, h + 1, w + 1)
        out[:, :, row::2, column::2] = y[:, :, row : row + height, column : column + width]
    return out  # (B, C_out, 2h, 2w)
