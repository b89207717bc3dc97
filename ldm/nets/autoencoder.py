"""Autoencoders: image <-> latent, downscaled by 2 ** (levels - 1).

AutoencoderKL
    image (B, in_channels, H, W) -> Encoder -> quant_conv -> DiagonalGaussian (mean, logvar) -> z
    z (B, embed_dim, h, w) -> post_quant_conv -> Decoder -> image (B, out_ch, H, W)
AutoencoderVQ
    image -> Encoder -> quant_conv -> z
    z -> VectorQuantizer (nearest vector of the codebook) -> post_quant_conv -> Decoder -> image

These latents are not multiplied by the model's scale_factor.
Rombach et al. 2022 (arXiv:2112.10752), section 3.1; Esser et al. 2021 (arXiv:2012.09841).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.attention import attention
from ldm.nets.blocks import CheckpointedLayer, Conv2d, GroupNorm, Layer, Upsample
from ldm.nets.circular import pad_bottom_right
from ldm.nets.quantizer import Quantized, VectorQuantizer
from ldm.runtime.errors import check_name, check_names

__all__ = [
    "Autoencoder", "AutoencoderConfig", "AutoencoderKL", "AutoencoderVQ", "DiagonalGaussian",
    "PixelSpace", "make_point",
]  # fmt: skip

NORM_EPS = 1e-6  # eps of every GroupNorm
ATTENTION_TYPES = ("vanilla", "vanilla-xformers", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Settings of encoder and decoder: `ddconfig` of the original's YAML.

    Level i has ch * ch_mult[i] channels, and feature maps downscaled by 2 ** i.
    """

    ch: int  # channels of the first convolution, a multiple of 32
    z_channels: int  # channels of the decoder's input
    num_res_blocks: int  # per level of the encoder; the decoder has one more
    resolution: int = 256  # side of the image to which attn_resolutions refer
    in_channels: int = 3
    out_ch: int = 3
    ch_mult: Sequence[int] = (1, 2, 4, 8)
    attn_resolutions: Sequence[int] = ()
    dropout: float = 0.0
    resamp_with_conv: bool = True  # else average pooling and nearest-neighbor upsampling only
    double_z: bool = True  # the encoder returns 2 z_channels: mean and log variance
    attn_type: str = "vanilla"
    use_linear_attn: bool = False
    give_pre_end: bool = False  # the decoder returns the features before its last norm
    tanh_out: bool = False  # tanh after the decoder

    def __post_init__(self) -> None:
        if self.use_linear_attn:
            raise ValueError("ddconfig: use_linear_attn is not supported")
        check_name("attn_type", self.attn_type, ATTENTION_TYPES, where="ddconfig")

    @property
    def encoded_channels(self) -> int:
        """Channels of the encoder's output."""
        return 2 * self.z_channels if self.double_z else self.z_channels

    @property
    def level_channels(self) -> list[int]:
        """Channels of each level, full resolution first."""
        return [self.ch * mult for mult in self.ch_mult]

    def has_attention(self, level: int) -> bool:
        """Return whether the residual blocks of a level are followed by attention."""
        return self.attn_type != "none" and self.resolution // 2**level in self.attn_resolutions

    @classmethod
    def from_ddconfig(cls, ddconfig: Mapping[str, Any]) -> "AutoencoderConfig":
        """Check the keys of a `ddconfig`, and return its settings."""
        known = [field.name for field in dataclasses.fields(cls)]
        check_names("parameter", ddconfig, known, where="ddconfig")
        return cls(**ddconfig)


class DiagonalGaussian:
    """A normal distribution with diagonal covariance.

    Args:
        parameters: Mean and log variance, concatenated over channels, (B, 2C, h, w).
        deterministic: Whether the standard deviation is 0 and the log variance ignored.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)  # (B, C, h, w) each
        # The original's limits, so that no standard deviation overflows float16.
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else (0.5 * self.logvar).exp()
        self.deterministic = deterministic

    def mode(self) -> Tensor:
        """Return the mode (B, C, h, w), which is the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a sample mean + std * noise, (B, C, h, w).

        Noise is drawn in float32 on the generator's device, so that it does not depend on the
        model's dtype and device; None = torch's global CPU generator.
        """
        device = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Compute KL(self || N(0, 1)) in nats, (B,); if deterministic, 0 of shape (1,).

        1/2 sum of (std² + mean² - 1 - log std²); Kingma and Welling 2013 (arXiv:1312.6114),
        appendix B.
        """
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        terms = 0.5 * (self.logvar.exp() + self.mean**2 - 1.0 - self.logvar)
        return terms.sum(dim=(1, 2, 3))


