"""The UNet of the x2 latent upscaler: k-diffusion's `image_v1`, conditioned on a low-res latent.

    noisy latent | low-res latent, upsampled by 2 -> down and up levels -> output, log variance

There are no transformer blocks: the embedding of noise levels and pooled text sets the scale and
shift of the group norms in residual blocks and attention layers.

Karras et al. 2022 (arXiv:2206.00364); random Fourier features: Tancik et al. 2020
(arXiv:2006.10739).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.attention import attention
from ldm.nets.blocks import Conv2d, Layer, LayerNorm, Linear
from ldm.nets.circular import pad_reflect

__all__ = ["LatentUpscalerUNet"]

CHANNELS_PER_GROUP = 32  # of group norms
HEAD_DIM = 64
FIR_TAPS = (1, 3, 3, 1)  # unnormalized taps of the resampling filter along one axis


@dataclass(kw_only=True, eq=False, repr=False)
class LatentUpscalerUNet(Layer):
    """The UNet of the x2 latent upscaler, and the embedding of the low-res latent's noise level.

    Its fields are the keys of `model` in k-diffusion's JSON. Level i has `channels[i]` channels,
    and feature maps downscaled by 2 ** i.
    """

    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset(
        {"type", "input_size", "augment_prob", "sigma_min", "sigma_max", "sigma_sample_density"}
    )

    channels: Sequence[int]
    depths: Sequence[int]  # residual blocks of each level, down and up
    self_attn_depths: Sequence[bool]  # whether each level has self-attention
    cross_attn_depths: Sequence[bool]  # whether each level has cross-attention to the text
    mapping_out: int  # features of the embedding
    mapping_cond_dim: int  # features of the embedded low-res noise level plus the pooled text's
    cross_cond_dim: int  # features of a text token, and of the pooled text
    input_channels: int = 4
    unet_cond_dim: int = 4  # channels of the low-res latent
    has_variance: bool = True
    dropout_rate: float = 0.0
    patch_size: int = 1
    sigma_data: float = 1.0
    augment_wrapper: bool = False
    skip_stages: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        unsupported = {
            f"patch_size {self.patch_size}": self.patch_size != 1,
            f"sigma_data {self.sigma_data}": self.sigma_data != 1,
            f"skip_stages {self.skip_stages}": self.skip_stages != 0,
            "augment_wrapper": self.augment_wrapper,
        }
        for setting, is_unsupported in unsupported.items():
            if is_unsupported:
                raise ValueError(f"{setting} is not supported by the x2 latent upscaler")
        self.context_dim = self.cross_cond_dim
        self.out_channels = self.input_channels
        self.low_res_noise_embed = FourierFeatures(self.mapping_cond_dim - self.cross_cond_dim)
        self.inner_model = _InnerModel(self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the network computes."""
        return next(self.parameters()).dtype

    @property
    def size_multiple(self) -> int:
        """Latent sides must be multiples of this number, and at least twice as long."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def uses_noise_level(self) -> bool:
        """Whether the low-res noise level has an effect; with diffusers' weights it has none."""
        return bool(self.low_res_noise_embed.weight.any())

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict EDM's F(x; sigma), (B, input_channels, h, w) in the dtype of x.

        Args:
            x: (B, input_channels + unet_cond_dim, h, w), h and w multiples of `size_multiple`.
            timesteps: EDM's c_noise = 0.25 ln sigma, (B,).
            context: Tokens (B, M, cross_cond_dim).
            y: Pooled text, then sigma of the low-res latent, (B, cross_cond_dim + 1).
            context_mask: Tokens to keep, bool (B, M); None = all.
        """
        return self.predict_with_log_variance(x, timesteps, context, y, context_mask)[0]

    def predict_with_log_variance(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction, and the learned log variance (B,) of its error; see `forward`."""
        sides, multiple = x.shape[-2:], self.size_multiple
        if any(side % multiple or side < 2 * multiple for side in sides):
            raise ValueError(
                f"a latent of {sides[1]}x{sides[0]} does not fit this UNet: sides must be "
                f"multiples of {multiple}, at least {2 * multiple}"
            )
        pooled, low_res_sigma = y[:, :-1], y[:, -1]
        noise_level = self.low_res_noise_embed(low_res_sigma.float().log1p())
        out = self.inner_model(
            x.to(self.dtype),
            timesteps,
            torch.cat([noise_level, pooled.float()], dim=1).to(self.dtype),
            context.to(self.dtype),
            context_mask,
        )
        prediction, log_variance = out[:, : self.out_channels], out[:, self.out_channels :]
        return prediction.to(x.dtype).contiguous(), log_variance.float().mean((1, 2, 3))


