"""ModelSpec 1.0.1: standard metadata of .safetensors files about the model in them.

Fields about the weights are computed. Those that the author writes (title, author, licence …) are
kept if the weights are unchanged, else only the licence.
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
    "LICENSE_KEY", "MERGED_FROM_KEY", "MODELSPEC_PREFIX", "describe_model", "filter_metadata",
]  # fmt: skip

MODELSPEC_PREFIX = "modelspec."
MERGED_FROM_KEY = f"{MODELSPEC_PREFIX}merged_from"
MODELSPEC_VERSION = "1.0.1"
# Values of `implementation`: the program whose names the tensors have.
ORIGINAL, DIFFUSERS = "https://github.com/Stability-AI/generative-models", "diffusers"
LICENSE_KEY = f"{MODELSPEC_PREFIX}license"
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample"}
# Suffix of the base model's architecture, by family; the standard has none for other families.
NAME_SUFFIXES = {"text": "", "refiner": "", "inpainting": "-inpainting", "depth": "-depth"}
STALE_HASHES = ("sshs_model_hash", "sshs_legacy_hash", TENSOR_HASH_KEY)  # of other tensors


def describe_model(
    model: nn.Module | None,
    title: str,
    adapter: Literal["", "lora", "textual-inversion"] = "",
    metadata: Mapping[str, str | int] | None = None,
) -> dict[str, str | int]:
    """Return metadata with ModelSpec's fields for a model, or for an adapter for it.

    Args:
        model: Model, which may be on the meta device; parts of models get no fields.
        title: Title, unless `metadata` has one.
        adapter: Type of adapter; "" for the model itself.
        metadata: Other entries, which replace computed ones, except for the prediction type; None =
            none.
    """
    metadata = dict(metadata or {})
    if not isinstance(model, LatentDiffusion):
        return metadata
    prediction_type = model.parameterization
    height, width = (side * model.downscale for side in model.latent_size)
    # Our LoRAs for SD 1 and 2 have diffusers' names.
    is_original = adapter != "lora" or is_sdxl(model)
    fields = {
        "sai_model_spec": MODELSPEC_VERSION,
        "architecture": _get_architecture(model, adapter),
        "implementation": ORIGINAL if is_original else DIFFUSERS,
        "title": title,
        "resolution": f"{width}x{height}",
        "prediction_type": PREDICTION_TYPES.get(prediction_type, prediction_type),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    spec = {f"{MODELSPEC_PREFIX}{name}": value for name, value in fields.items() if value}
    # The config is more reliable than the file.
    metadata.pop(f"{MODELSPEC_PREFIX}prediction_type", None)
    # The hash is a placeholder, filled in when the file is written.
    return {TENSOR_HASH_KEY: "", **spec, **metadata}


def filter_metadata(metadata: Mapping[str, str], *, same_weights: bool) -> dict[str, str]:
    """Return the metadata of a file that also apply to a file made from it.

    Args:
        same_weights: Whether weights were only renamed or cast, or a component replaced. If they
            were changed, only ModelSpec's licence applies, and none of kohya's fields about
            training (`ss_…`).
    """
    return {
        name: value
        for name, value in metadata.items()
        if name not in STALE_HASHES
        and (same_weights or name == LICENSE_KEY or not name.startswith((MODELSPEC_PREFIX, "ss_")))
    }


def _get_architecture(model: LatentDiffusion, adapter: str) -> str:
    base = find_base_model(model)
    suffix = f"/{adapter}" if adapter else NAME_SUFFIXES.get(find_family(model.conditioner) or "")
    return "" if base is None or suffix is None else f"{base.architecture}{suffix}"
