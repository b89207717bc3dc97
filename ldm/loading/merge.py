"""Merge checkpoints of one family, in float32, one tensor after the other.

    weighted sum      (1 - w) A + w B
    add difference    A + w (B - C)        for weights that C has, else A

w may differ by block. Everything else is taken from A: noise schedule, integers, and the
autoencoder unless `merge_vae` is set. Input channels that only an inpainting model A has are not
changed, so that "inpainting + (custom - base)" is an inpainting model.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.loading.blocks import BASE_BLOCK, list_blocks
from ldm.loading.build import build_on_meta
from ldm.loading.config import parse_yaml
from ldm.loading.convert import LORA_PREFIXES, Conversion, find_config_text, to_original_names
from ldm.loading.families import Family
from ldm.loading.files.checkpoint import CONFIG_KEY, Checkpoint, LazyTensor, release_pages
from ldm.loading.model_config import make_missing_config_error
from ldm.loading.modelspec import LICENSE_KEY, MERGED_FROM_KEY, filter_metadata, make_modelspec
from ldm.loading.weight_names import TEXT_2_PREFIX, TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, pair_names
from ldm.loading.weights import identify_weights, open_checkpoint
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError, WeightsMismatch, WrongFamily
from ldm.runtime.version import __version__

__all__ = ["RECIPE_KEY", "ModelFile", "check_compatible", "plan_merge", "read_model_file"]

TARGET_SUFFIXES = (".safetensors", ".ckpt")
RECIPE_KEY = "ldm.merge"  # metadata key: JSON of rule, names of files, and w by block
INPUT_CONV = "unet.input_blocks.0.0.weight"
TOKEN_IDS_SUFFIX = ".token_ids"  # of the ids of a compact vocabulary
LATENT_CHANNELS = 4  # input channels of a text-to-image model
# Metadata about the training or conversion of A, which do not apply to the result.
HISTORY_KEYS = ("global_step", "epoch", "ldm.training", "ldm.source", "ldm.ema")


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A checkpoint of a whole model: a mapping from our names to its weights, with its config.

    Args:
        checkpoint: Weights under the original's names.
        names: Original name by our name.
        model: The model on the meta device.
        family: None = unknown.
        config: Text of its YAML.
    """

    checkpoint: Checkpoint
    names: dict[str, str]
    model: LatentDiffusion
    family: Family | None
    config: str

    @property
    def title(self) -> str:
        """Title of its family, for messages."""
        return self.family.title if self.family else "of another family"

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.state_dict[self.names[name]]

    def release(self, tensor: Tensor) -> None:
        """Release the pages of a tensor, if it is memory-mapped."""
        if self.checkpoint.memory_mapped:
            release_pages(tensor)


