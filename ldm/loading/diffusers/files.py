"""Read a diffusers folder as a checkpoint, and write a checkpoint as a diffusers folder.

A folder that we write also contains `original.safetensors`: the tensors that diffusers does not
have (the last block of OpenCLIP's text encoder, projections, noise schedule), under their original
names, with the YAML in its metadata. diffusers ignores this file, which makes the conversion back
lossless. Without it unused weights become zeros, and the noise schedule is computed.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.encoders.image import ImageEmbedding
from ldm.encoders.towers import VOCAB_SIZE
from ldm.loading.autoencoders import SCALE_KEY, UPCAST_KEY, find_scale_factor
from ldm.loading.buffers import make_buffers
from ldm.loading.build import build_on_meta
from ldm.loading.config import format_yaml, parse_yaml
from ldm.loading.diffusers.encoders import read_added_tokens
from ldm.loading.diffusers.folder_configs import (
    NORMALIZER_CONFIG,
    FolderFiles,
    make_folder_configs,
    make_original_config,
)
from ldm.loading.diffusers.layout import (
    EXTRA_WEIGHTS,
    MISSING_FILES_REMEDY,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    UNET_CONFIG,
    VAE_CONFIG,
    read_json,
)
from ldm.loading.diffusers.locations import (
    convert_to_diffusers,
    get_component_prefixes,
    locate_weights,
)
from ldm.loading.files.checkpoint import CONFIG_KEY, Checkpoint, read_checkpoint
from ldm.loading.files.clip_statistics import load_clip_statistics
from ldm.loading.legacy import translate_config
from ldm.loading.matching import TOKEN_EMBEDDING, TOKEN_IDS, match_weights
from ldm.loading.modelspec import MODELSPEC_PREFIX
from ldm.loading.variants import SCHEDULER_KEY, detect_variant
from ldm.loading.weight_names import (
    AUXILIARY_TENSORS,
    has_sgm_names,
    rename_weights,
    restore_names,
    select_buffers,
)
from ldm.model import LatentDiffusion
from ldm.runtime.errors import FileFormatError, MissingFile, errors_as
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "PIPELINE_KEY", "get_weights_path", "is_diffusers_folder", "make_folder_contents",
    "read_component_state", "read_folder", "read_folder_config", "read_folder_metadata",
    "read_network_checkpoint", "write_text_files",
]  # fmt: skip

log = logging.getLogger(__name__)

PIPELINE_KEY = "ldm.pipeline"  # metadata key of the pipeline's class name
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"  # of weights files
WEIGHTS_STEMS = (DIFFUSERS_STEM, TRANSFORMERS_STEM, "pytorch_model")  # the last: a .bin
# Names of the JSON files that are read of a component.
CONFIG_NAMES = (
    "config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json",
    "tokenizer.json", "added_tokens.json",
)  # fmt: skip
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TRANSFORMERS_COMPONENTS = (*TOKENIZERS, "image_encoder", "depth_estimator")
TOKEN_EMBEDDING_SUFFIX = "embeddings.token_embedding.weight"
# A weights file, one shard of several, or the index of the shards.
WEIGHTS_FILE = re.compile(
    rf"(?P<stem>{'|'.join(WEIGHTS_STEMS)})(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?"
    r"\.(?P<suffix>safetensors|bin)(?P<index>\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)

Components = dict[str, dict[str, Tensor]]  # weights by component, under diffusers' names


def is_diffusers_folder(path: str | Path) -> bool:
    """Return whether a path is the folder of a pipeline or of an AutoencoderKL."""
    path = Path(path).expanduser()
    if (path / MODEL_INDEX).is_file():
        return True
    config = path / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == "AutoencoderKL"


def read_folder(path: str | Path, file_variant: str | None = None) -> Checkpoint:
    """Return the weights of a folder under the original's names, with config and added tokens.

    Args:
        file_variant: See `read_component_state`; at least one component must have it.
    """
    path = Path(path).expanduser()
    files = _read_configs(path)
    extra_checkpoint = _read_extra_weights(path, files) or Checkpoint(path, "diffusers", {})
    with errors_as(FileFormatError, f"`{path}` has an invalid config"):
        token_ids = {name: read_added_tokens(files, folder) for name, folder in TOKENIZERS.items()}
        if CONFIG_KEY in extra_checkpoint.metadata:
            original_config = parse_yaml(extra_checkpoint.metadata[CONFIG_KEY], where=EXTRA_WEIGHTS)
        else:
            original_config = make_original_config(files, str(path))
    auxiliary_tensors = _select_auxiliary_tensors(extra_checkpoint.state_dict)
    model, _ = _build_model(original_config, path.name, auxiliary_tensors)
    model_state, locations = model.state_dict(), locate_weights(model)
    prefixes = get_component_prefixes(model)
    added_tokens: dict[str, list[Tensor]] = {}
    state = rename_weights(extra_checkpoint.state_dict)
    folders = {name: path / name if MODEL_INDEX in files else path for name in locations}
    if file_variant and not any(
        file_variant in _find_weights_files(folder) for folder in folders.values()
    ):
        message = f"no weights of variant `{file_variant}` in `{path}`: leave out `variant`"
        raise MissingFile(message, "variant")
    for component, folder in folders.items():
        component_state = read_component_state(folder, file_variant)
        if component in TOKENIZERS:
            added = _pop_added_tokens(component_state, token_ids[component])
            for token, vectors in added.items():
                added_tokens.setdefault(token, []).append(vectors)
        if component == "text_encoder" and TOKEN_IDS in state:
            ids, table = state[TOKEN_IDS], state.pop(TOKEN_EMBEDDING)
            for name in component_state:
                if name.endswith(TOKEN_EMBEDDING_SUFFIX):
                    component_state[name] = _compact_vocabulary(component_state[name], ids, table)
        state |= {f"{prefixes[component]}{name}": v for name, v in component_state.items()}
    dtype = next((v.dtype for v in component_state.values() if v.is_floating_point()), None)
    located_names = {name for names in locations.values() for name in names}
    for name in model_state.keys() - located_names - state.keys():
        value = model_state[name]
        state[name] = torch.zeros(value.shape, dtype=dtype) if value.is_meta else value
    state = match_weights(model, state, path, f"`{path}` does not fit its own configs")
    buffers = make_buffers(model) if isinstance(model, LatentDiffusion) else {}
    if NORMALIZER_CONFIG in files:
        folder = (path / NORMALIZER_CONFIG).parent
        with errors_as(FileFormatError, f"`{folder}` has invalid statistics"):
            buffers |= _convert_statistics(read_component_state(folder, file_variant))
    config_text = format_yaml(original_config)
    return Checkpoint(
        path=path,
        format="diffusers",
        state_dict=restore_names(
            {name: state[name] for name in model_state}, buffers | auxiliary_tensors
        ),
        step=extra_checkpoint.step,
        memory_mapped=True,
        metadata=extra_checkpoint.metadata | _collect_metadata(files) | {CONFIG_KEY: config_text},
        added_tokens=added_tokens,
    )


def read_folder_config(path: Path) -> JsonObject:
    """Return the config of a folder, with the original's keys; weights are not read."""
    return make_original_config(_read_configs(path), str(path))


