"""Tasks of models that read prompts.

    txt2img           prompts                      any text-to-image model
    img2img           prompts, image               any text-to-image model
    inpaint           prompts, image, mask         inpainting models, and text-to-image models
    depth2img         prompts, image, depth map    depth models
    estimate_depth    image                        depth models
    upscale           prompts, low-res image       the x4 upscaler
    upscale_rgbd      prompts, image, depth        LDM3D-SR
    upscale_latent    prompts, image or latent     the x2 latent upscaler

Tasks of models that read images in place of a prompt are in `variations`.

Images are (1, 3, H, W) in [-1, 1], of any size: they are padded to whole latent pixels, and the
result is cropped again. Tasks that sample return (B, C, H, W) float32 in [-1, 1], one image per
prompt, with C = 3 if there is no depth. Shared arguments are documented in `txt2img`.

Images of LDM3D have depth in additional channels, see `ldm.imaging.rgbd`: input images have these
channels, or `depth` (1, 1, H, W) in [0, 1] is given, larger is nearer.

Tasks check the model, keywords, prompts and sizes before any network runs, and raise WrongFamily,
UnknownName or ArgumentError; they raise NonFinite if a network returns NaN or infinity.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ldm.diffusion.guidance import GuidanceScale
from ldm.diffusion.samplers.common import Constrain, NoiseSource
from ldm.encoders.concat_images import LowResImage, MaskedImage, RGBDLatent
from ldm.encoders.depth import MiDaSDepth
from ldm.model import LatentDiffusion
from ldm.nets.unet import UNet
from ldm.pipelines.conditions import encode_prompts
from ldm.pipelines.generate import generate, make_task_noise_source
from ldm.pipelines.images import add_depth, crop_like, decode_latent, encode_image, pad_to_multiple
from ldm.pipelines.latent_upscaling import (
    LATENT_UPSCALE_FACTOR,
    Upscaling,
    check_latent,
    check_noise,
    check_plain_syntax,
    check_sides_for_tiling,
    sample_upscaled_latent,
)
from ldm.pipelines.options import (
    GuidedOptions,
    TextOptions,
    select_sampling_options,
    select_sdxl_options,
)
from ldm.pipelines.prompts import (
    ParsedPair,
    TextPair,
    check_reads_prompts,
    get_prompt_pair,
    parse_fixed_prompt,
    repeat_texts,
    warn_about_prompts,
)
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling import invert
from ldm.pipelines.sampling_options import get_sigmas
from ldm.pipelines.sdxl import REFINER_SIZE_MULTIPLE, get_micro_conditions
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
    scale: GuidanceScale | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    upscaling: Upscaling | None = None,
    **options: Unpack[TextOptions],
) -> Tensor:
    """Make one image per prompt.

    Args:
        prompts: The prompt of each image.
        negative_prompt: One for all prompts, or one for each.
        scale: Guidance scale; 1 = no guidance, None = the model's default.
        size: (height, width) in pixels, multiples of 8, of 64 with a refiner; None = the model's
            training size.
        tile: Side in latent pixels of overlapping tiles to decode; None = no tiles.
        upscaling: The x2 latent upscaler that doubles the latents, and its options, such as
            `ldm.Upscaling(ldm.load(ckpt="sd-x2-latent-upscaler", base=model))`; None = no upscaler.
        options: Keywords of `sample`; `on_latent`, see `DecodingOptions`; `syntax` and `clip_skip`,
            see `PromptOptions`; other guidance methods, see `GuidanceOptions`; for SDXL the
            keywords of `SDXLOptions`, such as
            `txt2img(model, prompts, refiner=ldm.load(ckpt="sd_xl_refiner_1.0.safetensors"))`.
    Returns:
        (B, C, H, W) float32 in [-1, 1]; C = 3, or 4 or 6 for models with depth.
    """
    noise_source = make_task_noise_source(prompts, options)
    return generate(
        model, prompts, negative_prompt, {}, scale, tile, noise_source=noise_source, size=size,
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
    scale: GuidanceScale | None = None,
    tile: int | None = None,
    upscaling: Upscaling | None = None,
    **options: Unpack[TextOptions],
) -> Tensor:
    """Change the image toward each prompt (SDEdit, arXiv:2108.01073).

    Args:
        strength: 0 keeps the image, 1 starts from pure noise.
        z: Latents (B, C, h, w) of the image from `encode_image`; None = encode it.
        inversion: Whether to start from the DDIM inversion of the image, to keep its composition.
        source_prompt: Description of the image for the inversion, in the syntax of prompts, but
            without schedules, alternation and AND.
        depth: (1, 1, H, W) in [0, 1], larger is nearer, for LDM3D; None = the image has it, or the
            model reads none.
        negative_prompt, scale, tile, upscaling, options: See `txt2img`.
    """
    if source_prompt and not inversion:
        raise ArgumentError("source_prompt needs inversion", "source_prompt")
    image = add_depth(model, image, depth)
    noise_source = make_task_noise_source(prompts, options)
    n = len(prompts)
    source = _parse_source_prompt(source_prompt, options) if inversion else None
    padded = pad_to_multiple(image, _get_size_multiple(model, options))
    if upscaling is not None:
        factor, like = (model.downscale_factor, padded) if z is None else (1, z)
        height, width = (side // factor for side in like.shape[-2:])
        upscaling.check_run(model, height, width, options.get("syntax", PLAIN))
    if z is None:
        z = encode_image(model, padded, n, noise_source)
    if source is not None:
        options["x_T"] = _invert_to_noise(model, z, source, strength, options)
    images = generate(
        model, prompts, negative_prompt, {}, scale, tile, noise_source=noise_source, z=z,
        strength=strength, upscaling=upscaling, **options,
    )  # fmt: skip
    return crop_like(images, image, 1 if upscaling is None else LATENT_UPSCALE_FACTOR)


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
    scale: GuidanceScale | None = None,
    tile: int | None = None,
    **options: Unpack[TextOptions],
) -> Tensor:
    """Repaint the image where the mask is 1.

    With a text-to-image model, or a refiner, the latent outside the mask is reset to that of the
    image, with noise, before every step. The inpainting model of latent-diffusion reads no prompts:
    only their number is used.

    Args:
        mask: (1, 1, H, W) in [0, 1], or bool; repainted where it is at least 0.5.
        strength: Fraction of the steps to run; 1 = start from pure noise.
        composite: Whether to blend the result into the image by the mask, so that pixels stay where
            it is 0.
        depth: See `img2img`.
        negative_prompt, scale, tile, options: See `txt2img`.
    """
    check_reads_prompts(model, prompts, negative_prompt, scale)
    image, mask = add_depth(model, image, depth), mask.float()
    noise_source = make_task_noise_source(prompts, options)
    n, multiple = len(prompts), _get_size_multiple(model, options)
    padded = pad_to_multiple(image, multiple)
    binary_mask = (pad_to_multiple(mask, multiple) >= 0.5).float()
    inputs: dict[str, Tensor] = {}
    z: Tensor | None = None
    constrain: Constrain | None = None
    constrain_refiner: Constrain | None = None
    encoder = model.conditioner.find(MaskedImage)
    if encoder is not None:
        masked_image = pad_to_multiple(encoder.mask_image(image, mask), multiple)
        masked_z = encode_image(model, masked_image, n, noise_source)
        masks = binary_mask.to(masked_z).expand(n, -1, -1, -1)
        inputs["masked"] = encoder.concat_mask(masks, masked_z)
        if strength < 1:
            z = encode_image(model, padded, n, noise_source)
        if options.get("refiner") is not None:  # the refiner does not read masks
            options["x_T"] = x_T = _get_initial_noise(options, noise_source, masked_z)
            image_z = encode_image(model, padded, n, noise_source) if z is None else z
            constrain_refiner = _make_constraint(binary_mask, image_z, x_T, model.downscale_factor)
    else:
        z = encode_image(model, padded, n, noise_source)
        options["x_T"] = x_T = _get_initial_noise(options, noise_source, z)
        constrain = constrain_refiner = _make_constraint(
            binary_mask, z, x_T, model.downscale_factor
        )
    images = generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise_source=noise_source, z=z,
        strength=strength, size=(padded.shape[-2], padded.shape[-1]), constrain=constrain,
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
    scale: GuidanceScale | None = None,
    tile: int | None = None,
    **options: Unpack[GuidedOptions],
) -> Tensor:
    """Change the image toward each prompt and keep its depth.

    Args:
        depth: (1, 1, H, W), of any size and range, larger is nearer; None = estimate it.
        strength: 0 keeps the image, 1 keeps only its depth.
        negative_prompt, scale, tile, options: See `txt2img`.
    """
    noise_source = make_task_noise_source(prompts, options)
    n = len(prompts)
    z = encode_image(model, image, n, noise_source)
    batch = {"jpg": image} if depth is None else {"depth": depth}
    batch = {key: value.to(model.device) for key, value in batch.items()}
    batch = model.prepare(batch, (z.shape[-2], z.shape[-1]))
    inputs = {"depth": batch["depth"].expand(n, -1, -1, -1)}
    images = generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise_source=noise_source, z=z,
        strength=strength, **options,
    )  # fmt: skip
    return crop_like(images, image)


@task("depth")
def estimate_depth(model: LatentDiffusion, image: Tensor) -> Tensor:
    """Estimate relative inverse depth, larger is nearer: (1, 1, H', W') of MiDaS's input size."""
    return model.conditioner.get(MiDaSDepth).estimate(image.to(model.device))


