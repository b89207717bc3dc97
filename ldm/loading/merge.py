"""Merge checkpoints of one family, in float32, one tensor after the other.

    weighted sum        (1 - w) A + w B
    added difference    A + w (B - C)        for weights that C has, else A

w may differ by block. Everything else is A's: noise schedule, integers, and the autoencoder unless
`merge_vae`. Input channels that only an inpainting model A has stay as they are, so that
"inpainting + (custom - base)" is an inpainting model.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.loading.blocks import BASE, find_blocks
from ldm.loading.build import build_on_meta
from ldm.loading.config import parse_yaml
from ldm.loading.convert import (
    LORA_PARTS,
    Conversion,
    find_config_text,
    to_original_names,
)
from ldm.loading.families import Family
from ldm.loading.files.checkpoint import (
    CONFIG_KEY,
    Checkpoint,
    ComputedTensor,
    release_pages,
)
from ldm.loading.modelspec import LICENSE, MERGED_FROM, describe_model, filter_metadata
from ldm.loading.weight_names import AUTOENCODER, TEXT, TEXT_2, UNET, pair_names
from ldm.loading.weights import identify_weights, open_checkpoint
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError, MissingArgument, WeightsMismatch, WrongFamily
from ldm.runtime.version import __version__

__all__ = ["RECIPE", "ModelFile", "check_fits", "plan_merge", "read_model_file"]

SUFFIXES = (".safetensors", ".ckpt")
RECIPE = "ldm.merge"  # metadata key: JSON of rule, models and weights
INPUT_CONV = "unet.input_blocks.0.0.weight"
TOKEN_IDS = ".token_ids"  # end of the name of a compact vocabulary's ids
LATENT_CHANNELS = 4  # all input channels of a text-to-image model
# Metadata about the training or conversion of A, which are not valid for the result.
HISTORY = ("global_step", "epoch", "ldm.training", "ldm.source", "ldm.ema")


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A model in a file: a mapping of its weights by our names, with its config.

    Args:
        file: The weights, with the original's names.
        names: Name in `file` by our name.
        family: None = unknown.
        config: Text of its YAML.
    """

    file: Checkpoint
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
        return self.file.state[self.names[name]]

    def release(self, tensor: Tensor) -> None:
        """Release the memory of a tensor, if it is memory-mapped."""
        if self.file.mapped:
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
        block_weights: w of single blocks, see `Blocks.parse_weights`; `weight` is that of others.
        ema: Whether to use the EMA weights of models that have them.
        dtype: Dtype of floating-point weights to write; None = as in A.
        config: The YAML of all models; None finds it as `load` does.
    """
    target = Path(target).expanduser()
    if target.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"`{target}`: must end in {' or '.join(SUFFIXES)}", "target")
    if weight is None:
        weight = 0.5 if subtract is None else 1.0
    if not math.isfinite(weight):
        raise ArgumentError(f"weight must be a finite number, got {weight}", "weight")
    a, b = (read_model_file(path, config, ema=ema) for path in (model, other))
    c = None if subtract is None else read_model_file(subtract, config, ema=ema)
    others = [m for m in (b, c) if m is not None]
    if ema and not any(m.file.has_ema for m in (a, *others)):
        raise ArgumentError("no model has EMA weights", "ema")
    for m in others:
        check_fits(a, m)
    blocks = find_blocks(a.names)
    weights = dict.fromkeys(blocks.names, weight)
    if block_weights is not None:
        weights = blocks.parse_weights(block_weights, weight, "block_weights")
    prefixes = (*LORA_PARTS, AUTOENCODER) if merge_vae else LORA_PARTS
    state: dict[str, Tensor | ComputedTensor] = dict(a.file.state)
    candidates = [n for n in a.names if n.startswith(prefixes) and a[n].is_floating_point()]
    merged = [name for name in candidates if all(name in m for m in others)]
    for name in merged:
        if w := weights[blocks.find_block(name)]:  # of weight 0: A's tensor, not copied
            compute = partial(_merge, name, a, b, c, w)
            state[a.names[name]] = ComputedTensor(a[name].shape, a[name].dtype, compute)
    paths = [m.file.path.name for m in (a, *others)]
    notes = [_format_summary(paths, subtract is not None, weight, block_weights)]
    notes += _list_missing(candidates, prefixes, others)
    size = f"{len(state)} tensors, {len(merged)} of them merged"
    metadata = _make_metadata(a, others, weights if block_weights else {BASE: weight})
    metadata = describe_model(a.model, target.stem, metadata=metadata)
    return Conversion(
        a.file, target, {"": state}, {}, metadata, dtype, (*notes, f"{target.name:60} {size}")
    )


def read_model_file(path: str | Path, config: str | Path | None, *, ema: bool) -> ModelFile:
    """Read names and config of a whole model.

    Args:
        config: The YAML; None = find it as `load` does.
    """
    file = open_checkpoint(path)
    family = identify_weights(file).family
    text = find_config_text(file, config)
    if text is None:
        message = f"`{file.path}` is of no known family\nhint: pass its config"
        raise MissingArgument(message, "config")
    model = build_on_meta(parse_yaml(text))
    if not isinstance(model, LatentDiffusion):
        raise WrongFamily(f"`{file.path}` is not a whole model: it cannot be merged")
    file = to_original_names(file, model, ema=ema and file.has_ema)
    return ModelFile(file, dict(pair_names(file.state)), model, family, text)


def check_fits(a: ModelFile, b: ModelFile) -> None:
    """Raise WeightsMismatch unless b is of a's family, or a text-to-image model with fewer inputs.

    For an inpainting model a, b may be the text-to-image model of the same generation.
    """
    ours, theirs = f"`{a.file.path}`", f"`{b.file.path}`"
    unet = [name for name in {**a.names, **b.names} if name.startswith(UNET)]
    misfits = [name for name in unet if not _fits(name, a, b)]
    if misfits:
        if a.title != b.title:
            message = f"{theirs} is {b.title}, {ours} is {a.title}: only one family can be merged"
            raise WeightsMismatch(message)
        examples = ", ".join(f"`{name}`" for name in misfits[:3])
        message = f"{theirs} does not fit {ours}: {len(misfits)} weights of the UNet differ in"
        raise WeightsMismatch(f"{message} shape or are in one of them only: {examples}")
    predictions = [m.model.parameterization for m in (a, b)]
    if predictions[0] != predictions[1]:
        message = f"{theirs} predicts {predictions[1]}, {ours} predicts {predictions[0]}"
        raise WeightsMismatch(message)
    if type(a.model.schedule) is not type(b.model.schedule):
        raise WeightsMismatch(f"{theirs} has another kind of noise schedule than {ours}")
    for name in a.names:
        if name in b and name.startswith((TEXT, TEXT_2)):
            shapes = [tuple(m[name].shape) for m in (a, b)]
            if shapes[0] != shapes[1]:
                message = f"{theirs} does not fit {ours}: `{name}` is {shapes[1]}, not {shapes[0]}"
                raise WeightsMismatch(message)
            if name.endswith(TOKEN_IDS) and not a[name].equal(b[name]):
                raise WeightsMismatch(f"{theirs} has another vocabulary than {ours}")


def _fits(name: str, a: ModelFile, b: ModelFile) -> bool:
    """Return whether both have a weight of one shape, but for inputs that only a may have."""
    if name not in a or name not in b:
        return False
    ours, theirs = a[name].shape, b[name].shape
    if name != INPUT_CONV or ours == theirs:
        return ours == theirs
    is_text_model = theirs[1] == LATENT_CHANNELS and ours[1] > LATENT_CHANNELS
    return is_text_model and (ours[0], *ours[2:]) == (theirs[0], *theirs[2:])


def _merge(name: str, a: ModelFile, b: ModelFile, c: ModelFile | None, weight: float) -> Tensor:
    """Return a merged weight, float32; input channels that not all models have are a's."""
    models = [m for m in (a, b, c) if m is not None]
    values = [m[name].float() for m in models]
    merged = part = values[0].clone()
    if name == INPUT_CONV:
        count = min(value.shape[1] for value in values)
        part = merged[:, :count]
        values = [value[:, :count] for value in values]
    if c is None:
        part.copy_((1 - weight) * values[0] + weight * values[1])
    else:
        part.copy_(values[0] + weight * (values[1] - values[2]))
    for m in models:
        m.release(m[name])
    return merged