def read_folder_metadata(path: Path) -> tuple[dict[str, str], bool]:
    """Return (metadata of a folder, whether its UNet embeds the guidance scale)."""
    names = (MODEL_INDEX, UNET_CONFIG, VAE_CONFIG, SCHEDULER_CONFIG)
    files = _read_json_files(path, [path / name for name in names])
    return _collect_metadata(files), bool(files.get(UNET_CONFIG, {}).get("time_cond_proj_dim"))


def make_folder_contents(
    checkpoint: Checkpoint, original_config: JsonMapping, clip_stats: str | Path | None = None
) -> tuple[FolderFiles, Components]:
    """Return (text files by path, tensors by component) of a folder to write.

    Tensors that diffusers does not have are in component "", under the original's names.

    Args:
        checkpoint: Weights under the original's names.
        original_config: Config of the weights, with the original's keys.
        clip_stats: See `load_clip_statistics`.
    """
    auxiliary_tensors = _select_auxiliary_tensors(checkpoint.state_dict)
    model, config = _build_model(original_config, "config", auxiliary_tensors)
    state = match_weights(model, rename_weights(checkpoint.state_dict), checkpoint.path)
    variant = detect_variant(checkpoint.path, checkpoint.metadata, state)
    if variant is not None and isinstance(model, LatentDiffusion):
        model.defaults = variant.defaults
    files = make_folder_configs(model, config)
    if not isinstance(model, LatentDiffusion):
        factor, _ = find_scale_factor(checkpoint, None)
        files["config.json"] |= {"scaling_factor": factor} if factor is not None else {}
    remaining_state, components = dict(state), {}
    for component, locations in locate_weights(model).items():
        components[component] = convert_to_diffusers(locations, state)
        remaining_state = {name: v for name, v in remaining_state.items() if name not in locations}
    if TOKEN_IDS in state:
        text_state, name = components["text_encoder"], f"text_model.{TOKEN_EMBEDDING_SUFFIX}"
        text_state[name] = _expand_vocabulary(text_state[name], state[TOKEN_IDS])
        remaining_state[TOKEN_EMBEDDING] = state[TOKEN_EMBEDDING]
    if not isinstance(model, LatentDiffusion):
        return files, {**components, "": restore_names(remaining_state, sgm=False)}
    if NORMALIZER_CONFIG in files:
        buffers = select_buffers(checkpoint.state_dict)
        load_clip_statistics(model.conditioner, checkpoint.path, clip_stats, buffers)
        mean, std = model.conditioner.get(ImageEmbedding).noise.get_statistics()
        components[Path(NORMALIZER_CONFIG).parts[0]] = {"mean": mean, "std": std}
    is_sgm = has_sgm_names(state)
    return files, {**components, "": restore_names(remaining_state, auxiliary_tensors, sgm=is_sgm)}


