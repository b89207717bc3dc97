"""The tasks: each makes the records that a model reads, and goes through the one sampling loop.

    txt2img     prompts                            any text-to-image model
    img2img     prompts, picture                   any text-to-image model
    inpaint     prompts, picture, mask             inpainting models, and text-to-image models
    depth2img   prompts, picture or depth map      depth models
    upscale     prompts, small picture             the x4 upscaler

Those that see pictures instead of starting from one are in `variations`.

Pictures are images (1, 3, H, W) in [-1, 1], of any size: what the latent needs is padded to them
and cut off again. All return (B, 3, H, W) float32 in [-1, 1], one per prompt, and take the options
of `sample`: steps, sampler, eta, seeds, grid, x_T, callback, legacy …
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.guidance import Scale
from ldm.encoders.depth import MiDaSDepth
from ldm.encoders.lowres import LowRes, concat_mask, mask_image
from ldm.model import LatentDiffusion
from ldm.pipelines.frame import (
    check_family,
    cropped,
    latent_of,
    listed,
    made,
    padded,
    reads,
    seeded,
)

__all__ = ["depth2img", "depth_of", "img2img", "inpaint", "txt2img", "upscale"]


@torch.no_grad()
def txt2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 9.0,
    tile: int | None = None,
    **options: Any,
) -> Tensor:
    """One image per prompt.

        negative_prompt: what to steer away from, for all or one for each; "" is nothing.
        scale: guidance; 1 is none.
        tile: decode in tiles of this many latent pixels (None = whole).
        options: those of `sample`, among them size: (height, width) in pixels, multiples of 8.
    Raises NonFinite naming the stage, WrongFamily, ValueError for a bad option.
    """
    check_family(model, "txt2img")
    return made(model, prompts, negative_prompt, {}, scale, tile, **options)


@torch.no_grad()
def img2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    *,
    strength: float = 0.8,
    z: Tensor | None = None,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 9.0,
    tile: int | None = None,
    **options: Any,
) -> Tensor:
    """The picture, changed toward each prompt.

    image: (1, 3, H, W). strength: 0 keeps it, 1 forgets it.
    z: its latent, if that is at hand (`latent_of`); drawn from the posterior otherwise.
    """
    check_family(model, "txt2img")
    noise = seeded(options, prompts)
    if z is None:
        z = latent_of(model, image, len(listed(prompts)), noise)
    options |= {"z": z, "strength": strength, "size": None}
    return cropped(made(model, prompts, negative_prompt, {}, scale, tile, **options), image)


@torch.no_grad()
def inpaint(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    mask: Tensor,
    *,
    strength: float = 1.0,
    composite: bool = True,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 9.0,
    tile: int | None = None,
    **options: Any,
) -> Tensor:
    """The picture, painted anew where the mask says.

        image: (1, 3, H, W). mask: (1, 1, H, W) in [0, 1]; from 0.5 on it is painted anew.
        composite: put the picture back by the mask; where that is 0, pixels are what they were.
    A model that was not trained for it is held to the known latents at every step.
    """
    check_family(model, "inpaint", "txt2img")
    n, f = len(listed(prompts)), model.downscale
    if mask.shape[-2:] != image.shape[-2:]:
        mask_image(image, mask)  # raises
    noise = seeded(options, prompts)
    wide, area = padded(image, f), (padded(mask, f) >= 0.5).float()
    records: dict[str, Any] = {}
    if "masked" in reads(model):
        hidden = latent_of(model, mask_image(wide, area), n, noise)
        records["masked"] = concat_mask(area.to(hidden).expand(n, -1, -1, -1), hidden)
    if "masked" not in records or strength < 1:
        options |= {"z": latent_of(model, wide, n, noise), "strength": strength}
    if "masked" not in records:
        options["x_T"] = start = options.get("x_T", noise(options["z"]))
        known = ~F.max_pool2d(area, f).bool().to(start.device)  # (1, 1, h, w)
        z, start = options["z"].to(start), start.to(model.device)
        options["constrain"] = lambda x, sigma: torch.where(known, z + sigma * start, x)
    options["size"] = (wide.shape[-2], wide.shape[-1])
    painted = cropped(made(model, prompts, negative_prompt, records, scale, tile, **options), image)
    return torch.lerp(image.to(painted), painted, mask.to(painted)) if composite else painted


@torch.no_grad()
def depth2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    *,
    depth: Tensor | None = None,
    strength: float = 0.9,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 9.0,
    tile: int | None = None,
    **options: Any,
) -> Tensor:
    """The picture, changed toward each prompt under its own depth.

    image: (1, 3, H, W). strength: 1 takes nothing but the depth from it.
    depth: (1, 1, …) of any range, near = large; estimated from the picture if None.
    """
    check_family(model, "depth2img")
    n, noise = len(listed(prompts)), seeded(options, prompts)
    z = latent_of(model, image, n, noise)
    source = {"jpg": image} if depth is None else {"depth": depth}
    prepared = model.prepare(
        {key: value.to(model.device) for key, value in source.items()}, (z.shape[-2], z.shape[-1])
    )
    records = {"depth": prepared["depth"].expand(n, -1, -1, -1)}
    options |= {"z": z, "strength": strength, "size": None}
    return cropped(made(model, prompts, negative_prompt, records, scale, tile, **options), image)


@torch.no_grad()
def depth_of(model: LatentDiffusion, image: Tensor) -> Tensor:
    """What the model's own network says of a picture: (1, 1, H', W'), near = large."""
    check_family(model, "depth2img")
    encoder = model.conditioner.get(MiDaSDepth)
    return encoder.estimate(image.to(model.device))


@torch.no_grad()
def upscale(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    *,
    noise_level: int = 20,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 9.0,
    tile: int | None = None,
    **options: Any,
) -> Tensor:
    """The picture, enlarged by the factor of the autoencoder (4).

        image: (1, 3, h, w).
        noise_level: how much noise is put on it: more invents more.
        tile: side of the overlapping patches of the picture that network and decoder see; None is
            the side that the model was trained at. A picture that is no larger is seen whole.
    Raises ValueError for a level that the model was not trained at.
    """
    check_family(model, "upscale")
    n, noise = len(listed(prompts)), seeded(options, prompts)
    encoder = model.conditioner.get(LowRes)
    if not 0 <= noise_level < encoder.max_noise_level:
        raise ValueError(f"noise levels are 0 … {encoder.max_noise_level - 1}, got {noise_level}")
    lr = image.to(model.device, torch.float32).expand(n, -1, -1, -1)
    lr = lr.contiguous(memory_format=torch.channels_last)  # the order of the original's noise
    level = torch.full((n,), noise_level, device=model.device)
    records = {"lowres": encoder.add_noise(lr, level, noise(lr)), "noise_level": level}
    tile = model.image_size if tile is None else tile
    size = (lr.shape[-2] * model.downscale, lr.shape[-1] * model.downscale)
    options |= {"size": size, "unet_tile": tile}
    return made(model, prompts, negative_prompt, records, scale, tile, **options)
