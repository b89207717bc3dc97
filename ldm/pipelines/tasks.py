"""Tasks with a prompt, or with a prompt and an image.

    txt2img           prompts                      any text-to-image model
    img2img           prompts, image               any text-to-image model
    inpaint           prompts, image, mask         inpainting models, and text-to-image models
    depth2img         prompts, image, depth map    depth models
    estimate_depth    image                        depth models
    upscale           prompts, small image         the x4 upscaler
    upscale_rgbd      prompts, image, depth        LDM3D-SR
    upscale_latent    prompts, image or latent     the x2 latent upscaler

Tasks of models that read images in place of a prompt are in `variations`.

Images are (1, 3, H, W) in [-1, 1], of any size: they are padded to whole latent pixels, and the
result is cropped again. Tasks that sample return (B, C, H, W) float32 in [-1, 1], one image per
prompt, with C = 3 if there is no depth. Arguments that several have are documented at `txt2img`.

Images of LDM3D have depth in additional channels, see `ldm.imaging.rgbd`: input images have these
channels, or come with `depth` (1, 1, H, W) in [0, 1], larger is nearer.

Tasks raise WrongFamily, UnknownName and ArgumentError before any network runs, and NonFinite if a
network returns NaN or infinity.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ldm.diffusion.guidance import Scale
from ldm.diffusion.samplers.common import Constrain
from ldm.encoders.depth import MiDaSDepth
from ldm.encoders.lowres import LowRes, RGBDLatent, concat_mask, mask_image
from ldm.model import LatentDiffusion
from ldm.pipelines.conditions import encode_prompts
from ldm.pipelines.generate import generate, make_noise
from ldm.pipelines.images import add_depth, crop_like, decode_latent, encode_image, pad_to_multiple
from ldm.pipelines.latent_upscaling import (
    FACTOR,
    Upscaling,
    check_latent,
    check_noise,
    check_sides,
    double_latent,
)
from ldm.pipelines.options import GuidedOptions, TextOptions, select_sampling, select_sdxl
from ldm.pipelines.prompts import (
    as_list,
    get_pair,
    parse_constant,
    repeat_texts,
    warn_about_prompts,
)
from ldm.pipelines.quirks import Noise, Quirks
from ldm.pipelines.sampling import invert
from ldm.pipelines.sdxl import REFINER_MULTIPLE, size_conditions
from ldm.pipelines.task import task
from ldm.prompts import PLAIN
from ldm.runtime.errors import ArgumentError, MissingArgument, Stop

__all__ = [
    "depth2img", "estimate_depth", "img2img", "inpaint", "txt2img", "upscale", "upscale_latent",
    "upscale_rgbd",
]  # fmt: skip


@task("text")
def txt2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    upscaling: Upscaling | None = None,
    **options: Unpack[TextOptions],
) -> Tensor:
    """Make one image per prompt.

    Args:
        negative_prompt: One for all prompts, or one for each.
        scale: Guidance scale; 1 = no guidance, None = the model's default.
        size: (height, width) in pixels, multiples of 8, of 64 with a refiner; None = the model's
            training size.
        tile: Side in latent pixels of overlapping tiles to decode; None = decode whole.
        upscaling: A model that doubles the latents, such as
            `ldm.Upscaling(ldm.load(ckpt="sd-x2-latent-upscaler", base=model))`; None = none.
        options: Keywords of `sample`; `on_latent`, see `DecodingOptions`; `syntax` and `clip_skip`,
            see `PromptOptions`; other guidance methods, see `GuidanceOptions`; for SDXL those of
            `SDXLOptions`, such as
            `txt2img(model, prompts, refiner=ldm.load(ckpt="sd_xl_refiner_1.0.safetensors"))`.
    Returns:
        (B, C, H, W) float32 in [-1, 1]; C = 3, or more for models with depth.
    """
    noise = make_noise(prompts, options)
    return generate(
        model, prompts, negative_prompt, {}, scale, tile, noise=noise, size=size,
        upscaling=upscaling, **options,
    )  # fmt: skip


@task("text", "refiner")
def img2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    *,
    strength: float = 0.8,
    z: Tensor | None = None,
    inversion: bool = False,
    source_prompt: str = "",
    depth: Tensor | None = None,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale | None = None,
    tile: int | None = None,
    upscaling: Upscaling | None = None,
    **options: Unpack[TextOptions],
) -> Tensor:
    """Change the image toward each prompt (SDEdit, arXiv:2108.01073).

    Args:
        strength: 0 keeps the image, 1 starts from pure noise.
        z: Latents (B, C, h, w) of the image from `encode_image`; None = encode it.
        inversion: Whether to start from DDIM inversion, which keeps the composition.
        source_prompt: Description of the image for the inversion, in the syntax of prompts, but
            without schedules and AND.
        depth: (1, 1, H, W) in [0, 1], larger is nearer, for LDM3D; None = a channel of the image.
        negative_prompt, scale, tile, upscaling, options: See `txt2img`.
    """
    image = add_depth(model, image, depth)
    noise = make_noise(prompts, options)
    n = len(as_list(prompts))
    if z is None:
        padded = pad_to_multiple(image, _size_multiple(model, options))
        z = encode_image(model, padded, n, noise)
    if inversion:
        options["x_T"] = _inverted_noise(model, z, source_prompt, strength, options)
    images = generate(
        model, prompts, negative_prompt, {}, scale, tile, noise=noise, z=z, strength=strength,
        upscaling=upscaling, **options,
    )  # fmt: skip
    return crop_like(images, image, 1 if upscaling is None else FACTOR)


@task("inpainting", "text")
def inpaint(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    mask: Tensor,
    *,
    strength: float = 1.0,
    composite: bool = True,
    depth: Tensor | None = None,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale | None = None,
    tile: int | None = None,
    **options: Unpack[TextOptions],
) -> Tensor:
    """Repaint the image where the mask is 1.

    With a text-to-image model, or a refiner, the latent outside the mask is reset to that of the
    image, with noise, before every step.

    Args:
        mask: (1, 1, H, W) in [0, 1], or bool; repainted where it is at least 0.5.
        strength: Fraction of the steps to run; 1 = start from pure noise.
        composite: Whether to blend result and image by the mask, so that pixels stay where it is 0.
        depth: See `img2img`.
        negative_prompt, scale, tile, options: See `txt2img`.
    """
    image, mask = add_depth(model, image, depth), mask.float()
    noise = make_noise(prompts, options)
    n, multiple = len(as_list(prompts)), _size_multiple(model, options)
    padded = pad_to_multiple(image, multiple)
    hard_mask = (pad_to_multiple(mask, multiple) >= 0.5).float()
    masked_image = pad_to_multiple(mask_image(image, mask), multiple)
    inputs: dict[str, Tensor] = {}
    z: Tensor | None = None
    constrain: Constrain | None = None
    constrain_refiner: Constrain | None = None
    if "masked" in model.conditioner.keys:
        masked_z = encode_image(model, masked_image, n, noise)
        inputs["masked"] = concat_mask(hard_mask.to(masked_z).expand(n, -1, -1, -1), masked_z)
        if strength < 1:
            z = encode_image(model, padded, n, noise)
        if options.get("refiner") is not None:  # the refiner does not read masks
            options["x_T"] = x_T = _start_noise(options, noise, masked_z)
            original = encode_image(model, padded, n, noise) if z is None else z
            constrain_refiner = _keep_outside(hard_mask, original, x_T, model.downscale)
    else:
        z = encode_image(model, padded, n, noise)
        options["x_T"] = x_T = _start_noise(options, noise, z)
        constrain = constrain_refiner = _keep_outside(hard_mask, z, x_T, model.downscale)
    images = generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise=noise, z=z, strength=strength,
        size=(padded.shape[-2], padded.shape[-1]), constrain=constrain,
        constrain_refiner=constrain_refiner, **options,
    )  # fmt: skip
    images = crop_like(images, image)
    return torch.lerp(image.to(images), images, mask.to(images)) if composite else images


@task("depth")
def depth2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    *,
    depth: Tensor | None = None,
    strength: float = 0.9,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale | None = None,
    tile: int | None = None,
    **options: Unpack[GuidedOptions],
) -> Tensor:
    """Change the image toward each prompt and keep its depth.

    Args:
        strength: 0 keeps the image, 1 keeps only its depth.
        depth: (1, 1, H, W), of any size and range, larger is nearer; None = estimate it.
        negative_prompt, scale, tile, options: See `txt2img`.
    """
    noise = make_noise(prompts, options)
    n = len(as_list(prompts))
    z = encode_image(model, image, n, noise)
    batch = {"jpg": image} if depth is None else {"depth": depth}
    batch = {key: value.to(model.device) for key, value in batch.items()}
    batch = model.prepare(batch, (z.shape[-2], z.shape[-1]))
    inputs = {"depth": batch["depth"].expand(n, -1, -1, -1)}
    images = generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise=noise, z=z, strength=strength,
        **options,
    )  # fmt: skip
    return crop_like(images, image)


@task("depth")
def estimate_depth(model: LatentDiffusion, image: Tensor) -> Tensor:
    """Estimate relative inverse depth (1, 1, H', W'), larger is nearer, with the model's MiDaS."""
    return model.conditioner.get(MiDaSDepth).estimate(image.to(model.device))


