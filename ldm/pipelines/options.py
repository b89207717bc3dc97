"""Keywords of tasks, and their checks before any network runs."""

from collections.abc import Mapping, Sequence
from typing import cast

from ldm.diffusion.step_noise import StepNoise
from ldm.model import LatentDiffusion
from ldm.pipelines.guidance import GuidanceOptions, make_guidance
from ldm.pipelines.images import DecodingOptions
from ldm.pipelines.prompts import ANY_STEPS, CallPrompts, PromptOptions
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling_options import (
    SamplingOptions,
    check_embedded_guidance,
    check_sampling,
    get_latent_size,
    get_sigmas,
)
from ldm.pipelines.sdxl import SDXLOptions, check_sdxl
from ldm.prompts import PLAIN, check_syntax

__all__ = [
    "GuidedOptions", "TaskOptions", "TextOptions", "UnguidedOptions", "check_options",
    "select_sampling", "select_sdxl",
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


def select_sampling(options: Mapping[str, object]) -> SamplingOptions:
    """Return the keywords of `sample` among those of a task."""
    names = SamplingOptions.__annotations__
    return cast(SamplingOptions, {name: value for name, value in options.items() if name in names})


def select_sdxl(options: Mapping[str, object]) -> SDXLOptions:
    """Return the keywords for SDXL among those of a task."""
    names = SDXLOptions.__annotations__
    return cast(SDXLOptions, {name: value for name, value in options.items() if name in names})


def check_options(
    model: LatentDiffusion,
    prompts: str | Sequence[str],
    options: Mapping[str, object],
    strength: float = 1.0,
) -> None:
    """Raise ArgumentError for a keyword whose value is invalid, or that the model does not take.

    Args:
        options: Keywords of a task, by name.
    """
    sampling = select_sampling(options)
    sampler = sampling.get("sampler") or model.defaults.sampler
    check_sampling(
        sampler,
        sampling.get("scheduler"),
        StepNoise(
            sampling.get("eta"),
            sampling.get("s_churn", 0.0),
            sampling.get("s_tmin", 0.0),
            sampling.get("s_tmax"),
            sampling.get("s_noise", 1.0),
            sampling.get("brownian", False),
        ),
        strength,
        sampling.get("rescale", 0.0),
        sampling.get("legacy", ()),
    )
    quirks = Quirks.of(model, sampling.get("legacy", ()))
    # The next four raise ArgumentError for values or combinations that are not possible.
    get_sigmas(model, quirks, sampling)
    get_latent_size(model, cast(tuple[int, int] | None, options.get("size")), None)
    quirks.get_denoiser(model, sampler)
    guidance = make_guidance(cast(GuidanceOptions, options), quirks)
    if model.guidance_embed_dim is not None:
        check_embedded_guidance(
            guidance, sampling.get("rescale", 0.0), sampling.get("guidance_interval")
        )
    check_sdxl(model, select_sdxl(options))
    syntax = cast(PromptOptions, options).get("syntax", PLAIN)
    check_syntax(syntax)
    CallPrompts.parse(  # raises ArgumentError
        prompts,
        cast(str | Sequence[str], options.get("negative_prompt", "")),
        cast(SDXLOptions, options).get("prompt_2"),
        cast(SDXLOptions, options).get("negative_prompt_2"),
        guidance.texts if guidance else (),
        syntax,
        ANY_STEPS,
    )
