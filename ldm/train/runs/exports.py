"""Exports of a run: checkpoints with the original's key names, which other programs read.

    weights  ema   the EMA weights instead of the raw ones, best for sampling
             raw   the raw weights
             both  the raw weights, and the EMA as `model_ema.*`, as in the original
    dtype    half or full
    export   list of formats: safetensors, ckpt

Their metadata are the config, the step and the training options. LoRA and embeddings are written by
`AdaptationTask.write`.
"""

import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.loading.buffers import make_buffers
from ldm.loading.config import format_yaml
from ldm.loading.files.checkpoint import CONFIG_KEY, cast_weight, to_ema_name, write_checkpoint
from ldm.loading.files.clip_statistics import get_clip_statistics
from ldm.loading.modelspec import make_modelspec
from ldm.loading.weight_names import has_sgm_names, restore_names, to_original_name
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError
from ldm.runtime.version import __version__
from ldm.train.distributed.parallel import gather_shards
from ldm.train.run import Run
from ldm.train.tasks.adaptation import AdaptationTask

__all__ = ["export", "export_best", "export_step", "resolve_monitor"]

log = logging.getLogger(__name__)

DEFAULT_MONITOR = "val/loss_ema"
# Metadata key of the config of a LoRA or embedding: CONFIG_KEY would mark a whole model.
ADAPTATION_CONFIG_KEY = "ldm.training.config"
NUM_STATISTICS_IMAGES = 256  # from which an autoencoder's latents are normalized


def export(run: Run, base_path: Path | None = None) -> list[Path]:
    """Write BASE_PATH.safetensors and/or BASE_PATH.ckpt, by the options of `lightning.callbacks`.

    All processes call this, as weights may be sharded; the main process writes.

    Args:
        base_path: Path without suffix; None = checkpoints/last.
    Returns:
        The files; [] on other processes, or if the weights are not finite.
    """
    if not run.has_finite_weights("export"):
        return []
    options = run.settings.callbacks
    base_path = base_path or run.checkpoints / "last"
    has_ema = options.export_weights != "raw" and bool(run.state.ema.decay)
    if isinstance(run.task, AdaptationTask):
        path = base_path.with_name(f"{base_path.name}.safetensors")
        if run.ranks.is_main_process:
            with run.state.ema.apply_to(run.task.trainable, enabled=has_ema):
                run.task.write(path, _make_metadata(run))
        return [path] if run.ranks.is_main_process else []
    state = _gather_weights(run, ema=has_ema and options.export_weights == "ema")
    if has_ema and options.export_weights == "both":
        state |= _gather_ema_weights(run)
    if not run.ranks.is_main_process:
        return []
    float32_names = [n for n, v in state.items() if v.dtype == torch.float32 and v.ndim]
    if float32_names and options.export_dtype == "half":
        names = ", ".join(f"`{name}`" for name in float32_names[:3])
        message = "%d tensors stay in float32, their values are too large for half precision: %s"
        log.warning(message, len(float32_names), names)
    paths = [base_path.with_name(f"{base_path.name}.{suffix}") for suffix in options.export]
    for path in paths:
        write_checkpoint(path, state | _make_buffers(run, state), _make_metadata(run))
    return paths


def export_step(run: Run) -> list[Path]:
    """Export to checkpoints/trainstep_checkpoints/epoch=000001-step=000010000.…."""
    return export(run, run.checkpoints / "trainstep_checkpoints" / _make_step_name(run))


def export_best(run: Run, losses: Mapping[str, float]) -> list[Path]:
    """Export to checkpoints/epoch=…-step=…-loss_ema=0.123456.… if it is among the best.

    All processes call this.

    Args:
        losses: Validation losses by name, see `validate`.
    Raises:
        ValueError: The monitored loss is not among them.
    """
    options = run.settings.callbacks
    max_exports = options.save_top_k  # -1: all
    if not (max_exports and losses):
        return []
    monitor = resolve_monitor(options.monitor, losses)
    value = losses[monitor]
    loss_name = monitor.removeprefix("val/").replace("/", "_")  # for file names

    def is_among_best() -> bool:
        best_losses = [loss for loss, _ in _list_best_exports(run.checkpoints, loss_name)]
        is_full = 0 < max_exports <= len(best_losses)
        return math.isfinite(value) and (not is_full or value < best_losses[max_exports - 1])

    if not run.ranks.run_on_main_process(is_among_best):
        return []
    paths = export(run, run.checkpoints / f"{_make_step_name(run)}-{loss_name}={value:.6f}")
    if run.ranks.is_main_process and max_exports > 0:
        for _, path in _list_best_exports(run.checkpoints, loss_name)[max_exports:]:
            for file in path.parent.glob(f"{path.name}[.-]*"):
                file.unlink()
    return paths


