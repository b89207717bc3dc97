"""The KL autoencoder: image <-> latent, downscaled by 2 ** (levels - 1).

    image (B, 3, H, W) -> Encoder -> quant_conv -> DiagonalGaussian (mean, logvar) -> z
    z (B, embed_dim, h, w) -> post_quant_conv -> Decoder -> image

Latents here are without the model's scale_factor.
Rombach et al. 2022 (arXiv:2112.10752), section 3.1.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.attention import attention
from ldm.nets.blocks import CheckpointedLayer, Conv2d, GroupNorm, Layer, Upsample
from ldm.nets.circular import pad_end
from ldm.runtime.errors import check_name, check_names

__all__ = ["AutoencoderKL", "DiagonalGaussian", "Layout", "PixelSpace"]

EPS = 1e-6
ATTENTION_TYPES = ("vanilla", "vanilla-xformers", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """`ddconfig` of the YAML: the settings of encoder and decoder.

    Level i has ch * ch_mult[i] channels, and maps downscaled by 2 ** i.
    """

    ch: int  # channels of the first convolution, a multiple of 32
    z_channels: int  # of the decoder's input; the encoder returns twice as many
    num_res_blocks: int  # per level of the encoder; the decoder has one more
    resolution: int = 256  # side of the images, in pixels, that attn_resolutions refers to
    in_channels: int = 3
    out_ch: int = 3
    ch_mult: Sequence[int] = (1, 2, 4, 8)
    attn_resolutions: Sequence[int] = ()
    dropout: float = 0.0
    resamp_with_conv: bool = True  # else resampling by mean and nearest neighbor
    double_z: bool = True  # the encoder predicts mean and log variance
    attn_type: str = "vanilla"
    use_linear_attn: bool = False
    give_pre_end: bool = False  # the decoder returns the features before its last norm
    tanh_out: bool = False  # tanh after the decoder

    def __post_init__(self) -> None:
        if not self.double_z:
            raise ValueError("ddconfig: AutoencoderKL needs `double_z: true`")
        if self.use_linear_attn:
            raise ValueError("ddconfig: use_linear_attn is not supported")
        check_name("attn_type", self.attn_type, ATTENTION_TYPES, where="ddconfig")

    @property
    def channels(self) -> list[int]:
        """Channels of each level, full size first."""
        return [self.ch * mult for mult in self.ch_mult]

    def has_attention(self, level: int) -> bool:
        """Return whether the residual blocks of a level are followed by attention."""
        return self.attn_type != "none" and self.resolution // 2**level in self.attn_resolutions

    @classmethod
    def from_ddconfig(cls, ddconfig: Mapping[str, Any]) -> "Layout":
        """Build the layout from a `ddconfig`, whose keys are checked."""
        names = [field.name for field in dataclasses.fields(cls)]
        check_names("parameter", ddconfig, names, where="ddconfig")
        return cls(**ddconfig)


class DiagonalGaussian:
    """A normal distribution with diagonal covariance.

    Args:
        parameters: Mean and log variance, concatenated over channels, (B, 2C, h, w).
        deterministic: Whether the standard deviation is 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)  # (B, C, h, w) each
        # The original's limits, so that no standard deviation overflows float16.
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else (0.5 * self.logvar).exp()
        self.deterministic = deterministic

    def mode(self) -> Tensor:
        """Return the mode, which is the mean (B, C, h, w)."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a sample mean + std * noise, (B, C, h, w).

        Noise is drawn in float32 on the generator's device, so that it does not depend on dtype and
        device of the model.

        Args:
            generator: Random generator; None for torch's global one of the CPU.
        """
        device = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Compute KL(self || N(0, 1)) in nats, (B,); 0, (1,), if deterministic.

        1/2 sum of (std² + mean² - 1 - log std²); Kingma and Welling 2013 (arXiv:1312.6114),
        appendix B.
        """
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        terms = 0.5 * (self.logvar.exp() + self.mean**2 - 1.0 - self.logvar)
        return terms.sum(dim=(1, 2, 3))


class ResnetBlock(CheckpointedLayer):
    """Twice norm, SiLU and conv; plus the input, by a 1x1 convolution if channels change.

    The residual block of the UNet, without a time embedding.
    """

    def __init__(self, *, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, eps=EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = Conv2d(in_channels, out_channels, 1)

    def compute(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, h, w)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, C_out, h, w)
        skip: Tensor = self.nin_shortcut(x)
        return skip + h


class AttnBlock(Layer):
    """Single-head self-attention over all positions, as a residual."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(in_channels, eps=EPS)
        self.q = Conv2d(in_channels, in_channels, 1)
        self.k = Conv2d(in_channels, in_channels, 1)
        self.v = Conv2d(in_channels, in_channels, 1)
        self.proj_out = Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # (B, C, h, w)
        q, k, v = (_to_tokens(conv(h)) for conv in (self.q, self.k, self.v))
        h = attention(q, k, v)  # (B, 1, h w, C)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # (B, C, h, w)
        return x + self.proj_out(h)