def plan_merge(
    model: str | Path,
    other: str | Path,
    target: str | Path,
    *,
    subtract: str | Path | None = None,
    weight: float | None = None,
    block_weights: str | None = None,
    merge_vae: bool = False,
    ema: bool = False,
    dtype: torch.dtype | None = None,
    config: str | Path | None = None,
) -> Conversion:
    """Plan a merge, for `convert` to write it in the original's layout.

    Args:
        model: A: a file, a diffusers folder, or the folder of a training run.
        other: B, of the same family.
        target: Path ending in .safetensors or .ckpt.
        subtract: C, the model that B was fine-tuned from; None = weighted sum.
        weight: w; None = 0.5, or 1 with `subtract`.
        block_weights: w by block, see `Blocks.parse_weights`; other blocks have `weight`.
        ema: Whether to use the EMA weights of models that have them.
        dtype: Dtype of floating-point weights to write; None = as in A.
        config: The YAML of all models; None finds it as `load` does.
    """
    target = Path(target).expanduser()
    if target.suffix.lower() not in TARGET_SUFFIXES:
        raise ArgumentError(f"`{target}`: must end in {' or '.join(TARGET_SUFFIXES)}", "target")
    if weight is None:
        weight = 0.5 if subtract is None else 1.0
    if not math.isfinite(weight):
        raise ArgumentError(f"weight must be a finite number, got {weight}", "weight")
    a, b = (read_model_file(path, config, ema=ema) for path in (model, other))
    c = None if subtract is None else read_model_file(subtract, config, ema=ema)
    others = [m for m in (b, c) if m is not None]
    if ema and not any(m.checkpoint.has_ema for m in (a, *others)):
        raise ArgumentError("no model has EMA weights", "ema")
    for m in others:
        check_compatible(a, m)
    blocks = list_blocks(a.names)
    weights = dict.fromkeys(blocks.names, weight)
    if block_weights is not None:
        weights = blocks.parse_weights(block_weights, weight, "block_weights")
    prefixes = (*LORA_PREFIXES, VAE_PREFIX) if merge_vae else LORA_PREFIXES
    state: dict[str, Tensor | LazyTensor] = dict(a.checkpoint.state_dict)
    candidates = [n for n in a.names if n.startswith(prefixes) and a[n].is_floating_point()]
    merged = [name for name in candidates if all(name in m for m in others)]
    for name in merged:
        if w := weights[blocks.get_block(name)]:  # 0: A's tensor, not copied
            compute = partial(_merge_weight, name, a, b, c, w)
            state[a.names[name]] = LazyTensor(a[name].shape, a[name].dtype, compute)
    names = [m.checkpoint.path.name for m in (a, *others)]
    summary = [_format_formula(names, subtract is not None, weight, block_weights)]
    summary += _describe_missing(candidates, prefixes, others)
    size = f"{len(state)} tensors, {len(merged)} of them merged"
    metadata = _make_metadata(a, others, weights if block_weights else {BASE_BLOCK: weight})
    metadata = make_modelspec(a.model, target.stem, metadata=metadata)
    summary.append(f"{target.name:60} {size}")
    return Conversion(a.checkpoint, target, {"": state}, {}, metadata, dtype, tuple(summary))


def read_model_file(path: str | Path, config: str | Path | None, *, ema: bool) -> ModelFile:
    """Read names and config of a whole model.

    Args:
        config: The YAML; None = find it as `load` does.
    """
    checkpoint = open_checkpoint(path)
    weights = identify_weights(checkpoint)
    text = find_config_text(checkpoint, config)
    if text is None:
        raise make_missing_config_error(weights)
    model = build_on_meta(parse_yaml(text))
    if not isinstance(model, LatentDiffusion):
        raise WrongFamily(f"`{checkpoint.path}` is not a whole model: it cannot be merged")
    checkpoint = to_original_names(checkpoint, model, ema=ema and checkpoint.has_ema)
    return ModelFile(
        checkpoint, dict(pair_names(checkpoint.state_dict)), model, weights.family, text
    )


def check_compatible(a: ModelFile, b: ModelFile) -> None:
    """Raise WeightsMismatch unless b can be merged into a: both are of the same family.

    For an inpainting model a, b may be the text-to-image model of the same generation, whose UNet
    has fewer input channels.
    """
    path_a, path_b = f"`{a.checkpoint.path}`", f"`{b.checkpoint.path}`"
    unet_names = [name for name in {**a.names, **b.names} if name.startswith(UNET_PREFIX)]
    mismatched = [name for name in unet_names if not _is_compatible(name, a, b)]
    if mismatched:
        if a.title != b.title:
            message = f"{path_b} is {b.title}, {path_a} is {a.title}"
            raise WeightsMismatch(f"{message}: only models of one family can be merged")
        examples = ", ".join(f"`{name}`" for name in mismatched[:3])
        message = f"{path_b} does not fit {path_a}: {len(mismatched)} weights of the UNet differ in"
        raise WeightsMismatch(f"{message} shape or are in one of them only: {examples}")
    type_a, type_b = (m.model.parameterization for m in (a, b))
    if type_a != type_b:
        raise WeightsMismatch(f"{path_b} predicts {type_b}, {path_a} predicts {type_a}")
    if type(a.model.schedule) is not type(b.model.schedule):
        raise WeightsMismatch(f"{path_b} has another type of noise schedule than {path_a}")
    for name in a.names:
        if name in b and name.startswith((TEXT_PREFIX, TEXT_2_PREFIX)):
            shape_a, shape_b = (tuple(m[name].shape) for m in (a, b))
            if shape_a != shape_b:
                message = f"{path_b} does not fit {path_a}: `{name}` has shape {shape_b}"
                raise WeightsMismatch(f"{message}, not {shape_a}")
            if name.endswith(TOKEN_IDS_SUFFIX) and not a[name].equal(b[name]):
                raise WeightsMismatch(f"{path_b} has another vocabulary than {path_a}")


