"""Families of models, recognized by the batch keys that their encoders read."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ldm.conditioning import Conditioner
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError, WrongFamily

__all__ = [
    "FAMILIES", "Family", "check_family", "check_model", "find_family", "is_sdxl",
    "make_wrong_family_error", "quote_name",
]  # fmt: skip

# Size conditioning of Stable Diffusion XL; the other batch keys determine the family.
SIZE_KEYS = {"original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        keys: Batch keys that the encoders of all its models read, without SIZE_KEYS.
        title: Name in messages.
        function: Name of its task in `ldm.pipelines`.
        optional_keys: Batch keys that only the encoders of some of its models read.
    """

    keys: Set[str]
    title: str
    function: str
    optional_keys: Set[str] = frozenset()


FAMILIES = {
    "text": Family({"txt"}, "a text-to-image model", "txt2img"),
    "refiner": Family({"txt", "aesthetic_score"}, "the refiner of Stable Diffusion XL", "img2img"),
    "inpainting": Family({"masked"}, "an inpainting model", "inpaint", {"txt"}),
    "depth": Family({"txt", "depth"}, "a depth model", "depth2img"),
    "upscaling": Family({"txt", "lowres", "noise_level"}, "an upscaling model", "upscale"),
    "rgbd-upscaling": Family(
        {"txt", "rgbd"}, "an upscaling model for color and depth", "upscale_rgbd", {"noise_level"}
    ),
    "latent-upscaling": Family(
        {"txt", "lowres_latent", "noise_sigma"}, "an x2 latent upscaler", "upscale_latent"
    ),
    "unclip": Family({"txt", "embedding"}, "an unCLIP model", "unclip"),
    "variation": Family({"jpg"}, "an image variation model", "vary"),
    "super-resolution": Family({"lr"}, "a super-resolution model", "super_resolve"),
    "semantic": Family({"segmentation"}, "a semantic synthesis model", "semantic2img"),
    "layout": Family({"coordinates_bbox"}, "a layout model", "layout2img"),
    "retrieval": Family({"context"}, "a retrieval-augmented model", "knn2img"),
    "class": Family({"class_label"}, "a class-conditional model", "class2img"),
    "unconditional": Family(frozenset(), "an unconditional model", "uncond2img"),
}


def find_family(conditioner: Conditioner) -> str | None:
    """Return the name in FAMILIES of models with these encoders; None = an unknown family."""
    keys = conditioner.keys - SIZE_KEYS
    families = FAMILIES.items()
    names = (name for name, family in families if family.keys == keys - family.optional_keys)
    return next(names, None)


def is_sdxl(model: LatentDiffusion) -> bool:
    """Return whether the model is Stable Diffusion XL or its refiner, by its size conditioning."""
    return not SIZE_KEYS.isdisjoint(model.conditioner.keys)


def check_model(model: object, argument: str = "model") -> None:
    """Raise ArgumentError for an argument that is not a model, but for example a component."""
    if not isinstance(model, LatentDiffusion):
        text = type(model).__name__ if isinstance(model, nn.Module) else repr(model)
        raise ArgumentError(f"{argument} must be a whole model of `ldm.load`, got {text}", argument)


def check_family(model: LatentDiffusion, *families: str) -> None:
    """Raise WrongFamily unless the model is of one of the families."""
    check_model(model)
    name = find_family(model.conditioner)
    if name in families:
        return
    if name is None:
        keys = ", ".join(f"`{key}`" for key in sorted(model.conditioner.keys))
        raise WrongFamily(f"this model reads {keys}, and no task provides that")
    raise make_wrong_family_error(quote_name(model), name)


def make_wrong_family_error(model: str, family: str) -> WrongFamily:
    """Make the error for a model that a task does not support; it names the task that does."""
    title, function = FAMILIES[family].title, FAMILIES[family].function
    hint = f"use `{function}`"
    if family == "refiner":
        hint += ", or pass it as `refiner` with a base model"
    return WrongFamily(f"{model} is {title}: {hint}", function)


def quote_name(model: LatentDiffusion) -> str:
    """Return the name of the model's file in backticks, for messages; "this" if it has none."""
    path = model.provenance.get("checkpoint")
    return f"`{Path(path).name}`" if path else "this"
