"""Read LoRA and LyCORIS files in the formats of kohya, diffusers, peft and ComfyUI; write LoRAs.

    kohya       lora_unet_down_blocks_0_…_to_q.lora_down.weight, .lora_up.weight, .alpha
                lora_te_text_model_encoder_layers_0_mlp_fc1.…
      SDXL      lora_unet_input_blocks_4_1_…, lora_te1_…, lora_te2_…
    diffusers   unet.down_blocks.0.….to_q.lora_A.weight (or lora.down.weight), lora_B (lora.up)
                text_encoder.text_model.….mlp.fc1.… (or lora_linear_layer.down.weight)
      SDXL      text_encoder.…, text_encoder_2.…
    peft        base_model.model.….lora_A.weight, with alpha in the `adapter_config.json` beside it
    ComfyUI     the original's names: `input_blocks.1.1.….to_q.lora_A.weight`

Files have diffusers' names of layers (`loading/diffusers/names.py`) or the original's, with dots or
`_`; this module uses kohya's. The text encoder of SDXL's refiner may have the names of the first or
the second text encoder. Of a folder all LoRA files are read (peft: one per component).
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.loading.addons.embeddings import BUNDLE_PREFIX
from ldm.loading.addons.lora_targets import TargetLayer, list_lora_targets
from ldm.loading.base_models import BASE_MODELS, SDXL, find_base_model
from ldm.loading.diffusers.layout import read_json
from ldm.loading.files.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ldm.loading.modelspec import make_modelspec
from ldm.loading.weight_names import normalize_layer_name
from ldm.model import LatentDiffusion
from ldm.nets.lora import LoRA
from ldm.nets.lycoris import find_rank, is_adapter
from ldm.runtime.errors import FileFormatError, MissingFile
from ldm.runtime.hashes import get_sha256
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "BIAS_ROLES", "LORA_ROLES", "LayerTensors", "add_alphas", "compute_a1111_hash", "find_ranks",
    "guess_family_of_layers", "guess_family_of_lora", "list_lora_files", "read_bundled_embeddings",
    "read_layers", "write_lora",
]  # fmt: skip

log = logging.getLogger(__name__)

LORA_KEY = re.compile(
    r"""(.+?)(?:
    [._]lora(?:_linear_layer)?[._](down|up|A|B|mid|magnitude_vector)
      (?:\.(?!weight|bias)\w+)?(?:\.weight)?
    | \.(alpha|dora_scale|hada_(?:w\d_[ab]|t\d)|lokr_(?:w\d(?:_[ab])?|t2)|diff|diff_b|w_norm|b_norm
      |oft_blocks|rescale|on_input|(?:a1|a2|b1|b2)\.weight)
    )""",
    re.VERBOSE,
)
IA3_KEY = re.compile(r"(.+)\.(weight)")  # of (IA)^3, if there is an `on_input` of the layer
# Name in some files -> role.
ROLE_ALIASES = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
BIAS_ROLES = ("diff_b", "b_norm")  # of changes of a bias
LORA_ROLES = {"down", "up"}  # of a plain LoRA, which may also have alpha
DOWN_NAMES = ("down", "A")  # of the first matrix, (rank, C_in, …)
INPUT_ROLES = ("down", "hada_w1_b", "diff")  # of tensors (…, C_in)
LayerTensors = dict[str, Tensor]  # tensors of one layer, by role
ORIGINAL_BLOCKS = re.compile(r"(^|[._])(input_blocks|middle_block|output_blocks)[._]")
FOLDER_FILES = ("pytorch_lora_weights", "adapter_model")  # stems, of diffusers and of peft
UNSUPPORTED_TYPES = {  # by pattern in names of tensors that LORA_KEY does not match
    "lora_controlnet|lllite_": "ControlNet",
    "lora_embedding": "LoRA of an embedding",
    "oft_(R|diag)|boft": "OFT in another format",
    "ia3_": "(IA)^3 of peft",
    r"\.bm\.": "GLoRA with biases",
    r"lora_\w+\.bias$": "LoRA with biases",
    r"\.modules_to_save\.": "LoRA with fully trained layers",
}
# Pattern in names of layers -> family; only transformers of SDXL have several blocks.
FAMILY_PATTERNS = {
    r"lora_te2_|text_encoder_2\.|add_embedding|_\d_transformer_blocks_[1-9]": SDXL.title,
    r"double_blocks|single_(transformer_)?blocks|^transformer\.|joint_blocks": "Flux or SD 3",
}
# Values of peft's `init_lora_weights` that change the base model before training.
BASE_CHANGING_INITS = ("corda", "loftq", "lora_ga", "olora", "pissa")
ADAPTER_METADATA_KEY = "lora_adapter_metadata"  # of diffusers: JSON of peft's configs


def list_lora_files(path: str | Path) -> list[Path]:
    """Return the file at a path, or those in a folder of diffusers, peft or a training run."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return [path]
    if (last := path / "checkpoints/last.safetensors").is_file():
        return [last]
    for suffix in (".safetensors", ".bin"):
        files = [*path.glob(f"*{suffix}"), *path.glob(f"*/*{suffix}")]
        if files := sorted(file for file in files if file.stem in FOLDER_FILES):
            return files
    raise MissingFile(f"`{path}` contains no `{'` or `'.join(FOLDER_FILES)}`.safetensors", "loras")


