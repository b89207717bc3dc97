"""`ldm.modules.diffusionmodules.openaimodel` of the original: the UNet.

Classes derive from those of `ldm.nets`, but have torch's own layers. Layers, methods and globals of
this module are looked up at call time, so that they can be monkeypatched. One of them is `th`,
which is replaced by an object whose `cat` accepts feature maps of different sizes.
"""

import math as math
from abc import abstractmethod as abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ldm.compat.attention import SpatialTransformer
from ldm.compat.class_swap import COMPAT_CLASSES, CompatModule, swap_classes
from ldm.compat.diffusion_util import (
    avg_pool_nd as avg_pool_nd,
    checkpoint,
    conv_nd as conv_nd,
    linear as linear,
    normalization as normalization,
    timestep_embedding,
    zero_module as zero_module,
)
from ldm.compat.util import exists as exists, to_builtin
from ldm.nets import blocks, transformer, unet

np = np


def convert_module_to_f16(x: object) -> None:
    """Do nothing, as in the original."""


convert_module_to_f32 = convert_module_to_f16


class Timestep(nn.Module):
    """Timesteps (B,) -> sines and cosines (B, dim) float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.dim)


class TimestepBlock(nn.Module):
    """A layer that takes the timestep embedding as its second argument."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Runs layers in order, and passes the timestep embedding or context to those that take it."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: unet.Context = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class ResampleBase(CompatModule):
    """Base class of Upsample and Downsample.

    Args:
        out_channels: None = `channels`.
    """

    channels: int
    out_channels: int
    use_conv: bool

    def __init__(
        self,
        channels: int,
        use_conv: bool,
        dims: int = 2,
        out_channels: int | None = None,
        padding: int = 1,
    ) -> None:
        _check_dims(dims)
        super().__init__(channels, out_channels=out_channels, use_conv=use_conv)
        if (conv := self._find_conv()) is not None:
            conv.padding = (padding, padding)
        self.channels = channels  # in case there is no convolution from which to infer them
        self.out_channels = channels
        swap_classes(self)

    def set_original_attributes(self) -> None:
        self.dims = 2
        conv = self._find_conv()
        self.use_conv = conv is not None
        if conv is not None:
            self.channels = conv.in_channels
            self.out_channels = conv.out_channels

    def _find_conv(self) -> nn.Conv2d | None:
        return next((layer for layer in self.children() if isinstance(layer, nn.Conv2d)), None)