@task("upscaling")
def upscale(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    *,
    noise_level: int = 20,
    negative_prompt: str | Sequence[str] = "",
    scale: GuidanceScale | None = None,
    tile: int | None = None,
    **options: Unpack[GuidedOptions],
) -> Tensor:
    """Enlarge the image by the factor of the autoencoder (4).

    Args:
        image: (1, 3, h, w) in [-1, 1].
        noise_level: Timestep up to which noise is added to the image; more noise, more invented
            detail.
        tile: Side of overlapping tiles in pixels of the input: the decoder's, and the UNet's
            unless `unet_tile` is given; None = the training size, or with legacy `untiled` no
            tiles.
        negative_prompt, scale, options: See `txt2img`.
    """
    noise_source = make_task_noise_source(prompts, options)
    n = len(prompts)
    encoder = model.conditioner.get(LowResImage)
    _check_noise_level(model, noise_level, encoder.max_noise_level)
    low_res = image.to(model.device, torch.float32).expand(n, -1, -1, -1)
    # The original draws its noise in this memory format.
    low_res = low_res.contiguous(memory_format=torch.channels_last)
    level = torch.full((n,), noise_level, device=model.device)
    noised = encoder.add_noise(low_res, level, noise_source(low_res))
    inputs = {"lowres": noised, "noise_level": level}
    if tile is None and "untiled" not in Quirks.for_model(model, options.get("legacy", ())):
        tile = model.image_size
    if options.get("unet_tile") is None:
        options["unet_tile"] = tile
    size = (low_res.shape[-2] * model.downscale_factor, low_res.shape[-1] * model.downscale_factor)
    return generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise_source=noise_source, size=size,
        **options,
    )  # fmt: skip


