"""Read LoRA and LyCORIS files in the formats of kohya, diffusers, peft and ComfyUI; write LoRAs.

    kohya       lora_unet_down_blocks_0_…_to_q.lora_down.weight, .lora_up.weight, .alpha
                lora_te_text_model_encoder_layers_0_mlp_fc1.…
      SDXL      lora_unet_input_blocks_4_1_…, lora_te1_…, lora_te2_…
    diffusers   unet.down_blocks.0.….to_q.lora_A.weight (or lora.down.weight), lora_B (lora.up)
                text_encoder.text_model.….mlp.fc1.… (or lora_linear_layer.down.weight)
      SDXL      text_encoder.…, text_encoder_2.…
    peft        base_model.model.….lora_A.weight, with alpha in the `adapter_config.json` beside it
    ComfyUI     the original's names, as `input_blocks.1.1.….to_q.lora_A.weight`

Layers have diffusers' names (`loading/diffusers/names.py`) or the original's, with dots or `_`;
internally kohya's are used. The only text encoder of SDXL's refiner is the base's second one: names
of the first or the second text encoder both mean it. A folder stands for all LoRA files in it
(peft: one per network). Target layers are the linear layers and convolutions (LoCon) of UNet and
text encoders; of LyCORIS (see `nets/lycoris.py`) also norms and biases.
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.encoders.text import OpenCLIPText, TextEncoder
from ldm.encoders.towers import FusedAttention
from ldm.loading.addons.embeddings import BUNDLE, add_embeddings, read_bundle
from ldm.loading.addons.lora_weights import LoRAWeight
from ldm.loading.base_models import BASE_MODELS, SDXL, find_base_model
from ldm.loading.blocks import BASE, find_blocks
from ldm.loading.build import meta_device
from ldm.loading.diffusers.keys import text_component
from ldm.loading.diffusers.names import text_layers, unet_layers
from ldm.loading.files.checkpoint import Checkpoint, read_checkpoint, short_hash, write_checkpoint
from ldm.loading.modelspec import describe_model
from ldm.loading.variants import (
    Found,
    detect_lora,
    is_variant_given,
    looks_distilled,
    set_variant,
)
from ldm.loading.weight_names import SECOND_TEXT, layer_alias
from ldm.model import LatentDiffusion
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.nets.lora import (
    PROJECTION,
    Addition,
    LoRA,
    LoRALayer,
    MergedChanges,
    Target,
    WeightChange,
    merge_changes,
)
from ldm.nets.lycoris import Adapter, build_change, find_rank, is_complete
from ldm.pipelines.families import file_name, is_sdxl
from ldm.runtime.errors import (
    ArgumentError,
    FileFormatError,
    MissingFile,
    WeightsMismatch,
    WrongFamily,
)
from ldm.runtime.files import read_text
from ldm.runtime.hashes import hash_file
from ldm.runtime.offload import unload_all
from ldm.runtime.types import JsonObject

__all__ = [
    "LoRAFile", "TargetLayer", "add_loras", "detect_few_steps", "find_base", "load_loras",
    "lora_targets", "read_bundled_embeddings", "read_changes", "read_lora", "read_loras",
    "read_named_changes", "set_loras", "warn_if_distilled", "write_lora",
]  # fmt: skip

log = logging.getLogger(__name__)

KEY = re.compile(
    r"""(.+?)(?:
    [._]lora(?:_linear_layer)?[._](down|up|A|B|mid|magnitude_vector)
      (?:\.(?!weight|bias)\w+)?(?:\.weight)?
    | \.(alpha|dora_scale|hada_(?:w\d_[ab]|t\d)|lokr_(?:w\d(?:_[ab])?|t2)|diff|diff_b|w_norm|b_norm
      |oft_blocks|rescale|on_input|(?:a1|a2|b1|b2)\.weight)
    )""",
    re.VERBOSE,
)
VECTOR = re.compile(r"(.+)\.weight")  # of (IA)^3, beside `on_input`
ROLES = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
BIASES = ("diff_b", "b_norm")  # roles of changes of the bias
LOW_RANK = {"down", "up"}
DOWN = ("down", "A")  # of names
INPUT_ROLES = ("down", "hada_w1_b", "diff")  # of shape (…, features of the input)
LAYERS = (nn.Linear, nn.Conv2d, FusedAttention)
Kinds = tuple[type[nn.Module], ...]
Tensors = dict[str, Tensor]  # of one layer, by their role
UNET_PREFIX = "lora_unet_"
INPUT_CONVOLUTION = "input_blocks.0.0"
INPAINTING_CHANNELS = 9
ORIGINAL_BLOCKS = re.compile(r"(^|[._])(input_blocks|middle_block|output_blocks)[._]")
QKV = (".q_proj", ".k_proj", ".v_proj")
FOLDER_FILES = ("pytorch_lora_weights", "adapter_model")  # of diffusers, of peft
OTHER_KINDS = {  # by a pattern in the names
    "lora_embedding": "LoRA of an embedding",
    "oft_(R|diag)|boft": "OFT of another form",
    "ia3_": "(IA)^3 of peft",
    r"\.bm\.": "GLoRA with biases",
    r"lora_\w+\.bias$": "LoRA with biases",
    r"\.modules_to_save\.": "LoRA with whole layers",
}
FAMILY_BY_NAME = {  # by a pattern in the names
    r"lora_te2_|text_encoder_2\.|add_embedding|_\d_transformer_blocks_[1-9]": SDXL.title,
    r"double_blocks|single_(transformer_)?blocks|^transformer\.|joint_blocks": "Flux or SD 3",
}
METADATA = "lora_adapter_metadata"  # key under which diffusers keeps alpha


class TargetLayer(NamedTuple):
    """A layer that a LoRA may change, with its names."""

    target: Target
    original: str  # in the UNet or behind the text encoder's name
    diffusers: str  # `unet.down_blocks.0.…`, `text_encoder.text_model.…`
    kohya: str  # `lora_unet_…`, `lora_te_…`; those of `LoRA.layers`


Weight = float | str | LoRAWeight  # see `LoRAWeight.parse`


class LoRAFile(NamedTuple):
    """A file or folder, its weight, and the changes that it makes with that weight."""

    path: Path
    weight: LoRAWeight
    changes: list[WeightChange]


def load_loras(model: LatentDiffusion, files: Iterable[tuple[str | Path, Weight]]) -> None:
    """Read (file, weight) pairs and add them to a model."""
    add_loras(model, read_loras(model, files))


def read_loras(
    model: LatentDiffusion, files: Iterable[tuple[str | Path, Weight]]
) -> list[LoRAFile]:
    """Read (file, weight) pairs for a model, which may be on the meta device."""
    return [
        LoRAFile(
            Path(file).expanduser(), LoRAWeight.parse(weight), read_changes(file, model, weight)
        )
        for file, weight in files
    ]


def add_loras(model: LatentDiffusion, files: Sequence[LoRAFile]) -> None:
    """Merge LoRAs into a model, add the tokens in their files, and record them in `provenance`."""
    merge_changes(change for file in files for change in file.changes)
    _record(model, files)


def set_loras(model: LatentDiffusion, files: Iterable[tuple[str | Path, Weight]]) -> None:
    """Replace the LoRAs of a model by others, or by the same with other weights.

    The result is bit-identical to a model loaded with these `loras`, without loading it again, and
    has the same defaults. The original weights of changed layers stay in memory.

    Args:
        files: (file, weight) pairs, the weight as in `ldm.load`; an empty list removes all LoRAs.
    Raises:
        ArgumentError: the model was loaded with `loras`, which cannot be removed.
        ValueError, FileNotFoundError: as `ldm.load`; the model is then unchanged.
    """
    if model.merged is None and model.provenance.get("loras"):
        raise ArgumentError(
            f"{file_name(model)} was loaded with loras, which cannot be removed: load it without",
            "loras",
        )
    pairs = [(Path(file).expanduser(), LoRAWeight.parse(weight)) for file, weight in files]
    state = [(*_file_state(path), weight) for path, weight in pairs]
    if model.merged is not None and model.merged.state == state:
        return
    adapters = read_loras(model, pairs)
    merged = model.merged = model.merged or MergedChanges()
    unload_all()
    for encoder in model.conditioner.find_all(TextEncoder):
        for token in merged.tokens:
            encoder.added_embeddings.pop(token, None)
    merged.state = None  # if merging fails
    if merged.undo_sampling is not None:
        merged.undo_sampling()
        merged.undo_sampling = None
    merged.merge([change for file in adapters for change in file.changes])
    model.provenance["loras"] = []
    merged.tokens, merged.state = _record(model, adapters), state
    if is_variant_given(model):
        return
    if found := detect_few_steps(pairs):
        merged.undo_sampling = set_variant(model, found)
    else:
        warn_if_distilled(pairs)


def _file_state(path: Path) -> tuple[str, int]:
    """Return path and modification time (ns) of a file or folder."""
    times = (file.stat().st_mtime_ns for file in _files_of(path) if file.is_file())
    return str(path), max(times, default=0)


def _record(model: LatentDiffusion, files: Sequence[LoRAFile]) -> list[str]:
    """Record LoRAs in `provenance`, add the tokens in their files, and return these."""
    _report_order(files)
    provenance, tokens = [], []
    for path, weight, _ in files:
        lora_files = _files_of(path)
        hashes = {"hash": short_hash(path), "a1111_hash": _a1111_hash(lora_files[0])}
        provenance.append({"path": str(path.resolve()), "weight": weight.to_json(), **hashes})
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


def _report_order(files: Sequence[LoRAFile]) -> None:
    """Warn that the order matters, where several files scale or rotate the same weights."""
    counts: Counter[Target] = Counter()
    paths = []
    for file in files:
        targets = {c.target for c in file.changes if not isinstance(c, Addition)}
        counts.update(targets)
        paths += [file.path.name] if targets else []
    if counts and max(counts.values()) > 1:
        names = ", ".join(f"`{name}`" for name in paths)
        log.warning("%s scale or rotate the same weights: they are applied in this order", names)


def detect_few_steps(loras: Iterable[tuple[str | Path, Weight]]) -> Found | None:
    """Return the variant that LoRAs make of a model: of the first (file, weight) that tells it.

    One that changes no UNet does not count.
    """
    paths = [path for path, weight in loras if LoRAWeight.parse(weight).unet]
    files = (read_checkpoint(file) for path in paths for file in _files_of(path))
    return next(filter(None, (detect_lora(file.path, file.metadata) for file in files)), None)


def warn_if_distilled(loras: Iterable[tuple[str | Path, Weight]]) -> None:
    """Warn of LoRAs that look as if they were for few steps, though nothing tells which."""
    for file in (read_checkpoint(file) for path, _ in loras for file in _files_of(path)):
        matches = ((KEY.fullmatch(name), value) for name, value in file.state.items())
        ranks = {len(value) for match, value in matches if match and match[2] in DOWN}
        if looks_distilled(file.state, ranks):
            log.warning(
                "`%s` looks like a few-step LoRA, but neither name nor metadata say of which kind: "
                "set `variant`, for example to lcm",
                file.path,
            )


def read_lora(path: str | Path, model: LatentDiffusion) -> LoRA:
    """Return the LoRA in a file or folder, for the layers of a model; not attached, not merged.

    Raises:
        FileFormatError: it is not a LoRA, or of an unsupported kind.
        WeightsMismatch: it does not fit the model.
    """
    layers = {}
    for name, change in read_named_changes(path, model):
        if not isinstance(change, LoRALayer):
            raise FileFormatError(f"`{path}` is not a plain LoRA, its changes can only be merged")
        layers[name] = change
    return LoRA(layers)


def read_changes(
    path: str | Path, model: LatentDiffusion, weight: Weight = 1.0
) -> list[WeightChange]:
    """Return the changes that a LoRA or LyCORIS file or folder makes in a model; not merged.

    Changes of weight 0 are left out.

    Raises:
        ArgumentError: the weight is not for this UNet or this kind of file.
        FileFormatError: it is not such a file, or of an unsupported kind.
        WeightsMismatch: it does not fit the model.
    """
    changes = read_named_changes(path, model, weight)
    return [change for _, change in changes if change.strength]


def read_named_changes(
    path: str | Path, model: LatentDiffusion, weight: Weight = 1.0
) -> list[tuple[str, WeightChange]]:
    """Return the changes of a file with kohya's names of their layers; see `read_changes`."""
    weight = LoRAWeight.parse(weight)
    targets = {layer.kohya: layer for layer in _all_targets(model)}
    aliases = _names_by_alias(targets.values(), model)
    blocks = find_blocks(name for name, _ in model.unet.named_parameters())
    block_weights = weight.block_weights(blocks)
    layers: dict[str, Tensors] = {}
    for file in map(read_checkpoint, _files_of(path)):
        layers_of_file = _tensors_by_layer(file, aliases)
        _add_alphas(layers_of_file, file, targets)
        layers |= layers_of_file
    changes, unknown, mismatched = [], [], []
    for name, tensors in layers.items():
        if name not in targets:
            unknown.append(name)
            continue
        layer = targets[name]
        in_unet = name.startswith(UNET_PREFIX)
        strength = block_weights[blocks.find_block(layer.original) if in_unet else BASE]
        if weight.rank is not None:
            tensors = _cut_rank(tensors, weight.rank, path)
        try:
            for change in _build_changes(layer, tensors, strength):
                changes.append((name, change))
        except ValueError as error:
            mismatched.append(f"{name}: {error}")
    if unknown or mismatched:
        raise _mismatch(layers, unknown, mismatched, path, model)
    return changes


