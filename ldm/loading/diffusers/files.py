"""Read a diffusers folder as if it were a checkpoint, and split a checkpoint into one.

Beside what diffusers knows there is `original.safetensors`: the tensors that it has no place for
(the last block of OpenCLIP's text tower, projections, tables), under their original names, with the
YAML in its metadata. diffusers ignores it; with it the way back is lossless. Without it tensors
that no computation uses are zeros, and tables are computed.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.encoders.image import ImageEmbedding
from ldm.encoders.towers import VOCAB
from ldm.loading.build import add_unused_weights, build_on_meta, check_weights
from ldm.loading.config import format_yaml, parse_yaml
from ldm.loading.diffusers.index import INDEX, NORMALIZER, Files, folder_configs, original_config
from ldm.loading.diffusers.keys import (
    VAE_OLD,
    gather_weights,
    locate_weights,
    scatter_weights,
)
from ldm.loading.files.checkpoint import EMBEDDED, Checkpoint, read_checkpoint
from ldm.loading.files.clip_statistics import load_clip_statistics
from ldm.loading.legacy import (
    DERIVED,
    rename_weights,
    restore_names,
    schedule_tables,
    translate_config,
)
from ldm.model import LatentDiffusion
from ldm.runtime.errors import FileFormatError, MissingFile
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "REST", "build_folder", "is_diffusers_folder", "read_folder", "weights_path", "write_texts",
]  # fmt: skip

log = logging.getLogger(__name__)

REST = "original.safetensors"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of diffusers, of transformers
TRANSFORMERS = ("text_encoder", "image_encoder", "depth_estimator")  # components of transformers
# Of a compact vocabulary: the ids in CLIP's, and the rows of the embedding.
TOKEN_IDS = "conditioner.text.token_ids"
TOKEN_TABLE = "conditioner.text.model.token_embedding.weight"
TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"
UNUSED = ("position_ids", "text_projection.weight", "logit_scale")  # in files of older versions
MAX_JSON = 1 << 24  # bytes

Components = dict[str, dict[str, Tensor]]


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether it is the folder of a pipeline, or of an autoencoder alone."""
    path = Path(path).expanduser()
    if (path / INDEX).is_file():
        return True
    config = path / "config.json"
    return config.is_file() and _read_json(config).get("_class_name") == "AutoencoderKL"


def read_folder(path: str | Path, variant: str | None = None) -> Checkpoint:
    """The weights of a folder under the original's names, and their config in the metadata.

    Args:
        variant: which of several files (`fp16`); None is the plain one, or the only one there is.
    """
    path = Path(path).expanduser()
    candidates = [*sorted(path.glob("*/*.json")), path / INDEX, path / "config.json"]
    files = {str(f.relative_to(path)): _read_json(f) for f in candidates if f.is_file()}
    rest = _read_rest(path, files)
    raw = parse_yaml(rest.metadata[EMBEDDED], where=REST) if rest else original_config(files)
    derived = _derived_tensors(rest.state) if rest else {}
    state = rename_weights(rest.state) if rest else {}
    model, _ = _build_model(raw, path.name, derived)
    model_state, components = model.state_dict(), locate_weights(model)
    for component, locations in components.items():
        folder = path / component if INDEX in files else path
        theirs = _modern_names(component, _read_component(folder, variant))
        if component == "text_encoder" and TOKEN_IDS in state:
            theirs[TOKEN_EMBEDDING] = _compact_rows(
                theirs[TOKEN_EMBEDDING], state[TOKEN_IDS], state[TOKEN_TABLE]
            )
        expected = {name for location in locations.values() for name in location.names}
        if unexpected := theirs.keys() - expected:
            message = f"{len(unexpected)} unexpected tensors: `{min(unexpected)}` …"
            raise FileFormatError(f"`{folder}`: {message}")
        state |= gather_weights(locations, theirs, model_state)
    located = [name for locations in components.values() for name in locations]
    dtype = next((state[name].dtype for name in located if name in state), None)
    for name in model_state.keys() - located - state.keys():
        value = model_state[name]
        state[name] = torch.zeros(value.shape, dtype=dtype) if value.is_meta else value
    check_weights(model_state, state, f"`{path}` does not fit its own configs")
    tables = model.schedule.buffers() if isinstance(model, LatentDiffusion) else {}
    if NORMALIZER in files:
        tables |= _statistics(_read_component((path / NORMALIZER).parent, variant))
    return Checkpoint(
        path=path,
        kind="diffusers",
        state=restore_names({name: state[name] for name in model_state}, tables | derived),
        step=rest.step if rest else None,
        mapped=True,
        metadata=(rest.metadata if rest else {}) | {EMBEDDED: format_yaml(raw)},
    )


