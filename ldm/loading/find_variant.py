"""Find the few-step variant of a model by the argument `variant`, its LoRAs, or its weights."""

import logging
from collections.abc import Collection, Iterable
from pathlib import Path

from ldm.loading.addons.lora_files import find_ranks, list_lora_files
from ldm.loading.addons.lora_weights import LoRAWeight, LoRAWeightLike
from ldm.loading.diffusers.files import is_diffusers_folder, read_folder_metadata
from ldm.loading.files.checkpoint import loads_lazily, read_checkpoint
from ldm.loading.variants import (
    ARGUMENT_EVIDENCE,
    GUIDANCE_EMBED_KEY,
    NO_VARIANT,
    VARIANTS,
    DetectedVariant,
    detect_lora_variant,
    detect_variant,
    looks_distilled,
)
from ldm.loading.weight_names import pair_names
from ldm.loading.weights import Weights
from ldm.model import LatentDiffusion
from ldm.pipelines.families import find_family
from ldm.runtime.errors import ArgumentError

__all__ = [
    "detect_first_lora_variant", "detect_model_variant", "find_variant_without_weights",
    "resolve_variant", "select_file_variant", "supports_variants", "warn_if_distilled",
]  # fmt: skip

log = logging.getLogger(__name__)


def detect_model_variant(weights: Weights) -> DetectedVariant | None:
    """Return the variant by weights, metadata and path; None for an ordinary model."""
    return detect_variant(weights.path, weights.metadata, weights.state_dict)


def find_variant_without_weights(
    path: Path, loras: Iterable[tuple[str | Path, LoRAWeightLike]] = (), variant: str | None = None
) -> DetectedVariant | None:
    """Return the variant that `load` will find, by names and metadata; weights are not read.

    Returns None for a file that is slow to open if one of its tensors may contradict the name.

    Args:
        path: Path of the checkpoint.
        variant: Argument `variant` of `load`.
    """
    if is_diffusers_folder(path):
        metadata, embeds_guidance = read_folder_metadata(path)
        detected = detect_variant(path, metadata, [GUIDANCE_EMBED_KEY] if embeds_guidance else [])
    elif loads_lazily(path):
        file = read_checkpoint(path)
        detected = detect_variant(
            path, file.metadata, [name for name, _ in pair_names(file.state_dict)]
        )
    else:
        detected = detect_variant(path, {})
        if "lcm" in (variant or "") or (detected is not None and detected.name == "lcm"):
            return None
    return _combine_variants(detected, loras, variant, path)


def resolve_variant(
    model: LatentDiffusion,
    weights: Weights,
    variant: str | None,
    loras: Collection[tuple[str | Path, LoRAWeightLike]],
) -> DetectedVariant | None:
    """Return the variant by the argument, a LoRA or the weights; None for a model without one."""
    if not supports_variants(find_family(model.conditioner)):
        if variant in VARIANTS:
            message = f"there are no few-step models of the family of `{weights.path}`"
            raise ArgumentError(f"{message}: its variant is not {variant}", "variant")
        return None
    detected = _combine_variants(detect_model_variant(weights), loras, variant, weights.path)
    if detected is None and variant != NO_VARIANT:
        warn_if_distilled(loras)
    return detected


def detect_first_lora_variant(
    loras: Iterable[tuple[str | Path, LoRAWeightLike]],
) -> DetectedVariant | None:
    """Return the variant of the first LoRA that shows one; None for ordinary LoRAs.

    Args:
        loras: (file, weight) pairs; those with a weight of 0 for the UNet are ignored.
    """
    paths = [path for path, weight in loras if LoRAWeight.parse(weight).unet]
    files = (read_checkpoint(file) for path in paths for file in list_lora_files(path))
    variants = (detect_lora_variant(file.path, file.metadata) for file in files)
    return next(filter(None, variants), None)


def warn_if_distilled(loras: Iterable[tuple[str | Path, LoRAWeightLike]]) -> None:
    """Warn about LoRAs that look like few-step LoRAs, but do not show their variant."""
    for file in (read_checkpoint(file) for path, _ in loras for file in list_lora_files(path)):
        if looks_distilled(file.state_dict, find_ranks(file)):
            log.warning(
                "`%s` looks like a few-step LoRA, but neither its name nor its metadata names the "
                "variant: pass `variant`, such as lcm",
                file.path,
            )


def supports_variants(family: str | None) -> bool:
    """Return whether a family, by its name in `pipelines.families`, may have few-step models."""
    return family in ("text", "inpainting", "depth", "refiner")


def select_file_variant(variant: str | None) -> str | None:
    """Return a variant if it selects files of a diffusers folder, such as `fp16`, else None."""
    return None if variant in (NO_VARIANT, *VARIANTS) else variant


def _combine_variants(
    detected: DetectedVariant | None,
    loras: Iterable[tuple[str | Path, LoRAWeightLike]],
    variant: str | None,
    path: Path,
) -> DetectedVariant | None:
    """Return the first variant by: a tensor of the model, the argument, a LoRA, the model's names.

    Args:
        detected: Variant by the model itself; None = an ordinary model.
        variant: Argument of `load`; NO_VARIANT = an ordinary model.
    Raises:
        ArgumentError: A tensor shows that the model is of another variant.
    """
    if variant == NO_VARIANT:
        return None
    if detected is not None and VARIANTS[detected.name].marker:
        if variant in VARIANTS and variant not in (detected.name, "lcm"):
            message = f"`{path}` embeds the guidance scale, its variant is {detected.name}"
            raise ArgumentError(f"{message}, not {variant}", "variant")
        return detected
    detected = detect_first_lora_variant(loras) or detected
    if variant is not None and select_file_variant(variant) is None:
        detected = DetectedVariant(variant, ARGUMENT_EVIDENCE, detected.path if detected else path)
    if detected is not None and VARIANTS[detected.name].marker:
        raise ArgumentError(
            f"`{path}` does not embed the guidance scale, its variant is not {detected.name}",
            "variant",
        )
    return detected
