"""Read a diffusers folder as a checkpoint, and write a checkpoint as a diffusers folder.

A folder that we write also contains `original.safetensors`: the tensors that diffusers does not
have (the last block of OpenCLIP's text encoder, projections, noise schedule), under their original
names, with the YAML in its metadata. diffusers ignores it; with it the conversion back is lossless.
Without it unused weights become zeros, and the noise schedule is computed.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.encoders.image import ImageEmbedding
from ldm.encoders.towers import VOCAB
from ldm.loading.autoencoders import SCALE_KEY, UPCAST_KEY, find_scale
from ldm.loading.buffers import make_buffers
from ldm.loading.build import build_on_meta
from ldm.loading.config import format_yaml, parse_yaml
from ldm.loading.diffusers.encoders import added_tokens
from ldm.loading.diffusers.index import NORMALIZER, Files, folder_configs, original_config
from ldm.loading.diffusers.keys import component_prefixes, locate_weights, scatter_weights
from ldm.loading.diffusers.layout import INDEX, SCHEDULER, UNET, VAE, WHOLE
from ldm.loading.files.checkpoint import CONFIG_KEY, Checkpoint, read_checkpoint
from ldm.loading.files.clip_statistics import load_clip_statistics
from ldm.loading.legacy import translate_config
from ldm.loading.matching import TOKEN_IDS, TOKEN_TABLE, match_weights
from ldm.loading.modelspec import PREFIX
from ldm.loading.variants import SCHEDULER_KEY
from ldm.loading.weight_names import (
    DERIVED_WEIGHTS,
    has_engine_names,
    rename_weights,
    restore_names,
    select_buffers,
)
from ldm.model import LatentDiffusion
from ldm.runtime.errors import FileFormatError, MissingFile
from ldm.runtime.files import read_text
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "EXTRA_WEIGHTS", "PIPELINE_KEY", "build_folder", "is_diffusers_folder", "read_component",
    "read_folder", "read_folder_metadata", "weights_path", "write_texts",
]  # fmt: skip

log = logging.getLogger(__name__)

EXTRA_WEIGHTS = "original.safetensors"
PIPELINE_KEY = "ldm.pipeline"  # in the metadata: the class of a folder's pipeline
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of diffusers, of transformers
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TRANSFORMERS = (*TOKENIZERS, "image_encoder", "depth_estimator")  # classes of transformers
TOKEN_EMBEDDING = "embeddings.token_embedding.weight"
# The variant in the name of a file of weights, or of the index of several.
VARIANT = re.compile(
    rf"(?:{'|'.join(STEMS)})(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?"
    r"\.(?:safetensors|bin)(?:\.index(?:\.(?P<after>\w+))?\.json)?"
)
MAX_JSON = 1 << 24  # bytes

Components = dict[str, dict[str, Tensor]]


def is_diffusers_folder(path: str | Path) -> bool:
    """Return whether a path is the folder of a pipeline, or of an autoencoder only."""
    path = Path(path).expanduser()
    if (path / INDEX).is_file():
        return True
    config = path / "config.json"
    return config.is_file() and _read_json(config).get("_class_name") == "AutoencoderKL"


def read_folder(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Return the weights of a folder under the original's names, with config and added tokens.

    Args:
        variant: variant in the file names, such as `fp16`; None = files without one, else the only
            or the most precise variant.
    """
    path = Path(path).expanduser()
    candidates = [*sorted(path.glob("*/*.json")), path / INDEX, path / "config.json"]
    files = _read_files(path, candidates)
    rest = _read_rest(path, files)
    raw = (
        parse_yaml(rest.metadata[CONFIG_KEY], where=EXTRA_WEIGHTS)
        if rest
        else original_config(files, str(path))
    )
    derived = _derived_tensors(rest.state) if rest else {}
    model, _ = _build_model(raw, path.name, derived)
    model_state, located = model.state_dict(), locate_weights(model)
    added: dict[str, list[Tensor]] = {}
    state = rename_weights(rest.state) if rest else {}
    for component in located:
        theirs = read_component(path / component if INDEX in files else path, variant)
        if component in TOKENIZERS:
            ids_by_token = added_tokens(files, TOKENIZERS[component])
            for token, vectors in _pop_added_tokens(theirs, ids_by_token).items():
                added.setdefault(token, []).append(vectors)
        if component == "text_encoder" and TOKEN_IDS in state:
            name = next(name for name in theirs if name.endswith(TOKEN_EMBEDDING))
            ids, table = state[TOKEN_IDS], state[TOKEN_TABLE]
            theirs[name] = _compact_rows(theirs[name], ids, table)
            del state[TOKEN_TABLE]
        prefix = component_prefixes(model)[component]
        state |= {f"{prefix}{name}": value for name, value in theirs.items()}
    dtype = next((value.dtype for value in theirs.values() if value.is_floating_point()), None)
    known = {name for locations in located.values() for name in locations}
    for name in model_state.keys() - known - state.keys():
        value = model_state[name]
        state[name] = torch.zeros(value.shape, dtype=dtype) if value.is_meta else value
    state = match_weights(model, state, path, f"`{path}` does not fit its own configs")
    buffers = make_buffers(model) if isinstance(model, LatentDiffusion) else {}
    if NORMALIZER in files:
        buffers |= _statistics(read_component((path / NORMALIZER).parent, variant))
    return Checkpoint(
        path=path,
        kind="diffusers",
        state=restore_names({name: state[name] for name in model_state}, buffers | derived),
        step=rest.step if rest else None,
        mapped=True,
        metadata=(rest.metadata if rest else {})
        | _metadata(files)
        | {CONFIG_KEY: format_yaml(raw)},
        added_tokens=added,
    )


