"""Training runs of configs/train/tiny.yaml with a smaller UNet, small batches, no sample grids."""

from pathlib import Path
from typing import Any

import torch

from ldm.loading.config import instantiate, read_yaml
from ldm.train.config.settings import read_settings
from ldm.train.run import Run, build_run
from ldm.train.runs.run_folder import list_states

ROOT = Path(__file__).parents[2]
TINY_YAML = ROOT / "configs/train/tiny.yaml"
EMOJI = ROOT / "tests/data/emoji"
QUICK = (
    "model.params.unet_config.params.channel_mult=[1]",
    "model.params.unet_config.params.attention_resolutions=[1]",
    f"data.params.train.root={EMOJI}",
    "data.params.batch_size=2",
    "lightning.callbacks.max_images=0",
    "lightning.callbacks.loggers=[csv]",
)
TRANSFORM = "{name: emoji, size: 32}"
HELD_OUT = f"data.params.validation={{root: {EMOJI}, split: heldout, transform: {TRANSFORM}}}"


def make_tiny_config(*overrides: str) -> dict[str, Any]:
    return read_yaml(TINY_YAML, [*QUICK, *overrides])


def build_tiny_model() -> Any:
    torch.manual_seed(0)
    return instantiate(read_yaml(TINY_YAML)["model"])


def build_run_from(config: dict[str, Any], folder: Path) -> Run:
    return build_run(read_settings(config), folder, device=torch.device("cpu"))


def build_tiny_run(folder: Path, *overrides: str) -> Run:
    return build_run_from(make_tiny_config(*overrides), folder)


def resume_newest(run: Run, folder: Path | None = None) -> None:
    """Resume a run from the newest state in its folder, or in `folder` of another run."""
    run.resume(list_states((folder or run.folder) / "checkpoints")[-1])


def collect_weights(run: Run) -> dict[str, torch.Tensor]:
    """Collect the raw and the EMA weights by name."""
    ema = {f"ema.{name}": value for name, value in run.state.ema.shadow.items()}
    return run.task.trainable.state_dict() | ema