def find_base(path: str | Path) -> str | None:
    """Return the title of the family that a LoRA was trained for; None if it is not recognised."""
    files = [_tensors_by_layer(read_checkpoint(file), {}) for file in _files_of(path)]
    return _likely_family({name: tensors for layers in files for name, tensors in layers.items()})


def read_bundled_embeddings(path: str | Path) -> Tensors:
    """Return the tensors of textual inversions in a LoRA file or folder, by their names there."""
    files = map(read_checkpoint, _files_of(path))
    return {k: v for file in files for k, v in file.state.items() if k.startswith(BUNDLE)}


def write_lora(
    lora: LoRA,
    path: str | Path,
    model: LatentDiffusion,
    style: Literal["kohya", "diffusers"] = "kohya",
    metadata: Mapping[str, str | int] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a LoRA file, with its base model in the metadata; the weight of the LoRA is not saved.

    Args:
        others: Tensors that are no layers, by their names in the file.
        style: "kohya" opens in A1111, ComfyUI and diffusers. "diffusers" folds alpha / rank into
            `up`, as not every version of diffusers reads alpha.
    """
    state = {name: value.detach().cpu() for name, value in lora.state_dict().items()}
    notes = _describe(lora, model) if style == "kohya" else {}
    if style == "diffusers":
        names = {layer.kohya: layer.diffusers for layer in lora_targets(model)}
        state = {}
        for name, layer in lora.layers.items():
            ratio = float(layer.alpha) / layer.rank
            up = layer.lora_up.weight.detach().cpu()
            state[f"{names[name]}.lora_A.weight"] = layer.lora_down.weight.detach().cpu()
            state[f"{names[name]}.lora_B.weight"] = up * ratio if ratio != 1 else up
    state |= others or {}
    notes |= metadata or {}
    write_checkpoint(path, state, describe_model(model, Path(path).stem, "lora", notes))


def _describe(lora: LoRA, model: LatentDiffusion) -> dict[str, str | int]:
    """Return the metadata that kohya's scripts read."""
    notes: dict[str, str | int] = {"ss_network_module": "networks.lora"}
    sizes = {(layer.rank, float(layer.alpha)) for layer in lora.layers.values()}
    if sizes:
        rank, alpha = sizes.pop()
        is_dynamic = bool(sizes)  # as kohya's scripts say it
        notes["ss_network_dim"] = "Dynamic" if is_dynamic else rank
        notes["ss_network_alpha"] = "Dynamic" if is_dynamic else str(alpha)
    if base := find_base_model(model):
        notes["ss_base_model_version"] = base.version
    return notes


def lora_targets(model: LatentDiffusion) -> list[TargetLayer]:
    """List linear layers and convolutions that a LoRA may change."""
    return [*_unet_targets(model, LAYERS), *_text_targets(model, LAYERS)]


def _all_targets(model: LatentDiffusion) -> list[TargetLayer]:
    """List `lora_targets`, and layers that only LyCORIS files change: norms, text projections."""
    kinds = (*LAYERS, nn.GroupNorm, nn.LayerNorm)
    layers = [*_unet_targets(model, kinds), *_text_targets(model, kinds)]
    return [*layers, *_projection_targets(model)]


def _unet_targets(model: LatentDiffusion, kinds: Kinds) -> Iterator[TargetLayer]:
    if isinstance(model.unet, LatentUpscalerUNet):
        raise WeightsMismatch("a LoRA is not for the x2 latent upscaler", "lora")
    for ours, theirs in unet_layers(_layer_names(model.unet, kinds)).items():
        # kohya trains SDXL in a UNet with the original's names.
        kohya = UNET_PREFIX + _flat(ours if is_sdxl(model) else theirs)
        yield TargetLayer(Target(model.unet.get_submodule(ours)), ours, f"unet.{theirs}", kohya)


def _text_targets(model: LatentDiffusion, kinds: Kinds) -> Iterator[TargetLayer]:
    for prefix, text in _prefixes(model):
        network = text_component(text)
        used_layers = [
            name for name in _layer_names(text, kinds) if not name.startswith(text.unused)
        ]
        for ours, theirs in text_layers(used_layers).items():
            layer = text.get_submodule(ours)
            is_fused = isinstance(layer, FusedAttention)
            for part, end in enumerate(QKV) if is_fused else [(None, "")]:
                original, name = f"{network}.{ours}{end}", f"{network}.{theirs}{end}"
                yield TargetLayer(Target(layer, part), original, name, prefix + _flat(theirs + end))


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _names_by_alias(targets: Iterable[TargetLayer], model: LatentDiffusion) -> dict[str, str]:
    """Return kohya's name of each layer by the aliases (`layer_alias`) of its other names."""
    names = {
        layer_alias(name): layer.kohya
        for layer in targets
        for name in (layer.original, layer.diffusers)
    }
    if len(model.conditioner.find_all(TextEncoder)) == 1:
        names |= {alias.removeprefix(SECOND_TEXT): kohya for alias, kohya in names.items()}
    return names


def _projection_targets(model: LatentDiffusion) -> Iterator[TargetLayer]:
    for prefix, text in _prefixes(model):
        if isinstance(text, OpenCLIPText) and text.always_return_pooled:
            name = f"{text_component(text)}.{PROJECTION}"
            yield TargetLayer(Target(text.model, name=PROJECTION), name, name, prefix + PROJECTION)


def _prefixes(model: LatentDiffusion) -> Iterator[tuple[str, TextEncoder]]:
    """Yield (kohya's prefix of its layers, text encoder)."""
    encoders = model.conditioner.find_all(TextEncoder)
    for number, text in enumerate(encoders, start=1):
        yield f"lora_te{number}_" if len(encoders) > 1 else "lora_te_", text


def _layer_names(network: nn.Module, kinds: Kinds) -> list[str]:
    return [name for name, layer in network.named_modules() if isinstance(layer, kinds)]


def _build_changes(layer: TargetLayer, tensors: Tensors, strength: float) -> list[WeightChange]:
    """Build the changes of a layer's weight and bias; raise ValueError if shapes do not fit."""
    of_weight = {role: value for role, value in tensors.items() if role not in BIASES}
    of_bias = {role: value for role, value in tensors.items() if role in BIASES}
    changes = []
    for target, part in (
        (layer.target, of_weight),
        (layer.target._replace(name="bias"), of_bias),
    ):
        if not part.keys() - {"alpha"}:
            continue
        if layer.original == INPUT_CONVOLUTION and "down" in part:
            part["down"] = _pad_channels(part["down"], target)
        alpha, on_input = part.pop("alpha", None), part.pop("on_input", None)
        adapter = Adapter(
            part,
            None if alpha is None else float(alpha),
            on_input is not None and bool(on_input),
        )
        build = _build_layer if part.keys() == LOW_RANK else build_change
        changes.append(build(target, adapter, strength))
    return changes


def _cut_rank(tensors: Tensors, rank: int, path: str | Path) -> Tensors:
    """Return the first ranks of a plain LoRA's layer, with the same alpha / rank."""
    if not LOW_RANK <= tensors.keys() <= {*LOW_RANK, "alpha"}:
        raise ArgumentError(f"`{path}` is not a plain LoRA: its rank cannot be cut (dyn)", "lora")
    down, up = tensors["down"], tensors["up"]
    alpha = float(tensors.get("alpha", torch.tensor(len(down))))
    rank = min(rank, len(down))
    scaled = torch.tensor(alpha * rank / len(down))
    return {"down": down[:rank], "up": up[:, :rank], "alpha": scaled}


def _build_layer(target: Target, adapter: Adapter, strength: float) -> LoRALayer:
    """Build a layer of a plain LoRA, which can also be attached; ValueError if it does not fit."""
    down, up = adapter.tensors["down"], adapter.tensors["up"]
    rank, shape = len(down), target.weight.shape
    counts = rank * shape[1:].numel(), rank * shape[0]
    if len(shape) < 2 or len(up) != shape[0] or (down.numel(), up.numel()) != counts:
        raise ValueError(f"its tensors do not fit a weight of shape {tuple(shape)}")
    with meta_device():
        layer = LoRALayer(target, rank)
    state = {
        "lora_down.weight": down.reshape(layer.lora_down.weight.shape),
        "lora_up.weight": up.reshape(layer.lora_up.weight.shape),
        "alpha": torch.tensor(float(layer.rank) if adapter.alpha is None else adapter.alpha),
    }
    layer.load_state_dict(state, assign=True)
    layer.strength = strength
    return layer.requires_grad_(False)


def _files_of(path: str | Path) -> list[Path]:
    """Return the file at a path, or the LoRA files of diffusers or peft in a folder."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return [path]
    for ending in (".safetensors", ".bin"):
        files = [*path.glob(f"*{ending}"), *path.glob(f"*/*{ending}")]
        if files := sorted(file for file in files if file.stem in FOLDER_FILES):
            return files
    raise MissingFile(f"`{path}` holds no `{'` or `'.join(FOLDER_FILES)}`.safetensors", "loras")


def _a1111_hash(path: Path) -> str:
    """Return A1111's twelve hex digits of a LoRA: the SHA-256 of its tensors, or of a .pt."""
    digest = read_checkpoint(path).metadata.get("sshs_model_hash")
    if not digest and path.suffix == ".safetensors":
        with path.open("rb") as file:
            file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
            digest = hashlib.sha256(file.read()).hexdigest()
    return str(digest or hash_file(path))[:12]


def _tensors_by_layer(file: Checkpoint, aliases: Mapping[str, str]) -> dict[str, Tensors]:
    """Return the tensors of a file by kohya's name of the layer, then by role: "down", "up" …."""
    layers: dict[str, Tensors] = {}
    originals: dict[str, Tensors] = {}  # under the original's names
    others = []
    # Files in peft's folders name layers without the network; the folder says which it is.
    folder = "text_encoder_2." if file.path.parent.name == "text_encoder_2" else ""
    for key, value in file.state.items():
        match = KEY.fullmatch(key)
        vector = VECTOR.fullmatch(key)
        if match is None and vector is not None and f"{vector[1]}.on_input" in file.state:
            match = vector
        if match is not None:
            role = _role(match)
            name = aliases.get(layer_alias(folder + match[1]), match[1])
            group = originals if ORIGINAL_BLOCKS.search(match[1]) else layers
            group.setdefault(name, {})[role] = value
        elif not key.startswith(BUNDLE):
            others.append(key)
    if twice := originals.keys() & layers.keys():
        message = "`%s` has %d layers twice: those with the original's names are left out"
        log.warning(message, file.path, len(twice))
    layers = originals | layers
    for pattern, kind in OTHER_KINDS.items():
        if any(re.search(pattern, key) for key in others):
            raise FileFormatError(f"`{file.path}` is of an unsupported kind: {kind}")
    if not (others or layers):
        raise FileFormatError(f"`{file.path}` has no LoRA layers")
    if others:
        examples = ", ".join(f"`{key}`" for key in others[:3])
        what = "is of an unsupported kind of LoRA" if layers else "is not a LoRA file"
        count = f"{len(others)} of its {len(file.state)} keys {'is' if len(others) == 1 else 'are'}"
        raise FileFormatError(f"`{file.path}` {what}: {count} not recognised: {examples}")
    incomplete = [name for name, tensors in layers.items() if not _is_complete(tensors)]
    if incomplete:
        roles = ", ".join(f"`{role}`" for role in layers[incomplete[0]])
        count = "1 layer is" if len(incomplete) == 1 else f"{len(incomplete)} layers are"
        message = f"{count} incomplete: `{incomplete[0]}` has only {roles}"
        raise FileFormatError(f"`{file.path}`: {message}")
    if wrong := [name for name, tensors in layers.items() if not _are_finite(tensors.values())]:
        message = f"NaN or infinity in {len(wrong)} of its {len(layers)} layers: `{wrong[0]}`"
        raise FileFormatError(f"`{file.path}`: {message}")
    empty = [name for name, tensors in layers.items() if find_rank(tensors) == 0]
    if empty:
        log.info("`%s`: %d layers have rank 0 and change nothing", file.path, len(empty))
    return {name: tensors for name, tensors in layers.items() if name not in empty}


def _role(match: re.Match[str]) -> str:
    """Return the role of a tensor in its layer, by its name."""
    if match.re is VECTOR:
        return "weight"
    return match[3] or ROLES.get(match[2], match[2])


def _is_complete(tensors: Tensors) -> bool:
    of_weight = tensors.keys() - {"alpha", "on_input", *BIASES}
    return is_complete(of_weight) if of_weight else not tensors.keys().isdisjoint(BIASES)


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(value.float().isfinite().all()) for value in tensors)


