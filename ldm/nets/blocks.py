"""Layers of the UNet and the autoencoder, and the embedding of timesteps.

On CPUs, `ldm.nets.cpu` computes linear layers, convolutions and group norms, with equal results.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.nets import cpu
from ldm.nets.circular import crop_circular, get_circular_axes, pad_circular

NUM_GROUPS = 32  # of every GroupNorm


class Layer(nn.Module):
    """A module whose calls are typed to return a tensor; those of `nn.Module` return Any."""

    __call__: Callable[..., Tensor]


class CheckpointedLayer(Layer):
    """A layer with gradient checkpointing: activations are recomputed in the backward pass.

    Gradients are equal, and take less memory: Chen et al. 2016 (arXiv:1604.06174).

    Attributes:
        compute: The forward pass of a subclass, without checkpointing.
        use_checkpoint: Whether activations are recomputed; initially not.
    """

    compute: Callable[..., Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.use_checkpoint = False

    def forward(self, *args: Tensor | None) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.compute, *args, use_reentrant=False)
            return out
        return self.compute(*args)


class Linear(nn.Linear, Layer):
    """torch's layer, computed by `ldm.nets.cpu` on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return cpu.linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d, Layer):
    """A convolution that wraps around the edges within `circular_padding`."""

    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        if not get_circular_axes() or self.padding == (0, 0):
            return cpu.conv2d(x, self)
        # x is wrapped by whole strides, which keeps the output pixels in place. The layer also
        # pads with zeros: the `excess` output pixels at each side that see them are cropped.
        stride, padding = self.stride[0], int(self.padding[0])
        excess = math.ceil(padding / stride)
        return crop_circular(cpu.conv2d(pad_circular(x, excess * stride), self), excess)


class UpsampleConv2d(Conv2d):
    """A convolution after nearest-neighbor upsampling by 2."""

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Convolve `upsample_nearest(x, size)` of x (B, C, h, w); `size` as in that function."""
        height, width = x.shape[-2:]
        if size is None or tuple(size) == (2 * height, 2 * width):
            # One wrapped pixel of x becomes two of the output, which are cropped as in Conv2d.
            y = cpu.upsample_conv2d(pad_circular(x, 1), self)
            return crop_circular(y, 2)  # (B, C_out, 2h, 2w)
        return super().forward(upsample_nearest(x, size))


class LayerNorm(nn.LayerNorm, Layer):
    """LayerNorm that keeps the dtype of x under autocast, where the kernel returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class GroupNorm(nn.GroupNorm, Layer):
    """GroupNorm of 32 groups, with mean and variance in float32 for any dtype."""

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        if channels % NUM_GROUPS:
            raise ValueError(
                f"{channels} channels are not a multiple of {NUM_GROUPS}, which GroupNorm needs\n"
                "hint: choose model_channels (or ch) and channel_mult so that all levels have "
                f"multiples of {NUM_GROUPS}"
            )
        super().__init__(NUM_GROUPS, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            y = cpu.group_norm(x, NUM_GROUPS, self.weight, self.bias, self.eps)
            return y.to(x.dtype)  # under autocast the kernel returns float32
        y = F.group_norm(x.float(), NUM_GROUPS, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter to zero, so that a residual block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Embed timesteps (B,) as [cos(t f_0) … | sin(t f_0) …], (B, dim) float32.

    f_k = max_period ** (-k / (dim // 2)); for odd dim, the last feature is 0. Vaswani et al. 2017
    (arXiv:1706.03762), section 3.5.
    """
    # In float32 for networks of any dtype: timesteps go to 999, where float16 is spaced by 0.5.
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(max_period) * k / half)  # (B, dim // 2)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))  # (B, dim)


def upsample_nearest(x: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Upsample x (B, C, h, w) by 2, nearest neighbor.

    Args:
        size: (height, width) to crop to: odd sides are rounded up when halved, so that doubling
            gives one pixel too many. None = 2h x 2w.
    """
    x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (B, C, 2h, 2w)
    return x if size is None else x[..., : size[0], : size[1]]


class Upsample(Layer):
    """Nearest-neighbor upsampling by 2, then a 3x3 convolution if `use_conv`.

    Args:
        out_channels: Channels of the convolution's output; None = `channels`.
    """

    def __init__(
        self, channels: int, *, out_channels: int | None = None, use_conv: bool = True
    ) -> None:
        super().__init__()
        conv = UpsampleConv2d(channels, out_channels or channels, 3, padding=1)
        self.conv = conv if use_conv else None

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        if self.conv is None:
            return upsample_nearest(x, size)  # (B, C, 2h, 2w)
        return self.conv(x, size)  # (B, C_out, 2h, 2w)


class Downsample(Layer):
    """Downsampling by 2: a 3x3 convolution of stride 2 if `use_conv`, else average pooling.

    Args:
        out_channels: Channels of the convolution's output; None = `channels`.
    """

    def __init__(
        self, channels: int, *, out_channels: int | None = None, use_conv: bool = True
    ) -> None:
        super().__init__()
        conv = Conv2d(channels, out_channels or channels, 3, stride=2, padding=1)
        self.op = conv if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(x)  # (B, C_out, h / 2, w / 2)
        return x


class ResBlock(CheckpointedLayer):
    """Norm, SiLU and convolution, twice, with a residual connection and a time embedding.

    The embedding acts before or in the second norm. Dhariwal and Nichol 2021 (arXiv:2105.05233).

    Args:
        emb_channels: Features of the time embedding.
        out_channels: None = `channels`.
        use_conv: If the number of channels changes, whether the skip connection is a 3x3
            convolution, else 1x1.
        use_scale_shift_norm: Whether the embedding scales and shifts the second norm, instead of
            being added before it.
        up: Whether both branches are upsampled by 2 before the first convolution.
        down: Whether both branches are downsampled by 2 instead.
    """

    def __init__(
        self,
        *,
        channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample = _build_resampler(channels, up=up, down=down)
        emb_out_channels = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, emb_out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if out_channels != channels:
            kernel = 3 if use_conv else 1
            self.skip_connection = Conv2d(channels, out_channels, kernel, padding=kernel // 2)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        in_norm, silu, in_conv = self.in_layers
        h: Tensor = in_conv(self.resample(silu(in_norm(x))))  # (B, C_out, h, w)
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]  # (B, C_out or 2 C_out, 1, 1)
        if self.use_scale_shift_norm:
            out_norm, silu, dropout, out_conv = self.out_layers
            scale, shift = emb.chunk(2, dim=1)
            h = out_norm(h) * (1 + scale) + shift
            h = out_conv(dropout(silu(h)))
        else:
            h = self.out_layers(h + emb)
        skip: Tensor = self.skip_connection(self.resample(x))  # (B, C_out, h, w)
        return skip + h


def _build_resampler(channels: int, *, up: bool, down: bool) -> nn.Module:
    if up:
        return Upsample(channels, use_conv=False)
    if down:
        return Downsample(channels, use_conv=False)
    return nn.Identity()