@task("upscaling")
def upscale(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    *,
    noise_level: int = 20,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale | None = None,
    tile: int | None = None,
    **options: Unpack[GuidedOptions],
) -> Tensor:
    """Enlarge the image by the factor of the autoencoder (4).

    Args:
        image: (1, 3, h, w) in [-1, 1].
        noise_level: Timestep of the noise added to the image; more noise, more invented detail.
        tile: Side of overlapping tiles, in pixels of the input, for the decoder and, without
            `unet_tile`, the UNet; None = the training size.
        negative_prompt, scale, options: See `txt2img`.
    Raises:
        ArgumentError: The model was not trained at the noise level.
    """
    noise = make_noise(prompts, options)
    n = len(as_list(prompts))
    encoder = model.conditioner.get(LowRes)
    _check_noise_level(noise_level, encoder.max_noise_level)
    lr = image.to(model.device, torch.float32).expand(n, -1, -1, -1)
    lr = lr.contiguous(memory_format=torch.channels_last)  # the original draws noise in this order
    level = torch.full((n,), noise_level, device=model.device)
    inputs = {"lowres": encoder.add_noise(lr, level, noise(lr)), "noise_level": level}
    tile = model.image_size if tile is None else tile
    if options.get("unet_tile") is None:
        options["unet_tile"] = tile
    size = (lr.shape[-2] * model.downscale, lr.shape[-1] * model.downscale)
    return generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise=noise, size=size, **options
    )