def build_folder(
    file: Checkpoint, raw: JsonMapping, clip_stats: str | Path | None = None
) -> tuple[Files, Components]:
    """The content of the folder of a checkpoint: JSONs and texts by path, tensors by component.

    Tensors that diffusers has no place for are in component "", under the original's names. `raw`
    is the config of the file.
    """
    derived = _derived_tensors(file.state)
    model, spec = _build_model(raw, "config", derived)
    model_state, state = model.state_dict(), rename_weights(file.state)
    if not isinstance(model, LatentDiffusion):  # a part, perhaps out of a whole
        bare = {name.removeprefix("autoencoder."): value for name, value in state.items()}
        state = {name: bare[name] for name in model_state if name in bare}
    add_unused_weights(model, state, file.path)
    check_weights(model_state, state, f"`{file.path}` does not fit its config")
    files = folder_configs(model, spec)
    rest, components = dict(state), {}
    for component, locations in locate_weights(model).items():
        components[component] = scatter_weights(locations, state)
        rest = {name: value for name, value in rest.items() if name not in locations}
    if TOKEN_IDS in state:
        text = components["text_encoder"]
        text[TOKEN_EMBEDDING] = _all_rows(text[TOKEN_EMBEDDING], state[TOKEN_IDS])
        rest[TOKEN_TABLE] = state[TOKEN_TABLE]
    if not isinstance(model, LatentDiffusion):
        return files, {**components, "": restore_names(rest)}
    if NORMALIZER in files:
        tables = schedule_tables(file.state)
        load_clip_statistics(model.conditioner, file.path, clip_stats, tables)
        mean, std = model.conditioner.get(ImageEmbedding).noise.get_statistics()
        components[Path(NORMALIZER).parts[0]] = {"mean": mean, "std": std}
    return files, {**components, "": restore_names(rest, derived)}


def weights_path(component: str, files: Files, variant: str | None = None) -> str:
    """Path of a component's weights, in a folder of these files."""
    if not component:
        return REST
    stem = STEMS[1] if component in TRANSFORMERS else STEMS[0]
    name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    return f"{component}/{name}" if INDEX in files else name


def write_texts(folder: Path, files: Files) -> None:
    """Write the JSONs and texts of a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (folder / path).write_text(text, "utf-8")


def _build_model(
    raw: JsonMapping, where: str, derived: Mapping[str, Tensor]
) -> tuple[nn.Module, JsonObject]:
    """(model on the meta device, translated config); `derived` may hold its scale factor."""
    spec = translate_config(raw, where=where, skipped=[])
    model = build_on_meta(spec, where=where)
    if "scale_factor" in derived and isinstance(model, LatentDiffusion):  # measured in training
        model.scale_factor = float(derived["scale_factor"])
    return model, spec


def _derived_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables and markers beside the weights, which are small; not the losses of autoencoders."""
    return {
        name: value
        for name, value in state.items()
        if DERIVED.fullmatch(name) and not re.search(r"(^|\.)loss\.|position_ids$", name)
    }


def _read_rest(path: Path, files: Files) -> Checkpoint | None:
    """The tensors beside the components, if there are any and they belong to this folder."""
    if not (path / REST).is_file():
        return None
    rest = read_checkpoint(path / REST)
    if _has_same_config(rest, files):
        return rest
    log.warning("`%s` is of another model than the folder, and is left out", path / REST)
    return None


def _has_same_config(rest: Checkpoint, files: Files) -> bool:
    """Whether the YAML beside the rest says what the folder's JSONs say."""
    if EMBEDDED not in rest.metadata:
        return False
    raw = parse_yaml(rest.metadata[EMBEDDED], where=REST)
    expected = folder_configs(*_build_model(raw, REST, _derived_tensors(rest.state)))
    for path, content in json.loads(json.dumps(expected)).items():
        if not path.endswith("config.json") or path.startswith("tokenizer"):
            continue
        theirs = files.get(path)
        if theirs is None:
            return False
        if any(theirs.get(k, v) != v for k, v in content.items() if not k.startswith("_")):
            return False
    return True


def _read_component(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """The tensors of a component, in one file or several."""
    for file in filter(Path.is_file, _candidates(folder, variant)):
        if file.suffix != ".json":
            return read_checkpoint(file).state
        names = sorted({Path(name).name for name in _read_json(file)["weight_map"].values()})
        return {k: v for name in names for k, v in read_checkpoint(folder / name).state.items()}
    others = {file.name.split(".")[1] for file in folder.glob("*.*.safetensors")}
    if variant is None and len(others) == 1:
        return _read_component(folder, others.pop())
    what = f"of variant `{variant}`" if variant else f"(variants: {', '.join(others) or 'none'})"
    raise MissingFile(f"no weights {what} in `{folder}`")


def _candidates(folder: Path, variant: str | None) -> Iterator[Path]:
    dot = f".{variant}" if variant else ""
    for ending in (".safetensors", ".bin"):
        for stem in STEMS:
            yield folder / f"{stem}{dot}{ending}"
            yield folder / f"{stem}{ending}.index{dot}.json"


def _modern_names(component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of other versions of diffusers as today's and published files do."""
    renamed = {}
    for name, value in state.items():
        if component == "text_encoder" and "." in name and not name.startswith("text_"):
            name = f"text_model.{name}"
        if component == "vae" and ".attentions." in name:
            for new, old in VAE_OLD.items():
                name = name.replace(f".{old}.", f".{new}.")
        if not name.endswith(UNUSED):
            renamed[name] = value
    return renamed


def _statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean and standard deviation of embeddings, unless they are 0 and 1."""
    if not state["mean"].any() and bool((state["std"] == 1).all()):
        return {}
    return {f"noise_augmentor.data_{key}": state[key].flatten() for key in ("mean", "std")}


def _all_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Expand a compact embedding to CLIP's vocabulary; tokens that it does not have get row 0."""
    rows = torch.zeros(VOCAB, dtype=torch.int64)
    is_token = ids < VOCAB  # the others keep rows free
    rows[ids[is_token]] = torch.arange(1, len(table))[is_token]
    return table[rows]


def _compact_rows(embedding: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Invert `_all_rows`; rows that it left out are those of `table`."""
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
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FileFormatError(f"`{path}` is damaged: {error}") from error
