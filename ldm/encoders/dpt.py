"""DPT-hybrid, the network of MiDaS: image -> relative inverse depth.

A ResNet feeds a vision transformer; the decoder fuses two feature maps of each from coarse to fine:

    image -> stem -> stage 0 ----> stage 1 -> stage 2 -> ViT blocks 0 … 8 -> 9 … 11
                        | 1/4         | 1/8                 | 1/16             | 1/32
    depth <- head <- refine 1 <--- refine 2 <------------ refine 3 <------- refine 4

Ranftl et al. 2021 (arXiv:2103.13413).
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nets.blocks import Conv2d, Linear
from ldm.runtime.errors import ArgumentError

SIZE_MULTIPLE = 32  # stride of the coarsest feature map, in pixels of the image
HEAD_CHANNELS = 32  # before the last convolution


class DPT(nn.Module):
    """Relative inverse depth (B, 1, H, W) of images (B, 3, H, W) in [-1, 1].

    Args:
        vit: Hybrid vision transformer of timm, with `patch_embed.backbone` (`stem`, `stages`),
            `patch_embed.proj`, `cls_token`, `pos_embed` and `blocks`.
        hooks: Indices of the two blocks whose tokens the decoder uses.
        features: Channels of the decoder.
    """

    def __init__(
        self, vit: nn.Module, *, hooks: tuple[int, int] = (8, 11), features: int = 256
    ) -> None:
        super().__init__()
        timm_vit: Any = vit
        if not 0 <= hooks[0] < hooks[1] < len(timm_vit.blocks):
            raise ArgumentError(f"hooks {hooks} do not fit {len(timm_vit.blocks)} blocks", "hooks")
        self.hooks = hooks
        dim, stages = timm_vit.embed_dim, timm_vit.patch_embed.backbone.feature_info
        level_channels = [stages[1]["num_chs"], stages[2]["num_chs"], dim, dim]
        downsampling = {"4": Conv2d(dim, dim, 3, stride=2, padding=1)}
        self.pretrained = nn.ModuleDict(
            {
                "model": vit,
                "act_postprocess3": nn.ModuleDict(_build_reassembly(dim)),
                "act_postprocess4": nn.ModuleDict(_build_reassembly(dim) | downsampling),
            }
        )
        scratch: dict[str, nn.Module] = {}
        for i, channels in enumerate(level_channels, start=1):
            scratch[f"layer{i}_rn"] = Conv2d(channels, features, 3, padding=1, bias=False)
            scratch[f"refinenet{i}"] = FeatureFusion(features)
        # Indices as in MiDaS' files; layers 1, 3 and 5 have no weights.
        scratch["output_conv"] = nn.Sequential(
            Conv2d(features, features // 2, 3, padding=1),
            nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True),
            Conv2d(features // 2, HEAD_CHANNELS, 3, padding=1),
            nn.ReLU(),
            Conv2d(HEAD_CHANNELS, 1, 1),
            nn.ReLU(),
        )
        self.scratch = nn.ModuleDict(scratch)

    def forward(self, x: Tensor) -> Tensor:
        """Estimate inverse depth, larger = nearer; sides of x are multiples of SIZE_MULTIPLE."""
        if x.shape[-2] % SIZE_MULTIPLE or x.shape[-1] % SIZE_MULTIPLE:
            raise ArgumentError(
                f"an image of {x.shape[-1]}x{x.shape[-2]} pixels does not fit MiDaS: both sides "
                f"must be multiples of {SIZE_MULTIPLE}"
            )
        fused: Tensor | None = None
        for i, features in reversed(list(enumerate(self._compute_feature_maps(x), start=1))):
            level = self.scratch[f"layer{i}_rn"](features)  # (B, F, h_i, w_i)
            fused = self.scratch[f"refinenet{i}"](level, fused)  # (B, F, 2 h_i, 2 w_i)
        inverse_depth: Tensor = self.scratch["output_conv"](fused)  # (B, 1, H, W)
        return inverse_depth

    def _compute_feature_maps(self, x: Tensor) -> list[Tensor]:
        """Compute feature maps at 1/4, 1/8, 1/16 and 1/32 of the image's size."""
        vit: Any = self.pretrained["model"]
        resnet = vit.patch_embed.backbone
        first = resnet.stages[0](resnet.stem(x))  # (B, C_0, H/4, W/4)
        second = resnet.stages[1](first)  # (B, C_1, H/8, W/8)
        patches = vit.patch_embed.proj(resnet.stages[2](second))  # (B, D, h, w) at 1/16
        size = patches.shape[-2:]
        cls = vit.cls_token.expand(len(x), -1, -1)  # (B, 1, D)
        tokens = torch.cat([cls, rearrange(patches, "b d h w -> b (h w) d")], dim=1)
        tokens = tokens + _resize_positions(vit.pos_embed, size)  # (B, 1 + h w, D)
        outputs = []
        for i, block in enumerate(vit.blocks[: self.hooks[1] + 1]):
            tokens = block(tokens)
            if i in self.hooks:
                outputs.append(tokens)
        names = ("act_postprocess3", "act_postprocess4")
        vit_maps = (
            _reassemble(cast(nn.ModuleDict, self.pretrained[name]), output, size)
            for name, output in zip(names, outputs, strict=True)
        )
        return [first, second, *vit_maps]


class FeatureFusion(nn.Module):
    """Adds a feature map to the fused coarser ones, refines the sum and doubles its size.

    The coarsest level has no coarser one: its `resConfUnit1` is in checkpoints, but unused.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = Conv2d(features, features, 1)
        self.up = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True)

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        x = level if coarser is None else coarser + self.resConfUnit1(level)  # (B, F, h, w)
        fused: Tensor = self.out_conv(self.up(self.resConfUnit2(x)))  # (B, F, 2h, 2w)
        return fused


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with pre-activation, and a skip connection."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(features, features, 3, padding=1)
        self.conv2 = Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(F.relu(self.conv1(F.relu(x))))
        return x + residual  # (B, F, h, w)


def _build_reassembly(dim: int) -> dict[str, nn.Module]:
    """Build the layers of `_reassemble`; MiDaS' layers 1 and 2 are reshapes without weights."""
    project = nn.Sequential(Linear(2 * dim, dim), nn.GELU())
    return {"0": nn.ModuleDict({"project": project}), "3": Conv2d(dim, dim, 1)}


def _reassemble(layers: nn.ModuleDict, tokens: Tensor, size: torch.Size) -> Tensor:
    """Turn tokens (B, 1 + h w, D) into a feature map (B, D, h, w), halved by layer "4" if any."""
    cls, patches = tokens[:, :1], tokens[:, 1:]
    patches = torch.cat([patches, cls.expand_as(patches)], dim=-1)  # (B, h w, 2 D)
    patches = cast(nn.ModuleDict, layers["0"])["project"](patches)  # (B, h w, D)
    x: Tensor = layers["3"](rearrange(patches, "b (h w) d -> b d h w", h=size[0]))  # (B, D, h, w)
    if "4" in layers:
        x = layers["4"](x)
    return x


def _resize_positions(positions: Tensor, size: torch.Size) -> Tensor:
    """Resize the position embedding of a square grid (1, 1 + n n, D) to (1, 1 + h w, D)."""
    side = round((positions.shape[1] - 1) ** 0.5)
    maps = rearrange(positions[:, 1:], "b (h w) d -> b d h w", h=side)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(maps, "b d h w -> b (h w) d")], dim=1)
