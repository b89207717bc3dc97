"""What a run gives to the world: files with the original's names, which every program opens.

    weights  ema   the average, in the place of the weights (what one wants to sample from)
             raw   the weights as they are
             both  the weights, and the average under `model_ema.*`, as the original saves them
    dtype    half or full
    export   safetensors and/or ckpt

The config, the step and where the weights are from stand in the file. LoRA and words are written in
the formats of `adaptation`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.loading.families import zero_snr_markers
from ldm.loading.files.checkpoint import EMBEDDED, write_checkpoint
from ldm.loading.files.clip_statistics import clip_statistics_tensors
from ldm.loading.legacy import original_name, restore_names
from ldm.model import LatentDiffusion
from ldm.runtime.version import __version__
from ldm.train.distributed.parallel import whole
from ldm.train.monitoring.samples import epoch
from ldm.train.tasks.adaptation import Adaptation

__all__ = ["export", "export_best", "export_step"]

USUAL = "val/loss_ema"  # what is monitored if nothing is said
ADAPTED = "ldm.training.config"  # key of the config that something small was trained with
MEASURED = 256  # pictures that the statistics of an autoencoder's latents are taken from


def export(run: Any, stem: Path) -> list[Path]:
    """Writes `stem`.safetensors and/or .ckpt as `lightning.callbacks` of the run say.

    run: a `Run`; all its processes call this, as weights may be split, and the first writes.
    Returns the files, [] on other processes.
    """
    options = run.settings.callbacks
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in options.export]
    averaged = options.weights != "raw" and bool(run.state.ema.decay)
    if isinstance(run.task, Adaptation):
        if not run.ranks.is_first:
            return []
        with run.state.ema.applied(run.task.trained) if averaged else nullcontext():
            notes = _notes(run)
            if EMBEDDED in notes:  # under another name, as the file is no model with a config
                notes[ADAPTED] = notes.pop(EMBEDDED)
            run.task.export(stem.with_name(f"{stem.name}.safetensors"), notes)
        return [stem.with_name(f"{stem.name}.safetensors")]
    state = _state(run, averaged=averaged and options.weights == "ema")
    if averaged and options.weights == "both":
        state |= _averages(run)
    if not run.ranks.is_first:
        return []
    for path in paths:
        write_checkpoint(path, state | _tables(run, state), _notes(run))
    return paths


def export_step(run: Any) -> list[Path]:
    """An export that stays: checkpoints/trainstep_checkpoints/epoch=000001-step=000010000.…"""
    name = f"epoch={epoch(run):06}-step={run.state.step:09}"
    return export(run, run.folder / "checkpoints" / "trainstep_checkpoints" / name)


def export_best(run: Any, found: Mapping[str, float]) -> list[Path]:
    """An export that stays while few are better: checkpoints/epoch=…-step=…-loss_ema=0.123456.…

        found: the losses on held-out data, as `validate` gives them; all processes call this.
    Raises ValueError if the one that is monitored is not among them.
    """
    most, name = run.settings.callbacks.best, run.settings.callbacks.monitor
    if not (most and found):
        return []
    name = name or USUAL
    name = name if name in found else name.removesuffix("_ema")  # where nothing is averaged
    if name not in found:
        raise ValueError(f"lightning.callbacks.monitor: `{name}` is none of {', '.join(found)}")
    folder, value = run.folder / "checkpoints", found[name]
    title = name.removeprefix("val/").replace("/", "_")

    def is_good() -> bool:
        kept = _best(folder, title)
        return math.isfinite(value) and (not 0 < most <= len(kept) or value < kept[most - 1][0])

    if not run.ranks.told(is_good):
        return []
    step = f"epoch={epoch(run):06}-step={run.state.step:09}"
    paths = export(run, folder / f"{step}-{title}={value:.6f}")
    if run.ranks.is_first and most > 0:
        for _, path in _best(folder, title)[most:]:
            for kind in ("safetensors", "ckpt"):
                path.with_name(f"{path.name}.{kind}").unlink(missing_ok=True)
    return paths


def _best(folder: Path, title: str) -> list[tuple[float, Path]]:
    """(value, file without ending) of the exports that were kept for a loss, the best first."""
    pattern = re.compile(rf"(epoch=\d+-step=\d+-{re.escape(title)}=(.+))\.(safetensors|ckpt)")
    matches = [pattern.fullmatch(path.name) for path in folder.glob("epoch=*")]
    return sorted({(float(match[2]), folder / match[1]) for match in matches if match})


def _state(run: Any, *, averaged: bool) -> dict[str, Tensor]:
    """The weights under the original's names, with what its files hold beside weights."""
    images = _images(run)
    with run.state.ema.applied(run.task.trained) if averaged else nullcontext():
        weights = whole(run.task.weights_to_export(images), keep=run.ranks.is_first)
        dtype = torch.float16 if run.settings.callbacks.dtype == "half" else torch.float32
        return {
            name: value.to(
                "cpu", dtype if value.is_floating_point() and value.ndim else None, copy=True
            )
            for name, value in restore_names(weights).items()
        }


def _images(run: Any) -> Iterator[Tensor]:
    """Decoded when the first is asked for, which only an autoencoder does."""
    for sample in run.source.first_samples(MEASURED):
        yield sample["jpg"]


def _averages(run: Any) -> dict[str, Tensor]:
    """`model_ema.*`: names that lost their dots, the decay and the number of updates."""
    state, ema = _state(run, averaged=True), run.state.ema
    trained = {original_name(name) for name in ema.shadow}
    found = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value
        for name, value in state.items()
        if name in trained
    }
    numbers = {"model_ema.decay": torch.tensor(ema.decay, dtype=torch.float32)}
    numbers["model_ema.num_updates"] = torch.tensor(ema.updates, dtype=torch.int32)
    return found | numbers


def _tables(run: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The schedule, marks and statistics of a whole model, unless its weights have them."""
    model = run.model
    if not isinstance(model, LatentDiffusion):
        return {}
    found = model.schedule.buffers() | clip_statistics_tensors(model.conditioner)
    found |= zero_snr_markers(model.parameterization, zero_snr=model.schedule.zero_snr)
    return {name: value for name, value in found.items() if name not in state}


def _notes(run: Any) -> dict[str, str | int]:
    """What the file says about itself."""
    trainer, state = run.settings.trainer, run.state
    origin = {
        "seed": trainer.seed,
        "batches_per_step": state.parts,
        "batch_size": run.batch_size,
        "seconds": round(state.seconds),
        "weights": run.settings.callbacks.weights if state.ema.decay else "raw",
        "torch": torch.__version__,
    }
    notes = {
        "global_step": state.step,
        "epoch": epoch(run),
        "ldm.version": __version__,
        "ldm.training": json.dumps(origin),
    }
    if run.text:
        notes[EMBEDDED] = run.text
    if isinstance(run.model, LatentDiffusion):
        kind = run.model.parameterization
        notes["modelspec.prediction_type"] = {"eps": "epsilon"}.get(kind, kind)
    return notes