def _to_tokens(x: Tensor) -> Tensor:
    # Contiguous, as fused attention kernels need contiguous features.
    return x.flatten(2).transpose(1, 2).contiguous()[:, None]  # (B, 1, h w, C)


class Downsample(Layer):
    """Halves the size (rounded down) by stride 2, with padding at the right and bottom only."""

    def __init__(self, channels: int, *, use_conv: bool = True) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)  # (B, C, h / 2, w / 2)
        return self.conv(pad_end(x))  # (B, C, h / 2, w / 2)


class Level(Layer):
    """Residual blocks (channels[i] -> channels[i + 1]) of one resolution, then resampling."""

    def __init__(
        self,
        *,
        layout: Layout,
        level: int,
        channels: Sequence[int],
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels=in_channels, out_channels=out_channels, dropout=layout.dropout)
            for in_channels, out_channels in itertools.pairwise(channels)
        )
        attn_channels = channels[1:] if layout.has_attention(level) else []
        self.attn = nn.ModuleList(AttnBlock(n) for n in attn_channels)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()
        if downsample:
            self.downsample = Downsample(channels[-1], use_conv=layout.resamp_with_conv)
        if upsample:
            self.upsample = Upsample(channels[-1], use_conv=layout.resamp_with_conv)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)  # (B, C, h, w)
            if self.attn:
                x = self.attn[i](x)
        x = self.upsample(self.downsample(x))  # (B, C, h / 2, w / 2), (B, C, 2h, 2w) or the same
        return x


class Middle(Layer):
    """Residual block, attention (unless the layout has none), residual block."""

    def __init__(self, channels: int, layout: Layout) -> None:
        super().__init__()
        dropout = layout.dropout
        self.block_1 = ResnetBlock(in_channels=channels, out_channels=channels, dropout=dropout)
        self.attn_1 = nn.Identity() if layout.attn_type == "none" else AttnBlock(channels)
        self.block_2 = ResnetBlock(in_channels=channels, out_channels=channels, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))  # (B, C, h, w)


