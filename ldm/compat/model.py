"""`ldm.modules.diffusionmodules.model` of the original: encoder and decoder of the autoencoder.

Classes derive from those of `ldm.nets.autoencoder`, but have torch's own layers. Layers, methods
and `nonlinearity` are looked up at call time, so that they can be monkeypatched.
"""

import math as math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch as torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ldm.compat.class_swap import COMPAT_CLASSES, CompatModule, swap_classes
from ldm.nets import autoencoder, blocks
from ldm.nets.autoencoder import ATTENTION_TYPES, NORM_EPS, AutoencoderConfig
from ldm.runtime.errors import make_unknown_name_error

np = np
DEFAULT_RESOLUTION = 256  # as in SD's configs; it cannot be inferred from weights


def nonlinearity(x: Tensor) -> Tensor:
    """Compute SiLU, x sigmoid(x)."""
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.Module:
    """Build the norm layer of the autoencoder and of SpatialTransformer."""
    # Its eps is 1e-6; the norms of the UNet's residual blocks have 1e-5.
    return nn.GroupNorm(num_groups, in_channels, eps=NORM_EPS)


class ResampleBase(CompatModule):
    """Base class of Upsample and Downsample."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__(in_channels, use_conv=with_conv)
        swap_classes(self)

    @property
    def with_conv(self) -> bool:
        """Whether there is a convolution."""
        return any(isinstance(layer, nn.Conv2d) for layer in self.children())


class Upsample(ResampleBase, blocks.Upsample):
    """Nearest-neighbor upsampling by 2, with a 3x3 convolution if `with_conv`."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (B, C, 2h, 2w)
        return x if self.conv is None else self.conv(x)


class Downsample(ResampleBase, autoencoder.AsymmetricDownsample):
    """Downsampling by 2 (rounded down), with padding at the right and bottom only."""


