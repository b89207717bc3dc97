"""A YAML and a weights file -> a model: where config, old names, files and families meet.

    raw   = config.read(path, overrides)
    spec  = legacy.translate(raw)                  old words -> ours
    model = on_meta(spec)                          no memory, no initialisation
    state = legacy.rename(checkpoint.read(ckpt))   memory-mapped
    model.load_state_dict(state, assign=True)      strict: every tensor, every shape

Nothing is downloaded. Where device and dtype stay as in the file, weights are pages of that file.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldm.loading import legacy
from ldm.loading.addons.embeddings import load_embeddings
from ldm.loading.addons.lora import load_loras
from ldm.loading.addons.midas import add_depth_network
from ldm.loading.build import add_unused_weights, build_on_meta, fill_weights
from ldm.loading.config import parse_yaml, read_yaml
from ldm.loading.families import (
    PUBLISHED,
    detect_prediction,
    probe_prediction,
    recognise_family,
    zero_snr_markers,
)
from ldm.loading.files.checkpoint import EMBEDDED, Checkpoint, write_checkpoint
from ldm.loading.files.clip_statistics import clip_statistics_tensors, load_clip_statistics
from ldm.loading.legacy import rename_weights, restore_names, schedule_tables, translate_config
from ldm.loading.weights import read_weights
from ldm.model import LatentDiffusion
from ldm.runtime.files import find_file

__all__ = ["choose_config", "load", "markers", "save_model"]

log = logging.getLogger(__name__)

DEMO = ("configs/demo/text2img.yaml", "checkpoints/demo.safetensors")
TABLE_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of rounded schedules; others: 1e-5


def load(
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    overrides: Iterable[str] = (),
    allow: Sequence[str] = (),
    clip_stats: str | Path | None = None,
    midas: str | Path | None = None,
    loras: Iterable[tuple[str | Path, float]] = (),
    embeddings: Iterable[str | Path] = (),
) -> LatentDiffusion:
    """The model that a config describes, with the weights of a checkpoint.

        config: a YAML; None recognises the family from the weights. Both None: the demo model.
        ckpt: a .ckpt or .safetensors, or the folder of a diffusers pipeline or of a training run;
            may stand alone, `load("folder")`.
        dtype: of all weights; every part computes in the dtype of its weights.
        ema: the averaged weights of a file that has both.
        overrides: `model.params.scale_factor=0.13`, applied to the YAML.
        allow: packages of your own whose classes the YAML may name.
        clip_stats: statistics of CLIP's embeddings, for unCLIP models that do not find theirs.
        midas: the depth network, for depth models whose checkpoint lacks it or for another one.
        loras: files and their weights, to be merged into the model.
        embeddings: files of textual inversions, or folders of them: words for prompts.
    Returns the model in eval mode (or the part, for the config of a single part); `provenance`
    says what it was made of.
    Raises FileNotFoundError, or ValueError saying what does not fit what.
    """
    if config is None and ckpt is None:
        config, ckpt = _demo()
    if ckpt is None and not str(config).endswith((".yaml", ".yml")):
        config, ckpt = None, config  # weights alone
    if ckpt is None:
        raise ValueError("a config alone has no weights\nhint: pass a checkpoint as well")
    file = read_weights(ckpt, ema) if config is None else None
    source = str(config) if file is None else choose_config(file)
    raw = _raw(source, file, overrides)
    where, skipped = Path(source).name, list[str]()
    spec = translate_config(raw, where=where, skipped=skipped)
    model = build_on_meta(spec, allow=allow, where=where, skipped=skipped)
    if file is None:
        file = read_weights(ckpt, ema, restore_names(model.state_dict()))
    state, tables, notes = rename_weights(file.state), schedule_tables(file.state), markers(file)
    for held in (file.state, file.averages):
        held.clear()  # so that memory is given back while `state` is used up
    misfit = f"`{file.path}` does not fit {where}"
    add_unused_weights(model, state, str(file.path))
    lent = add_depth_network(model.state_dict(), state, file.path, midas)
    fill_weights(
        model, state, device=device, dtype=dtype, mapped=file.mapped and not lent, misfit=misfit
    )
    if isinstance(model, LatentDiffusion):
        _check_tables(model, tables, misfit)
        load_clip_statistics(model.conditioner, file.path, clip_stats, tables)
        _check_averages(raw, file)
        model.provenance = {"config": source, **_origin(raw, file, skipped)}
        _check_prediction(model, file, notes, given=config is not None)
    _extend(model, tuple(loras), tuple(embeddings))
    return cast(LatentDiffusion, model.eval())


def save_model(
    model: LatentDiffusion, path: str | Path, metadata: Mapping[str, str | int] | None = None
) -> None:
    """Writes a model in the layout of the original, readable by every program that reads those.

    metadata: kept beside the weights; the YAML's text under `ldm.config` lets `load` do without.
    """
    schedule = model.schedule
    tables = schedule.buffers() | zero_snr_markers(
        model.parameterization, zero_snr=schedule.zero_snr
    )
    state = restore_names(model.state_dict(), tables)
    write_checkpoint(path, state | clip_statistics_tensors(model.conditioner), metadata)


def _extend(
    model: Any, loras: Sequence[tuple[str | Path, float]], embeddings: Sequence[str | Path]
) -> None:
    """Merges LoRAs into a model and teaches it words."""
    if (loras or embeddings) and not isinstance(model, LatentDiffusion):
        raise ValueError("LoRAs and words are for a whole model, the config is that of a part")
    if loras:
        load_loras(model, loras)
    if embeddings:
        load_embeddings(model, embeddings)


def choose_config(file: Checkpoint) -> str:
    """The YAML for weights that came without one, by what they look like.

    Raises ValueError if they look like no published family, or a family this project has not.
    """
    if EMBEDDED in file.metadata:
        return EMBEDDED
    state = rename_weights(file.state)
    family = recognise_family(state)
    if family is None or not family.config:
        looks = f"looks like {family.title}, which is not supported" if family else "is unknown"
        raise ValueError(f"`{file.path}` {looks}\nhint: pass its config (--config)")
    found = detect_prediction(family, state, step=file.step, markers=markers(file))
    name = family.config_for(found.kind)
    log.info("`%s` is %s; config %s; predicts %s", file.path, family.title, name, found)
    return f"{PUBLISHED}/{name}.yaml"


def _raw(source: str, file: Checkpoint | None, overrides: Iterable[str]) -> dict[str, Any]:
    """The config at `source`, which may be in the file; if it was chosen, with the file's marks."""
    if file is not None and source == EMBEDDED:
        return parse_yaml(file.metadata[EMBEDDED], overrides, where=source)
    raw = read_yaml(source, overrides)
    if file is not None and "ztsnr" in markers(file):
        raw["model"]["params"].setdefault("rescale_betas_zero_snr", True)
    return raw