def get_weights_path(component: str, files: FolderFiles, file_variant: str | None = None) -> str:
    """Return the path of a component's weights in a folder.

    Args:
        component: Name of the component; "" for EXTRA_WEIGHTS.
        files: The text files of the folder.
        file_variant: Variant in the file name, such as `fp16`; None = no variant.
    """
    if not component:
        return EXTRA_WEIGHTS
    stem = TRANSFORMERS_STEM if component in TRANSFORMERS_COMPONENTS else DIFFUSERS_STEM
    name = f"{stem}.{file_variant}.safetensors" if file_variant else f"{stem}.safetensors"
    return f"{component}/{name}" if MODEL_INDEX in files else name


def write_text_files(folder: Path, files: FolderFiles) -> None:
    """Write the JSON and text files of a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            indent = None if path.endswith("vocab.json") else 2  # 49408 lines take half a second
            content = json.dumps(content, indent=indent) + "\n"
        (folder / path).write_text(content, "utf-8")


def _read_configs(path: Path) -> FolderFiles:
    candidates = [file for name in CONFIG_NAMES for file in sorted(path.glob(f"*/{name}"))]
    return _read_json_files(path, [*candidates, path / MODEL_INDEX, path / "config.json"])


def _read_json_files(path: Path, candidates: Iterable[Path]) -> FolderFiles:
    return {f.relative_to(path).as_posix(): read_json(f) for f in candidates if f.is_file()}


def _collect_metadata(files: FolderFiles) -> dict[str, str]:
    """Return metadata from JSON files: class names, prediction type, options of the VAE."""
    vae_config: JsonMapping = files.get(VAE_CONFIG) or files.get("config.json") or {}
    keys = {SCALE_KEY: "scaling_factor", UPCAST_KEY: "force_upcast"}
    options = {k: json.dumps(vae_config[name]) for k, name in keys.items() if name in vae_config}
    scheduler: JsonMapping = files.get(SCHEDULER_CONFIG, {})
    scheduler_class = str(scheduler.get("_class_name", ""))
    metadata = {
        PIPELINE_KEY: files.get(MODEL_INDEX, {}).get("_class_name"),
        SCHEDULER_KEY: scheduler_class,
    }
    if not scheduler_class.startswith("EDM"):  # its "epsilon" means EDM's preconditioning
        metadata[f"{MODELSPEC_PREFIX}prediction_type"] = scheduler.get("prediction_type")
    return options | {key: str(value) for key, value in metadata.items() if value}


def _build_model(
    original_config: JsonMapping, where: str, auxiliary_tensors: Mapping[str, Tensor]
) -> tuple[nn.Module, JsonObject]:
    """Return (model on the meta device, translated config).

    Args:
        auxiliary_tensors: `scale_factor` among them replaces the config's.
    """
    config = translate_config(original_config, where=where, skipped=[])
    model = build_on_meta(config, where=where)
    if "scale_factor" in auxiliary_tensors and isinstance(model, LatentDiffusion):
        model.scale_factor = float(auxiliary_tensors["scale_factor"])
    return model, config


def _select_auxiliary_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all AUXILIARY_TENSORS except losses and position ids."""
    return {
        name: value
        for name, value in state.items()
        if AUXILIARY_TENSORS.fullmatch(name) and not re.search(r"(^|\.)loss\.|position_ids$", name)
    }