@task("rgbd-upscaling")
def upscale_rgbd(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    depth: Tensor | None = None,
    *,
    noise_level: int = 20,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale | None = None,
    tile: int | None = None,
    **options: Unpack[GuidedOptions],
) -> Tensor:
    """Restore the detail of an image with depth that was enlarged.

    Args:
        image: (1, 3, H, W), resized to the size of the result.
        depth: (1, 1, H, W) in [0, 1], larger is nearer; None = a channel of the image.
        noise_level: Input of models with an embedding of it, although no noise is added; ignored by
            others.
        negative_prompt, scale, tile, options: See `txt2img`.
    Returns:
        (B, 4, H, W).
    Raises:
        ArgumentError: The model was not trained at the noise level.
    """
    image = add_depth(model, image, depth)
    noise = make_noise(prompts, options)
    n = len(as_list(prompts))
    _check_noise_level(noise_level, model.conditioner.get(RGBDLatent).max_noise_level)
    padded = pad_to_multiple(image, model.downscale)
    level = torch.full((n,), noise_level, device=model.device)
    inputs = {"rgbd": encode_image(model, padded, n, noise), "noise_level": level}
    images = generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise=noise,
        size=(padded.shape[-2], padded.shape[-1]), **options,
    )  # fmt: skip
    return crop_like(images, image)


def _check_noise_level(level: int, maximum: int) -> None:
    if not 0 <= level < maximum:
        raise ArgumentError(f"noise levels are 0 … {maximum - 1}, got {level}", "noise_level")


