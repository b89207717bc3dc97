"""The discriminator of autoencoder training: classifies patches as real or reconstructed.

Isola et al. 2017 (arXiv:1611.07004): "PatchGAN", patches of 70 x 70 pixels with three layers.
"""

import itertools

from torch import Tensor, nn

from ldm.nets.blocks import Layer

__all__ = ["PatchDiscriminator"]

MAX_MULT = 8  # largest number of channels, as a multiple of the first layer's
NEGATIVE_SLOPE = 0.2  # of LeakyReLU


class PatchDiscriminator(Layer):
    """`num_layers` convolutions of stride 2, each doubling the channels, then two of stride 1."""

    def __init__(self, *, in_channels: int = 3, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        ]
        layer_channels = [channels * min(2**n, MAX_MULT) for n in range(num_layers + 1)]
        for n, (channels_in, channels_out) in enumerate(itertools.pairwise(layer_channels), 1):
            stride = 2 if n < num_layers else 1
            layers += [
                nn.Conv2d(channels_in, channels_out, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(layer_channels[-1], 1, 4, padding=1))
        for layer in self.main:  # initialized as by Isola et al.
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """Classify patches of images (B, 3, H, W) in [-1, 1]: logits (B, 1, h, w), real > 0."""
        logits: Tensor = self.main(image)  # (B, 1, h, w)
        return logits
