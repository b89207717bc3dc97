"""ModelSpec 1.0.1: standard metadata of .safetensors files about the model in them.

Fields about the weights are computed. Fields of the author (title, author, license …) are kept if
the weights are unchanged, else only the license.
"""

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Literal

from torch import nn

from ldm.loading.base_models import find_base_model
from ldm.loading.files.checkpoint import TENSOR_HASH_KEY
from ldm.model import LatentDiffusion
from ldm.pipelines.families import find_family, is_sdxl

__all__ = [
    "LICENSE_KEY", "MERGED_FROM_KEY", "MODELSPEC_PREFIX", "filter_metadata", "make_modelspec",
]  # fmt: skip

MODELSPEC_PREFIX = "modelspec."
MERGED_FROM_KEY = f"{MODELSPEC_PREFIX}merged_from"
MODELSPEC_VERSION = "1.0.1"
# Values of `implementation`: the program whose names of tensors the file has.
SGM, DIFFUSERS = "https://github.com/Stability-AI/generative-models", "diffusers"
LICENSE_KEY = f"{MODELSPEC_PREFIX}license"
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample"}  # ModelSpec's by ours; others are equal
# Name in `pipelines.families.FAMILIES` -> suffix of the base model's architecture; the standard has
# none for other families.
ARCHITECTURE_SUFFIXES = {"text": "", "refiner": "", "inpainting": "-inpainting", "depth": "-depth"}
HASH_KEYS = ("sshs_model_hash", "sshs_legacy_hash", TENSOR_HASH_KEY)  # not valid for other tensors


def make_modelspec(
    model: nn.Module | None,
    title: str,
    adapter: Literal["", "lora", "textual-inversion"] = "",
    metadata: Mapping[str, str | int] | None = None,
) -> dict[str, str | int]:
    """Return metadata with ModelSpec's fields for a model, or for an adapter for it.

    Args:
        model: Model, which may be on the meta device; no fields are computed for other modules.
        title: Title, unless `metadata` has one.
        adapter: Type of adapter; "" = the model itself.
        metadata: Additional entries; they replace computed ones, except the prediction type. None =
            no additions.
    """
    metadata = dict(metadata or {})
    if not isinstance(model, LatentDiffusion):
        return metadata
    height, width = (side * model.downscale_factor for side in model.latent_size)
    # Our LoRAs for SD 1 and 2 have diffusers' names.
    has_original_names = adapter != "lora" or is_sdxl(model)
    fields = {
        "sai_model_spec": MODELSPEC_VERSION,
        "architecture": _get_architecture(model, adapter),
        "implementation": SGM if has_original_names else DIFFUSERS,
        "title": title,
        "resolution": f"{width}x{height}",
        "prediction_type": PREDICTION_TYPES.get(model.parameterization, model.parameterization),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    spec = {f"{MODELSPEC_PREFIX}{name}": value for name, value in fields.items() if value}
    # The config is more reliable than the file.
    metadata.pop(f"{MODELSPEC_PREFIX}prediction_type", None)
    # The hash is a placeholder, filled in when the file is written.
    return {TENSOR_HASH_KEY: "", **spec, **metadata}


def filter_metadata(metadata: Mapping[str, str], *, keep_author_fields: bool) -> dict[str, str]:
    """Return the metadata of a file that also apply to a file made from it.

    Args:
        keep_author_fields: Whether to keep the fields of ModelSpec, and of kohya about training
            (`ss_…`), as weights were only renamed or cast, or a component was replaced. False =
            keep only the license of them.
    """
    dropped_prefixes = () if keep_author_fields else (MODELSPEC_PREFIX, "ss_")
    return {
        name: value
        for name, value in metadata.items()
        if name not in HASH_KEYS and (name == LICENSE_KEY or not name.startswith(dropped_prefixes))
    }


def _get_architecture(model: LatentDiffusion, adapter: str) -> str:
    base = find_base_model(model)
    family = find_family(model.conditioner) or ""
    suffix = f"/{adapter}" if adapter else ARCHITECTURE_SUFFIXES.get(family)
    return "" if base is None or suffix is None else f"{base.architecture}{suffix}"