def read_layers(file: Checkpoint, aliases: Mapping[str, str]) -> dict[str, LayerTensors]:
    """Return the tensors of a file by kohya's name of the layer, then by role: "down", "up" ….

    Layers of rank 0 are left out.

    Args:
        aliases: Other name of a layer -> kohya's, from `map_aliases`; unknown names are kept.
    Raises:
        FileFormatError: The file is not a LoRA, of an unsupported type, incomplete or not finite.
    """
    layers: dict[str, LayerTensors] = {}
    under_original_names: dict[str, LayerTensors] = {}
    unknown = []
    # In a peft folder, the folder of a file has the name of the component, and layers do not.
    prefix = "text_encoder_2." if file.path.parent.name == "text_encoder_2" else ""
    for key, value in file.state_dict.items():
        match = LORA_KEY.fullmatch(key)
        if match is None and f"{key.removesuffix('.weight')}.on_input" in file.state_dict:
            match = IA3_KEY.fullmatch(key)
        if match is not None:
            name = aliases.get(normalize_layer_name(prefix + match[1]), match[1])
            role = match[match.lastindex or 0]  # group 2 or 3
            group = under_original_names if ORIGINAL_BLOCKS.search(match[1]) else layers
            group.setdefault(name, {})[ROLE_ALIASES.get(role, role)] = value
        elif not key.startswith(BUNDLE_PREFIX):
            unknown.append(key)
    if duplicates := under_original_names.keys() & layers.keys():
        message = "`%s` has %d layers twice: their tensors under original names are ignored"
        log.warning(message, file.path, len(duplicates))
    layers = under_original_names | layers
    _check_keys(file, layers, unknown)
    _check_layers(file.path, layers)
    rank_0 = [name for name, tensors in layers.items() if find_rank(tensors) == 0]
    if rank_0:
        log.info("`%s`: %d layers have rank 0 and change nothing", file.path, len(rank_0))
    return {name: tensors for name, tensors in layers.items() if name not in rank_0}


def add_alphas(
    layers: Mapping[str, LayerTensors], file: Checkpoint, targets: Mapping[str, TargetLayer]
) -> None:
    """Add the missing alpha of layers, from the metadata of diffusers or the config of peft.

    Raises:
        FileFormatError: Metadata or config are damaged, or peft changed the base model.
    """
    path = file.path.with_name("adapter_config.json")
    has_metadata = ADAPTER_METADATA_KEY in file.metadata
    content = read_json(path) if not has_metadata and path.is_file() else {}
    try:
        configs: dict[str, JsonObject] = {"": content}  # by component: "unet.", "text_encoder."
        for key, value in json.loads(file.metadata.get(ADAPTER_METADATA_KEY, "{}")).items():
            component, dot, name = key.partition(".")
            configs.setdefault(component + dot, {})[name] = value
        for component, config in configs.items():
            _check_initialization(file.path, config)
            for kohya_name, tensors in layers.items():
                target = targets.get(kohya_name)
                name = target.diffusers_name if target else kohya_name
                if name.startswith(component) and "alpha" not in tensors:
                    _add_alpha(tensors, config, name.partition(".")[2])
    except (AttributeError, TypeError, ValueError, re.error) as error:
        if isinstance(error, FileFormatError):
            raise
        message = f"`{file.path}`: alpha in its metadata or `{path.name}` is damaged: {error}"
        raise FileFormatError(message) from error