def _format_summary(
    paths: list[str], is_difference: bool, weight: float, blocks: str | None
) -> str:
    number = f"{weight:g}" if blocks is None else f"{weight:g}, by block {blocks}"
    if is_difference:
        return f"{paths[0]} + w ({paths[1]} - {paths[2]}), w = {number}"
    return f"(1 - w) {paths[0]} + w {paths[1]}, w = {number}"


def _list_missing(
    names: list[str], prefixes: tuple[str, ...], others: list[ModelFile]
) -> list[str]:
    """Return lines about weights that are not merged, as another model does not have them."""
    notes = []
    for m in others:
        for prefix in prefixes:
            missing = [name for name in names if name.startswith(prefix) and name not in m]
            if missing:
                examples = ", ".join(missing[:2])
                path = m.file.path.name
                notes.append(f"{path} does not have {len(missing)} weights, they stay: {examples}")
    return notes


def _make_metadata(
    a: ModelFile, others: list[ModelFile], weights: Mapping[str, float]
) -> dict[str, str | int]:
    models = [m.file for m in (a, *others)]
    names = [file.path.name for file in models]
    metadata: dict[str, str | int] = {
        name: value
        for name, value in filter_metadata(a.file.metadata, same_weights=False).items()
        if name not in HISTORY
    }
    licenses = dict.fromkeys(f.metadata[LICENSE] for f in models if f.metadata.get(LICENSE))
    if licenses:
        metadata[LICENSE] = " AND ".join(licenses)
    rule = "add difference" if len(models) > 2 else "weighted sum"
    recipe = {"rule": rule, "models": names, "weights": weights}
    return metadata | {
        "ldm.version": __version__,
        CONFIG_KEY: a.config,
        MERGED_FROM: ", ".join(names),
        RECIPE: json.dumps(recipe),
    }