class Encoder(Layer):
    """image (B, 3, H, W) -> moments (B, 2 z_channels, h, w)."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        channels = layout.channels
        self.conv_in = Conv2d(layout.in_channels, layout.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                layout=layout,
                level=level,
                channels=[in_channels] + [out_channels] * layout.num_res_blocks,
                downsample=level < len(channels) - 1,
            )
            for level, (in_channels, out_channels) in enumerate(
                itertools.pairwise([layout.ch, *channels])
            )
        )
        self.mid = Middle(channels[-1], layout)
        self.norm_out = GroupNorm(channels[-1], eps=EPS)
        self.conv_out = Conv2d(channels[-1], 2 * layout.z_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)  # (B, ch, H, W)
        for level in self.down:
            h = level(h)  # (B, ch ch_mult[i], H / 2^i, W / 2^i)
        h = self.mid(h)  # (B, C, h, w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 2 z_channels, h, w)


class Decoder(Layer):
    """(B, z_channels, h, w) -> image (B, 3, H, W); up[0] is the last level, of full size."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.give_pre_end = layout.give_pre_end
        self.tanh_out = layout.tanh_out
        channels = layout.channels
        self.conv_in = Conv2d(layout.z_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], layout)
        self.up = nn.ModuleList(
            Level(
                layout=layout,
                level=level,
                channels=[in_channels] + [out_channels] * (layout.num_res_blocks + 1),
                upsample=level > 0,
            )
            for level, (out_channels, in_channels) in enumerate(
                itertools.pairwise([*channels, channels[-1]])
            )
        )
        self.norm_out = GroupNorm(channels[0], eps=EPS)
        self.conv_out = Conv2d(channels[0], layout.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B, C, h, w)
        for level in reversed(self.up):
            h = level(h)  # (B, ch ch_mult[i], H / 2^i, W / 2^i)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, H, W)
        return h.tanh() if self.tanh_out else h


class AutoencoderKL(nn.Module):
    """Encoder and decoder, with 1x1 convolutions to and from the latent.

    Args:
        ddconfig: Fields of `Layout`.
        embed_dim: Channels of the latent.

    Attributes:
        in_channels: Channels of an image: RGB, and 1 or 3 of depth, see `ldm.imaging.rgbd`.
        downscale: Image pixels per latent pixel along each side.
    """

    IGNORED_PARAMETERS = frozenset({
        "lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor",
        "ema_decay", "learn_logvar",
    })  # fmt: skip

    def __init__(self, *, ddconfig: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        layout = Layout.from_ddconfig(ddconfig)
        self.layout = layout
        self.embed_dim = embed_dim
        self.in_channels = layout.in_channels
        self.z_channels = layout.z_channels
        self.downscale = 2 ** (len(layout.ch_mult) - 1)
        self.encoder = Encoder(layout)
        self.decoder = Decoder(layout)
        self.quant_conv = Conv2d(2 * layout.z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = Conv2d(embed_dim, layout.z_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which encoder and decoder compute."""
        return self.quant_conv.weight.dtype

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Encode images (B, 3, H, W) in [-1, 1] to distributions over (B, embed_dim, h, w)."""
        if min(image.shape[-2:]) < self.downscale:
            raise ValueError(
                f"image of {image.shape[-2]} x {image.shape[-1]} pixels is too small, "
                f"each side needs at least {self.downscale}"
            )
        moments = self.quant_conv(self.encoder(image.to(self.dtype)))  # (B, 2 embed_dim, h, w)
        return DiagonalGaussian(moments.to(image.dtype).contiguous())

    def decode(self, z: Tensor) -> Tensor:
        """Decode z (B, embed_dim, h, w) to images (B, 3, H, W), about [-1, 1] but not clamped."""
        image = self.decoder(self.post_quant_conv(z.to(self.dtype)))  # (B, 3, H, W)
        return image.to(z.dtype).contiguous()

    def forward(
        self, image: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Return reconstructions (B, 3, H, W) from posterior samples, and the posterior.

        Args:
            generator: Random generator of the samples; None for torch's global one.
        """
        posterior = self.encode(image)
        return self.decode(posterior.sample(generator)), posterior


class PixelSpace(nn.Module):
    """Placeholder in models without an autoencoder: the latent is the image itself."""

    in_channels = 3
    downscale = 1

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Return a distribution that has the image (B, 3, H, W) as its only sample."""
        # The second half, the log variance, is not used.
        return DiagonalGaussian(torch.cat([image, image], dim=1), deterministic=True)

    def decode(self, z: Tensor) -> Tensor:
        """Return z."""
        return z
