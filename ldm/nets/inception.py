"""The Inception network of FID: the one of TensorFlow of 2015-12-05, with torchvision's names.

It differs from torchvision's: average pools do not count padding, the last block has a maximum
pool, and its weights are others. Szegedy et al. 2015 (arXiv:1512.00567).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.blocks import Layer

__all__ = ["INCEPTION_FEATURES", "INCEPTION_SIDE", "Inception"]

INCEPTION_FEATURES = 2048
INCEPTION_SIDE = 299  # pixels of its input
EPS = 1e-3


class Conv(NamedTuple):
    """A convolution: with stride 1 padded to the same size, with stride 2 not at all."""

    name: str  # in the block
    width: int  # output channels
    kernel: tuple[int, int] = (1, 1)  # (height, width)
    stride: int = 1


Pool = Callable[[Tensor], Tensor]


class Branch(NamedTuple):
    """One branch of a block: a pool or none, then steps of one or of two parallel convolutions."""

    steps: Sequence[tuple[Conv, ...]]
    pool: Pool | None = None


class ConvNorm(Layer):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, width_in: int, width: int, kernel: tuple[int, int], stride: int, padding: bool = True
    ) -> None:
        super().__init__()
        around = (kernel[0] // 2, kernel[1] // 2) if padding else (0, 0)
        self.conv = nn.Conv2d(width_in, width, kernel, stride, around, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(Layer):
    """Branches on the same input, their outputs side by side."""

    def __init__(self, width: int, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            width_in = width
            for step in branch.steps:
                for name, out, kernel, stride in step:
                    layer = ConvNorm(width_in, out, kernel, stride, padding=stride == 1)
                    self.add_module(name, layer)
                width_in = sum(conv.width for conv in step)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            h = x if branch.pool is None else branch.pool(x)
            for step in branch.steps:
                h = torch.cat([self.get_submodule(conv.name)(h) for conv in step], dim=1)
            outputs.append(h)
        return torch.cat(outputs, dim=1)


class Inception(Layer):
    """Images (B, 3, 299, 299), about -1 … 1 -> features (B, 2048), the mean of the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2, padding=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), 1, padding=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), 1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1), 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), 1, padding=False)
        self.Mixed_5b = Block(192, _block_a(32))
        self.Mixed_5c = Block(256, _block_a(64))
        self.Mixed_5d = Block(288, _block_a(64))
        self.Mixed_6a = Block(288, BLOCK_B)
        self.Mixed_6b = Block(768, _block_c(128))
        self.Mixed_6c = Block(768, _block_c(160))
        self.Mixed_6d = Block(768, _block_c(160))
        self.Mixed_6e = Block(768, _block_c(192))
        self.Mixed_7a = Block(768, BLOCK_D)
        self.Mixed_7b = Block(1280, _block_e(_average_pool))
        self.Mixed_7c = Block(2048, _block_e(_max_pool))

    def forward(self, image: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(image)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _chain(*convs: Conv) -> Branch:
    return Branch([(conv,) for conv in convs])


def _pool_then_conv(pool: Pool, width: int) -> Branch:
    return Branch([(Conv("branch_pool", width),)], pool)


THREE, FIVE, WIDE, TALL = (3, 3), (5, 5), (1, 7), (7, 1)

BLOCK_B = [
    _chain(Conv("branch3x3", 384, THREE, 2)),
    _chain(
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, THREE),
        Conv("branch3x3dbl_3", 96, THREE, 2),
    ),
    Branch([], _halve),
]
BLOCK_D = [
    _chain(Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, THREE, 2)),
    _chain(
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, WIDE),
        Conv("branch7x7x3_3", 192, TALL),
        Conv("branch7x7x3_4", 192, THREE, 2),
    ),
    Branch([], _halve),
]


def _block_a(pool_width: int) -> list[Branch]:
    return [
        _chain(Conv("branch1x1", 64)),
        _chain(Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, FIVE)),
        _chain(
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, THREE),
            Conv("branch3x3dbl_3", 96, THREE),
        ),
        _pool_then_conv(_average_pool, pool_width),
    ]


def _block_c(width: int) -> list[Branch]:
    return [
        _chain(Conv("branch1x1", 192)),
        _chain(
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, WIDE),
            Conv("branch7x7_3", 192, TALL),
        ),
        _chain(
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, TALL),
            Conv("branch7x7dbl_3", width, WIDE),
            Conv("branch7x7dbl_4", width, TALL),
            Conv("branch7x7dbl_5", 192, WIDE),
        ),
        _pool_then_conv(_average_pool, 192),
    ]


def _block_e(pool: Pool) -> list[Branch]:
    def fork(name: str) -> tuple[Conv, ...]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return [
        _chain(Conv("branch1x1", 320)),
        Branch([(Conv("branch3x3_1", 384),), fork("branch3x3_2")]),
        Branch(
            [
                (Conv("branch3x3dbl_1", 448),),
                (Conv("branch3x3dbl_2", 384, THREE),),
                fork("branch3x3dbl_3"),
            ]
        ),
        _pool_then_conv(pool, 192),
    ]