@task("rgbd-upscaling")
def upscale_rgbd(
    model: LatentDiffusion,
    prompts: Sequence[str],
    image: Tensor,
    depth: Tensor | None = None,
    *,
    noise_level: int = 20,
    negative_prompt: str | Sequence[str] = "",
    scale: GuidanceScale | None = None,
    tile: int | None = None,
    **options: Unpack[GuidedOptions],
) -> Tensor:
    """Add detail to an enlarged image and its depth.

    Args:
        image: (1, 3, H, W), resized to the size of the result.
        depth: (1, 1, H, W) in [0, 1], larger is nearer; None = the image has it.
        noise_level: Input of the UNet, if it embeds noise levels; no noise is added.
        negative_prompt, scale, tile, options: See `txt2img`.
    Returns:
        (B, 4, H, W).
    """
    image = add_depth(model, image, depth)
    noise_source = make_task_noise_source(prompts, options)
    n = len(prompts)
    _check_noise_level(model, noise_level, model.conditioner.get(RGBDLatent).max_noise_level)
    padded = pad_to_multiple(image, model.downscale_factor)
    level = torch.full((n,), noise_level, device=model.device)
    inputs = {"rgbd": encode_image(model, padded, n, noise_source), "noise_level": level}
    images = generate(
        model, prompts, negative_prompt, inputs, scale, tile, noise_source=noise_source,
        size=(padded.shape[-2], padded.shape[-1]), **options,
    )  # fmt: skip
    return crop_like(images, image)