class ResnetBlock(CompatModule, autoencoder.ResnetBlock):
    """Norm, SiLU and convolution, twice, with a residual connection.

    Args:
        out_channels: None = `in_channels`.
        conv_shortcut: Whether the shortcut of a block that changes the number of channels is a
            3x3 convolution, else 1x1.
        temb_channels: Features of the time embedding that is added between the convolutions; 0 =
            no time embedding.
    """

    use_conv_shortcut: bool

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 512,
    ) -> None:
        out_channels = out_channels or in_channels
        super().__init__(in_channels=in_channels, out_channels=out_channels, dropout=dropout)
        swap_classes(self)
        self.use_conv_shortcut = conv_shortcut
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        if in_channels != out_channels and conv_shortcut:
            del self.nin_shortcut
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def set_original_attributes(self) -> None:
        self.in_channels = self.conv1.in_channels
        self.out_channels = self.conv1.out_channels
        self.use_conv_shortcut = False
        if isinstance(self.nin_shortcut, nn.Identity):
            del self.nin_shortcut

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Transform x (B, C, h, w); add a time embedding (B, temb_channels) unless it is None."""
        h = self.conv1(nonlinearity(self.norm1(x)))  # (B, C_out, h, w)
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(CompatModule, autoencoder.AttnBlock):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels)
        swap_classes(self)

    def set_original_attributes(self) -> None:
        self.in_channels = self.norm.num_channels


MemoryEfficientAttnBlock = AttnBlock


def make_attn(
    in_channels: int, attn_type: str = "vanilla", attn_kwargs: object = None
) -> nn.Module:
    """Build an AttnBlock, or nn.Identity for attn_type "none"."""
    if attn_type not in ATTENTION_TYPES:
        raise make_unknown_name_error("attn_type", attn_type, ATTENTION_TYPES)
    return nn.Identity() if attn_type == "none" else AttnBlock(in_channels)


class EncoderDecoderBase(CompatModule):
    """Base class of Encoder and Decoder, which have the same constructor.

    Args:
        double_z: Whether the encoder returns mean and log variance (2 z_channels), else z_channels.
        ignored: Other keys of a `ddconfig`. The others: see
            `ldm.nets.autoencoder.AutoencoderConfig`.
    """

    double_z = True

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignored: object,
    ) -> None:
        config = AutoencoderConfig(
            ch=ch,
            out_ch=out_ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            resamp_with_conv=resamp_with_conv,
            in_channels=in_channels,
            resolution=resolution,
            z_channels=z_channels,
            give_pre_end=give_pre_end,
            tanh_out=tanh_out,
            use_linear_attn=use_linear_attn,
            attn_type=attn_type,
        )
        super().__init__(config)
        self.double_z = double_z
        swap_classes(self)
        self.ch = ch
        self.in_channels = in_channels
        self.resolution = resolution


class Encoder(EncoderDecoderBase, autoencoder.Encoder):
    """Images (B, in_channels, H, W) -> moments (B, 2 z_channels, h, w)."""

    def set_original_attributes(self) -> None:
        if not self.double_z:
            channels, z_channels = self.conv_out.in_channels, self.conv_out.out_channels // 2
            self.conv_out = nn.Conv2d(  # type: ignore[assignment]  # torch's own, as all layers
                channels, z_channels, 3, padding=1
            )
        self.ch = self.conv_in.out_channels
        self.temb_ch = 0
        self.in_channels = self.conv_in.in_channels
        self.num_resolutions = len(self.down)
        self.num_res_blocks = len(_cast_levels(self.down)[0].block)
        self.resolution = DEFAULT_RESOLUTION

    def forward(self, x: Tensor) -> Tensor:
        # Autoencoders have no time embedding, but third-party blocks take the argument.
        temb = None
        h = self.conv_in(x)  # (B, ch, H, W)
        for i, level in enumerate(_cast_levels(self.down)):
            for j, block in enumerate(level.block):
                h = block(h, temb)
                if len(level.attn) > 0:
                    h = level.attn[j](h)
            if i != self.num_resolutions - 1:
                h = level.downsample(h)  # (B, C_i, H / 2^i, W / 2^i)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Decoder(EncoderDecoderBase, autoencoder.Decoder):
    """Latents (B, z_channels, h, w) -> images (B, out_ch, H, W).

    Levels run in reverse order: up[0], of full resolution, is the last.

    Attributes:
        last_z_shape: Shape of the last input.
    """

    def set_original_attributes(self) -> None:
        self.ch = self.conv_out.in_channels
        self.temb_ch = 0
        self.in_channels = 3  # of the encoder's images
        self.num_resolutions = len(self.up)
        self.num_res_blocks = len(_cast_levels(self.up)[0].block) - 1
        self.resolution = DEFAULT_RESOLUTION
        side = self.resolution // 2 ** (self.num_resolutions - 1)
        self.z_shape = (1, self.conv_in.in_channels, side, side)
        self.last_z_shape = torch.Size(self.z_shape)
        for level in _cast_levels(self.up):
            if isinstance(level.upsample, blocks.Upsample):
                level.upsample.__class__ = Upsample

    def forward(self, z: Tensor) -> Tensor:
        self.last_z_shape = z.shape
        temb = None
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        for i, level in reversed(list(enumerate(_cast_levels(self.up)))):
            for j, block in enumerate(level.block):
                h = block(h, temb)
                if len(level.attn) > 0:
                    h = level.attn[j](h)
            if i != 0:
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(nonlinearity(self.norm_out(h)))  # (B, out_ch, H, W)
        return torch.tanh(h) if self.tanh_out else h


def _cast_levels(modules: nn.ModuleList) -> list[autoencoder.ResolutionLevel]:
    return cast(list[autoencoder.ResolutionLevel], list(modules))


COMPAT_CLASSES.update(
    {
        autoencoder.Encoder: Encoder,
        autoencoder.Decoder: Decoder,
        autoencoder.ResnetBlock: ResnetBlock,
        autoencoder.AttnBlock: AttnBlock,
        autoencoder.AsymmetricDownsample: Downsample,
    }
)