def _check_initialization(path: Path, config: JsonMapping) -> None:
    """Raise FileFormatError if peft subtracted the initial LoRA from the base model."""
    initialization = str(config.get("init_lora_weights")).lower()
    if initialization.startswith(BASE_CHANGING_INITS):
        raise FileFormatError(
            f"`{path}` is of an unsupported type: LoRA from `{initialization}`, which also changes "
            "the base model: save it with peft's `path_initial_model_for_weight_conversion`"
        )


def _add_alpha(tensors: LayerTensors, config: JsonMapping, name: str) -> None:
    """Add the alpha of one layer; `name` is matched with peft's patterns."""
    alpha = _match_pattern(
        config, "alpha_pattern", name, config.get("lora_alpha", config.get("alpha"))
    )
    rank = find_rank(tensors)
    if alpha is None:
        return
    if rank is not None:
        # rsLoRA scales by alpha / sqrt(rank).
        factor = rank**0.5 if config.get("use_rslora") else 1
        tensors["alpha"] = torch.tensor(float(alpha) * factor)
    elif "lokr_w1" in tensors:  # two full matrices: peft scales their product, LyCORIS does not
        rank_in_config = _match_pattern(config, "rank_pattern", name, config.get("r"))
        tensors["lokr_w1"] = tensors["lokr_w1"].float() * (float(alpha) / float(rank_in_config))


def _match_pattern(config: JsonMapping, key: str, name: str, default: Any) -> Any:
    """Return the value of the first pattern under a key that matches the end of a name, as peft."""
    patterns = (config.get(key) or {}).items()
    matching = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matching, default)


def find_ranks(file: Checkpoint) -> set[int]:
    """Return the ranks of the layers of a plain LoRA."""
    matches = ((LORA_KEY.fullmatch(name), value) for name, value in file.state_dict.items())
    return {len(value) for match, value in matches if match and match[2] in DOWN_NAMES}


def guess_family_of_lora(path: str | Path) -> str | None:
    """Return the title of the family that a LoRA was trained for; None if it is not recognized."""
    layers: dict[str, LayerTensors] = {}
    for file in list_lora_files(path):
        layers |= read_layers(read_checkpoint(file), {})
    return guess_family_of_layers(layers)


def guess_family_of_layers(layers: Mapping[str, LayerTensors]) -> str | None:
    """Return the title of a family by the context dimension, else by the names of the layers."""
    for name, tensors in layers.items():
        matrices = (value for role, value in tensors.items() if role in INPUT_ROLES)
        context_dim = next((value.shape[1] for value in matrices if value.dim() > 1), None)
        if normalize_layer_name(name).endswith("attn2_to_k") and context_dim in BASE_MODELS:
            return BASE_MODELS[context_dim].title
    names = "\n".join(n for name in layers for n in (name, normalize_layer_name(name)))
    matches = (f for pattern, f in FAMILY_PATTERNS.items() if re.search(pattern, names, re.M))
    return next(matches, None)


