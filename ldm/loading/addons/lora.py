"""Load LoRA and LyCORIS files into a model, replace and remove them.

Target layers are linear layers and convolutions (LoCon) of UNet and text encoders; those of LyCORIS
(see `nets/lycoris.py`) are also norms, and include biases.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.encoders.text import TextEncoder
from ldm.loading.addons.embeddings import add_embeddings, read_bundle
from ldm.loading.addons.lora_files import (
    BIAS_ROLES,
    LORA_ROLES,
    LayerTensors,
    add_alphas,
    compute_a1111_hash,
    guess_family_of_layers,
    list_lora_files,
    read_layers,
)
from ldm.loading.addons.lora_targets import (
    KOHYA_UNET_PREFIX,
    TargetLayer,
    list_lycoris_targets,
    map_aliases,
)
from ldm.loading.addons.lora_weights import LoRAWeight, LoRAWeightLike
from ldm.loading.base_models import find_base_model
from ldm.loading.blocks import BASE_BLOCK, list_blocks
from ldm.loading.build import meta_device
from ldm.loading.diffusers.layout import INPAINTING_CHANNELS
from ldm.loading.files.checkpoint import compute_short_hash, read_checkpoint
from ldm.loading.find_variant import detect_first_lora_variant, warn_if_distilled
from ldm.loading.variants import is_variant_fixed, set_variant
from ldm.model import LatentDiffusion
from ldm.nets.lora import LoRALayer, MergedChanges, Target, WeightChange, WeightDelta, merge_changes
from ldm.nets.lycoris import Adapter, build_change
from ldm.pipelines.families import check_model, quote_name
from ldm.runtime.errors import ArgumentError, FileFormatError, WeightsMismatch, WrongFamily
from ldm.runtime.offload import unload_all

__all__ = [
    "LoRAFile", "add_loras", "build_lora_layer", "load_loras", "parse_loras", "read_loras",
    "read_weight_changes", "set_loras",
]  # fmt: skip

log = logging.getLogger(__name__)

INPUT_CONV = "input_blocks.0.0"


class LoRAFile(NamedTuple):
    """A LoRA file or folder, its weight, and the changes that it makes to a model."""

    path: Path
    weight: LoRAWeight
    changes: list[WeightChange]


def parse_loras(
    files: Iterable[tuple[str | Path, LoRAWeightLike]],
) -> list[tuple[Path, LoRAWeight]]:
    """Parse (file, weight) pairs; raise ArgumentError for anything else."""
    pairs = []
    if isinstance(files, str | Path) or not isinstance(files, Iterable):
        files = [cast(tuple[str, float], files)]
    for pair in files:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str | Path):
            example = '[("x.safetensors", 0.8)]'
            message = f"loras must be (file, weight) pairs, such as {example}, got {pair!r}"
            raise ArgumentError(message, "loras")
        file, weight = pair
        pairs.append((Path(file).expanduser(), LoRAWeight.parse(weight)))
    return pairs


def load_loras(model: LatentDiffusion, files: Iterable[tuple[str | Path, LoRAWeightLike]]) -> None:
    """Merge LoRAs, as (file, weight) pairs, into a model; see `add_loras`."""
    add_loras(model, read_loras(model, files))


def read_loras(
    model: LatentDiffusion, files: Iterable[tuple[str | Path, LoRAWeightLike]]
) -> list[LoRAFile]:
    """Read (file, weight) pairs for a model, which may be on the meta device.

    Changes of weight 0 are left out. Raises the errors of `read_weight_changes`.
    """
    loras = []
    for path, weight in parse_loras(files):
        changes = [c for _, c in read_weight_changes(path, model, weight) if c.strength]
        loras.append(LoRAFile(path, weight, changes))
    return loras


def add_loras(model: LatentDiffusion, files: Sequence[LoRAFile]) -> None:
    """Merge LoRAs into a model, add the tokens in their files, and record them in `provenance`."""
    merge_changes(change for file in files for change in file.changes)
    _record_loras(model, files)


def set_loras(model: LatentDiffusion, files: Iterable[tuple[str | Path, LoRAWeightLike]]) -> None:
    """Replace the LoRAs of a model by others, or by the same LoRAs with other weights.

    The result is bit-identical to a model loaded with these `loras`, and has the same defaults, but
    the model is not loaded again. The original weights of changed layers stay in memory.

    Args:
        files: (file, weight) pairs, the weight as in `ldm.load`; an empty list removes all LoRAs.
    Raises:
        ArgumentError: The model was loaded with `loras`, which cannot be removed; or a sum of
            weights is too large for its dtype, and the model then has no LoRAs.
        ValueError, FileNotFoundError: As `ldm.load`; the model is unchanged.
    """
    check_model(model)
    if model.merged_changes is None and model.provenance.get("loras"):
        raise ArgumentError(
            f"{quote_name(model)} was loaded with loras, which cannot be removed: load it without",
            "loras",
        )
    pairs = parse_loras(files)
    requested = [(str(path), _read_modification_time(path), weight) for path, weight in pairs]
    if model.merged_changes is not None and model.merged_changes.loras == requested:
        return
    loras = read_loras(model, pairs)
    merged = model.merged_changes = model.merged_changes or MergedChanges()
    unload_all()  # the weights of offloaded components are changed on the CPU
    for encoder in model.conditioner.find_all(TextEncoder):
        for token in merged.tokens:
            encoder.added_embeddings.pop(token, None)
    merged.loras = None  # so that the next call merges again if this one fails
    if merged.restore_defaults is not None:
        merged.restore_defaults()
        merged.restore_defaults = None
    model.provenance["loras"] = []
    merged.merge([change for file in loras for change in file.changes])
    merged.tokens, merged.loras = _record_loras(model, loras), requested
    if is_variant_fixed(model):
        return
    if variant := detect_first_lora_variant(pairs):
        merged.restore_defaults = set_variant(model, variant)
    else:
        warn_if_distilled(pairs)


def read_weight_changes(
    path: str | Path, model: LatentDiffusion, weight: LoRAWeightLike = 1.0
) -> list[tuple[str, WeightChange]]:
    """Return (kohya's name of the layer, change) for all changes by a file or folder.

    Raises:
        ArgumentError: The weight does not fit this UNet or this type of file.
        FileFormatError: The file is not a LoRA, or of an unsupported type.
        WeightsMismatch: The LoRA does not fit the model.
    """
    weight = LoRAWeight.parse(weight)
    targets = {layer.kohya_name: layer for layer in list_lycoris_targets(model)}
    aliases = map_aliases(targets.values(), model)
    blocks = list_blocks(name for name, _ in model.unet.named_parameters())
    block_weights = weight.compute_block_weights(blocks)
    layers: dict[str, LayerTensors] = {}
    for file in map(read_checkpoint, list_lora_files(path)):
        file_layers = read_layers(file, aliases)
        add_alphas(file_layers, file, targets)
        layers |= file_layers
    changes, unknown, mismatched = [], [], []
    for name, tensors in layers.items():
        if name not in targets:
            unknown.append(name)
            continue
        layer = targets[name]
        is_in_unet = name.startswith(KOHYA_UNET_PREFIX)
        block = blocks.get_block(layer.original_name) if is_in_unet else BASE_BLOCK
        strength = block_weights[block]
        if weight.rank is not None:
            tensors = _truncate_rank(tensors, weight.rank, path)
        try:
            changes += [(name, change) for change in _build_changes(layer, tensors, strength)]
        except ValueError as error:
            mismatched.append(f"{name}: {error}")
    if unknown or mismatched:
        raise _make_mismatch_error(layers, unknown, mismatched, path, model)
    return changes


def _read_modification_time(path: Path) -> int:
    """Return the latest modification time (ns) of a file, or of the files in a folder."""
    times = (file.stat().st_mtime_ns for file in list_lora_files(path) if file.is_file())
    return max(times, default=0)


def _record_loras(model: LatentDiffusion, files: Sequence[LoRAFile]) -> list[str]:
    """Record LoRAs in `provenance`, add the tokens in their files, and return these tokens."""
    _warn_about_order(files)
    provenance, tokens = [], []
    for path, weight, _ in files:
        lora_files = list_lora_files(path)
        short_hash, a1111_hash = compute_short_hash(path), compute_a1111_hash(lora_files[0])
        entry = {"path": str(path.resolve()), "weight": weight.to_json()}
        provenance.append(entry | {"hash": short_hash, "a1111_hash": a1111_hash})
        for file in lora_files:
            try:
                bundle = read_bundle(file)
                add_embeddings(model, bundle, file)
                tokens += [token.lower() for token in bundle]
            except (FileFormatError, WeightsMismatch, WrongFamily) as error:
                log.warning("textual inversions of the LoRA are skipped: %s", error)
    if provenance:
        model.provenance["loras"] = [*model.provenance.get("loras", []), *provenance]
    return tokens


def _warn_about_order(files: Sequence[LoRAFile]) -> None:
    """Warn that the order matters if several files scale or rotate the same weights."""
    counts: Counter[Target] = Counter()
    paths = []
    for file in files:
        targets = {c.target for c in file.changes if not isinstance(c, WeightDelta)}
        counts.update(targets)
        paths += [file.path.name] if targets else []
    if counts and max(counts.values()) > 1:
        names = ", ".join(f"`{name}`" for name in paths)
        log.warning("%s scale or rotate the same weights: they are applied in this order", names)


def _build_changes(
    layer: TargetLayer, tensors: LayerTensors, strength: float
) -> list[WeightChange]:
    """Build the changes of a layer's weight and bias; raise ValueError if a shape does not fit."""
    bias_tensors = {role: value for role, value in tensors.items() if role in BIAS_ROLES}
    weight_tensors = {role: value for role, value in tensors.items() if role not in BIAS_ROLES}
    if layer.original_name == INPUT_CONV and "down" in weight_tensors:
        weight_tensors["down"] = _pad_channels(weight_tensors["down"], layer.target)
    changes = []
    if weight_tensors.keys() - {"alpha"}:
        changes.append(_build_change(layer.target, weight_tensors, strength))
    if bias_tensors:
        changes.append(_build_change(layer.target._replace(name="bias"), bias_tensors, strength))
    return changes


def _build_change(target: Target, tensors: LayerTensors, strength: float) -> WeightChange:
    """Build the change of one weight; alpha and `on_input` are removed from `tensors`."""
    alpha = float(tensors.pop("alpha")) if "alpha" in tensors else None
    on_input = bool(tensors.pop("on_input", False))
    if tensors.keys() != LORA_ROLES:
        return build_change(target, Adapter(tensors, alpha, on_input), strength)
    layer = build_lora_layer(target, tensors["down"], tensors["up"], alpha)
    layer.strength = strength
    return layer


def _truncate_rank(tensors: LayerTensors, rank: int, path: str | Path) -> LayerTensors:
    """Return a layer of a plain LoRA with only its first ranks, and with the same alpha / rank."""
    if not LORA_ROLES <= tensors.keys() <= {*LORA_ROLES, "alpha"}:
        message = f"`{path}` is not a plain LoRA: its rank cannot be truncated (dyn)"
        raise ArgumentError(message, "lora")
    down, up = tensors["down"], tensors["up"]
    alpha = float(tensors.get("alpha", torch.tensor(len(down))))
    rank = min(rank, len(down))
    alpha = alpha * rank / len(down)
    return {"down": down[:rank], "up": up[:, :rank], "alpha": torch.tensor(alpha)}


def build_lora_layer(
    target: Target, down: Tensor, up: Tensor, alpha: float | None = None
) -> LoRALayer:
    """Build a layer of a plain LoRA, which can be merged or attached.

    Args:
        down: (rank, C_in, …), of the target's shape (C_out, C_in, …) or with as many elements.
        up: (C_out, rank), or with as many elements.
        alpha: None = the rank, so that alpha / rank is 1.
    Raises:
        ValueError: The shapes do not fit the target.
    """
    rank, shape = len(down), target.weight.shape
    numels = rank * shape[1:].numel(), rank * shape[0]
    if len(shape) < 2 or len(up) != shape[0] or (down.numel(), up.numel()) != numels:
        raise ValueError(f"its tensors do not fit a weight of shape {tuple(shape)}")
    with meta_device():
        layer = LoRALayer(target, rank)
    state = {
        "lora_down.weight": down.reshape(layer.lora_down.weight.shape),
        "lora_up.weight": up.reshape(layer.lora_up.weight.shape),
        "alpha": torch.tensor(float(rank) if alpha is None else alpha),
    }
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)


