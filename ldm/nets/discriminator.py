"""The discriminator of autoencoder training: classifies patches as real or reconstructed.

Isola et al. 2017 (arXiv:1611.07004): "PatchGAN", patches of 70 x 70 pixels with three layers.
"""

import itertools

from torch import Tensor, nn

from ldm.nets.blocks import Layer

__all__ = ["PatchDiscriminator"]

MAX_MULT = 8  # largest number of channels, as a multiple of the first layer's
SLOPE = 0.2  # of LeakyReLU


class PatchDiscriminator(Layer):
    """`layers` convolutions of stride 2, doubling the channels each, then two of stride 1."""

    def __init__(self, *, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        layer_channels = [channels * min(2**n, MAX_MULT) for n in range(layers + 1)]
        main: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE, inplace=True),
        ]
        for n, (before, after) in enumerate(itertools.pairwise(layer_channels), start=1):
            stride = 2 if n < layers else 1
            main += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        self.main = nn.Sequential(*main, nn.Conv2d(layer_channels[-1], 1, 4, padding=1))
        for layer in self.main:  # initialized as by Isola et al.
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """Classify patches of images (B, 3, H, W) in [-1, 1]: logits (B, 1, h, w), real > 0."""
        logits: Tensor = self.main(image)  # (B, 1, h, w)
        return logits
