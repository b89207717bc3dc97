"""LPIPS: a perceptual distance of two images, from the features of an image classifier.

    both images -> features of five layers of VGG16, normalized over channels -> squared difference,
    weighted per channel -> mean over positions -> sum over layers

Zhang et al. 2018 (arXiv:1801.03924); VGG16 of Simonyan and Zisserman 2014 (arXiv:1409.1556).
Without the weights that `ldm.loading.addons.lpips` loads, the distance is meaningless.
"""

import itertools

import torch
from torch import Tensor, nn

from ldm.nets.blocks import Layer

__all__ = ["LPIPS", "LPIPS_CHANNELS"]

LPIPS_CHANNELS = (64, 128, 256, 512, 512)  # of the five layers
NUM_CONVOLUTIONS = (2, 2, 3, 3, 3)  # in each slice of VGG16
DROPOUT = 0.5  # has no effect (see `LPIPS.train`); the layer is part of weight names
EPS = 1e-10  # added to norms, as LPIPS's authors do
# Mean and standard deviation of VGG16's inputs in [-1, 1], rounded by LPIPS's authors.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Scaling(Layer):
    """Normalizes images (B, 3, H, W) as VGG16's input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None])

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.shift) / self.scale  # (B, 3, H, W)


class VGG16(nn.Module):  # not a Layer, as it returns a list
    """The convolutions of VGG16 in five slices, one per feature layer, numbered as in VGG16."""

    def __init__(self) -> None:
        super().__init__()
        count = itertools.count()
        for k, (in_channels, channels) in enumerate(itertools.pairwise([3, *LPIPS_CHANNELS])):
            layers = nn.Sequential()
            if k:
                layers.add_module(str(next(count)), nn.MaxPool2d(2))
            for n in range(NUM_CONVOLUTIONS[k]):
                conv = nn.Conv2d(channels if n else in_channels, channels, 3, padding=1)
                layers.add_module(str(next(count)), conv)
                layers.add_module(str(next(count)), nn.ReLU())
            self.add_module(f"slice{k + 1}", layers)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, features = image, []
        for layers in self.children():
            x = layers(x)  # (B, LPIPS_CHANNELS[i], H / 2^i, W / 2^i)
            features.append(x)
        return features


class Head(Layer):
    """Computes a weighted sum over the channels of one layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(DROPOUT), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, difference: Tensor) -> Tensor:
        weighted: Tensor = self.model(difference)  # (B, 1, h, w)
        return weighted


class LPIPS(Layer):
    """Computes the LPIPS distance of two images, with frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = Scaling()
        self.net = VGG16()
        for k, channels in enumerate(LPIPS_CHANNELS):
            self.add_module(f"lin{k}", Head(channels))
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in eval mode: the original's dropout in training only added noise to a distance."""
        return self

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Compute distances (B, 1, 1, 1) of images (B, 3, H, W) in [-1, 1], at least 16 x 16."""
        pairs = zip(self.extract_features(image), self.extract_features(reference), strict=True)
        distance = image.new_zeros(len(image), 1, 1, 1)
        for k, (x, y) in enumerate(pairs):
            head = self.get_submodule(f"lin{k}")
            distance = distance + head((x - y).square()).mean(dim=(2, 3), keepdim=True)
        return distance  # (B, 1, 1, 1)

    def extract_features(self, image: Tensor) -> list[Tensor]:
        """Return the features (B, C, h, w) of the five layers, with unit norm over channels."""
        return [_normalize(x) for x in self.net(self.scaling_layer(image))]


def _normalize(x: Tensor) -> Tensor:
    # vector_norm, unlike the root of a sum of squares, has a finite gradient where x is 0.
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / (norm + EPS)  # (B, C, h, w)