def make_point(mean: Tensor) -> DiagonalGaussian:
    """Return a distribution with this mean (B, C, h, w), and standard deviation 0."""
    # The second half, in place of the log variance, is ignored.
    return DiagonalGaussian(torch.cat([mean, mean], dim=1), deterministic=True)


class ResnetBlock(CheckpointedLayer):
    """The UNet's residual block without a time embedding.

    The shortcut is a 1x1 convolution if the number of channels changes, else the identity.
    """

    def __init__(self, *, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, eps=NORM_EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = Conv2d(in_channels, out_channels, 1)

    def compute(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, h, w)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, C_out, h, w)
        shortcut: Tensor = self.nin_shortcut(x)
        return shortcut + h


class AttnBlock(Layer):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(in_channels, eps=NORM_EPS)
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


class AsymmetricDownsample(Layer):
    """Downsampling by 2, rounded down: a 3x3 convolution of stride 2, or average pooling.

    The convolution pads at the right and bottom only.
    """

    def __init__(self, channels: int, *, use_conv: bool = True) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)  # (B, C, h / 2, w / 2)
        return self.conv(pad_bottom_right(x))  # (B, C, h / 2, w / 2)


class ResolutionLevel(Layer):
    """The residual blocks of one resolution, each with attention if the level has it; resampling.

    Args:
        block_channels: Channels of the input, and of the output of each residual block.
    """

    def __init__(
        self,
        *,
        config: AutoencoderConfig,
        level: int,
        block_channels: Sequence[int],
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels=in_channels, out_channels=out_channels, dropout=config.dropout)
            for in_channels, out_channels in itertools.pairwise(block_channels)
        )
        attn_channels = block_channels[1:] if config.has_attention(level) else []
        self.attn = nn.ModuleList(AttnBlock(channels) for channels in attn_channels)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()
        if downsample:
            self.downsample = AsymmetricDownsample(
                block_channels[-1], use_conv=config.resamp_with_conv
            )
        if upsample:
            self.upsample = Upsample(block_channels[-1], use_conv=config.resamp_with_conv)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)  # (B, C, h, w)
            if self.attn:
                x = self.attn[i](x)
        x = self.upsample(self.downsample(x))  # (B, C, h / 2, w / 2), (B, C, 2h, 2w) or the same
        return x


class MiddleBlock(Layer):
    """Residual block, attention (unless attn_type is "none"), residual block."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        dropout = config.dropout
        self.block_1 = ResnetBlock(in_channels=channels, out_channels=channels, dropout=dropout)
        self.attn_1 = nn.Identity() if config.attn_type == "none" else AttnBlock(channels)
        self.block_2 = ResnetBlock(in_channels=channels, out_channels=channels, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))  # (B, C, h, w)


class Encoder(Layer):
    """image (B, in_channels, H, W) -> features (B, encoded_channels, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            ResolutionLevel(
                config=config,
                level=level,
                block_channels=[in_channels] + [out_channels] * config.num_res_blocks,
                downsample=level < len(channels) - 1,
            )
            for level, (in_channels, out_channels) in enumerate(
                itertools.pairwise([config.ch, *channels])
            )
        )
        self.mid = MiddleBlock(channels[-1], config)
        self.norm_out = GroupNorm(channels[-1], eps=NORM_EPS)
        self.conv_out = Conv2d(channels[-1], config.encoded_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)  # (B, ch, H, W)
        for level in self.down:
            h = level(h)  # (B, ch ch_mult[i], H / 2^i, W / 2^i)
        h = self.mid(h)  # (B, C, h, w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, encoded_channels, h, w)