def read_folder_metadata(path: Path) -> tuple[dict[str, str], bool]:
    """Return the metadata of a folder, and whether its UNet embeds the guidance scale."""
    files = _read_files(path, [path / name for name in (INDEX, UNET, VAE, SCHEDULER)])
    return _metadata(files), bool(files.get(UNET, {}).get("time_cond_proj_dim"))


def build_folder(
    file: Checkpoint, raw: JsonMapping, clip_stats: str | Path | None = None
) -> tuple[Files, Components]:
    """Return the content of a folder: JSONs and texts by path, tensors by component.

    Tensors that diffusers does not have are in component "", under the original's names.

    Args:
        raw: config of the file.
        clip_stats: see `load_clip_statistics`.
    """
    derived = _derived_tensors(file.state)
    model, spec = _build_model(raw, "config", derived)
    state = match_weights(model, rename_weights(file.state), file.path)
    files = folder_configs(model, spec)
    if not isinstance(model, LatentDiffusion):
        scale, _ = find_scale(file, None)
        files["config.json"] |= {"scaling_factor": scale} if scale is not None else {}
    rest, components = dict(state), {}
    for component, locations in locate_weights(model).items():
        components[component] = scatter_weights(locations, state)
        rest = {name: value for name, value in rest.items() if name not in locations}
    if TOKEN_IDS in state:
        text, name = components["text_encoder"], f"text_model.{TOKEN_EMBEDDING}"
        text[name] = _all_rows(text[name], state[TOKEN_IDS])
        rest[TOKEN_TABLE] = state[TOKEN_TABLE]
    if not isinstance(model, LatentDiffusion):
        return files, {**components, "": restore_names(rest, engine=False)}
    if NORMALIZER in files:
        buffers = select_buffers(file.state)
        load_clip_statistics(model.conditioner, file.path, clip_stats, buffers)
        mean, std = model.conditioner.get(ImageEmbedding).noise.get_statistics()
        components[Path(NORMALIZER).parts[0]] = {"mean": mean, "std": std}
    engine = has_engine_names(state)
    return files, {**components, "": restore_names(rest, derived, engine=engine)}


