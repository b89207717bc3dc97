"""The Inception v3 network of FID: TensorFlow's `inception-2015-12-05` graph, torchvision's names.

It differs from torchvision's: average pools do not count padding, the last block has a max pool,
and the weights are different. Szegedy et al. 2015 (arXiv:1512.00567).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.blocks import Layer

__all__ = ["INCEPTION_IMAGE_SIZE", "INCEPTION_NUM_FEATURES", "Inception"]

INCEPTION_NUM_FEATURES = 2048
INCEPTION_IMAGE_SIZE = 299  # side of the input images, in pixels
EPS = 1e-3  # of batch norms, as in TensorFlow
AVERAGE_POOL = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAX_POOL = nn.MaxPool2d(3, stride=1, padding=1)
HALVING_POOL = nn.MaxPool2d(3, stride=2)


class ConvSpec(NamedTuple):
    """Settings of a branch's convolution; padding is "same" with stride 1, none with stride 2.

    Args:
        name: Attribute name in the block.
        kernel: (height, width).
    """

    name: str
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class BranchSpec(NamedTuple):
    """Settings of a branch of a block.

    Args:
        stages: Run in order; each is one convolution, or two parallel ones.
        pool: Runs before the stages; None = no pooling.
    """

    stages: Sequence[tuple[ConvSpec, ...]]
    pool: nn.Module | None = None


class ConvNorm(Layer):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        stride: int,
        *,
        same_padding: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same_padding else (0, 0)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(Layer):
    """Branches with the same input, whose outputs are concatenated over channels."""

    def __init__(self, in_channels: int, branches: Sequence[BranchSpec]) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            channels = in_channels
            for stage in branch.stages:
                for name, out_channels, kernel, stride in stage:
                    layer = ConvNorm(
                        channels, out_channels, kernel, stride, same_padding=stride == 1
                    )
                    self.add_module(name, layer)
                channels = sum(conv.out_channels for conv in stage)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            h = x if branch.pool is None else branch.pool(x)
            for stage in branch.stages:
                h = torch.cat([self.get_submodule(conv.name)(h) for conv in stage], dim=1)
            outputs.append(h)
        return torch.cat(outputs, dim=1)


class Inception(Layer):
    """Images (B, 3, 299, 299) -> features (B, 2048), a spatial mean.

    The caller normalizes pixels x in 0 … 255 to (x - 128) / 128, as TensorFlow's graph does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2, same_padding=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), 1, same_padding=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), 1)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1), 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), 1, same_padding=False)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = Block(192, _make_block_a(32))
        self.Mixed_5c = Block(256, _make_block_a(64))
        self.Mixed_5d = Block(288, _make_block_a(64))
        self.Mixed_6a = Block(288, BLOCK_B)
        self.Mixed_6b = Block(768, _make_block_c(128))
        self.Mixed_6c = Block(768, _make_block_c(160))
        self.Mixed_6d = Block(768, _make_block_c(160))
        self.Mixed_6e = Block(768, _make_block_c(192))
        self.Mixed_7a = Block(768, BLOCK_D)
        self.Mixed_7b = Block(1280, _make_block_e(AVERAGE_POOL))
        self.Mixed_7c = Block(2048, _make_block_e(MAX_POOL))

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for layer in self.children():  # (B, 288, 35, 35) after 5d, (B, 768, 17, 17) after 6e
            x = layer(x)
        return x.mean(dim=(2, 3))  # of (B, 2048, 8, 8)


def _make_conv_branch(*convs: ConvSpec) -> BranchSpec:
    return BranchSpec([(conv,) for conv in convs])


def _make_pool_branch(pool: nn.Module, out_channels: int) -> BranchSpec:
    return BranchSpec([(ConvSpec("branch_pool", out_channels),)], pool)


# Blocks A to E, as torchvision's InceptionA to InceptionE.
BLOCK_B = [
    _make_conv_branch(ConvSpec("branch3x3", 384, (3, 3), 2)),
    _make_conv_branch(
        ConvSpec("branch3x3dbl_1", 64),
        ConvSpec("branch3x3dbl_2", 96, (3, 3)),
        ConvSpec("branch3x3dbl_3", 96, (3, 3), 2),
    ),
    BranchSpec([], HALVING_POOL),
]
BLOCK_D = [
    _make_conv_branch(ConvSpec("branch3x3_1", 192), ConvSpec("branch3x3_2", 320, (3, 3), 2)),
    _make_conv_branch(
        ConvSpec("branch7x7x3_1", 192),
        ConvSpec("branch7x7x3_2", 192, (1, 7)),
        ConvSpec("branch7x7x3_3", 192, (7, 1)),
        ConvSpec("branch7x7x3_4", 192, (3, 3), 2),
    ),
    BranchSpec([], HALVING_POOL),
]


def _make_block_a(pool_channels: int) -> list[BranchSpec]:
    return [
        _make_conv_branch(ConvSpec("branch1x1", 64)),
        _make_conv_branch(ConvSpec("branch5x5_1", 48), ConvSpec("branch5x5_2", 64, (5, 5))),
        _make_conv_branch(
            ConvSpec("branch3x3dbl_1", 64),
            ConvSpec("branch3x3dbl_2", 96, (3, 3)),
            ConvSpec("branch3x3dbl_3", 96, (3, 3)),
        ),
        _make_pool_branch(AVERAGE_POOL, pool_channels),
    ]


def _make_block_c(channels: int) -> list[BranchSpec]:
    return [
        _make_conv_branch(ConvSpec("branch1x1", 192)),
        _make_conv_branch(
            ConvSpec("branch7x7_1", channels),
            ConvSpec("branch7x7_2", channels, (1, 7)),
            ConvSpec("branch7x7_3", 192, (7, 1)),
        ),
        _make_conv_branch(
            ConvSpec("branch7x7dbl_1", channels),
            ConvSpec("branch7x7dbl_2", channels, (7, 1)),
            ConvSpec("branch7x7dbl_3", channels, (1, 7)),
            ConvSpec("branch7x7dbl_4", channels, (7, 1)),
            ConvSpec("branch7x7dbl_5", 192, (1, 7)),
        ),
        _make_pool_branch(AVERAGE_POOL, 192),
    ]


def _make_block_e(pool: nn.Module) -> list[BranchSpec]:
    def make_fork(name: str) -> tuple[ConvSpec, ...]:
        return ConvSpec(f"{name}a", 384, (1, 3)), ConvSpec(f"{name}b", 384, (3, 1))

    return [
        _make_conv_branch(ConvSpec("branch1x1", 320)),
        BranchSpec([(ConvSpec("branch3x3_1", 384),), make_fork("branch3x3_2")]),
        BranchSpec(
            [
                (ConvSpec("branch3x3dbl_1", 448),),
                (ConvSpec("branch3x3dbl_2", 384, (3, 3)),),
                make_fork("branch3x3dbl_3"),
            ]
        ),
        _make_pool_branch(pool, 192),
    ]