def _check_noise_level(model: LatentDiffusion, level: int, max_level: int) -> None:
    """Raise ArgumentError for a level above `max_level`, or without a label in the UNet.

    Training draws levels below `max_level`; the originals' programs also take `max_level` itself.
    """
    num_labels = model.unet.num_classes if isinstance(model.unet, UNet) else None
    highest = min(max_level, num_labels - 1) if isinstance(num_labels, int) else max_level
    if not 0 <= level <= highest:
        raise ArgumentError(f"noise levels are 0 … {highest}, got {level}", "noise_level")


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
    scale: GuidanceScale | None = None,
    tile: int | None = None,
    **options: Unpack[GuidedOptions],
) -> Tensor:
    """Double the size of an image, or of the latent of one.

    Args:
        image: (1, 3, h, w) in [-1, 1]; None if `latent` is given.
        latent: (1 | B, 4, h / 8, w / 8) of the autoencoder of Stable Diffusion 1 or 2, multiplied
            by its `scale_factor`; None if `image` is given.
        noise_sigma: sigma of the noise added to the low-res latent, usually up to 0.6; more
            noise, more invented detail.
        noise_kind: "gaussian", or "fake": the network gets `noise_sigma`, but no noise is added.
        scale: Guidance scale; 1 = no guidance, 0 = the negative prompt only, None = the model's
            default.
        negative_prompt, tile, options: See `txt2img`.
    """
    noise_source = make_task_noise_source(prompts, options)
    n = len(prompts)
    negatives = repeat_texts(negative_prompt, n, "negative_prompt")
    check_noise(model, noise_sigma, noise_kind)
    check_plain_syntax(options.get("syntax", PLAIN))
    if latent is None:
        if image is None:
            raise MissingArgument("neither an image nor a latent is given", "image")
        check_sides_for_tiling(
            model, *(-(-side // model.downscale_factor) for side in image.shape[-2:])
        )
        latent = encode_image(model, image, n, noise_source)
    else:
        if image is not None:
            raise ArgumentError("give an image or a latent, not both", "latent")
        check_latent(model, latent, n)
    try:
        z = sample_upscaled_latent(
            model, prompts, negatives, latent, noise_source=noise_source, noise_sigma=noise_sigma,
            noise_kind=noise_kind, scale=scale, **select_sampling_options(options),
        )  # fmt: skip
    except Stop as stop:
        if stop.latent is None:
            raise
        z = stop.latent
    images = decode_latent(model, z, tile, options.get("on_latent"))
    return images if image is None else crop_like(images, image, LATENT_UPSCALE_FACTOR)


def _get_size_multiple(model: LatentDiffusion, options: TextOptions) -> int:
    """Return the number of pixels that the sides of images must be multiples of."""
    return model.size_multiple if options.get("refiner") is None else REFINER_SIZE_MULTIPLE


def _get_initial_noise(options: TextOptions, noise_source: NoiseSource, like: Tensor) -> Tensor:
    x_T = options.get("x_T")
    return noise_source(like) if x_T is None else x_T.to(like)


def _make_constraint(mask: Tensor, z: Tensor, x_T: Tensor, factor: int) -> Constrain:
    """Make (x, sigma) -> x that resets x to the noisy z where a mask (1, 1, H, W) is 0.

    Args:
        factor: Downscaling factor of the autoencoder.
    """
    is_outside = ~F.max_pool2d(mask, factor).bool().to(z.device)  # (1, 1, h, w)
    return lambda x, sigma: torch.where(is_outside, z + sigma * x_T, x)


def _parse_source_prompt(prompt: str, options: TextOptions) -> ParsedPair | TextPair:
    for name in ("sigmas", "rho", "x_T"):
        if options.get(name) is not None:
            raise ArgumentError(f"DDIM inversion takes no {name}", name)
    return parse_fixed_prompt(prompt, options.get("syntax", PLAIN), "source_prompt")


def _invert_to_noise(
    model: LatentDiffusion,
    z: Tensor,
    source: ParsedPair | TextPair,
    strength: float,
    options: TextOptions,
) -> Tensor:
    """Invert z by DDIM, and return the x_T (B, C, h, w) with which `sample` starts from the result.

    Sets `options["scheduler"]`: the sampling that follows must take the same steps in reverse.
    """
    options["scheduler"] = options.get("scheduler") or "uniform"
    quirks = Quirks.for_model(model, options.get("legacy", ()))
    sigmas = get_sigmas(model, quirks, select_sampling_options(options))
    steps, total_steps = options.get("steps"), len(sigmas) - 1
    steps = model.defaults.steps if steps is None else steps
    # At strength 0 one step, as the last level may be 0.
    indices = quirks.find_first_step(strength, steps, total_steps)
    first_step, noise_index = (min(index, total_steps - 1) for index in indices)
    height, width = (side * model.downscale_factor for side in z.shape[-2:])
    sdxl = select_sdxl_options(options)
    micro_conds, _ = get_micro_conditions(model, sdxl, (height, width), Quirks())
    warn_about_prompts(model, [source])
    cond = encode_prompts(model, [get_prompt_pair(source)] * len(z), {}, micro_conds)
    z_t = invert(model, z, cond, sigmas=sigmas[first_step:], legacy=quirks.names)
    sigma = float(sigmas[noise_index])
    x = z_t * (1 + sigma**2) ** 0.5  # VP -> VE
    # `sample` starts from x = z + sigma x_T, so solve this for x_T; or from x_T itself, scaled
    # from VP to VE.
    starts_from_noise = quirks.starts_from_noise(strength, steps, total_steps)
    return z_t if starts_from_noise else (x - z.to(x)) / sigma
