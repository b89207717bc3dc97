"""The decorator of tasks: it checks model and keywords before any network runs."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, cast, get_args

import torch
from torch import Tensor

from ldm.encoders.text import TextEncoder, clip_skip
from ldm.model import LatentDiffusion
from ldm.nets.circular import circular_padding
from ldm.pipelines.arguments import check_arguments
from ldm.pipelines.families import check_family, quote_name
from ldm.pipelines.finite import check_finite_weights
from ldm.pipelines.options import GuidedOptions, TaskArguments, check_options
from ldm.runtime.errors import ArgumentError, NonFinite, UnknownName, make_unknown_name_error
from ldm.runtime.warn import warn_caller

__all__ = ["get_clip_skip_warning", "task"]

P = ParamSpec("P")
FORMER_KEYWORDS = {"grid": "scheduler"}  # still accepted
# Keyword of diffusers, or former one of ours -> the keyword that the error suggests.
SUGGESTED_KEYWORDS = {
    "generator": "seeds", "guidance_scale": "scale", "height": "size", "mask_image": "mask",
    "noise": "noise_source", "num_inference_steps": "steps", "rescale": "guidance_rescale",
    "width": "size",
}  # fmt: skip


def task(*families: str) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorate the function of a task to check its arguments first, and to run without gradients.

    Its first parameter is `model`. If it has `**options: Unpack[…Options]`, it takes these keywords
    besides its own, and it has a parameter `prompts`, `classes` or `n`. The decorated function
    raises WrongFamily for a model of another family, UnknownName for an unknown keyword, and
    ArgumentError for an invalid value.

    Args:
        families: Names in FAMILIES of the models that the task works with.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        signature = inspect.signature(function)
        *_, last_parameter = parameters = list(signature.parameters.values())
        takes_options = last_parameter.kind is last_parameter.VAR_KEYWORD
        annotations = {p.name: p.annotation for p in parameters if p.kind is not p.VAR_KEYWORD}
        if takes_options:
            (options_type,) = get_args(last_parameter.annotation)
            annotations |= options_type.__annotations__
        allowed = list(annotations)

        @wraps(function)
        @torch.no_grad()
        def wrapper(*args: P.args, **keywords: P.kwargs) -> Tensor:
            for former, name in FORMER_KEYWORDS.items():
                if former in keywords and keywords.get(name) is None:
                    keywords[name] = keywords.pop(former)
            for keyword in keywords:
                if keyword in allowed:
                    continue
                if takes_options and keyword in GuidedOptions.__annotations__:
                    raise ArgumentError(f"{keyword} needs a model that reads prompts", keyword)
                description = f"keyword of {function.__name__}"
                if (nearest := SUGGESTED_KEYWORDS.get(keyword, "")) in allowed:
                    message = f"unknown {description} `{keyword}`, did you mean `{nearest}`?"
                    raise UnknownName(message, keyword)
                raise make_unknown_name_error(description, keyword, allowed[1:], argument=keyword)
            names = ("tiling", "clip_skip")
            context_options = {name: keywords.pop(name) for name in names if name in keywords}
            if isinstance(legacy := keywords.get("legacy"), str):
                keywords["legacy"] = [legacy]
            bound = signature.bind(*args, **keywords)
            if isinstance(prompt := bound.arguments.get("prompts"), str):
                bound.arguments["prompts"] = [prompt]
            arguments = {**bound.arguments, **bound.kwargs}
            model = arguments.pop("model")
            check_family(model, *families)
            if takes_options:
                arguments.pop(last_parameter.name, None)  # each is an argument of its own
            check_arguments(model, {**arguments, **context_options}, annotations)
            if takes_options:
                check_options(model, cast(TaskArguments, arguments))
            tiling = str(context_options.get("tiling", "none"))
            skip = cast(int, context_options.get("clip_skip", 1))
            if (warning := get_clip_skip_warning(model, skip)) is not None:
                warn_caller(warning)
            try:
                with circular_padding(tiling), clip_skip(skip):
                    return function(*bound.args, **bound.kwargs)
            except NonFinite as error:
                for used_model in (model, keywords.get("refiner")):
                    if isinstance(used_model, LatentDiffusion):
                        check_finite_weights(used_model, error)
                raise

        return wrapper

    return decorate


def get_clip_skip_warning(model: LatentDiffusion, skip: int) -> str | None:
    """Return a warning if a clip skip has no effect on a model, else None.

    Raises:
        ArgumentError: It is below 1, or exceeds the layers of the text encoder.
    """
    if skip < 1:
        raise ArgumentError(f"clip_skip must be 1 or more, got {skip}", "clip_skip")
    if skip == 1:
        return None
    encoders = model.conditioner.find_all(TextEncoder)
    layers = [encoder.num_blocks for encoder in encoders if encoder.takes_clip_skip]
    if not layers:
        return (
            f"clip_skip {skip} is ignored: it is for Stable Diffusion 1, which "
            f"{quote_name(model)} is not"
        )
    if skip > min(layers):
        message = f"clip_skip {skip}: the text encoder has {min(layers)} layers"
        raise ArgumentError(message, "clip_skip")
    return None
