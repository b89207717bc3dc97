"""A diffusers folder on disk: read as if it were a checkpoint, and written.

Beside what diffusers knows there is `original.safetensors`: the tensors that it has no place for
(the last block of OpenCLIP's text tower, projections, tables), under their original names, with the
YAML in its metadata. diffusers does not look at it, and with it the way back loses nothing. Without
it a folder is completed: what no computation uses is zero, tables are computed.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.encoders.image import ImageEmbedding
from ldm.encoders.towers import VOCAB
from ldm.loading import legacy
from ldm.loading.build import add_unused_weights, build_on_meta, check_weights
from ldm.loading.config import format_yaml, parse_yaml
from ldm.loading.diffusers.index import INDEX, folder_configs, original_config
from ldm.loading.diffusers.keys import (
    VAE_OLD,
    Location,
    gather_weights,
    locate_weights,
    scatter_weights,
)
from ldm.loading.files.checkpoint import EMBEDDED, Checkpoint, read_checkpoint
from ldm.loading.files.clip_statistics import load_clip_statistics
from ldm.loading.legacy import rename_weights, restore_names, schedule_tables, translate_config
from ldm.model import LatentDiffusion

__all__ = [
    "REST",
    "build_folder",
    "is_diffusers_folder",
    "read_folder",
    "weights_path",
    "write_texts",
]

log = logging.getLogger(__name__)

REST = "original.safetensors"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of diffusers, of transformers
OF_TRANSFORMERS = ("text_encoder", "image_encoder", "depth_estimator")
NORMALIZER = "image_normalizer"
ROWS, TABLE = "conditioner.text.token_ids", "conditioner.text.model.token_embedding.weight"
EMBEDDING = "text_model.embeddings.token_embedding.weight"
UNUSED = ("position_ids", "text_projection.weight", "logit_scale")  # in files of older versions
MAX_JSON = 1 << 24  # bytes

Components = dict[str, dict[str, Tensor]]
Files = dict[str, Any]


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether diffusers would take it for a pipeline, or for an autoencoder alone."""
    path = Path(path).expanduser()
    if (path / INDEX).is_file():
        return True
    config = path / "config.json"
    return config.is_file() and _json(config).get("_class_name") == "AutoencoderKL"


def read_folder(path: str | Path, variant: str | None = None) -> Checkpoint:
    """The weights of a folder under the original's names, and their config in the metadata.

        variant: which of several files (`fp16`); None is the plain one, or the only one there is.
    Raises ValueError for a folder that is incomplete, or no family that is known here.
    """
    path = Path(path).expanduser()
    found = [*sorted(path.glob("*/*.json")), path / INDEX, path / "config.json"]
    files = {str(file.relative_to(path)): _json(file) for file in found if file.is_file()}
    rest = read_checkpoint(path / REST) if (path / REST).is_file() else None
    if rest is not None and not _agree(rest, files):
        log.warning("`%s` is of another model than the folder, and is left out", path / REST)
        rest = None
    raw = (
        original_config(files) if rest is None else parse_yaml(rest.metadata[EMBEDDED], where=REST)
    )
    derived = _derived(rest.state) if rest else {}
    model, _ = _model(raw, path.name, derived)
    wanted, homes = model.state_dict(), locate_weights(model)
    state = rename_weights(rest.state) if rest else {}
    for component, mine in _by_component(homes).items():
        home = path / component if INDEX in files else path
        theirs = _words(component, _weights(home, variant))
        if component == "text_encoder" and ROWS in state:
            theirs[EMBEDDING] = _reduced(theirs[EMBEDDING], state[ROWS], state[TABLE])
        foreign = theirs.keys() - {name for place in mine.values() for name in place.names}
        if foreign:
            raise ValueError(f"`{home}`: {len(foreign)} unexpected tensors: `{min(foreign)}` …")
        state |= gather_weights(mine, theirs, wanted)
    kind = next((state[name].dtype for name in homes if name in state), None)
    for name in wanted.keys() - homes.keys() - state.keys():
        value = wanted[name]
        state[name] = torch.zeros(value.shape, dtype=kind) if value.is_meta else value
    check_weights(wanted, state, f"`{path}` does not fit its own configs")
    tables = model.schedule.buffers() if isinstance(model, LatentDiffusion) else {}
    if f"{NORMALIZER}/config.json" in files:
        tables |= _statistics(_weights(path / NORMALIZER, variant))
    tables |= derived
    return Checkpoint(
        path=path,
        kind="diffusers",
        state=restore_names({name: state[name] for name in wanted}, tables),
        step=rest.step if rest else None,
        mapped=True,
        metadata=(rest.metadata if rest else {}) | {EMBEDDED: format_yaml(raw)},
    )