def resolve_monitor(monitor: str | None, losses: Collection[str]) -> str:
    """Return the name of the monitored validation loss.

    Args:
        monitor: `lightning.callbacks.monitor`; None = the loss with the EMA weights if there is an
            EMA, else with the raw ones.
    Raises:
        ValueError: It is not among the losses.
    """
    name = monitor or DEFAULT_MONITOR
    if name not in losses:  # without an EMA
        name = name.removesuffix("_ema")
    if name not in losses:
        raise ValueError(
            f"lightning.callbacks.monitor: `{name}` should be one of {', '.join(losses)}"
        )
    return name


def _make_step_name(run: Run) -> str:
    return f"epoch={run.epoch:06}-step={run.state.step:09}"


def _list_best_exports(folder: Path, loss_name: str) -> list[tuple[float, Path]]:
    """List (loss, path without suffix) of the exports that were the best by a loss, best first."""
    # `…=0.1-diffusers.safetensors` is the second file of a LoRA, not another export.
    loss_name = re.escape(loss_name)
    pattern = re.compile(rf"(epoch=\d+-step=\d+-{loss_name}=(-?\d+\.\d+))\.(safetensors|ckpt)")
    matches = [pattern.fullmatch(path.name) for path in folder.glob("epoch=*")]
    return sorted({(float(match[2]), folder / match[1]) for match in matches if match})


def _gather_weights(run: Run, *, ema: bool) -> dict[str, Tensor]:
    """Copy the weights of the whole model to the CPU, under the original's names."""
    dtype = torch.float16 if run.settings.callbacks.export_dtype == "half" else torch.float32
    with run.state.ema.apply_to(run.task.trainable, enabled=ema):
        weights = run.task.get_weights_to_export(_load_statistics_images(run))
        weights = gather_shards(weights, keep=run.ranks.is_main_process)
        return {
            name: _cast_if_possible(name, value, dtype).to("cpu", copy=True)
            for name, value in restore_names(weights).items()
        }


def _cast_if_possible(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a weight, unless it is a scalar or its values would overflow."""
    if not (value.is_floating_point() and value.ndim):
        return value
    try:
        return cast_weight(name, value, dtype)
    except ArgumentError:
        return value


def _load_statistics_images(run: Run) -> Iterator[Tensor]:
    """Yield images (3, H, W) of the data; none is read before the task asks for it."""
    yield from (sample["jpg"] for sample in run.source.load_fixed_samples(NUM_STATISTICS_IMAGES))


def _gather_ema_weights(run: Run) -> dict[str, Tensor]:
    """Return `model_ema.*` as in the original: weights (names without dots), decay, num_updates."""
    ema = run.state.ema
    is_sgm = has_sgm_names(run.model.state_dict())
    ema_names = {to_original_name(name, sgm=is_sgm) for name in ema.shadow}
    state = {
        to_ema_name(name): value
        for name, value in _gather_weights(run, ema=True).items()
        if name in ema_names
    }
    state["model_ema.decay"] = torch.tensor(ema.decay, dtype=torch.float32)
    state["model_ema.num_updates"] = torch.tensor(ema.num_updates, dtype=torch.int32)
    return state


def _make_buffers(run: Run, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return noise schedule, prediction type and CLIP statistics, unless `state` has them."""
    model = run.model
    if not isinstance(model, LatentDiffusion):
        return {}
    buffers = make_buffers(model) | get_clip_statistics(model.conditioner)
    return {name: value for name, value in buffers.items() if name not in state}


def _make_metadata(run: Run) -> dict[str, str | int]:
    state = run.state
    training = {
        "seed": run.seed,
        "batches_per_step": state.batches_per_step,
        "batch_size": run.batch_size,
        "seconds": round(state.seconds),
        "weights": run.settings.callbacks.export_weights if state.ema.decay else "raw",
        "torch": torch.__version__,
    }
    metadata: dict[str, str | int] = {
        "global_step": state.step,
        "epoch": run.epoch,
        "ldm.version": __version__,
        "ldm.training": json.dumps(training),
    }
    config = format_yaml(run.settings.config)
    if isinstance(run.task, AdaptationTask):  # its `write` adds the rest
        return {**metadata, ADAPTATION_CONFIG_KEY: config, "modelspec.title": run.folder.name}
    metadata[CONFIG_KEY] = config
    return make_modelspec(run.model, run.folder.name, metadata=metadata)