@task("latent-upscaling")
def upscale_latent(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor | None = None,
    *,
    latent: Tensor | None = None,
    noise_sigma: float = 0.0,
    noise_kind: str = "gaussian",
    negative_prompt: str | Sequence[str] = "",
    scale: Scale | None = None,
    tile: int | None = None,
    **options: Unpack[GuidedOptions],
) -> Tensor:
    """Double the size of an image, or of the latent of one.

    Args:
        image: (1, 3, h, w) in [-1, 1]; None = `latent`.
        latent: (1 | B, 4, h / 8, w / 8) of the autoencoder of Stable Diffusion 1 or 2, multiplied
            by its `scale_factor`; None = that of the image.
        noise_sigma: sigma of the noise added to the small latent, 0 … 0.6; more noise, more
            invented detail.
        noise_kind: "gaussian", or "fake": the network gets `noise_sigma`, but no noise is added.
        scale: Guidance scale; 1 = no guidance, 0 = the negative prompt only, None = the model's
            default.
        negative_prompt, tile, options: See `txt2img`.
    Raises:
        MissingArgument: There is neither an image nor a latent.
        ArgumentError: A latent of another shape, or a noise level that the model does not support.
    """
    noise = make_noise(prompts, options)
    texts = as_list(prompts)
    negatives = repeat_texts(negative_prompt, len(texts), "negative_prompt")
    check_noise(model, noise_sigma, noise_kind)
    if options.get("syntax", PLAIN) != PLAIN:
        raise ArgumentError("the x2 latent upscaler takes prompts of syntax plain only", "syntax")
    if latent is None:
        if image is None:
            raise MissingArgument("neither an image nor a latent is given", "image")
        check_sides(model, *(-(-side // model.downscale) for side in image.shape[-2:]))
        latent = encode_image(model, image, len(texts), noise)
    elif image is not None:
        raise ArgumentError("give an image or a latent, not both", "latent")
    check_latent(model, latent, len(texts))
    try:
        z = double_latent(
            model, texts, negatives, latent, noise=noise, noise_sigma=noise_sigma,
            noise_kind=noise_kind, scale=scale, **select_sampling(options),
        )  # fmt: skip
    except Stop as stop:
        if stop.latent is None:
            raise
        z = stop.latent
    images = decode_latent(model, z, tile, options.get("on_latent"))
    return images if image is None else crop_like(images, image, FACTOR)


def _size_multiple(model: LatentDiffusion, options: TextOptions) -> int:
    """Return the number of pixels of which the sides of images must be multiples."""
    return model.downscale if options.get("refiner") is None else REFINER_MULTIPLE


def _start_noise(options: TextOptions, noise: Noise, like: Tensor) -> Tensor:
    x_T = options.get("x_T")
    return noise(like) if x_T is None else x_T.to(like)


def _keep_outside(mask: Tensor, z: Tensor, x_T: Tensor, factor: int) -> Constrain:
    """Return (x, sigma) -> x that resets x to the noisy z where a mask (1, 1, H, W) is 0.

    Args:
        factor: Downscaling factor of the autoencoder.
    """
    is_outside = ~F.max_pool2d(mask, factor).bool().to(z.device)  # (1, 1, h, w)
    return lambda x, sigma: torch.where(is_outside, z + sigma * x_T, x)


def _inverted_noise(
    model: LatentDiffusion, z: Tensor, prompt: str, strength: float, options: TextOptions
) -> Tensor:
    """Return the x_T (B, C, h, w) from which `sample` starts at the DDIM inversion of z."""
    for name in ("sigmas", "rho"):
        if options.get(name) is not None:
            raise ArgumentError(f"DDIM inversion takes no {name}", name)
    steps, scheduler = options.get("steps"), options.get("scheduler") or "uniform"
    steps = model.defaults.steps if steps is None else steps
    options["scheduler"] = scheduler  # the sampling that follows takes the same steps back
    sigmas = model.schedule.step_sigmas(steps, scheduler)
    until = max(round(strength * steps), 1)
    height, width = (side * model.downscale for side in z.shape[-2:])
    sizes, _ = size_conditions(model, select_sdxl(options), (height, width), Quirks())
    constant = parse_constant(prompt, options.get("syntax", PLAIN), "source_prompt")
    warn_about_prompts(model, [constant])
    cond = encode_prompts(model, [get_pair(constant)] * len(z), {}, sizes)
    legacy = {"encode"}.intersection(options.get("legacy", ()))
    z_t = invert(model, z, cond, steps=steps, until=until, scheduler=scheduler, legacy=legacy)
    sigma = float(sigmas[steps - until])
    x = z_t * (1 + sigma**2) ** 0.5  # VP -> VE
    # `sample` starts from z + sigma x_T: solve for x_T; at strength 1 from x_T scaled to VE.
    return z_t if strength == 1 else (x - z.to(x)) / sigma
