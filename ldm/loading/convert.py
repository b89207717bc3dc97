"""Convert between original files (.ckpt, .safetensors), run folders and diffusers folders.

    source -> Checkpoint -> file in the original's layout | diffusers folder

Tensors are pages of the source until they are written, one after the other. What is written appears
under its name only when it is complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
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
from ldm.loading.legacy import AUTOENCODER_CONFIG, our_names, translate_config
from ldm.loading.load import choose_config, probe_weights
from ldm.loading.weights import AUTOENCODER, identify_weights, read_autoencoder, read_weights
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError, MissingArgument, WrongFamily
from ldm.runtime.files import find_file
from ldm.runtime.version import __version__

__all__ = ["SUFFIXES", "Conversion", "convert", "plan_conversion"]

SUFFIXES = (".safetensors", ".ckpt")
LORAS = "ldm.loras"  # metadata key under which merged LoRAs are listed
CONV_IN = "encoder.conv_in.weight"  # in every autoencoder
LORA_PARTS = ("unet.", "conditioner.text.")  # what LoRAs change


@dataclass(frozen=True)
class Conversion:
    """What will be written, and what a reader should know of it.

    Args:
        weights: tensors, by the path of their file in a folder ("" for a single file).
        texts: JSONs and texts of a folder, by path.
        notes: lines to show.
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
        return sum(_bytes(state, self.dtype) for state in self.weights.values())


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
    """Read names and configs, and decide what becomes of each tensor; writes nothing.

    Args:
        source: a file, a diffusers folder, or the folder of a training run.
        target: ending in .safetensors or .ckpt: a file in the original's layout; else a folder.
        config: the YAML of the source; None finds it as `load` does.
        dtype: of all floating-point numbers, None = as they are.
        ema: averaged weights take the place of raw ones.
        prune: averaged weights are left out. Single files keep both otherwise, folders cannot.
        variant: in the file names of folders, such as `fp16` (which also means that dtype).
        clip_stats: statistics of CLIP's embeddings, for unCLIP models that do not bring theirs.
        vae: what `source` may be, to take the autoencoder from.
        loras: files and their strengths, to be merged into the model; averages are left out then.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something does not fit, or cannot be expressed in the other layout.
    """
    if variant == "fp16" and dtype is None and not is_diffusers_folder(source):
        dtype = torch.float16
    file = read_weights(source, ema, variant)
    text = _config_text(file, config)
    notes = []
    if vae is not None:
        file = _replace_autoencoder(file, vae)
        notes.append(f"the autoencoder is that of {vae}")
    metadata: dict[str, str | int] = {**file.metadata, **_provenance(file, text, ema)}
    if loras:
        file, metadata[LORAS] = _merge_loras(file, text, loras, dtype)
        notes.append(f"merged: {', '.join(f'{name} of weight {w:g}' for name, w in loras)}")
    target = Path(target).expanduser()
    is_file = target.suffix in SUFFIXES
    averages = file.averages if is_file and not (ema or prune or loras) else {}
    texts: dict[str, Any] = {}
    if is_file:
        weights = {"": {**file.state, **averages}}
    else:
        raw = parse_yaml(_require_config(text, file), where="config")
        texts, components = build_folder(file, raw, clip_stats)
        weights = {
            weights_path(component, texts, variant): state
            for component, state in components.items()
            if state
        }
    for path, state in weights.items():
        size = _bytes(state, dtype) / 1e9
        notes.append(f"{path or target.name:60} {len(state):>5} tensors {size:8.3f} GB")
    if file.averages and not averages:
        what = "took the place of raw ones" if ema else "left out, `ema` takes them"
        notes.append(f"{'model_ema.*':60} {len(file.averages):>5} tensors {what}")
    return Conversion(file, target, weights, texts, metadata, dtype, tuple(notes))