def _add_alphas(
    layers: Mapping[str, dict[str, Tensor]], file: Checkpoint, targets: Mapping[str, TargetLayer]
) -> None:
    """Add the missing alpha of layers, from the metadata of diffusers or the config of peft."""
    adapters: JsonObject = json.loads(file.metadata.get(METADATA, "{}"))
    config_path = file.path.with_name("adapter_config.json")
    configs: dict[str, JsonObject] = {}  # by network: "unet.", "text_encoder."
    for key, value in adapters.items():
        network, dot, name = key.partition(".")
        configs.setdefault(network + dot, {})[name] = value
    if not adapters and config_path.is_file():
        configs = {"": json.loads(read_text(config_path))}
    for network, config in configs.items():
        patterns = config.get("alpha_pattern") or {}
        for kohya, tensors in layers.items():
            name = targets[kohya].diffusers if kohya in targets else kohya
            if not name.startswith(network) or "alpha" in tensors:
                continue
            matching = [a for n, a in patterns.items() if name.endswith(n.removeprefix("^"))]
            alpha = matching[-1] if matching else config.get("lora_alpha", config.get("alpha"))
            rank = find_rank(tensors)
            if alpha is not None and rank is not None:
                # rsLoRA divides by the root of the rank.
                factor = rank**0.5 if config.get("use_rslora") else 1
                tensors["alpha"] = torch.tensor(float(alpha) * factor)


