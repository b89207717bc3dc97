"""DPT-hybrid, the network behind MiDaS: a picture -> inverse depth, without unit or zero.

A ResNet feeds a vision transformer; two maps of each, from fine to coarse, go through a decoder
that fuses them from coarse to fine:

    image -> stem -> stage 0 ----> stage 1 -> stage 2 -> ViT blocks 0 … 8 -> 9 … 11
                        | 1/4         | 1/8                 | 1/16             | 1/32
    depth <- head <- refine 1 <--- refine 2 <------------ refine 3 <------- refine 4

The backbone is handed in (`depth.py` makes it); parameter names are those of the MiDaS files.
Ranftl et al. 2021 (arXiv:2103.13413).
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nets.blocks import Conv2d, Linear

MULTIPLE = 32  # pixels of an image per pixel of the coarsest map
HEAD = 32  # channels before the last convolution


class DPT(nn.Module):
    """Inverse depth (B, 1, H, W) of normalised images (B, 3, H, W).

    vit: a hybrid vision transformer as timm builds them: `patch_embed.backbone` (`stem`, three
        `stages`), `patch_embed.proj`, `cls_token`, `pos_embed`, `blocks`.
    hooks: the two blocks whose tokens are used.
    features: width of the decoder.
    """

    def __init__(
        self, vit: nn.Module, *, hooks: tuple[int, int] = (8, 11), features: int = 256
    ) -> None:
        super().__init__()
        body: Any = vit
        if not 0 <= hooks[0] < hooks[1] < len(body.blocks):
            raise ValueError(f"hooks {hooks} do not fit {len(body.blocks)} blocks")
        self.hooks = hooks
        width, stages = body.embed_dim, body.patch_embed.backbone.feature_info
        maps = [stages[1]["num_chs"], stages[2]["num_chs"], width, width]
        coarse = {"4": Conv2d(width, width, 3, stride=2, padding=1)}
        self.pretrained = nn.ModuleDict(
            {
                "model": vit,
                "act_postprocess3": nn.ModuleDict(_reassembly(width)),
                "act_postprocess4": nn.ModuleDict(_reassembly(width) | coarse),
            }
        )
        scratch: dict[str, nn.Module] = {}
        for i, channels in enumerate(maps, start=1):
            scratch[f"layer{i}_rn"] = Conv2d(channels, features, 3, padding=1, bias=False)
            scratch[f"refinenet{i}"] = Fusion(features)
        scratch["output_conv"] = nn.Sequential(
            Conv2d(features, features // 2, 3, padding=1),
            Twice(),
            Conv2d(features // 2, HEAD, 3, padding=1),
            nn.ReLU(),
            Conv2d(HEAD, 1, 1),
            nn.ReLU(),
        )
        self.scratch = nn.ModuleDict(scratch)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W), sides multiples of 32. Returns (B, 1, H, W), at least 0, near = large.

        Raises ValueError for another size.
        """
        if x.shape[-2] % MULTIPLE or x.shape[-1] % MULTIPLE:
            raise ValueError(
                f"depth of an image of {x.shape[-2]} x {x.shape[-1]} pixels: "
                f"both sides must be multiples of {MULTIPLE}"
            )
        fused: Tensor | None = None
        for i, features in reversed(list(enumerate(self._maps(x), start=1))):
            level = self.scratch[f"layer{i}_rn"](features)  # (B, F, h_i, w_i)
            fused = self.scratch[f"refinenet{i}"](level, fused)  # (B, F, 2 h_i, 2 w_i)
        return self.scratch["output_conv"](fused)  # (B, 1, H, W)

    def _maps(self, x: Tensor) -> list[Tensor]:
        """Feature maps at 1/4, 1/8, 1/16 and 1/32 of the size."""
        vit: Any = self.pretrained["model"]
        cnn = vit.patch_embed.backbone
        first = cnn.stages[0](cnn.stem(x))  # (B, C_0, H/4, W/4)
        second = cnn.stages[1](first)  # (B, C_1, H/8, W/8)
        grid = vit.patch_embed.proj(cnn.stages[2](second))  # (B, D, h, w) at 1/16
        size = grid.shape[-2:]
        start = vit.cls_token.expand(len(x), -1, -1)  # (B, 1, D)
        tokens = torch.cat([start, rearrange(grid, "b d h w -> b (h w) d")], dim=1)
        tokens, kept = tokens + _resized(vit.pos_embed, size), []  # (B, 1 + h w, D)
        for i, block in enumerate(vit.blocks[: self.hooks[1] + 1]):
            tokens = block(tokens)
            if i in self.hooks:
                kept.append(tokens)
        names = ("act_postprocess3", "act_postprocess4")
        maps = (_reassemble(self.pretrained[n], t, size) for n, t in zip(names, kept, strict=True))
        return [first, second, *maps]


class Fusion(nn.Module):
    """Adds a level to what came from below it, refines the sum, and doubles its size.

    The lowest level has nothing below: its `resConfUnit1` exists in the files, unused.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.resConfUnit1 = Residual(features)
        self.resConfUnit2 = Residual(features)
        self.out_conv = Conv2d(features, features, 1)
        self.up = Twice()

    def forward(self, level: Tensor, below: Tensor | None) -> Tensor:
        x = level if below is None else below + self.resConfUnit1(level)  # (B, F, h, w)
        return self.out_conv(self.up(self.resConfUnit2(x)))  # (B, F, 2h, 2w)


class Residual(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(features, features, 3, padding=1)
        self.conv2 = Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))  # (B, F, h, w)


class Twice(nn.Module):
    """Twice the size, corners on corners."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


def _reassembly(width: int) -> dict[str, nn.Module]:
    """The class token's part ("project"), and a convolution; numbers 1 and 2 are mere reshapes."""
    project = nn.Sequential(Linear(2 * width, width), nn.GELU())
    return {"0": nn.ModuleDict({"project": project}), "3": Conv2d(width, width, 1)}


def _reassemble(layers: Any, tokens: Tensor, size: torch.Size) -> Tensor:
    """Tokens (B, 1 + h w, D) -> a map (B, D, h, w), or half of that size."""
    start, rest = tokens[:, :1], tokens[:, 1:]
    rest = torch.cat([rest, start.expand_as(rest)], dim=-1)  # (B, h w, 2 D)
    rest = layers["0"]["project"](rest)  # (B, h w, D)
    x = rearrange(rest, "b (h w) d -> b d h w", h=size[0])
    for name in ("3", "4"):
        x = layers[name](x) if name in layers else x
    return x


def _resized(positions: Tensor, size: torch.Size) -> Tensor:
    """Position embedding of a square grid (1, 1 + n n, D) -> of another grid (1, 1 + h w, D)."""
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = rearrange(positions[:, 1:], "b (h w) d -> b d h w", h=side)
    grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(grid, "b d h w -> b (h w) d")], dim=1)