def convert(
    conversion: Conversion,
    *,
    force: bool = False,
    progress: Callable[[int], object] = lambda size: None,
) -> Path:
    """Write what is planned, whole or not at all.

    Args:
        force: replace what is there.
        progress: called with the bytes of each tensor that was written.

    Returns:
        The target.

    Raises:
        FileExistsError: the target exists.
        ArgumentError: it may not be replaced.
    """
    target, mapped = conversion.target, conversion.source.mapped
    _check_target(conversion, force)

    def write(path: Path, state: dict[str, Tensor], metadata: Mapping[str, str | int]) -> None:
        write_checkpoint(
            path, state, metadata, dtype=conversion.dtype, mapped=mapped, progress=progress
        )

    if not conversion.texts:
        write(target, conversion.weights[""], conversion.metadata)
        return target
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        write_texts(part, conversion.texts)
        for path, state in conversion.weights.items():
            write(part / path, state, conversion.metadata if path == REST else {})
        _replace_folder(target, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _replace_folder(target: Path, new: Path) -> None:
    """Put a folder in the place of another one, or of none."""
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _check_target(conversion: Conversion, force: bool) -> None:
    target = conversion.target
    if not target.exists():
        return
    if not force:
        raise FileExistsError(f"`{target}` exists\nhint: `force` replaces it")
    is_folder = target.is_dir()
    if is_folder != bool(conversion.texts) or (is_folder and not is_diffusers_folder(target)):
        kind = "a folder of another kind" if is_folder else "a file"
        raise ArgumentError(f"`{target}` is {kind}, it is not replaced", "target")


def _config_text(file: Checkpoint, config: str | Path | None) -> str | None:
    """The text of the YAML: the given one, embedded in the file, or of the recognised family.

    Of an autoencoder alone it is the autoencoder's part of that; None if nothing is known.
    """
    weights = identify_weights(file)
    is_part = not any(name.startswith("unet.") for name in weights.state)
    is_autoencoder = any(n.removeprefix(AUTOENCODER) == CONV_IN for n in weights.state)
    if config is None and EMBEDDED in file.metadata:
        text = file.metadata[EMBEDDED]
    elif config is None and is_part and is_autoencoder:
        text = find_file(f"{PUBLISHED}/v1-inference.yaml").read_text("utf-8")
    else:
        if config is None:
            weights.prediction = probe_weights(weights)
            try:
                config = choose_config(weights)
            except MissingArgument:
                return None
        text = find_file(config).read_text("utf-8")
    model = parse_yaml(text, where="config").get("model", {})
    if is_part and AUTOENCODER_CONFIG in (model.get("params") or {}):
        return format_yaml({"model": model["params"][AUTOENCODER_CONFIG]})
    return text


def _require_config(text: str | None, file: Checkpoint) -> str:
    if text is None:
        message = f"`{file.path}` is of no known family\nhint: pass its config"
        raise MissingArgument(message, "config")
    return text


def _merge_loras(
    file: Checkpoint,
    text: str | None,
    loras: Sequence[tuple[str | Path, float]],
    dtype: torch.dtype | None,
) -> tuple[Checkpoint, str]:
    """A model with LoRAs in its weights, and the list of all that it has now, as JSON.

    dtype: what the weights will be written in; the sum is rounded to it only if it is coarser.
    """
    raw = parse_yaml(_require_config(text, file), where="config")
    model = build_on_meta(translate_config(raw, where="config"))
    if not isinstance(model, LatentDiffusion):
        raise WrongFamily(f"`{file.path}` is a part of a model, LoRAs are for whole ones")
    names = {ours: old for ours, old in our_names(file.state) if ours.startswith(LORA_PARTS)}
    wanted = {name: v for name, v in model.state_dict().items() if name.startswith(LORA_PARTS)}
    state = {ours: file.state[old] for ours, old in names.items()}
    if dtype == torch.float32:
        state = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    add_unused_weights(model, state, str(file.path))
    check_weights(wanted, state, f"`{file.path}` does not fit its config")
    model.load_state_dict(state, strict=False, assign=True)
    before = dict(model.named_parameters())
    load_loras(model, loras)
    merged = {
        names[name]: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter is not before[name]
    }
    records = json.loads(file.metadata.get(LORAS, "[]"))
    records += [{**lora, "path": Path(lora["path"]).name} for lora in model.provenance["loras"]]
    return replace(file, state={**file.state, **merged}, mapped=False), json.dumps(records)


def _replace_autoencoder(file: Checkpoint, vae: str | Path) -> Checkpoint:
    """A whole model with another autoencoder, in the precision of its own."""
    names = {ours: old for ours, old in our_names(file.state) if ours.startswith(AUTOENCODER)}
    wanted = {ours: file.state[old] for ours, old in names.items()}
    tensors = read_autoencoder(read_weights(vae), wanted, str(file.path))
    new = {names[ours]: value.to(wanted[ours].dtype) for ours, value in tensors.items()}
    return replace(file, state={**file.state, **new}, mapped=False)


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


def _bytes(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> int:
    """Size of tensors once floating-point ones are cast."""
    return sum(
        value.numel() * (dtype if dtype and value.is_floating_point() else value.dtype).itemsize
        for value in state.values()
    )