def weights_path(component: str, files: Files, variant: str | None = None) -> str:
    """Return the path of a component's weights in a folder."""
    if not component:
        return EXTRA_WEIGHTS
    stem = STEMS[1] if component in TRANSFORMERS else STEMS[0]
    name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    return f"{component}/{name}" if INDEX in files else name


def write_texts(folder: Path, files: Files) -> None:
    """Write the JSONs and texts of a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            indent = None if path.endswith("vocab.json") else 2  # 49408 lines take half a second
            content = json.dumps(content, indent=indent) + "\n"
        (folder / path).write_text(content, "utf-8")


def _read_files(path: Path, candidates: Iterable[Path]) -> Files:
    return {f.relative_to(path).as_posix(): _read_json(f) for f in candidates if f.is_file()}


def _metadata(files: Files) -> dict[str, str]:
    """Return what metadata keep of a folder's JSONs: classes, prediction, numbers of the VAE."""
    pipeline = files.get(INDEX, {}).get("_class_name")
    config: JsonMapping = files.get(VAE) or files.get("config.json") or {}
    keys = {SCALE_KEY: "scaling_factor", UPCAST_KEY: "force_upcast"}
    numbers = {key: json.dumps(config[name]) for key, name in keys.items() if name in config}
    scheduler: JsonMapping = files.get(SCHEDULER, {})
    kind = scheduler.get("_class_name", "")
    texts = {PIPELINE_KEY: pipeline, SCHEDULER_KEY: kind}
    if not kind.startswith("EDM"):  # whose `epsilon` is another
        texts[f"{PREFIX}prediction_type"] = scheduler.get("prediction_type")
    return numbers | {key: str(text) for key, text in texts.items() if text}


def _build_model(
    raw: JsonMapping, where: str, derived: Mapping[str, Tensor]
) -> tuple[nn.Module, JsonObject]:
    """Return (model on the meta device, translated config); `derived` may hold its scale factor."""
    spec = translate_config(raw, where=where, skipped=[])
    model = build_on_meta(spec, where=where)
    if "scale_factor" in derived and isinstance(model, LatentDiffusion):  # measured in training
        model.scale_factor = float(derived["scale_factor"])
    return model, spec


def _derived_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return buffers and markers, without the losses of autoencoders."""
    return {
        name: value
        for name, value in state.items()
        if DERIVED_WEIGHTS.fullmatch(name) and not re.search(r"(^|\.)loss\.|position_ids$", name)
    }


def _read_rest(path: Path, files: Files) -> Checkpoint | None:
    """Return `original.safetensors`, unless it is missing or belongs to another model."""
    if not (path / EXTRA_WEIGHTS).is_file():
        return None
    rest = read_checkpoint(path / EXTRA_WEIGHTS)
    if _has_same_config(rest, files):
        return rest
    log.warning("`%s` is of another model than the folder, and is left out", path / EXTRA_WEIGHTS)
    return None


def _has_same_config(rest: Checkpoint, files: Files) -> bool:
    """Return whether the YAML in `original.safetensors` agrees with the folder's JSONs."""
    if CONFIG_KEY not in rest.metadata:
        return False
    raw = parse_yaml(rest.metadata[CONFIG_KEY], where=EXTRA_WEIGHTS)
    expected = folder_configs(*_build_model(raw, EXTRA_WEIGHTS, _derived_tensors(rest.state)))
    for path, config in expected.items():
        if not path.endswith("config.json") or path.startswith("tokenizer"):
            continue
        content, theirs = json.loads(json.dumps(config)), files.get(path)
        if theirs is None:
            return False
        keys = (key for key in content if not key.startswith("_") and key != "vocab_size")
        if any(theirs.get(key, content[key]) != content[key] for key in keys):
            return False
    return True