def build_folder(
    file: Checkpoint, raw: Mapping[str, Any], clip_stats: str | Path | None = None
) -> tuple[Files, Components]:
    """What the folder of a checkpoint consists of: JSONs and texts by path, tensors by component.

        raw: the config of the file.
    Tensors without a place are in component "", under the original's names.
    Raises ValueError for weights that do not fit the config, and for what diffusers cannot express.
    """
    derived = _derived(file.state)
    model, spec = _model(raw, "config", derived)
    wanted, homes = model.state_dict(), locate_weights(model)
    state = rename_weights(file.state)
    if not isinstance(model, LatentDiffusion):  # a part, perhaps out of a whole
        own = {name.removeprefix("autoencoder."): name for name in state}
        state = {name: state[own[name]] for name in wanted if name in own}
    add_unused_weights(model, state, str(file.path))
    check_weights(wanted, state, f"`{file.path}` does not fit its config")
    files = folder_configs(model, spec)
    found = {part: scatter_weights(mine, state) for part, mine in _by_component(homes).items()}
    if ROWS in state:
        theirs = found["text_encoder"]
        theirs[EMBEDDING] = _whole(theirs[EMBEDDING], state[ROWS])
    if f"{NORMALIZER}/config.json" in files:
        assert isinstance(model, LatentDiffusion)
        load_clip_statistics(model.conditioner, file.path, clip_stats, schedule_tables(file.state))
        mean, std = model.conditioner.get(ImageEmbedding).noise.get_statistics()
        found[NORMALIZER] = {"mean": mean, "std": std}
    rest = {name: value for name, value in state.items() if name not in homes}
    if ROWS in rest:
        rest[TABLE] = state[TABLE]
    return files, {**found, "": restore_names(rest, derived if found.keys() > {"vae"} else {})}


def weights_path(component: str, files: Files, variant: str | None = None) -> str:
    """Where the weights of a component are, in a folder of these files."""
    if not component:
        return REST
    stem = STEMS[1] if component in OF_TRANSFORMERS else STEMS[0]
    name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    return f"{component}/{name}" if INDEX in files else name


def write_texts(folder: Path, files: Files) -> None:
    """Writes the JSONs and texts of a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (folder / path).write_text(text, "utf-8")


def _model(
    raw: Mapping[str, Any], where: str, derived: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Any]]:
    spec = translate_config(raw, where=where, skipped=[])
    model: Any = build_on_meta(spec, where=where)
    if "scale_factor" in derived:  # which training measured
        model.scale_factor = float(derived["scale_factor"])
    return model, spec


def _derived(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables and notes beside the weights, which are small; not the judges of autoencoders."""
    return {
        name: value
        for name, value in state.items()
        if legacy.DERIVED.fullmatch(name) and not re.search(r"(^|\.)loss\.|position_ids$", name)
    }


def _agree(rest: Checkpoint, files: Files) -> bool:
    """Whether the config beside the rest says what the folder's JSONs say."""
    if EMBEDDED not in rest.metadata:
        return False
    raw = parse_yaml(rest.metadata[EMBEDDED], where=REST)
    ours = folder_configs(*_model(raw, REST, _derived(rest.state)))
    for path, content in ours.items():
        if not path.endswith("config.json") or path.startswith("tokenizer"):
            continue
        theirs = files.get(path)
        if theirs is None:
            return False
        plain = json.loads(json.dumps(content))
        if any(theirs.get(k, v) != v for k, v in plain.items() if not k.startswith("_")):
            return False
    return True


def _by_component(homes: Mapping[str, Location]) -> dict[str, dict[str, Location]]:
    found: dict[str, dict[str, Location]] = {}
    for name, place in homes.items():
        found.setdefault(place.component, {})[name] = place
    return found


def _weights(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """The tensors of a component, in one file or several.

    Raises FileNotFoundError if there is none, or only those of several variants.
    """
    for file in _candidates(folder, variant):
        if file.suffix != ".json" and file.is_file():
            return read_checkpoint(file).state
        if file.is_file():
            names = sorted({Path(name).name for name in _json(file)["weight_map"].values()})
            return {k: v for name in names for k, v in read_checkpoint(folder / name).state.items()}
    others = {file.name.split(".")[1] for file in folder.glob("*.*.safetensors")}
    if variant is None and len(others) == 1:
        return _weights(folder, others.pop())
    what = f"of variant `{variant}`" if variant else f"(variants: {', '.join(others) or 'none'})"
    raise FileNotFoundError(f"no weights {what} in `{folder}`")


def _candidates(folder: Path, variant: str | None) -> Iterator[Path]:
    dot = f".{variant}" if variant else ""
    for ending in (".safetensors", ".bin"):
        for stem in STEMS:
            yield folder / f"{stem}{dot}{ending}"
            yield folder / f"{stem}{ending}.index{dot}.json"


def _words(component: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The words of today and of published files, for those of other versions."""
    found = {}
    for name, value in state.items():
        if component == "text_encoder" and "." in name and not name.startswith("text_"):
            name = f"text_model.{name}"
        if component == "vae" and ".attentions." in name:
            for new, old in VAE_OLD.items():
                name = name.replace(f".{old}.", f".{new}.")
        if not name.endswith(UNUSED):
            found[name] = value
    return found


def _statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean and deviation of embeddings, unless they are 0 and 1."""
    if not state["mean"].any() and bool((state["std"] == 1).all()):
        return {}
    return {f"noise_augmentor.data_{key}": state[key].flatten() for key in ("mean", "std")}


def _whole(table: Tensor, ids: Tensor) -> Tensor:
    """A reduced embedding as one of all of CLIP's tokens; those it does not know share row 0."""
    rows = torch.zeros(VOCAB, dtype=torch.int64)
    known = ids < VOCAB  # the others keep rows free
    rows[ids[known]] = torch.arange(1, len(table))[known]
    return table[rows]


def _reduced(whole: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """The inverse of `_whole`; rows that it left out are those of `table`."""
    known, free = ids < VOCAB, torch.ones(VOCAB, dtype=torch.bool)
    free[ids[known]] = False
    reduced = table.clone()
    reduced[0] = whole[free.nonzero()[0, 0]]
    reduced[1:][known] = whole[ids[known]]
    return reduced


def _json(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"`{path}`: {path.stat().st_size} bytes are too much for a config")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path}` is damaged: {error}") from error
