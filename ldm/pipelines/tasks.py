"""The tasks: each makes the inputs that a model reads, and goes through the one sampling loop.

    txt2img     prompts                            any text-to-image model
    img2img     prompts, image                     any text-to-image model
    inpaint     prompts, image, mask               inpainting models, and text-to-image models
    depth2img   prompts, image or depth map        depth models
    upscale     prompts, small image               the x4 upscaler

Those that see images instead of starting from one are in `variations`.

Images are (1, 3, H, W) in [-1, 1], of any size: they are padded to what the latent needs, and the
result is cropped again. All tasks return (B, 3, H, W) float32 in [-1, 1], one image per prompt, and
take:

    negative_prompt   what to steer away from, for all or one for each; "" is nothing
    scale             guidance scale; 1 is none
    tile              side in latent pixels of overlapping tiles that are decoded one by one;
                      None = decode whole
    options           keywords of `sample`: steps, sampler, scheduler, eta, seeds, x_T, callback …

They raise WrongFamily, UnknownName and ArgumentError before any network runs, and NonFinite.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ldm.diffusion.guidance import Scale
from ldm.encoders.depth import MiDaSDepth
from ldm.encoders.lowres import LowRes, concat_mask, mask_image
from ldm.model import LatentDiffusion
from ldm.pipelines.families import batch_keys
from ldm.pipelines.frame import (
    as_list,
    check_options,
    crop_like,
    encode_image,
    encode_prompts,
    generate,
    pad_to_multiple,
    pipeline,
)
from ldm.pipelines.sampling import SamplingOptions, invert
from ldm.runtime.errors import ArgumentError

__all__ = ["depth2img", "estimate_depth", "img2img", "inpaint", "txt2img", "upscale"]


@pipeline("text")
def txt2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 9.0,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """One image per prompt.

    Args:
        size: (height, width) in pixels, multiples of 8; None = the size that the model was trained
            at.
    """
    noise = check_options(model, prompts, options)
    return generate(
        model, prompts, negative_prompt, {}, scale, tile, noise=noise, size=size, **options
    )


@pipeline("text")
def img2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    *,
    strength: float = 0.8,
    z: Tensor | None = None,
    inversion: bool = False,
    source_prompt: str = "",
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 9.0,
    tile: int | None = None,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """The image, changed toward each prompt (SDEdit, arXiv:2108.01073).

    Args:
        strength: 0 keeps the image, 1 starts from noise alone.
        z: its latent (B, C, h, w), if that is at hand (`encode_image`); drawn otherwise.
        inversion: start from the noise that DDIM inversion finds instead of random noise, which
            keeps the composition.
        source_prompt: what the image shows, for the inversion.
    """
    noise = check_options(model, prompts, options, strength)
    n = len(as_list(prompts))
    if z is None:
        z = encode_image(model, image, n, noise)
    if inversion:
        options["x_T"] = _inverted_noise(model, z, source_prompt, strength, options)
    images = generate(
        model, prompts, negative_prompt, {}, scale, tile, noise=noise, z=z, strength=strength,
        **options,
    )  # fmt: skip
    return crop_like(images, image)


@pipeline("inpainting", "text")
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
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """The image, repainted where the mask says.

    A model that was not trained for it is held to the known latents at every step.

    Args:
        mask: (1, 1, H, W) in [0, 1]; repainted from 0.5 on.
        composite: paste the image back by the mask; where that is 0, pixels stay as they were.
    """
    noise = check_options(model, prompts, options, strength)
    n, f = len(as_list(prompts)), model.downscale
    if mask.shape[-2:] != image.shape[-2:]:
        mask_image(image, mask)  # raises
    wide, area = pad_to_multiple(image, f), (pad_to_multiple(mask, f) >= 0.5).float()
    inputs: dict[str, Tensor] = {}
    z = constrain = None
    if "masked" in batch_keys(model):
        hidden = encode_image(model, mask_image(wide, area), n, noise)
        inputs["masked"] = concat_mask(area.to(hidden).expand(n, -1, -1, -1), hidden)
    if not inputs or strength < 1:
        z = encode_image(model, wide, n, noise)
    if z is not None and not inputs:
        x_T = options.get("x_T")
        options["x_T"] = start = noise(z) if x_T is None else x_T
        known = ~F.max_pool2d(area, f).bool().to(model.device)  # (1, 1, h, w)
        clean, start = z, start.to(model.device)

        def constrain(x: Tensor, sigma: float) -> Tensor:
            return torch.where(known, clean + sigma * start, x)

    images = generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise=noise, z=z, strength=strength,
        size=(wide.shape[-2], wide.shape[-1]), constrain=constrain, **options,
    )  # fmt: skip
    images = crop_like(images, image)
    return torch.lerp(image.to(images), images, mask.to(images)) if composite else images


@pipeline("depth")
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
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """The image, changed toward each prompt under its own depth.

    Args:
        strength: 1 takes nothing but the depth from it.
        depth: (1, 1, …) of any range, near = large; estimated from the image if None.
    """
    noise = check_options(model, prompts, options, strength)
    n = len(as_list(prompts))
    z = encode_image(model, image, n, noise)
    batch = {"jpg": image} if depth is None else {"depth": depth}
    batch = {key: value.to(model.device) for key, value in batch.items()}
    prepared = model.prepare(batch, (z.shape[-2], z.shape[-1]))
    inputs = {"depth": prepared["depth"].expand(n, -1, -1, -1)}
    images = generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise=noise, z=z, strength=strength,
        **options,
    )  # fmt: skip
    return crop_like(images, image)


@pipeline("depth")
def estimate_depth(model: LatentDiffusion, image: Tensor) -> Tensor:
    """The depth that the model's own network sees in an image: (1, 1, H', W'), near = large."""
    return model.conditioner.get(MiDaSDepth).estimate(image.to(model.device))