def _read_extra_weights(path: Path, files: FolderFiles) -> Checkpoint | None:
    """Return `original.safetensors`, unless it is missing or belongs to another model."""
    if not (path / EXTRA_WEIGHTS).is_file():
        return None
    extra_checkpoint = read_checkpoint(path / EXTRA_WEIGHTS)
    if _has_same_config(extra_checkpoint, files):
        return extra_checkpoint
    log.warning("`%s` is ignored: it belongs to another model", path / EXTRA_WEIGHTS)
    return None


def _has_same_config(extra_checkpoint: Checkpoint, files: FolderFiles) -> bool:
    """Return whether the YAML in `original.safetensors` agrees with the folder's configs."""
    if CONFIG_KEY not in extra_checkpoint.metadata:
        return False
    original_config = parse_yaml(extra_checkpoint.metadata[CONFIG_KEY], where=EXTRA_WEIGHTS)
    auxiliary_tensors = _select_auxiliary_tensors(extra_checkpoint.state_dict)
    expected_files = make_folder_configs(
        *_build_model(original_config, EXTRA_WEIGHTS, auxiliary_tensors)
    )
    for path, config in expected_files.items():
        if not path.endswith("config.json") or path.startswith("tokenizer"):
            continue
        if path not in files:
            return False
        expected = json.loads(json.dumps(config))  # tuples become lists
        keys = (key for key in expected if not key.startswith("_") and key != "vocab_size")
        if any(files[path].get(key, expected[key]) != expected[key] for key in keys):
            return False
    return True


