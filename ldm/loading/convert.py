"""Conversion: original files (.ckpt, .safetensors), folders of runs and of diffusers.

    source -> Checkpoint -> file in the original's layout | diffusers folder

Tensors are pages of the source until they are written, one after the other. What is written appears
under its name only when it is complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.loading.addons.lora import load_loras
from ldm.loading.build import add_unused_weights, build_on_meta, check_weights
from ldm.loading.config import format_yaml, parse_yaml
from ldm.loading.diffusers.files import (
    REST,
    build_folder,
    is_diffusers_folder,
    weights_path,
    write_texts,
)
from ldm.loading.families import PUBLISHED
from ldm.loading.files.checkpoint import EMBEDDED, Checkpoint, write_checkpoint
from ldm.loading.legacy import original_name, rename_weights, translate_config
from ldm.loading.report import inspect_checkpoint
from ldm.loading.weights import read_weights
from ldm.model import LatentDiffusion
from ldm.runtime.files import find_file
from ldm.runtime.version import __version__

__all__ = ["SUFFIXES", "Conversion", "convert", "plan_conversion"]

SUFFIXES = (".safetensors", ".ckpt")
KL, STAGE = "encoder.conv_in.weight", "first_stage_config"
PART = "autoencoder."
LORAS = "ldm.loras"  # key of what was merged
ADAPTED = ("unet.", "conditioner.text.")  # what LoRAs change


@dataclass(frozen=True)
class Conversion:
    """What would be written, and what a reader should know of it.

    texts: JSONs and texts of a folder, by path. weights: tensors, by the path of their file
        ("" for a single file). notes: one line for each thing.
    """

    source: Checkpoint
    target: Path
    weights: dict[str, dict[str, Tensor]]
    texts: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str | int] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """How much there is to write."""
        tensors = (value for part in self.weights.values() for value in part.values())
        return sum(_size(value, self.dtype) for value in tensors)


def plan_conversion(
    source: str | Path,
    target: str | Path,
    *,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    prune: bool = False,
    variant: str | None = None,
    clip_stats: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> Conversion:
    """Reads names and configs, and settles what becomes of each tensor; writes nothing.

        source: a file, a diffusers folder, or the folder of a training run.
        target: ending in .safetensors or .ckpt: a file in the original's layout; else a folder.
        config: the YAML of the source; None finds it as `load` does.
        dtype: of all floating-point numbers, None = as they are.
        ema: averaged weights take the place of raw ones. prune: they are left out; single files
            keep both otherwise, folders have no room for both.
        variant: in the names of weights in folders, such as `fp16` (which also means that dtype).
        clip_stats: statistics of CLIP's embeddings, for unCLIP models that do not bring theirs.
        vae: what `source` may be, whose autoencoder takes the place of the source's.
        loras: files and their weights, to be merged into the model; averages are left out then.
    Raises FileNotFoundError, or ValueError for what does not fit or cannot be expressed.
    """
    if variant == "fp16" and dtype is None and not is_diffusers_folder(source):
        dtype = torch.float16
    file = read_weights(source, ema, variant=variant)
    text = _config(file, config)
    notes = []
    if vae is not None:
        file = _with_autoencoder(file, read_weights(vae))
        notes.append(f"the autoencoder is that of {vae}")
    metadata: dict[str, str | int] = {**file.metadata, **_provenance(file, text, ema)}
    if loras:
        file, metadata[LORAS] = _merged(file, text, loras, dtype)
        notes.append(f"merged: {', '.join(f'{name} of weight {w:g}' for name, w in loras)}")
    target = Path(target).expanduser()
    is_file = target.suffix in SUFFIXES
    kept = file.averages if is_file and not (ema or prune or loras) else {}
    texts: dict[str, Any] = {}
    if is_file:
        weights = {"": {**file.state, **kept}}
    else:
        text = _known(text, file)
        texts, parts = build_folder(file, parse_yaml(text, where="config"), clip_stats)
        parts = {name: part for name, part in parts.items() if part}
        weights = {weights_path(name, texts, variant): part for name, part in parts.items()}
    for path, part in weights.items():
        size = sum(_size(value, dtype) for value in part.values())
        notes.append(f"{path or target.name:60} {len(part):>5} tensors {size / 1e9:8.3f} GB")
    if file.averages and not kept:
        what = "took the place of raw ones" if ema else "left out, --ema takes them"
        notes.append(f"{'model_ema.*':60} {len(file.averages):>5} tensors {what}")
    return Conversion(file, target, weights, texts, metadata, dtype, tuple(notes))


def convert(
    what: Conversion, *, force: bool = False, progress: Callable[[int], object] = lambda size: None
) -> Path:
    """Writes it, whole or not at all.

        force: replace what is there.
        progress: told the bytes of each tensor that was written.
    Raises FileExistsError if something is there, ValueError if it may not be replaced.
    """
    _check_target(what, force)
    options: dict[str, Any] = {"dtype": what.dtype, "progress": progress}
    options["mapped"] = what.source.mapped
    if not what.texts:
        write_checkpoint(what.target, what.weights[""], what.metadata, **options)
        return what.target
    part = what.target.with_name(f".{what.target.name}.{os.getpid()}.part")
    old = what.target.with_name(f".{what.target.name}.{os.getpid()}.old")
    try:
        write_texts(part, what.texts)
        for path, state in what.weights.items():
            notes = what.metadata if path == REST else {}
            write_checkpoint(part / path, state, notes, **options)
        _exchange(part, what.target, old)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return what.target


def _exchange(new: Path, place: Path, aside: Path) -> None:
    """Puts a folder where another one may be."""
    if not place.exists():
        new.rename(place)
        return
    place.rename(aside)
    try:
        new.rename(place)
    except OSError:
        aside.rename(place)
        raise
    shutil.rmtree(aside)


def _check_target(what: Conversion, force: bool) -> None:
    target = what.target
    if not target.exists():
        return
    if not force:
        raise FileExistsError(f"`{target}` exists\nhint: --force replaces it")
    if target.is_dir() != bool(what.texts) or (target.is_dir() and not is_diffusers_folder(target)):
        kind = "a folder of another kind" if target.is_dir() else "a file"
        raise ValueError(f"`{target}` is {kind}, it is not replaced")


def _config(file: Checkpoint, given: str | Path | None) -> str | None:
    """The text of the YAML: as given, from inside the file, or that of the recognised family."""
    names = rename_weights(file.state)
    alone = not any(name.startswith("unet.") for name in names)
    if given is not None:
        text: str | None = find_file(given).read_text("utf-8")
    elif EMBEDDED in file.metadata:
        text = file.metadata[EMBEDDED]
    elif alone and any(name.removeprefix("autoencoder.") == KL for name in names):
        text = find_file(f"{PUBLISHED}/v1-inference.yaml").read_text("utf-8")
    else:
        found = inspect_checkpoint(file.path).config
        text = None if found is None else find_file(found).read_text("utf-8")
    model = parse_yaml(text, where="config").get("model", {}) if text else {}
    if alone and STAGE in (model.get("params") or {}):
        return format_yaml({"model": model["params"][STAGE]})
    return text


def _known(text: str | None, file: Checkpoint) -> str:
    if text is None:
        raise ValueError(f"`{file.path}` is of no known family\nhint: pass its --config")
    return text


def _merged(
    file: Checkpoint,
    text: str | None,
    loras: Sequence[tuple[str | Path, float]],
    dtype: torch.dtype | None,
) -> tuple[Checkpoint, str]:
    """A model with LoRAs in its weights, and a note about all that it has now, as JSON.

    dtype: what the weights will be written in; the sum is rounded to it only if it is coarser.
    """
    spec = translate_config(parse_yaml(_known(text, file), where="config"), where="config")
    model = build_on_meta(spec)
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"`{file.path}` is a part of a model, LoRAs are for whole ones")
    names: dict[str, Any] = rename_weights({name: name for name in file.state})  # type: ignore[misc]
    names = {ours: theirs for ours, theirs in names.items() if ours.startswith(ADAPTED)}
    wanted = {name: v for name, v in model.state_dict().items() if name.startswith(ADAPTED)}
    state = {ours: file.state[theirs] for ours, theirs in names.items()}
    if dtype == torch.float32:
        state = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    add_unused_weights(model, state, str(file.path))
    check_weights(wanted, state, f"`{file.path}` does not fit its config")
    model.load_state_dict(state, strict=False, assign=True)
    before = dict(model.named_parameters())
    load_loras(model, loras)
    new = {name: p.detach() for name, p in model.named_parameters() if p is not before[name]}
    noted = json.loads(file.metadata.get(LORAS, "[]"))
    noted += [{**lora, "path": Path(lora["path"]).name} for lora in model.provenance["loras"]]
    state = {**file.state, **{names[name]: value for name, value in new.items()}}
    return replace(file, state=state, mapped=False), json.dumps(noted)


def _with_autoencoder(file: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A whole model with another autoencoder, in the precision of its own."""
    wanted = [name for name in rename_weights(file.state) if name.startswith(PART)]
    given = {PART + n.removeprefix(PART): v for n, v in rename_weights(other.state).items()}
    state = dict(file.state)
    for name in wanted:
        own = state[original_name(name)]
        if name not in given or given[name].shape != own.shape:
            what = "is missing" if name not in given else f"is {tuple(given[name].shape)}"
            raise ValueError(
                f"the autoencoder of `{other.path}` does not fit `{file.path}`: "
                f"`{name.removeprefix(PART)}` {what}, {tuple(own.shape)} is needed"
            )
        state[original_name(name)] = given[name].to(own.dtype)
    if not wanted:
        raise ValueError(f"`{file.path}` has no autoencoder to put another in the place of")
    return replace(file, state=state, mapped=False)


def _provenance(file: Checkpoint, text: str | None, ema: bool) -> dict[str, str | int]:
    """What a single file, or the rest of a folder, says about itself."""
    notes: dict[str, str | int] = {"ldm.version": __version__, "ldm.source": file.path.name}
    if text:
        params = parse_yaml(text, where="config").get("model", {}).get("params") or {}
        notes[EMBEDDED] = text
        if "unet_config" in params:
            kind = params.get("parameterization", "eps")
            notes["modelspec.prediction_type"] = {"eps": "epsilon"}.get(kind, kind)
    if file.step is not None:
        notes["global_step"] = file.step
    return notes | ({"ldm.ema": "merged"} if ema else {})


def _size(value: Tensor, dtype: torch.dtype | None) -> int:
    kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
    return value.numel() * kind.itemsize