class Decoder(Layer):
    """(B, z_channels, h, w) -> image (B, out_ch, H, W); up[0], of full resolution, runs last."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.give_pre_end = config.give_pre_end
        self.tanh_out = config.tanh_out
        channels = config.level_channels
        self.conv_in = Conv2d(config.z_channels, channels[-1], 3, padding=1)
        self.mid = MiddleBlock(channels[-1], config)
        self.up = nn.ModuleList(
            ResolutionLevel(
                config=config,
                level=level,
                block_channels=[in_channels] + [out_channels] * (config.num_res_blocks + 1),
                upsample=level > 0,
            )
            for level, (out_channels, in_channels) in enumerate(
                itertools.pairwise([*channels, channels[-1]])
            )
        )
        self.norm_out = GroupNorm(channels[0], eps=NORM_EPS)
        self.conv_out = Conv2d(channels[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B, C, h, w)
        for level in reversed(self.up):
            h = level(h)  # (B, ch ch_mult[i], H / 2^i, W / 2^i)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))  # (B, out_ch, H, W)
        return h.tanh() if self.tanh_out else h


class Autoencoder(nn.Module):
    """Base class of autoencoders: encoder and decoder, with 1x1 convolutions to and from latents.

    Args:
        ddconfig: Fields of `AutoencoderConfig`.
        embed_dim: Channels of the latent.

    Attributes:
        in_channels: Channels of an image: 3 (RGB); with depth, 1 or 3 more, see
            `ldm.imaging.rgbd`.
        downscale_factor: Image pixels per latent pixel along each side.
    """

    IGNORED_PARAMS = frozenset({
        "lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor",
        "ema_decay", "learn_logvar",
    })  # fmt: skip
    double_z: ClassVar[bool]  # the only value of `AutoencoderConfig.double_z` for this class

    def __init__(self, *, ddconfig: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        config = AutoencoderConfig.from_ddconfig(ddconfig)
        if config.double_z != self.double_z:
            value = str(self.double_z).lower()
            raise ValueError(f"ddconfig: {type(self).__name__} needs `double_z: {value}`")
        self.config = config
        self.embed_dim = embed_dim
        self.in_channels = config.in_channels
        self.z_channels = config.z_channels
        self.downscale_factor = 2 ** (len(config.ch_mult) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        latent_channels = 2 * embed_dim if config.double_z else embed_dim
        self.quant_conv = Conv2d(config.encoded_channels, latent_channels, 1)
        self.post_quant_conv = Conv2d(embed_dim, config.z_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which encoder and decoder compute."""
        return self.quant_conv.weight.dtype

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1] to posteriors of z (B, embed_dim, h, w)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Decode z (B, embed_dim, h, w) to images (B, out_ch, H, W), about [-1, 1], not clamped."""
        image = self.decoder(self.post_quant_conv(z.to(self.dtype)))  # (B, out_ch, H, W)
        return image.to(z.dtype).contiguous()

    def _encode_features(self, image: Tensor) -> Tensor:
        """Return the output of `quant_conv`, in the dtype of the image."""
        if min(image.shape[-2:]) < self.downscale_factor:
            raise ValueError(
                f"an image of {image.shape[-1]}x{image.shape[-2]} pixels is too small: each side "
                f"must be at least {self.downscale_factor}"
            )
        features = self.quant_conv(self.encoder(image.to(self.dtype)))
        return features.to(image.dtype).contiguous()


class AutoencoderKL(Autoencoder):
    """Autoencoder with Gaussian posteriors, which are close to N(0, 1)."""

    double_z = True

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1] to posteriors of z (B, embed_dim, h, w)."""
        return DiagonalGaussian(self._encode_features(image))

    def forward(
        self, image: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Return reconstructions (B, out_ch, H, W) from posterior samples, and the posterior."""
        posterior = self.encode(image)
        return self.decode(posterior.sample(generator)), posterior


class AutoencoderVQ(Autoencoder):
    """Autoencoder whose decoder replaces latents by the nearest vectors of a codebook.

    Diffusion models learn the latents before this step.

    Args:
        n_embed: Vectors of the codebook.
    """

    IGNORED_PARAMS = Autoencoder.IGNORED_PARAMS | {
        "batch_resize_range", "scheduler_config", "lr_g_factor", "remap", "sane_index_shape",
        "use_ema",
    }  # fmt: skip
    double_z = False

    def __init__(self, *, ddconfig: Mapping[str, Any], embed_dim: int, n_embed: int) -> None:
        super().__init__(ddconfig=ddconfig, embed_dim=embed_dim)
        self.quantize = VectorQuantizer(n_embed, embed_dim)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1] to z, as distributions of standard deviation 0."""
        return make_point(self._encode_features(image))

    def decode(self, z: Tensor) -> Tensor:
        """Decode z (B, embed_dim, h, w), quantized first, to images (B, out_ch, H, W)."""
        return super().decode(self.quantize(z).z)

    def forward(
        self, image: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Quantized]:
        """Return reconstructions (B, out_ch, H, W), and the quantization; nothing is drawn."""
        quantized = self.quantize(self._encode_features(image))
        return super().decode(quantized.z), quantized


class PixelSpace(nn.Module):
    """Stands in for the autoencoder of pixel-space models: the latent is the image itself."""

    IGNORED_PARAMS = frozenset({"vq_interface"})  # of the original's `quantize`
    in_channels = 3
    downscale_factor = 1

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Return a distribution with the image (B, 3, H, W) as mean, and standard deviation 0."""
        return make_point(image)

    def decode(self, z: Tensor) -> Tensor:
        """Return z."""
        return z
