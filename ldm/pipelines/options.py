"""Keywords of tasks, and their checks before any network runs."""

from collections.abc import Collection, Mapping, Sequence, Sized
from typing import cast

from torch import Tensor

from ldm.diffusion.guidance import GuidanceScale
from ldm.diffusion.step_noise import StepNoise
from ldm.model import LatentDiffusion
from ldm.pipelines.families import find_family
from ldm.pipelines.guidance import GuidanceOptions, check_guidance, make_guidance
from ldm.pipelines.images import DecodingOptions
from ldm.pipelines.prompts import PLACEHOLDER_STEPS, PromptBatch, PromptOptions
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling_options import (
    SamplingOptions,
    check_embedded_guidance,
    check_sampling,
    check_tiles,
    get_latent_shape,
    get_sigmas,
)
from ldm.pipelines.sdxl import REFINER_SIZE_MULTIPLE, SDXLOptions, check_sdxl
from ldm.prompts import PLAIN, check_syntax
from ldm.runtime.errors import ArgumentError

__all__ = [
    "GuidedOptions", "TaskArguments", "TaskOptions", "TextOptions", "UnguidedOptions",
    "check_options", "count_images", "select_sampling_options", "select_sdxl_options",
]  # fmt: skip


class UnguidedOptions(SamplingOptions, DecodingOptions):
    """Keywords of tasks whose models read no prompts."""


class GuidedOptions(UnguidedOptions, GuidanceOptions, PromptOptions):
    """Keywords of tasks whose models read prompts."""


class TaskOptions(GuidedOptions):
    """The keywords that all tasks take, for a batch of several prompts."""

    negative_prompt: Sequence[str]
    scale: float | None
    tile: int | None


class TextOptions(GuidedOptions, SDXLOptions):
    """Keywords of tasks that also work with SDXL."""


class TaskArguments(TextOptions, total=False):
    """The arguments of tasks that `check_options` reads, besides the model."""

    prompts: Sequence[str]
    classes: Sequence[int]
    n: int
    negative_prompt: str | Sequence[str]
    scale: GuidanceScale | None
    size: tuple[int, int] | None
    strength: float
    tile: int | None
    image: Tensor | None
    z: Tensor | None


def _check_initial_latent(model: LatentDiffusion, arguments: TaskArguments) -> None:
    """Raise ArgumentError for a size or initial latents that do not fit the model."""
    size, image = arguments.get("size"), arguments.get("image")
    if image is not None:
        if find_family(model.conditioner) in ("upscaling", "latent-upscaling", "super-resolution"):
            return  # their latents are larger than the image
        multiple = (
            REFINER_SIZE_MULTIPLE if arguments.get("refiner") is not None else model.size_multiple
        )
        height, width = (side + -side % multiple for side in image.shape[-2:])
        size = height, width
    z, x_T = arguments.get("z"), arguments.get("x_T")
    num_images = count_images(arguments)
    get_latent_shape(model, num_images, size if z is None else None, z=z, x_T=x_T)


def count_images(arguments: Mapping[str, object]) -> int:
    """Return the number of images of a task: that of prompts, classes or embeddings, or `n`."""
    names = ("prompts", "classes", "embeddings")
    rows = next((arguments[name] for name in names if name in arguments), None)
    return len(rows) if isinstance(rows, Sized) else cast(int, arguments.get("n", 1))


def select_sampling_options(options: Mapping[str, object]) -> SamplingOptions:
    """Return the keywords of `sample` among those of a task.

    Seeds are left out unless Brownian paths need them, as tasks pass a noise source instead.
    """
    names = set(SamplingOptions.__annotations__)
    if not options.get("brownian"):
        names.remove("seeds")
    return cast(SamplingOptions, _select(options, names))


def select_sdxl_options(options: Mapping[str, object]) -> SDXLOptions:
    """Return the keywords of SDXL among those of a task."""
    return cast(SDXLOptions, _select(options, SDXLOptions.__annotations__))


def _select(options: Mapping[str, object], names: Collection[str]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name in names}


def check_options(model: LatentDiffusion, arguments: TaskArguments) -> None:
    """Raise ArgumentError for a keyword whose value is invalid, or that the model does not take."""
    if count_images(arguments) < 1:
        name = "classes" if "classes" in arguments else "n"
        raise ArgumentError(f"{name} must be of at least one image", name)
    sampling = select_sampling_options(arguments)
    sampler = sampling.get("sampler") or model.defaults.sampler
    guidance_rescale = sampling.get("guidance_rescale", 0.0)
    step_noise = StepNoise(
        sampling.get("eta"), sampling.get("s_churn", 0.0), sampling.get("s_tmin", 0.0),
        sampling.get("s_tmax"), sampling.get("s_noise", 1.0), sampling.get("brownian", False),
    )  # fmt: skip
    interval = sampling.get("guidance_interval")
    check_sampling(
        sampler, sampling.get("scheduler"), step_noise, arguments.get("strength", 1.0),
        guidance_rescale, arguments.get("seeds"), interval,
    )  # fmt: skip
    quirks = Quirks.for_model(model, sampling.get("legacy", ()))
    # Each of these calls raises ArgumentError for invalid values or combinations.
    get_sigmas(model, quirks, sampling)
    _check_initial_latent(model, arguments)
    check_tiles(tile=arguments.get("tile"), unet_tile=sampling.get("unet_tile"))
    quirks.get_denoiser(model, sampler)
    guidance = make_guidance(arguments, quirks)
    check_guidance(model, arguments.get("scale"), arguments, quirks)
    check_embedded_guidance(model, guidance, guidance_rescale, interval)
    check_sdxl(model, select_sdxl_options(arguments))
    syntax = arguments.get("syntax", PLAIN)
    check_syntax(syntax)
    negative_prompt = arguments.get("negative_prompt", "")
    prompts = arguments.get("prompts", [""] * count_images(arguments))
    PromptBatch.parse(prompts, negative_prompt, arguments, guidance, syntax, PLACEHOLDER_STEPS)