def _is_compatible(name: str, a: ModelFile, b: ModelFile) -> bool:
    """Return whether both have a weight of one shape; a may have additional input channels."""
    if name not in a or name not in b:
        return False
    shape_a, shape_b = a[name].shape, b[name].shape
    if name != INPUT_CONV or shape_a == shape_b:
        return shape_a == shape_b
    has_additional = shape_b[1] == LATENT_CHANNELS and shape_a[1] > LATENT_CHANNELS
    return has_additional and (shape_a[0], *shape_a[2:]) == (shape_b[0], *shape_b[2:])


def _merge_weight(
    name: str, a: ModelFile, b: ModelFile, c: ModelFile | None, weight: float
) -> Tensor:
    """Return a merged weight, float32; input channels that only a has are not changed."""
    models = [m for m in (a, b, c) if m is not None]
    tensors = [m[name].float() for m in models]
    merged = shared = tensors[0].clone()
    if name == INPUT_CONV:
        channels = min(tensor.shape[1] for tensor in tensors)
        shared = merged[:, :channels]
        tensors = [tensor[:, :channels] for tensor in tensors]
    if c is None:
        shared.copy_((1 - weight) * tensors[0] + weight * tensors[1])
    else:
        shared.copy_(tensors[0] + weight * (tensors[1] - tensors[2]))
    for m in models:
        m.release(m[name])
    return merged


def _format_formula(
    names: list[str], is_difference: bool, weight: float, blocks: str | None
) -> str:
    w = f"w = {weight:g}" if blocks is None else f"w = {weight:g}, by block {blocks}"
    if is_difference:
        return f"{names[0]} + w ({names[1]} - {names[2]}), {w}"
    return f"(1 - w) {names[0]} + w {names[1]}, {w}"


def _describe_missing(
    names: list[str], prefixes: tuple[str, ...], others: list[ModelFile]
) -> list[str]:
    """Return lines about weights that are not merged because another model does not have them."""
    lines = []
    for m in others:
        for prefix in prefixes:
            missing = [name for name in names if name.startswith(prefix) and name not in m]
            if missing:
                examples = ", ".join(missing[:2])
                name = m.checkpoint.path.name
                count = f"{len(missing)} weights"
                lines.append(f"{name} does not have {count}, which are not merged: {examples}")
    return lines


def _make_metadata(
    a: ModelFile, others: list[ModelFile], weights: Mapping[str, float]
) -> dict[str, str | int]:
    models = (a, *others)
    names = [m.checkpoint.path.name for m in models]
    metadata: dict[str, str | int] = {
        name: value
        for name, value in filter_metadata(a.checkpoint.metadata, keep_author_fields=False).items()
        if name not in HISTORY_KEYS
    }
    licenses = filter(None, (m.checkpoint.metadata.get(LICENSE_KEY) for m in models))
    if text := " AND ".join(dict.fromkeys(licenses)):
        metadata[LICENSE_KEY] = text
    rule = "add difference" if len(models) > 2 else "weighted sum"
    recipe = {"rule": rule, "models": names, "weights": weights}
    return metadata | {
        "ldm.version": __version__,
        CONFIG_KEY: a.config,
        MERGED_FROM_KEY: ", ".join(names),
        RECIPE_KEY: json.dumps(recipe),
    }