def read_bundled_embeddings(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of textual inversions in a LoRA file or folder, by name in the file."""
    files = map(read_checkpoint, list_lora_files(path))
    return {
        k: v for file in files for k, v in file.state_dict.items() if k.startswith(BUNDLE_PREFIX)
    }


def compute_a1111_hash(path: Path) -> str:
    """Return A1111's hash of a LoRA: 12 hex digits of the SHA-256 of its tensors, or of its .pt."""
    digest = read_checkpoint(path).metadata.get("sshs_model_hash")
    if not digest and path.suffix == ".safetensors":
        with path.open("rb") as file:
            file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
            digest = hashlib.sha256(file.read()).hexdigest()
    return str(digest or get_sha256(path))[:12]


def write_lora(
    lora: LoRA,
    path: str | Path,
    model: LatentDiffusion,
    lora_format: Literal["kohya", "diffusers"] = "kohya",
    metadata: Mapping[str, str | int] | None = None,
    other_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a LoRA file, with its base model in the metadata, but without its strength.

    Args:
        lora_format: "kohya" opens in A1111, ComfyUI and diffusers. "diffusers" folds alpha / rank
            into `up`, as not every version of diffusers reads alpha.
        metadata: Additional metadata; None = no additions.
        other_tensors: Tensors besides the layers, by name in the file; None = no others.
    """
    entries: dict[str, str | int] = {}
    if lora_format == "kohya":
        state = {name: value.detach().cpu() for name, value in lora.state_dict().items()}
        entries = _make_kohya_metadata(lora, model)
    else:
        names = {layer.kohya_name: layer.diffusers_name for layer in list_lora_targets(model)}
        state = {}
        for name, layer in lora.layers.items():
            scaling = float(layer.alpha) / layer.rank
            up = layer.lora_up.weight.detach().cpu()
            state[f"{names[name]}.lora_A.weight"] = layer.lora_down.weight.detach().cpu()
            state[f"{names[name]}.lora_B.weight"] = up * scaling if scaling != 1 else up
    state |= other_tensors or {}
    entries |= metadata or {}
    write_checkpoint(path, state, make_modelspec(model, Path(path).stem, "lora", entries))


def _make_kohya_metadata(lora: LoRA, model: LatentDiffusion) -> dict[str, str | int]:
    """Return the metadata of a LoRA that kohya's scripts read."""
    entries: dict[str, str | int] = {"ss_network_module": "networks.lora"}
    rank_alphas = {(layer.rank, float(layer.alpha)) for layer in lora.layers.values()}
    if rank_alphas:
        rank, alpha = rank_alphas.pop()
        varies = bool(rank_alphas)
        entries["ss_network_dim"] = "Dynamic" if varies else rank
        entries["ss_network_alpha"] = "Dynamic" if varies else str(alpha)
    if base := find_base_model(model):
        entries["ss_base_model_version"] = base.version
    return entries


def _check_keys(file: Checkpoint, layers: Mapping[str, LayerTensors], unknown: list[str]) -> None:
    """Raise FileFormatError for a file without layers, or with keys that are not recognized."""
    for pattern, title in UNSUPPORTED_TYPES.items():
        if any(re.search(pattern, key) for key in unknown):
            raise FileFormatError(f"`{file.path}` is of an unsupported type: {title}")
    if not (unknown or layers):
        raise FileFormatError(f"`{file.path}` has no LoRA layers")
    if unknown:
        examples = ", ".join(f"`{key}`" for key in unknown[:3])
        problem = "is an unsupported type of LoRA" if layers else "is not a LoRA file"
        verb = "is" if len(unknown) == 1 else "are"
        count = f"{len(unknown)} of its {len(file.state_dict)} keys {verb}"
        raise FileFormatError(f"`{file.path}` {problem}: {count} not recognized: {examples}")


def _check_layers(path: Path, layers: Mapping[str, LayerTensors]) -> None:
    """Raise FileFormatError for layers that are incomplete, not finite, or quantized."""
    incomplete = [name for name, tensors in layers.items() if not _is_complete_layer(tensors)]
    if incomplete:
        roles = ", ".join(f"`{role}`" for role in layers[incomplete[0]])
        count = "1 layer is" if len(incomplete) == 1 else f"{len(incomplete)} layers are"
        message = f"{count} incomplete: `{incomplete[0]}` has only {roles}"
        raise FileFormatError(f"`{path}`: {message}")
    invalid = [
        name
        for name, tensors in layers.items()
        if not all(value.float().isfinite().all() for value in tensors.values())
    ]
    if invalid:
        message = f"NaN or infinity in {len(invalid)} of its {len(layers)} layers: `{invalid[0]}`"
        raise FileFormatError(f"`{path}`: {message}")
    for name, tensors in layers.items():
        for role, value in tensors.items():
            if role not in ("alpha", "on_input") and not value.is_floating_point():
                message = f"`{name}` is of {value.dtype}: quantized LoRAs are not supported"
                raise FileFormatError(f"`{path}`: {message}")


def _is_complete_layer(tensors: LayerTensors) -> bool:
    weight_roles = tensors.keys() - {"alpha", "on_input", *BIAS_ROLES}
    return is_adapter(weight_roles) if weight_roles else not tensors.keys().isdisjoint(BIAS_ROLES)
