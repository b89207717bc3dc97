"""LPIPS: how different two pictures look, by what a network for recognising things sees in them.

    both images -> five depths of VGG16 -> squared difference of unit vectors, weighed per channel
    -> mean over positions -> sum over depths

Zhang et al. 2018 (arXiv:1801.03924); VGG16 of Simonyan & Zisserman 2014 (arXiv:1409.1556). The
names of the weights are those of the original's training checkpoints; this file makes no weights
of its own, see `ldm.loading.addons.lpips`.
"""

import itertools

import torch
from torch import Tensor, nn

__all__ = ["LPIPS", "WIDTHS"]

WIDTHS = (64, 128, 256, 512, 512)  # of the five depths
CONVOLUTIONS = (2, 2, 3, 3, 3)
DROPOUT = 0.5
TINY = 1e-10
# Colours of [-1, 1] with the mean and deviation that VGG16 expects, as its authors round them.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Scaling(nn.Module):
    """(image - shift) / scale, for each colour."""

    def __init__(self) -> None:
        super().__init__()
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None])

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.shift) / self.scale  # (B, 3, H, W)


class VGG16(nn.Module):
    """The convolutions of VGG16 in five slices; layers are numbered as in the whole network."""

    def __init__(self) -> None:
        super().__init__()
        count = itertools.count()
        widths = [3, *WIDTHS]
        for depth, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            part = nn.Sequential()
            if depth > 1:
                part.add_module(str(next(count)), nn.MaxPool2d(2))
            for n in range(CONVOLUTIONS[depth - 1]):
                conv = nn.Conv2d(after if n else before, after, 3, padding=1)
                part.add_module(str(next(count)), conv)
                part.add_module(str(next(count)), nn.ReLU())
            self.add_module(f"slice{depth}", part)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, features = image, []
        for part in self.children():
            x = part(x)  # (B, WIDTHS[i], H / 2^i, W / 2^i)
            features.append(x)
        return features


class Head(nn.Module):
    """The weights of the channels of one depth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(DROPOUT), nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, difference: Tensor) -> Tensor:
        return self.model(difference)  # (B, 1, h, w)


class LPIPS(nn.Module):
    """The distance of two images, frozen. Their sides need at least 16 pixels.

    Stays in eval mode whatever holds it: the original's dropout came back when its whole model
    was put in training mode, which only adds noise to a distance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = Scaling()
        self.net = VGG16()
        for depth, width in enumerate(WIDTHS):
            self.add_module(f"lin{depth}", Head(width))
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "LPIPS":
        return self

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """image, other: (B, 3, H, W) in [-1, 1]. Returns (B, 1, 1, 1), 0 for equal ones."""
        pairs = zip(self.features(image), self.features(other), strict=True)
        distance = image.new_zeros(len(image), 1, 1, 1)
        for depth, (one, two) in enumerate(pairs):
            head = self.get_submodule(f"lin{depth}")
            distance = distance + head((one - two).square()).mean(dim=(2, 3), keepdim=True)
        return distance  # (B, 1, 1, 1)

    def features(self, image: Tensor) -> list[Tensor]:
        """Five tensors (B, C, h, w), unit vectors along the channels."""
        return [_unit(x) for x in self.net(self.scaling_layer(image))]


def _unit(x: Tensor) -> Tensor:
    # This norm has a gradient where all channels are 0, unlike the root of a sum of squares.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + TINY)  # (B, C, h, w)
