"""TAESD: a small autoencoder distilled from Stable Diffusion's, for previews and fast decoding.

    image (B, 3, H, W) -> encoder -> latent in the UNet's scale -> decoder -> image

Layers are named as in the authors' files, by their index in a sequence.
https://github.com/madebyollin/taesd
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.nets.blocks import Conv2d, Layer, UpsampleConv2d

__all__ = ["TinyAutoencoder", "TinyDecoder", "TinyEncoder"]

CHANNELS = 64
LATENT_CHANNELS = 4
LATENT_LIMIT = 3.0  # for latents of standard deviation 1
LEVELS = 3  # that halve or double the sides: 2 ** 3 = 8
BLOCKS_PER_LEVEL = 3


class TinyBlock(Layer):
    """Three 3x3 convolutions, with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Sequential):
    """Image (B, 3, H, W) in [0, 1] -> (B, 4, H / 8, W / 8)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [_conv(in_channels=3), TinyBlock()]
        for _ in range(LEVELS):
            layers.append(Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1, bias=False))
            layers += [TinyBlock() for _ in range(BLOCKS_PER_LEVEL)]
        super().__init__(*layers, _conv(out_channels=LATENT_CHANNELS))


class TinyDecoder(nn.Sequential):
    """(B, 4, h, w) -> image (B, 3, 8 h, 8 w) in [0, 1], but not clamped."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [_SoftClamp(), _conv(in_channels=LATENT_CHANNELS), nn.ReLU()]
        for _ in range(LEVELS):
            layers += [TinyBlock() for _ in range(BLOCKS_PER_LEVEL)]
            # In the authors' file, upsampling and convolution are two layers with an index each;
            # UpsampleConv2d does both.
            layers += [nn.Identity(), UpsampleConv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)]
        super().__init__(*layers, TinyBlock(), _conv(out_channels=3))


class TinyAutoencoder(nn.Module):
    """TAESD in place of a model's autoencoder.

    Args:
        scale_factor: The `scale_factor` of the replaced autoencoder. TAESD's own latents include
            it, so `encode` divides by it and `decode` multiplies by it.

    Attributes:
        encoder: None if only the decoder was loaded.
        fallback_encoder: The replaced autoencoder, which encodes in place of a missing `encoder`;
            None = there is none, or none is needed.
    """

    in_channels = 3
    downscale_factor = 8
    z_channels = LATENT_CHANNELS

    def __init__(self, scale_factor: float) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.encoder: TinyEncoder | None = TinyEncoder()
        self.fallback_encoder: AutoencoderKL | None = None
        self.decoder = TinyDecoder()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the networks compute."""
        return next(self.decoder.parameters()).dtype

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Encode images (B, 3, H, W) in [-1, 1]: distribution of z, with standard deviation 0."""
        if self.encoder is None:
            assert self.fallback_encoder is not None, "TAESD without an encoder can only decode"
            return self.fallback_encoder.encode(image)
        z = self.encoder((image.to(self.dtype) + 1) / 2) / self.scale_factor
        # The second z is in place of the log variance, which `deterministic` ignores.
        return DiagonalGaussian(torch.cat([z, z], dim=1).to(image.dtype), deterministic=True)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to images (B, 3, 8 h, 8 w), about [-1, 1] but not clamped.

        Args:
            z: (B, 4, h, w), in the scale of the replaced autoencoder, without its `scale_factor`.
        """
        image: Tensor = self.decoder((z * self.scale_factor).to(self.dtype)) * 2 - 1
        return image.to(z.dtype).contiguous()


class _SoftClamp(nn.Module):
    """Clamps latents softly to ± LATENT_LIMIT."""

    def forward(self, z: Tensor) -> Tensor:
        return LATENT_LIMIT * torch.tanh(z / LATENT_LIMIT)


def _conv(in_channels: int = CHANNELS, out_channels: int = CHANNELS) -> Conv2d:
    return Conv2d(in_channels, out_channels, 3, padding=1)
