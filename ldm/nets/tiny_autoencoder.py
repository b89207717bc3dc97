"""TAESD: a small autoencoder distilled from Stable Diffusion's, for previews and fast decoding.

    image (B, 3, H, W) -> encoder -> latent in the UNet's scale -> decoder -> image

As in the authors' files, layers are named by their index in a sequence.
https://github.com/madebyollin/taesd
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.autoencoder import Autoencoder, DiagonalGaussian, make_point
from ldm.nets.blocks import Conv2d, Layer, UpsampleConv2d

__all__ = ["TinyAutoencoder", "TinyDecoder", "TinyEncoder"]

CHANNELS = 64
LATENT_CHANNELS = 4
MAX_LATENT = 3.0  # of latents with standard deviation 1
NUM_LEVELS = 3  # each halves or doubles the sides
BLOCKS_PER_LEVEL = 3


class TinyBlock(Layer):
    """Three 3x3 convolutions, with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_build_conv(), nn.ReLU(), _build_conv(), nn.ReLU(), _build_conv())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Sequential):
    """Image (B, 3, H, W) in [0, 1] -> latent (B, 4, H / 8, W / 8)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [_build_conv(in_channels=3), TinyBlock()]
        for _ in range(NUM_LEVELS):
            layers.append(Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1, bias=False))
            layers += [TinyBlock() for _ in range(BLOCKS_PER_LEVEL)]
        super().__init__(*layers, _build_conv(out_channels=LATENT_CHANNELS))


class TinyDecoder(nn.Sequential):
    """Latent (B, 4, h, w) -> image (B, 3, 8 h, 8 w), about [0, 1], not clamped."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [
            _SoftClamp(),
            _build_conv(in_channels=LATENT_CHANNELS),
            nn.ReLU(),
        ]
        for _ in range(NUM_LEVELS):
            layers += [TinyBlock() for _ in range(BLOCKS_PER_LEVEL)]
            # In the authors' file, upsampling and convolution are two layers with an index each;
            # UpsampleConv2d does both.
            layers += [nn.Identity(), UpsampleConv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)]
        super().__init__(*layers, TinyBlock(), _build_conv(out_channels=3))


class TinyAutoencoder(nn.Module):
    """TAESD in place of a model's autoencoder.

    Args:
        scale_factor: The `scale_factor` of the replaced autoencoder. TAESD's own latents include
            it, so `encode` divides by it and `decode` multiplies by it.

    Attributes:
        encoder: None if only the decoder was loaded.
        fallback_encoder: The replaced autoencoder, which encodes if `encoder` is None; None if it
            is not available or not needed.
    """

    in_channels = 3
    downscale_factor = 8
    z_channels = LATENT_CHANNELS

    def __init__(self, scale_factor: float) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.encoder: TinyEncoder | None = TinyEncoder()
        self.fallback_encoder: Autoencoder | None = None
        self.decoder = TinyDecoder()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the networks compute."""
        return next(self.decoder.parameters()).dtype

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Encode images (B, 3, H, W) in [-1, 1] to distributions of z with standard deviation 0."""
        if self.encoder is None:
            assert self.fallback_encoder is not None, "TAESD without an encoder can only decode"
            return self.fallback_encoder.encode(image)
        z = self.encoder((image.to(self.dtype) + 1) / 2) / self.scale_factor
        return make_point(z.to(image.dtype))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to images (B, 3, 8 h, 8 w), about [-1, 1], not clamped.

        Args:
            z: (B, 4, h, w), in the scale of the replaced autoencoder, without its `scale_factor`.
        """
        image: Tensor = self.decoder((z * self.scale_factor).to(self.dtype)) * 2 - 1
        return image.to(z.dtype).contiguous()


class _SoftClamp(nn.Module):
    """Clamps latents softly to ± MAX_LATENT."""

    def forward(self, z: Tensor) -> Tensor:
        return MAX_LATENT * torch.tanh(z / MAX_LATENT)


def _build_conv(in_channels: int = CHANNELS, out_channels: int = CHANNELS) -> Conv2d:
    return Conv2d(in_channels, out_channels, 3, padding=1)