class Upsample(ResampleBase, blocks.Upsample):
    """Nearest-neighbor upsampling by 2, with a 3x3 convolution if `use_conv`."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (B, C, 2h, 2w)
        return x if self.conv is None else self.conv(x)  # (B, C_out, 2h, 2w)


class Downsample(ResampleBase, blocks.Downsample):
    """Downsampling by 2, by a 3x3 convolution of stride 2 if `use_conv`, else average pooling."""


class ResBlock(CompatModule, blocks.ResBlock, TimestepBlock):
    """Residual block: norm, SiLU, conv; add the timestep embedding; norm, SiLU, dropout, conv.

    Args:
        out_channels: None = `channels`. The others: see `ldm.nets.blocks.ResBlock`.

    Attributes:
        updown: Whether both branches are resampled, by `h_upd` and `x_upd`.
    """

    channels: int
    out_channels: int
    emb_channels: int
    dropout: float

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        _check_dims(dims)
        super().__init__(
            channels=channels,
            emb_channels=emb_channels,
            dropout=dropout,
            out_channels=out_channels,
            use_conv=use_conv,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
            up=up,
            down=down,
        )
        swap_classes(self)
        self.use_conv = use_conv  # unknown to `swap_classes` if the channels do not change

    def set_original_attributes(self) -> None:
        conv, emb_linear, dropout = self.in_layers[-1], self.emb_layers[-1], self.out_layers[2]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(emb_linear, nn.Linear)
        assert isinstance(dropout, nn.Dropout)
        self.channels, self.out_channels = conv.in_channels, conv.out_channels
        self.emb_channels, self.dropout = emb_linear.in_features, dropout.p
        skip, resampler = self.skip_connection, self.resample
        self.use_conv = isinstance(skip, nn.Conv2d) and skip.kernel_size == (3, 3)
        self.updown = isinstance(resampler, (Upsample, Downsample))
        if isinstance(resampler, (Upsample, Downsample)):
            resampler.channels = self.channels
            resampler.out_channels = self.channels
        self.h_upd = resampler
        self.x_upd = resampler
        del self.resample

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """Transform x (B, C, h, w), given the embedding of the timestep (B, emb_channels)."""
        out: Tensor = checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)
        return out

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            h = self.h_upd(self.in_layers[:-1](x))
            x = self.x_upd(x)
            h = self.in_layers[-1](h)
        else:
            h = self.in_layers(x)  # (B, C_out, h, w)
        emb = self.emb_layers(emb).type(h.dtype)[:, :, None, None]  # (B, C_out or 2 C_out, 1, 1)
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        skip: Tensor = self.skip_connection(x)
        out: Tensor = skip + h
        return out


class AttentionBlock(CompatModule, transformer.AttentionBlock):
    """Self-attention over all positions, with a residual connection."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__(
            channels=channels,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_checkpoint=use_checkpoint,
            use_new_attention_order=use_new_attention_order,
        )
        swap_classes(self)

    def set_original_attributes(self) -> None:
        self.channels = self.norm.num_channels
        self.num_heads = self.heads

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend over the positions of x (B, C, h, w)."""
        out: Tensor = checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)
        return out

    def _forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


class UNetModel(CompatModule, unet.UNet):
    """The denoising network; for the arguments see `ldm.nets.unet.UNet`.

    Attributes:
        dtype: Dtype to which x is converted; callers may set it, as `half()` does not change it.
        num_res_blocks: Number of residual blocks of each level, always a list.
    """

    dtype: torch.dtype = torch.float32

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: Literal[2] = 2,
        num_classes: int | Literal["continuous", "sequential", "timestep"] | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        use_bf16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: unet.TransformerDepth = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            model_channels=model_channels,
            out_channels=out_channels,
            num_res_blocks=to_builtin(num_res_blocks),
            attention_resolutions=to_builtin(attention_resolutions),
            dropout=dropout,
            channel_mult=to_builtin(channel_mult),
            conv_resample=conv_resample,
            dims=dims,
            num_classes=num_classes,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
            use_spatial_transformer=use_spatial_transformer,
            transformer_depth=to_builtin(transformer_depth),
            context_dim=to_builtin(context_dim),
            n_embed=n_embed,
            legacy=legacy,
            disable_self_attentions=to_builtin(disable_self_attentions),
            num_attention_blocks=to_builtin(num_attention_blocks),
            disable_middle_self_attn=disable_middle_self_attn,
            use_linear_in_transformer=use_linear_in_transformer,
            adm_in_channels=adm_in_channels,
        )
        swap_classes(self)
        self.image_size = image_size
        self.dtype = torch.float16 if use_fp16 else torch.float32
        if use_bf16:
            self.dtype = torch.bfloat16

    def set_original_attributes(self) -> None:
        self.image_size = 32  # as in SD's configs; it cannot be inferred from weights
        self.dtype = next(self.parameters()).dtype
        self.predict_codebook_ids = False
        if self.num_heads_upsample == -1:
            self.num_heads_upsample = self.num_heads
        self.num_res_blocks = list(self._level_num_res_blocks)
        # The sum of the channels of all blocks: each level has n + 1 input blocks, including the
        # downsampling or middle block, and as many output blocks.
        levels = zip(self.num_res_blocks, self._level_channels, strict=True)
        self._feature_size = self.model_channels + sum(
            2 * (num_blocks + 1) * channels for num_blocks, channels in levels
        )
        channels = self.model_channels
        for block in [*self.input_blocks, *self.output_blocks]:
            for layer in block:
                if isinstance(layer, ResBlock):
                    channels = layer.out_channels
                elif isinstance(layer, (Upsample, Downsample)):
                    # Set again, as layers without a convolution cannot infer them.
                    layer.channels = channels
                    layer.out_channels = channels

    def convert_to_fp16(self) -> None:
        """Do nothing, as in the original."""

    convert_to_fp32 = convert_to_fp16

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: unet.Context = None,
        y: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Predict eps, v or x0 of noisy latents x (B, in_channels, h, w).

        Args:
            timesteps, context, y: See `ldm.nets.unet.UNet.forward`.
            kwargs: Ignored, as in the original.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError("`y` is needed if, and only if, the network has `num_classes`")
        assert timesteps is not None
        emb = timestep_embedding(timesteps, self.model_channels, repeat_only=False)
        emb = emb.to(next(self.time_embed.parameters()).dtype)
        emb = self.time_embed(emb)  # (B, 4 model_channels)
        if y is not None:
            emb = emb + self._embed_label(y)
        # Three arguments, unlike in `ldm.nets`: third-party blocks take no others.
        h, skips = x.type(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb, context)  # (B, C_i, h / 2^i, w / 2^i)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = th.cat([h, skips.pop()], dim=1)
            h = block(h, emb, context)  # (B, C_i, h / 2^i, w / 2^i)
        out: Tensor = self.out(h.type(x.dtype))
        return out  # (B, out_channels, h, w)


def _check_dims(dims: int) -> None:
    if dims != 2:
        raise ValueError(f"dims must be 2 (images), got {dims}")


COMPAT_CLASSES.update(
    {
        unet.UNetBlock: TimestepEmbedSequential,
        unet.UNet: UNetModel,
        blocks.ResBlock: ResBlock,
        blocks.Upsample: Upsample,
        blocks.Downsample: Downsample,
        transformer.AttentionBlock: AttentionBlock,
    }
)
