"""A network that tells pictures from reconstructions, patch by patch.

    image (B, 3, H, W) -> logits (B, 1, h, w), one for every overlapping patch; h about H / 8

Isola et al. 2017 (arXiv:1611.07004): its "PatchGAN", 70 x 70 pixels a patch with three layers.
"""

import itertools

from torch import Tensor, nn

__all__ = ["PatchDiscriminator"]

WIDEST = 8  # times `width`
SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Convolutions of stride 2, each twice as wide as the one before, then two of stride 1.

    layers: how many have stride 2.
    """

    def __init__(self, *, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(
                f"a discriminator of {layers} layers sees nothing, at least 1 is needed"
            )
        widths = [width * min(2**n, WIDEST) for n in range(layers + 1)]
        main: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE, inplace=True),
        ]
        for n, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if n < layers else 1
            main += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        return self.main(image)  # (B, 1, h, w)