def read_component(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """Return the tensors of a component, from one file or several shards.

    Raises:
        MissingFile: there are no weights of the variant.
    """
    for file in filter(Path.is_file, _candidates(folder, variant)):
        if file.suffix != ".json":
            return read_checkpoint(file).state
        names = sorted({Path(name).name for name in _read_json(file)["weight_map"].values()})
        return {k: v for name in names for k, v in read_checkpoint(folder / name).state.items()}
    names = sorted(file.name for file in folder.glob("*"))
    matches = [match for match in map(VARIANT.fullmatch, names) if match]
    shards = [m[0] for m in matches if m["shard"] and m["variant"] == variant]
    if shards:  # without their index
        return {k: v for name in shards for k, v in read_checkpoint(folder / name).state.items()}
    others = {m["variant"] or m["after"] for m in matches} - {None}
    if variant is None and others:
        choice = min(others, key=lambda name: (name == "non_ema", name != "fp16", name))
        log.info("`%s` has variants %s, using %s", folder, ", ".join(sorted(others)), choice)
        return read_component(folder, choice)
    what = f" of variant `{variant}`" if variant else ""
    remedy = "leave out `variant`" if variant and others | {m[0] for m in matches} else WHOLE
    listed = ", ".join(names) or "nothing"
    raise MissingFile(f"no weights{what} in `{folder}`, only {listed}: {remedy}")


def _candidates(folder: Path, variant: str | None) -> Iterator[Path]:
    dot = f".{variant}" if variant else ""
    for ending in (".safetensors", ".bin"):
        for stem in STEMS:
            yield folder / f"{stem}{dot}{ending}"
            yield folder / f"{stem}{ending}.index{dot}.json"
            yield folder / f"{stem}{dot}{ending}.index.json"


def _pop_added_tokens(state: dict[str, Tensor], ids: Mapping[str, int]) -> dict[str, Tensor]:
    """Remove the rows of added tokens from a text encoder; return vectors (n, D) by token."""
    name = next((name for name in state if name.endswith(TOKEN_EMBEDDING)), None)
    if name is None or len(state[name]) <= VOCAB:
        return {}
    table = state[name]
    state[name] = table[:VOCAB]
    rows = {token: table[i] for token, i in ids.items() if VOCAB <= i < len(table)}
    if not rows:
        log.warning("`%s` has %d rows without a token: left out", name, len(table) - VOCAB)
    vectors = {}
    for token in rows:  # `<cat>`, `<cat>_1`, `<cat>_2` are the vectors of one token
        group = takewhile(rows.__contains__, (f"{token}_{i}" for i in count(1)))
        vectors[token] = torch.stack([rows[token], *(rows[other] for other in group)])
    return vectors


def _statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean and standard deviation of embeddings, unless they are 0 and 1."""
    if not state["mean"].any() and bool((state["std"] == 1).all()):
        return {}
    return {f"noise_augmentor.data_{key}": state[key].flatten() for key in ("mean", "std")}


def _all_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Expand a compact token embedding to CLIP's vocabulary; missing tokens get row 0."""
    rows = torch.zeros(VOCAB, dtype=torch.int64)
    is_token = ids < VOCAB  # the others are unused rows
    rows[ids[is_token]] = torch.arange(1, len(table))[is_token]
    return table[rows]


def _compact_rows(embedding: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Invert `_all_rows`; unused rows are taken from `table`."""
    is_token, is_free = ids < VOCAB, torch.ones(VOCAB, dtype=torch.bool)
    is_free[ids[is_token]] = False
    compact = table.clone()
    compact[0] = embedding[is_free.nonzero()[0, 0]]
    compact[1:][is_token] = embedding[ids[is_token]]
    return compact


def _read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON:
        raise FileFormatError(f"`{path}`: {path.stat().st_size} bytes are too much for a config")
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise FileFormatError(f"`{path}` is damaged: {error}") from error
