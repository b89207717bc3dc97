"""Records beside the picture, for models that see more than text.

    mask    (1, H, W)  1 = to be painted anew     strokes, boxes, now and then everything
    lr      (3, h, w)  in [-1, 1]                 the picture made small, in one of several ways
    depth   (1, H, W)  in [0, 1], near = large    a relief: the silhouette as if it were inflated

Each is made from the image (3, H, W) in [-1, 1], its opacity (1, H, W) in [0, 1] and a source of
chance. A picture that fills its frame is opaque everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

__all__ = ["Mask", "Relief", "Small", "makers"]

Maker = Callable[[Tensor, Tensor, Random], Tensor]
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Mask:
    """Holes as people draw them.

    whole: share of masks that cover everything, so that the model can also paint from nothing.
    boxes: share of those of one to three boxes; the others are one to three strokes of a brush.
    """

    whole: float = 0.15
    boxes: float = 0.5

    def __call__(self, image: Tensor, opacity: Tensor, rng: Random) -> Tensor:
        height, width = image.shape[-2:]
        if rng.random() < self.whole:
            return torch.ones(1, height, width)
        mask = Image.new("L", (width, height))
        pen = ImageDraw.Draw(mask)
        draw = _box if rng.random() < self.boxes else _stroke
        for _ in range(rng.choice((1, 1, 2, 3))):
            draw(pen, width, height, rng)
        return torch.from_numpy(np.array(mask, dtype=np.float32))[None]  # (1, H, W)


@dataclass(frozen=True)
class Small:
    """The picture `factor` times smaller, as different programs would make it.

    blur: greatest standard deviation of a blur afterwards, small pixels.
    """

    factor: int = 4
    blur: float = 0.0

    def __call__(self, image: Tensor, opacity: Tensor, rng: Random) -> Tensor:
        size = [side // self.factor for side in image.shape[-2:]]
        mode = rng.choice(("area", "bilinear", "bicubic"))
        smooth = {} if mode == "area" else {"antialias": rng.random() < 0.8}
        small = F.interpolate(image[None], size, mode=mode, **smooth)  # (1, 3, h, w)
        sigma = rng.uniform(0, self.blur)
        if sigma > 0.1:
            small = _blurred(small, sigma)
        return small[0].clamp(-1, 1)


@dataclass(frozen=True)
class Relief:
    """How near each point would be if the silhouette were a cushion; bright parts stand out a bit.

    depth: pixels from the edge to where the cushion is at its full height.
    luminance: share of the brightness in the height.
    """

    depth: int = 24
    luminance: float = 0.25

    def __call__(self, image: Tensor, opacity: Tensor, rng: Random) -> Tensor:
        inside, height = opacity[None], torch.zeros_like(opacity[None])  # (1, 1, H, W)
        for step in range(self.depth):
            height += inside / self.depth
            inside = _eroded(inside, square=bool(step % 2))
        round_ = (2 * height - height**2).clamp(min=0).sqrt()  # a quarter of a circle
        light = torch.einsum("chw,c->hw", (image + 1) / 2, image.new_tensor(LUMINANCE))
        share = self.luminance
        return round_[0] * (1 - share) + share * light * opacity  # (1, H, W)


MAKERS: dict[str, Any] = {"mask": Mask, "lr": Small, "depth": Relief}


def makers(specs: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Maker]:
    """What makes each named record, from its options.

    Raises ValueError for an unknown record or option.
    """
    made = {}
    for name, options in specs.items():
        if name not in MAKERS:
            raise ValueError(f"unknown record `{name}`, choose one of {', '.join(MAKERS)}")
        known = MAKERS[name].__dataclass_fields__
        for key in options or {}:
            if key not in known:
                raise ValueError(f"record `{name}` has no `{key}`, only {', '.join(known)}")
        made[name] = MAKERS[name](**(options or {}))
    return made


def _box(pen: ImageDraw.ImageDraw, width: int, height: int, rng: Random) -> None:
    w, h = (round(side * rng.uniform(0.2, 0.7)) for side in (width, height))
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    pen.rectangle((left, top, left + w, top + h), fill=1)


def _stroke(pen: ImageDraw.ImageDraw, width: int, height: int, rng: Random) -> None:
    """A line of a few corners, round at them."""
    side = min(width, height)
    thick = round(side * rng.uniform(0.1, 0.3))
    corners = [(rng.randint(0, width), rng.randint(0, height)) for _ in range(rng.randint(2, 4))]
    pen.line(corners, fill=1, width=thick)
    for x, y in corners:
        pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=1)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (1, C, h, w), edges repeated."""
    half = max(1, round(3 * sigma))
    offsets = torch.arange(-half, half + 1, dtype=image.dtype)
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    window = (window / window.sum()).expand(image.shape[1], 1, 1, -1)  # (C, 1, 1, taps)
    wide = F.pad(image, (half, half, half, half), mode="replicate")
    across = F.conv2d(wide, window, groups=image.shape[1])
    return F.conv2d(across, window.mT, groups=image.shape[1])


def _eroded(inside: Tensor, *, square: bool) -> Tensor:
    """One pixel less all around: squares and crosses in turn come near to circles."""
    outside = F.pad(1 - inside, (1, 1, 1, 1), value=1.0)
    if square:
        return 1 - F.max_pool2d(outside, 3, stride=1)
    across = F.max_pool2d(outside[..., 1:-1, :], (1, 3), stride=1)
    down = F.max_pool2d(outside[..., 1:-1], (3, 1), stride=1)
    return 1 - torch.maximum(across, down)
