"""Runs of configs/train/tiny.yaml with a smaller UNet, small batches and no sample grids."""

from pathlib import Path
from typing import Any

import torch

from ldm.loading.config import read_yaml
from ldm.train.config.settings import read_settings
from ldm.train.run import Run, build_run
from ldm.train.runs.run_folder import list_states

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/train/tiny.yaml"
EMOJI = ROOT / "tests/data/emoji"
QUICK = (
    "model.params.unet_config.params.channel_mult=[1]",
    "model.params.unet_config.params.attention_resolutions=[1]",
    f"data.params.train.root={EMOJI}",
    "data.params.batch_size=2",
    "lightning.callbacks.images=0",
    "lightning.callbacks.loggers=[csv]",
)


def tiny_config(*overrides: str) -> dict[str, Any]:
    return read_yaml(TINY, [*QUICK, *overrides])


def build_run_from(config: dict[str, Any], folder: Path) -> Run:
    cpu = torch.device("cpu")
    return build_run(read_settings(config), folder, device=cpu)


def build_tiny_run(folder: Path, *overrides: str) -> Run:
    return build_run_from(tiny_config(*overrides), folder)


def resume_newest(run: Run, folder: Path | None = None) -> None:
    """Resume from the newest state in the folder of a run."""
    run.resume(list_states((folder or run.folder) / "checkpoints")[-1])


def collect_weights(run: Run) -> dict[str, torch.Tensor]:
    """Raw and EMA weights."""
    ema = {f"ema.{name}": value for name, value in run.state.ema.shadow.items()}
    return run.task.trainable.state_dict() | ema