def _demo() -> tuple[str, str]:
    try:
        config, ckpt = (str(find_file(path)) for path in DEMO)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the demo model is not here: {error}\nhint: pass a config and a checkpoint"
        ) from error
    return config, ckpt


def markers(file: Checkpoint) -> dict[str, str]:
    """What the file says about itself: its metadata, and empty tensors that serve as notes."""
    return {**file.metadata, **{key: "" for key in legacy.MARKERS if key in file.state}}


def _origin(raw: Mapping[str, Any], file: Checkpoint, skipped: list[str]) -> dict[str, Any]:
    """What a model was made of: the config's hash, the file, its step, and which weights of it."""
    if skipped:
        log.info("not needed for sampling, skipped: %s", ", ".join(skipped))
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode())
    return {
        "config_hash": digest.hexdigest()[:10],
        "checkpoint": str(file.path),
        "step": file.step,
        "ema": file.ema,
        "skipped": skipped,
    }


def _check_tables(model: LatentDiffusion, tables: Mapping[str, Tensor], misfit: str) -> None:
    """Compares the schedule in the file with the config's, which is the one that is used."""
    if "scale_factor" in tables:  # kept by models trained with `scale_by_std`
        model.scale_factor = float(tables["scale_factor"])
    ours = model.schedule.buffers()
    for name in sorted(ours.keys() & tables.keys()):
        theirs = tables[name]
        # Also of files that were in half precision once, and are float32 again.
        rounded = (error for kind, error in TABLE_ERROR.items() if _survives(theirs, kind))
        tolerance = next(rounded, 1e-5)
        if theirs.shape != ours[name].shape:
            difference = f"{len(theirs)} steps for {len(ours[name])}"
        elif (
            error := float((theirs.float() - ours[name]).abs().max() / ours[name].abs().max())
        ) > tolerance:
            difference = f"{error:.2g} of its largest value"
        else:
            continue
        warnings.warn(
            f"{misfit}: its noise schedule is another one (`{name}` differs by {difference}); the "
            "config's is used, check `linear_start`, `linear_end` and `beta_schedule`",
            stacklevel=3,
        )
        return


def _survives(table: Tensor, kind: torch.dtype) -> bool:
    """Whether numbers are what they are after rounding to another kind."""
    return torch.equal(table.to(kind).to(table.dtype), table)


def _check_averages(raw: Mapping[str, Any], file: Checkpoint) -> None:
    """The original samples with averaged weights where the config says `use_ema` and they exist."""
    params = raw.get("model", raw).get("params") or {}
    if not file.has_ema or file.ema:
        return
    asks = "asks" if params.get("use_ema", True) else "does not ask"
    log.info(
        "`%s` also holds averaged (EMA) weights, the config %s for them; `ema` takes them",
        file.path,
        asks,
    )


def _check_prediction(
    model: LatentDiffusion, file: Checkpoint, notes: Mapping[str, str], *, given: bool
) -> None:
    """Holds what the weights look like against what the config says; warns of a contradiction.

    Without a given config two methods must have spoken; if they have not, the UNet is asked.
    """
    state = model.state_dict()
    family = recognise_family(state)
    found = detect_prediction(family, state, step=file.step, markers=notes)
    if not given and family is not None and family.predicts is None and found.votes < 2:
        found = probe_prediction(model.unet, found, family.context or 0)
        if found.kind and found.kind != model.parameterization:
            model.parameterization = found.kind
            name = family.config_for(found.kind)
            model.provenance["config"] = f"{PUBLISHED}/{name}.yaml"
    model.provenance["prediction"] = str(found)
    if found.kind and found.kind != model.parameterization:
        warnings.warn(
            f"`{file.path}` looks like a model that predicts {found.kind}, the config says "
            f"{model.parameterization}: {found}; pictures will be noise if the config is wrong",
            stacklevel=3,
        )
    elif found.disputed and not given:
        warnings.warn(
            f"`{file.path}`: it is not sure what the model predicts: {found}\n"
            "hint: say it with a config (v2-inference.yaml: eps, v2-inference-v.yaml: v)",
            stacklevel=3,
        )