class FourierFeatures(Layer):
    """x (B,) -> [cos 2π f x | sin 2π f x], (B, features) float32.

    The frequencies f (`weight`) are fixed, drawn from a standard normal distribution.
    """

    weight: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(features // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * x.float()[:, None] @ self.weight.float().mT
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class _InnerModel(Layer):
    """The mapping network and the UNet levels, conditioned on a vector and on text tokens."""

    def __init__(self, config: LatentUpscalerUNet) -> None:
        super().__init__()
        channels, emb_channels = config.channels[0], config.mapping_out
        self.timestep_embed = FourierFeatures(emb_channels)
        self.mapping_cond = Linear(config.mapping_cond_dim, emb_channels, bias=False)
        self.mapping = nn.Sequential(
            Linear(emb_channels, emb_channels),
            nn.GELU(),
            Linear(emb_channels, emb_channels),
            nn.GELU(),
        )
        self.proj_in = Conv2d(config.input_channels + config.unet_cond_dim, channels, 1)
        self.u_net = _UNetLevels(config)
        self.proj_out = Conv2d(channels, config.out_channels + config.has_variance, 1)

    def forward(
        self, x: Tensor, timesteps: Tensor, vector: Tensor, context: Tensor, mask: Tensor | None
    ) -> Tensor:
        emb = self.timestep_embed(timesteps).to(vector.dtype) + self.mapping_cond(vector)
        emb = self.mapping(emb)  # (B, mapping_out)
        return self.proj_out(self.u_net(self.proj_in(x), emb, context, mask))


class _UNetLevels(Layer):
    """The down and up levels, each a list of layers, named as in k-diffusion."""

    def __init__(self, config: LatentUpscalerUNet) -> None:
        super().__init__()
        d_blocks, u_blocks = [], []
        for level, channels in enumerate(config.channels):
            outer_channels = config.channels[max(0, level - 1)]  # of the next higher resolution
            depth, is_deepest = config.depths[level], level == len(config.channels) - 1
            layers = _build_layers(config, level, [outer_channels] + [channels] * depth)
            d_blocks.append(nn.ModuleList([_build_resampler(level, up=False), *layers]))
            up_channels = [channels] * depth + [outer_channels]
            up_channels[0] *= 1 if is_deepest else 2  # with the skip connection
            layers = _build_layers(config, level, up_channels)
            u_blocks.append(nn.ModuleList([*layers, _build_resampler(level, up=True)]))
        self.d_blocks = nn.ModuleList(d_blocks)
        self.u_blocks = nn.ModuleList(reversed(u_blocks))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        skips: list[Tensor] = []
        for level in self.d_blocks:
            x = _run_level(level, x, emb, context, mask)  # (B, C_i, h / 2^i, w / 2^i) at level i
            skips.append(x)
        skips.pop()  # the deepest level has no skip connection: its output is x
        for i, level in enumerate(self.u_blocks):
            x = torch.cat([x, skips.pop()], dim=1) if i else x
            x = _run_level(level, x, emb, context, mask)
        return x


def _build_resampler(level: int, *, up: bool) -> nn.Module:
    return FIRResample(up=up) if level else nn.Identity()


def _build_layers(
    config: LatentUpscalerUNet, level: int, block_channels: Sequence[int]
) -> list[nn.Module]:
    """Build the layers of one level, down or up: residual blocks, each with its attention.

    Args:
        block_channels: Channels of the input, and of the output of each residual block.
    """
    layers: list[nn.Module] = []
    emb_channels, hidden_channels = config.mapping_out, config.channels[level]
    for in_channels, out_channels in itertools.pairwise(block_channels):
        layers.append(
            ResidualBlock(
                emb_channels, in_channels, hidden_channels, out_channels, config.dropout_rate
            )
        )
        if config.self_attn_depths[level]:
            layers.append(SelfAttention(emb_channels, out_channels))
        if config.cross_attn_depths[level]:
            layers.append(CrossAttention(emb_channels, out_channels, config.cross_cond_dim))
    return layers


def _run_level(
    level: nn.Module, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor | None
) -> Tensor:
    for layer in level.children():
        if isinstance(layer, ResidualBlock | SelfAttention):
            x = layer(x, emb)
        elif isinstance(layer, CrossAttention):
            x = layer(x, emb, context, mask)
        else:
            x = layer(x)
    return x


class AdaGroupNorm(Layer):
    """Group norm whose scale and shift are a linear function of the embedding."""

    def __init__(self, emb_channels: int, channels: int) -> None:
        super().__init__()
        self.num_groups = max(1, channels // CHANNELS_PER_GROUP)
        self.mapper = Linear(emb_channels, 2 * channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.mapper(emb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        return torch.addcmul(
            shift, F.group_norm(x, self.num_groups, eps=1e-5).to(x.dtype), scale + 1
        )


class ResidualBlock(Layer):
    """Norm, GELU and 3x3 convolution, twice, with a residual connection."""

    def __init__(
        self,
        emb_channels: int,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.main = nn.Sequential(
            AdaGroupNorm(emb_channels, in_channels),
            nn.GELU(),
            Conv2d(in_channels, hidden_channels, 3, padding=1),
            nn.Dropout(dropout),
            AdaGroupNorm(emb_channels, hidden_channels),
            nn.GELU(),
            Conv2d(hidden_channels, out_channels, 3, padding=1),
            nn.Dropout(dropout),
        )
        self.skip: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip = Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = x
        for layer in self.main:
            h = layer(h, emb) if isinstance(layer, AdaGroupNorm) else layer(h)
        skip: Tensor = self.skip(x)  # (B, C_out, h, w)
        return skip + h


class SelfAttention(Layer):
    """Self-attention over all positions, with a residual connection."""

    def __init__(self, emb_channels: int, channels: int) -> None:
        super().__init__()
        self.norm_in = AdaGroupNorm(emb_channels, channels)
        self.qkv_proj = Conv2d(channels, 3 * channels, 1)
        self.out_proj = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.norm_in(x, emb)).chunk(3, dim=1)  # (B, C, h, w) each
        q, k, v = (_split_heads(y.flatten(2).mT) for y in qkv)  # (B, heads, h w, d) each
        return x + self.out_proj(_merge_heads(attention(q, k, v), x))


class CrossAttention(Layer):
    """Cross-attention to the text tokens, with a residual connection."""

    def __init__(self, emb_channels: int, channels: int, context_dim: int) -> None:
        super().__init__()
        self.norm_enc = LayerNorm(context_dim)
        self.norm_dec = AdaGroupNorm(emb_channels, channels)
        self.q_proj = Conv2d(channels, channels, 1)
        self.kv_proj = Linear(context_dim, 2 * channels)
        self.out_proj = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        q = _split_heads(self.q_proj(self.norm_dec(x, emb)).flatten(2).mT)
        k, v = map(_split_heads, self.kv_proj(self.norm_enc(context)).chunk(2, dim=2))
        h = attention(q, k, v, None if mask is None else mask[:, None, None])
        return x + self.out_proj(_merge_heads(h, x))


class FIRResample(Layer):
    """Resampling by 2 with a separable FIR filter of four taps; upsampling is its transpose."""

    kernel: Tensor  # (4, 4); along each axis, taps sum to 1, or to 2 for upsampling

    def __init__(self, *, up: bool) -> None:
        super().__init__()
        self.up = up
        # On the CPU, as the filter needs values even if the weights are on the meta device.
        taps = torch.tensor(FIR_TAPS, dtype=torch.float32, device="cpu")
        gain = 2.0 if up else 1.0
        self.register_buffer("kernel", torch.outer(taps, taps) * (gain / sum(FIR_TAPS)) ** 2)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        weight = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        x = pad_reflect(x, 1)
        if self.up:
            return F.conv_transpose2d(x, weight, stride=2, padding=3, groups=channels)
        return F.conv2d(x, weight, stride=2, groups=channels)


def _split_heads(x: Tensor) -> Tensor:
    """Split features: (B, N, C) -> (B, heads, N, d)."""
    heads = max(1, x.shape[-1] // HEAD_DIM)
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _merge_heads(h: Tensor, like: Tensor) -> Tensor:
    """Merge heads: (B, heads, h w, d) -> (B, C, h, w), the shape of `like`."""
    return h.transpose(2, 3).reshape(like.shape)
