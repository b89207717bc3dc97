"""Options of Stable Diffusion XL: micro-conditioning, second prompts, and the refiner.

Podell et al. 2023 (arXiv:2307.01952): micro-conditioning, section 2.2; refiner, section 2.5.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypedDict, cast

from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule
from ldm.model import LatentDiffusion
from ldm.pipelines.families import find_family, is_sdxl, quote_name
from ldm.pipelines.quirks import Quirks
from ldm.runtime.errors import ArgumentError
from ldm.runtime.warn import warn_caller

__all__ = [
    "REFINER_FILE", "REFINER_STRENGTH", "MicroConditions", "SDXLOptions", "check_sdxl",
    "check_size", "find_handover", "get_micro_conditions",
]  # fmt: skip

log = logging.getLogger(__name__)

REFINER_SIZE_MULTIPLE = 64  # pixels: the autoencoder downscales by 8, the refiner's UNet by 8 more
REFINER_FILE = "`sd_xl_refiner_1.0.safetensors`"  # the published refiner, for messages
REFINER_STRENGTH = 0.15  # as in sgm's demo
AESTHETIC_SCORES = (6.0, 2.5)  # defaults for the prompt and the negative prompt
API_SCORES = (5.0, 5.0)  # the same in sgm's `SamplingPipeline`
# (height, width) of the aspect ratio buckets that sgm's demo offers for the base model.
BUCKETS = [
    (1408, 704), (1344, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 832), (1152, 896),
    (1088, 896), (1088, 960), (1024, 960), (1024, 1024), (960, 1024), (960, 1088), (896, 1088),
    (896, 1152), (832, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1344), (704, 1408),
    (704, 1472), (640, 1536), (640, 1600), (576, 1664), (576, 1728),
]  # fmt: skip
TRAINING_LATENT_SIDE = 128  # of models trained with these buckets
MAX_BUCKET_RATIO = 1.25  # a size whose sides differ more from the nearest bucket's is reported

MicroConditions = Mapping[str, Sequence[float]]  # size, crop and score of an image, by batch key


class SDXLOptions(TypedDict, total=False):
    """Keywords of tasks for SDXL: second prompts, micro-conditioning and the refiner.

    The sizes are conditions, not the size of the result. Keywords `negative_*` are for the negative
    prompt; by default its sizes are those for the prompt.

    Attributes:
        prompt_2: Prompts for the second text encoder; None = `prompts`.
        negative_prompt_2: Negative prompts for it; None = `negative_prompt`.
        original_size: (height, width) in pixels before resizing, as a training image; None = the
            size of the image.
        crop: (top, left) of the crop in pixels; None = (0, 0).
        target_size: (height, width) in pixels after resizing; None = the size of the image.
        aesthetic_score: 1 … 10, for the refiner; None = 6, of the negative prompt 2.5.
        refiner: Model that finishes the images, from the noise level where the base stops, by
            default with the sampler, eta and scale of the base.
        refiner_strength: Fraction of the steps that the refiner takes, 0 … 1; None = 0.15.
        refiner_start: Instead of refiner_strength, the fraction of the timesteps that the base
            takes, 0 … 1, `denoising_end` in diffusers.
    """

    prompt_2: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    original_size: tuple[int, int] | None
    crop: tuple[int, int] | None
    target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_original_size: tuple[int, int] | None
    negative_crop: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    negative_aesthetic_score: float | None
    refiner: LatentDiffusion | None
    refiner_strength: float | None
    refiner_start: float | None


def check_sdxl(model: LatentDiffusion, options: SDXLOptions) -> None:
    """Raise ArgumentError for options that have no effect on this model, or a wrong refiner.

    Warns of sizes that a refiner alone does not read.
    """
    refiner = options.get("refiner")
    given_names = [name for name, value in options.items() if value is not None]
    if given_names and not is_sdxl(model):
        raise ArgumentError(
            f"{given_names[0]} is for Stable Diffusion XL, which {quote_name(model)} is not",
            given_names[0],
        )
    for name in ("prompt_2", "negative_prompt_2"):
        if name in given_names and "text_2" not in model.conditioner.encoders:
            raise ArgumentError(f"{name} needs a second text encoder, this model has one", name)
    for name in ("target_size", "negative_target_size"):
        if name in given_names and "target_size_as_tuple" not in model.conditioner.keys:
            warn_caller(f"{quote_name(model)} does not read {name}: ignored")
    for name in ("aesthetic_score", "negative_aesthetic_score"):
        if name in given_names and refiner is None and find_family(model.conditioner) != "refiner":
            raise ArgumentError(f"{name} is for the refiner, the base does not read it", name)
    if refiner is None:
        for name in ("refiner_strength", "refiner_start"):
            if name in given_names:
                raise ArgumentError(f"{name} needs a refiner", name)
        return
    if find_family(refiner.conditioner) != "refiner":
        message = f"{quote_name(refiner)} is not the refiner of Stable Diffusion XL"
        raise ArgumentError(f"{message}, such as {REFINER_FILE}", "refiner")
    if find_family(model.conditioner) == "refiner":
        raise ArgumentError(
            f"{quote_name(model)} is a refiner itself: leave out `refiner`", "refiner"
        )
    if not model.latent_space.matches(refiner.latent_space):
        raise ArgumentError(
            f"{quote_name(refiner)} has latents other than those of {quote_name(model)}: refine "
            "its images instead, with `img2img`", "refiner",
        )  # fmt: skip
    if "refiner_strength" in given_names and "refiner_start" in given_names:
        raise ArgumentError("give refiner_strength or refiner_start, not both", "refiner_start")
    for name in ("refiner_strength", "refiner_start"):
        value = cast(float | None, options.get(name))
        if value is not None and not 0 <= value <= 1:
            raise ArgumentError(f"{name} must be in 0 … 1, got {value}", name)


def find_handover(
    schedule: NoiseSchedule, sigmas: Tensor, options: SDXLOptions, quirks: Quirks
) -> int:
    """Return the index in sigmas (n + 1,) at which the refiner takes over from the base model."""
    steps, start = len(sigmas) - 1, options.get("refiner_start")
    if start is None:
        strength = options.get("refiner_strength")
        strength = REFINER_STRENGTH if strength is None else strength
        first_step, _ = quirks.find_first_step(strength, steps, steps)
        return first_step
    # The lowest timestep of the base, rounded as in diffusers.
    last_timestep = round(len(schedule) - len(schedule) * float(start))
    if last_timestep == len(schedule):
        return 0
    # 1e-6: a sigma that equals this level up to rounding is still the base's.
    return int((sigmas[:-1] > schedule.sigmas[last_timestep] * (1 - 1e-6)).sum())


def get_micro_conditions(
    model: LatentDiffusion, options: SDXLOptions, size: tuple[int, int], quirks: Quirks
) -> tuple[MicroConditions, MicroConditions]:
    """Return the micro-conditions that a model reads, for prompt and for negative prompt.

    Args:
        size: (height, width) of the images in pixels.
    """
    scores = API_SCORES if "api-scores" in quirks else AESTHETIC_SCORES
    requested = (options.get("aesthetic_score"), options.get("negative_aesthetic_score"))
    score, negative_score = (
        default if value is None else value
        for value, default in zip(requested, scores, strict=True)
    )
    values: dict[str, tuple[Sequence[float], Sequence[float] | None]] = {
        "original_size_as_tuple": (
            options.get("original_size") or size,
            options.get("negative_original_size"),
        ),
        "crop_coords_top_left": (options.get("crop") or (0, 0), options.get("negative_crop")),
        "target_size_as_tuple": (
            options.get("target_size") or size,
            options.get("negative_target_size"),
        ),
        "aesthetic_score": ((score,), (negative_score,)),
    }
    pairs = {key: pair for key, pair in values.items() if key in model.conditioner.keys}
    return (
        {key: positive for key, (positive, _) in pairs.items()},
        {key: negative or positive for key, (positive, negative) in pairs.items()},
    )


def check_size(model: LatentDiffusion, size: tuple[int, int], options: SDXLOptions) -> None:
    """Raise ArgumentError for a size that a refiner does not support; log if it is unusual."""
    has_refiner = options.get("refiner") is not None
    if has_refiner and any(side % REFINER_SIZE_MULTIPLE for side in size):
        raise ArgumentError(
            f"height and width must be multiples of {REFINER_SIZE_MULTIPLE} with a refiner, got "
            f"{size[0]} x {size[1]}", "size",
        )  # fmt: skip
    if is_sdxl(model) and model.image_size == TRAINING_LATENT_SIDE:
        _log_nearest_bucket(size)


@cache
def _log_nearest_bucket(size: tuple[int, int]) -> None:
    """Log, once per size, the bucket of the nearest aspect ratio, if it is far from the size."""
    height, width = size
    nearest = min(BUCKETS, key=lambda bucket: abs(math.log(bucket[0] * width / bucket[1] / height)))
    log_ratios = (math.log(nearest[0] / height), math.log(nearest[1] / width))
    if max(map(abs, log_ratios)) > math.log(MAX_BUCKET_RATIO):
        log.info(
            "%dx%d (height x width) is far from the sizes that this model was trained with, the "
            "nearest is %dx%d", *size, *nearest,
        )  # fmt: skip