@pipeline("upscaling")
def upscale(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    *,
    noise_level: int = 20,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 9.0,
    tile: int | None = None,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """The image, enlarged by the factor of the autoencoder (4).

    Args:
        image: (1, 3, h, w).
        noise_level: timestep of the noise that is put on it: more invents more.
        tile: side of the overlapping tiles of the image that decoder and, unless `unet_tile` says
            otherwise, network see; None = the side that the model was trained at.
    Raises:
        ArgumentError: a noise level that the model was not trained at.
    """
    noise = check_options(model, prompts, options)
    n = len(as_list(prompts))
    encoder = model.conditioner.get(LowRes)
    if not 0 <= noise_level < encoder.max_noise_level:
        message = f"noise levels are 0 … {encoder.max_noise_level - 1}, got {noise_level}"
        raise ArgumentError(message, "noise_level")
    lr = image.to(model.device, torch.float32).expand(n, -1, -1, -1)
    lr = lr.contiguous(memory_format=torch.channels_last)  # the order of the original's noise
    level = torch.full((n,), noise_level, device=model.device)
    inputs = {"lowres": encoder.add_noise(lr, level, noise(lr)), "noise_level": level}
    tile = model.image_size if tile is None else tile
    if options.get("unet_tile") is None:
        options["unet_tile"] = tile
    size = (lr.shape[-2] * model.downscale, lr.shape[-1] * model.downscale)
    return generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise=noise, size=size, **options
    )


def _inverted_noise(
    model: LatentDiffusion, z: Tensor, prompt: str, strength: float, options: SamplingOptions
) -> Tensor:
    """The x_T from which `sample` starts exactly at the DDIM inversion of z, (B, C, h, w)."""
    steps, scheduler = options.get("steps", 50), options.get("scheduler") or "uniform"
    options["scheduler"] = scheduler
    sigmas = model.schedule.steps(steps, scheduler)
    until = max(round(strength * steps), 1)
    cond = encode_prompts(model, [prompt] * len(z), {})
    z_t = invert(model, z, cond, steps=steps, until=until, scheduler=scheduler)
    sigma = float(sigmas[steps - until])
    x = z_t * (1 + sigma**2) ** 0.5
    return z_t if strength == 1 else (x - z.to(x)) / sigma