def _pad_channels(down: Tensor, target: Target) -> Tensor:
    """Pad input channels with zeros, for a LoRA of a text-to-image model in an inpainting model."""
    in_channels = target.weight.shape[1]
    if in_channels != INPAINTING_CHANNELS or down.dim() != 4:
        return down
    return F.pad(down, (0, 0, 0, 0, 0, max(in_channels - down.shape[1], 0)))


def _make_mismatch_error(
    layers: Mapping[str, LayerTensors],
    unknown: Sequence[str],
    mismatched: Sequence[str],
    path: str | Path,
    model: LatentDiffusion,
) -> WeightsMismatch:
    """Return the error for layers that the model does not have, or has in another shape."""
    lora_family, base = guess_family_of_layers(layers), find_base_model(model)
    model_family = base and base.title
    remedy = f"use a LoRA that was trained for {model_family or 'this model'}"
    if lora_family and lora_family != model_family:
        title = model_family or "of another family"
        return WeightsMismatch(
            f"`{path}` is a LoRA for {lora_family}, the model is {title}: {remedy}"
        )
    return WeightsMismatch(
        f"`{path}` does not fit this model, {len(unknown)} of its {len(layers)} layers unknown, "
        f"{len(mismatched)} of another shape: "
        f"{', '.join([*unknown, *mismatched][:3])}; {remedy}"
    )