def _pad_channels(down: Tensor, target: Target) -> Tensor:
    """Pad input channels with zeros, if the model is an inpainting model and the LoRA is not."""
    channels = target.weight.shape[1]
    if channels != INPAINTING_CHANNELS or down.dim() != 4:
        return down
    return F.pad(down, (0, 0, 0, 0, 0, max(channels - down.shape[1], 0)))


def _mismatch(
    layers: Mapping[str, Tensors],
    unknown: Sequence[str],
    mismatched: Sequence[str],
    path: str | Path,
    model: LatentDiffusion,
) -> WeightsMismatch:
    """Return the error for layers that the model does not have, or has in another shape."""
    theirs, base = _likely_family(layers), find_base_model(model)
    ours = base and base.title
    remedy = f"use a LoRA that was trained for {ours or 'this model'}"
    if theirs and theirs != ours:
        model_title = ours or "of another family"
        return WeightsMismatch(
            f"`{path}` is a LoRA for {theirs}, the model is {model_title}: {remedy}"
        )
    return WeightsMismatch(
        f"`{path}` does not fit this model, {len(unknown)} of its {len(layers)} layers unknown, "
        f"{len(mismatched)} of another shape: "
        f"{', '.join([*unknown, *mismatched][:3])}; {remedy}"
    )


def _likely_family(layers: Mapping[str, Tensors]) -> str | None:
    """Return the family by the cross-attention dimension, else by the names of the layers."""
    for name, tensors in layers.items():
        matrix = next((tensors[role] for role in INPUT_ROLES if role in tensors), None)
        width = None if matrix is None else matrix.shape[1]
        if layer_alias(name).endswith("attn2_to_k") and width in BASE_MODELS:
            return BASE_MODELS[width].title
    names = "\n".join(text for name in layers for text in (name, layer_alias(name)))
    return next(
        (f for pattern, f in FAMILY_BY_NAME.items() if re.search(pattern, names, re.M)), None
    )