def read_component_state(folder: Path, file_variant: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a component, from one file or several shards.

    Args:
        file_variant: Variant in the file names, such as `fp16`. If it is None or the component does
            not have it: files without a variant, else fp16, else any other, `non_ema` last.
    """
    variants = _find_weights_files(folder)
    if not variants:
        listed = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
        raise MissingFile(f"no weights in `{folder}`, only {listed}: {MISSING_FILES_REMEDY}")
    selected = file_variant or ""
    if selected not in variants:
        selected = min(
            variants, key=lambda name: (name != "", name == "non_ema", name != "fp16", name)
        )
        if file_variant is None:
            listed = ", ".join(sorted(variants))
            log.info("`%s` has variants %s, using %s", folder, listed, selected)
        else:
            message = "`%s` has no variant %s, using %s"
            log.warning(message, folder, file_variant, selected or "none")
    best = min(variants[selected], key=_rank_file)
    path = folder / best.string
    names = [path.name]
    if best["index"]:
        # Without folders: an index that was downloaded must not refer to files elsewhere.
        with errors_as(FileFormatError, f"`{path}` is damaged"):
            names = sorted({Path(name).name for name in read_json(path)["weight_map"].values()})
    elif best["shard"]:
        names = [match.string for match in variants[selected] if match["shard"]]
    return {k: v for name in names for k, v in read_checkpoint(folder / name).state_dict.items()}


def _find_weights_files(folder: Path) -> dict[str, list[re.Match[str]]]:
    """Return the matches of WEIGHTS_FILE in a folder by variant; "" = without a variant."""
    variants: dict[str, list[re.Match[str]]] = {}
    names = sorted(file.name for file in folder.glob("*"))
    for match in filter(None, map(WEIGHTS_FILE.fullmatch, names)):
        variants.setdefault(match["variant"] or match["index_variant"] or "", []).append(match)
    return variants


def _rank_file(match: re.Match[str]) -> tuple[bool, bool, int, bool]:
    """Return a sort key: shards without an index last, safetensors before pickles."""
    is_pickle = match["suffix"] != "safetensors"
    return bool(match["shard"]), is_pickle, WEIGHTS_STEMS.index(match["stem"]), bool(match["index"])


def read_network_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint of one network, from a file or from the folder of a component."""
    if path.is_dir():
        return Checkpoint(path, "diffusers", read_component_state(path), memory_mapped=True)
    return read_checkpoint(path)


def _pop_added_tokens(state: dict[str, Tensor], ids: Mapping[str, int]) -> dict[str, Tensor]:
    """Remove added tokens from a text encoder's table; return their vectors (n, D) by token."""
    name = next((name for name in state if name.endswith(TOKEN_EMBEDDING_SUFFIX)), None)
    if name is None or len(state[name]) <= VOCAB_SIZE:
        return {}
    table = state[name]
    state[name] = table[:VOCAB_SIZE]
    rows = {token: table[i] for token, i in ids.items() if VOCAB_SIZE <= i < len(table)}
    if not rows:
        log.warning("`%s` has %d rows without a token: left out", name, len(table) - VOCAB_SIZE)
    vectors = {}
    for token in rows:  # `<cat>`, `<cat>_1`, `<cat>_2` are the vectors of one token
        numbered_tokens = takewhile(rows.__contains__, (f"{token}_{i}" for i in count(1)))
        vectors[token] = torch.stack([rows[name] for name in (token, *numbered_tokens)])
    return vectors


def _convert_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return mean and standard deviation of CLIP's embeddings as buffers; {} if 0 and 1."""
    if not state["mean"].any() and bool((state["std"] == 1).all()):
        return {}
    return {f"noise_augmentor.data_{key}": state[key].flatten() for key in ("mean", "std")}


def _expand_vocabulary(table: Tensor, ids: Tensor) -> Tensor:
    """Expand the token embedding of a compact vocabulary to CLIP's vocabulary.

    Args:
        table: (n + 1, D); row 0 is for all tokens that are not in the compact vocabulary.
        ids: (n,) ids in CLIP's vocabulary of the other rows; VOCAB_SIZE or more = an unused row.
    Returns:
        (VOCAB_SIZE, D).
    """
    rows = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    is_used = ids < VOCAB_SIZE
    rows[ids[is_used]] = torch.arange(1, len(table))[is_used]
    return table[rows]


def _compact_vocabulary(embedding: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Invert `_expand_vocabulary`; `table` (n + 1, D) has the values of unused rows."""
    is_used, is_unused = ids < VOCAB_SIZE, torch.ones(VOCAB_SIZE, dtype=torch.bool)
    is_unused[ids[is_used]] = False
    compact = table.clone()
    compact[0] = embedding[is_unused.nonzero()[0, 0]]
    compact[1:][is_used] = embedding[ids[is_used]]
    return compact
