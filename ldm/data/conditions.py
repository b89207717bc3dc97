"""Synthetic conditioning images for training inpainting, upscaling and depth models.

    mask    (1, H, W)  1 = inpaint                brush strokes or boxes, sometimes the full image
    lr      (3, h, w)  in [-1, 1]                 the image downscaled with a random filter
    depth   (1, H, W)  in [0, 1], near = large    rises with the distance from the silhouette's edge

Each is generated from the image (3, H, W) in [-1, 1], its opacity (1, H, W) in [0, 1] and a random
generator. The opacity is all ones for images without alpha.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.data.former_options import rename_options, to_former_names
from ldm.runtime.errors import ArgumentError, check_name, check_names
from ldm.runtime.types import JsonMapping

__all__ = ["ConditionGenerator", "LowRes", "PseudoDepth", "RandomMask", "build_conditions"]

LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)


@dataclass(frozen=True)
class ConditionGenerator(ABC):
    """Base class of generators of conditioning images; their fields are options in configs.

    Attributes:
        NAME: Name in configs, and batch key of the images.
        FORMER_NAME: Former class name, part of the keys of latent caches.
    """

    NAME: ClassVar[str]
    FORMER_NAME: ClassVar[str]

    @abstractmethod
    def __call__(self, image: Tensor, opacity: Tensor, rng: Random) -> Tensor:
        """Generate the conditioning image of an image."""

    def get_cache_key(self) -> str:
        """Return class and options for keys of latent caches, with former names."""
        options = to_former_names(self.NAME, vars(self)).items()
        return f"{self.FORMER_NAME}({', '.join(f'{key}={value!r}' for key, value in options)})"


@dataclass(frozen=True)
class RandomMask(ConditionGenerator):
    """Random inpainting masks: one to three brush strokes or boxes.

    Args:
        full_probability: Probability of the full image, to learn to generate without context.
        box_probability: Probability of boxes instead of brush strokes.
    """

    NAME = "mask"
    FORMER_NAME = "Mask"

    full_probability: float = 0.15
    box_probability: float = 0.5

    def __call__(self, image: Tensor, opacity: Tensor, rng: Random) -> Tensor:
        height, width = image.shape[-2:]
        if rng.random() < self.full_probability:
            return torch.ones(1, height, width)
        mask = Image.new("L", (width, height))
        pen = ImageDraw.Draw(mask)
        draw = _draw_box if rng.random() < self.box_probability else _draw_stroke
        for _ in range(rng.choice((1, 1, 2, 3))):
            draw(pen, width, height, rng)
        return torch.from_numpy(np.array(mask, dtype=np.float32))[None]  # (1, H, W)


@dataclass(frozen=True)
class LowRes(ConditionGenerator):
    """The image downscaled by `factor` with a random filter, to imitate different resizers.

    Args:
        blur: Maximum sigma of a Gaussian blur of the downscaled image, in its pixels.
    """

    NAME = "lr"
    FORMER_NAME = "Small"

    factor: int = 4
    blur: float = 0.0

    def __call__(self, image: Tensor, opacity: Tensor, rng: Random) -> Tensor:
        size = [side // self.factor for side in image.shape[-2:]]
        mode = rng.choice(("area", "bilinear", "bicubic"))
        antialias = mode != "area" and rng.random() < 0.8
        small = F.interpolate(image[None], size, mode=mode, antialias=antialias)  # (1, 3, h, w)
        sigma = rng.uniform(0, self.blur)
        if sigma > 0.1:  # smaller ones change nothing
            small = _gaussian_blur(small, sigma)
        return small[0].clamp(-1, 1)


@dataclass(frozen=True)
class PseudoDepth(ConditionGenerator):
    """A dome over the silhouette, blended with the luma.

    Args:
        ramp_width: Distance from the edge to the dome's full height, in pixels.
        luminance: Weight of the luma, 0 … 1.
    """

    NAME = "depth"
    FORMER_NAME = "Relief"

    ramp_width: int = 24
    luminance: float = 0.25

    def __call__(self, image: Tensor, opacity: Tensor, rng: Random) -> Tensor:
        silhouette, elevation = opacity[None], torch.zeros_like(opacity[None])  # (1, 1, H, W)
        # `elevation` becomes the distance from the edge: 0 at it, 1 at `ramp_width` and beyond.
        for step in range(self.ramp_width):
            elevation += silhouette / self.ramp_width
            silhouette = _erode(silhouette, square=bool(step % 2))
        dome = (2 * elevation - elevation**2).clamp(min=0).sqrt()  # a quarter of a circle
        pixels = ((image + 1) / 2).permute(1, 2, 0).contiguous()  # (H, W, 3)
        luma = pixels @ image.new_tensor(LUMA_WEIGHTS)  # (H, W)
        weight = self.luminance
        return dome[0] * (1 - weight) + weight * luma * opacity  # (1, H, W)


CONDITIONS: dict[str, type[ConditionGenerator]] = {
    generator.NAME: generator for generator in (RandomMask, LowRes, PseudoDepth)
}


def build_conditions(specs: Mapping[str, JsonMapping | None]) -> dict[str, ConditionGenerator]:
    """Build the generators from a mapping of their NAME to their options."""
    conditions: dict[str, ConditionGenerator] = {}
    for name, spec in specs.items():
        check_name("condition", name, CONDITIONS)
        options = rename_options(name, spec or {})
        defaults = {field.name: field.default for field in fields(CONDITIONS[name])}
        check_names("option", options, defaults, name)
        for option, value in options.items():
            minimum = 1 if isinstance(defaults[option], int) else 0
            if not isinstance(value, int | float) or value < minimum:
                raise ArgumentError(
                    f"{name}.{option}: `{value}` is not a number of at least {minimum}"
                )
        conditions[name] = CONDITIONS[name](**options)
    return conditions


def _draw_box(pen: ImageDraw.ImageDraw, width: int, height: int, rng: Random) -> None:
    w, h = (round(side * rng.uniform(0.2, 0.7)) for side in (width, height))
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    pen.rectangle((left, top, left + w, top + h), fill=1)


def _draw_stroke(pen: ImageDraw.ImageDraw, width: int, height: int, rng: Random) -> None:
    side = min(width, height)
    thickness = round(side * rng.uniform(0.1, 0.3))
    points = [(rng.randint(0, width), rng.randint(0, height)) for _ in range(rng.randint(2, 4))]
    pen.line(points, fill=1, width=thickness)
    for x, y in points:
        pen.ellipse(
            (x - thickness / 2, y - thickness / 2, x + thickness / 2, y + thickness / 2), fill=1
        )


def _gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur an image (1, C, h, w) by a Gaussian, with replicated edges."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, 1, -1)  # (C, 1, 1, taps)
    padded = F.pad(image, (radius, radius, radius, radius), mode="replicate")
    blurred = F.conv2d(padded, kernel, groups=image.shape[1])
    return F.conv2d(blurred, kernel.mT, groups=image.shape[1])


def _erode(mask: Tensor, *, square: bool) -> Tensor:
    """Erode by one pixel; alternating 3 x 3 squares and crosses approximates a disc."""
    background = F.pad(1 - mask, (1, 1, 1, 1), value=1.0)
    if square:
        return 1 - F.max_pool2d(background, 3, stride=1)
    rows = F.max_pool2d(background[..., 1:-1, :], (1, 3), stride=1)
    columns = F.max_pool2d(background[..., 1:-1], (3, 1), stride=1)
    return 1 - torch.maximum(rows, columns)
