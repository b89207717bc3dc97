"""Progress bar and loggers of a run; only the main process logs.

csv           log.csv, a row per logged step
tensorboard   tensorboard/, skipped with a message if the package is not installed
wandb         Weights & Biases
"""

import csv
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.imaging import pixels, reading
from ldm.runtime.files import write_atomically
from ldm.runtime.types import JsonMapping
from ldm.train.distributed.parallel import Ranks

__all__ = ["CsvLogger", "LoggerCollection", "ProgressBar", "read_table"]

log = logging.getLogger(__name__)

# Numbers in the progress bar, with their formats.
BAR_FORMATS = {
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "images_per_second": "{:.3g} images/s",
    "memory_gib": "{:.2f} GiB",
}


class Logger:
    """Base class of loggers of scalars and images; its methods do nothing."""

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name."""

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Log a PNG."""

    def close(self) -> None:
        """Write pending entries."""


class LoggerCollection(Logger):
    """Several loggers as one.

    Args:
        names: "csv", "tensorboard", "wandb"; () on all processes but the first.
        start_step: Step that the run resumes from; entries of later steps are dropped.
        wandb: Keywords of `wandb.init` (project, name, …); None = its defaults.
        config: Config of the run, for wandb.
    Raises:
        ImportError: "wandb" is given, but not installed.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        start_step: int = 0,
        wandb: JsonMapping | None = None,
        config: JsonMapping | None = None,
    ) -> None:
        self.loggers: list[Logger] = []
        if "csv" in names:
            self.loggers.append(CsvLogger(folder / "log.csv", start_step=start_step))
        if "wandb" in names:
            self.loggers.append(WandbLogger(folder, wandb or {}, config or {}))
        if "tensorboard" in names:
            try:
                self.loggers.append(TensorBoardLogger(folder / "tensorboard", start_step))
            except ImportError:
                log.info(
                    "no log for TensorBoard, the package is not installed\n"
                    "hint: pip install 'ldm-revived[train]'"
                )

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self.loggers if values else ():
            logger.log_scalars(step, values)

    def log_image(self, step: int, name: str, path: Path) -> None:
        for logger in self.loggers:
            logger.log_image(step, name, path)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class CsvLogger(Logger):
    """A CSV table; new names add columns, and rows of steps after `start_step` are dropped."""

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        self.path = path
        self.columns, rows = read_table(path)
        kept_rows = [row for row in rows if int(row["step"]) <= start_step]
        if len(kept_rows) < len(rows):
            _write_table(path, self.columns, kept_rows)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": str(step), **{key: f"{value:.6g}" for key, value in values.items()}}
        new_columns = [key for key in row if key not in self.columns]
        if new_columns:
            _, rows = read_table(self.path)
            self.columns += new_columns
            _write_table(self.path, self.columns, [*rows, row])
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)


class TensorBoardLogger(Logger):
    """Events in a folder that `tensorboard --logdir` shows."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_image(self, step: int, name: str, path: Path) -> None:
        image = pixels.to_tensor(reading.load_image(path))[0]  # (3, H, W) in [-1, 1]
        self.writer.add_image(name, (image + 1) / 2, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbLogger(Logger):
    """A run on Weights & Biases, or with `mode: offline` only in the folder."""

    def __init__(self, folder: Path, options: JsonMapping, config: JsonMapping) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "lightning.callbacks.loggers: `wandb` is not installed, pip install "
                "'ldm-revived[wandb]'"
            ) from error
        defaults = {"name": folder.name, "id": folder.name, "resume": "allow"}
        self.wandb: Any = wandb
        self.run: Any = wandb.init(dir=str(folder), config=dict(config), **defaults | dict(options))

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class ProgressBar:
    """A progress bar with losses, learning rate, images per second and memory, also logged.

    Args:
        max_steps: Number of steps of the whole run; None = unknown, as it ends by time.
        log_steps: Interval of logging, in steps; in between, losses stay on their device, so that
            the CPU does not wait for a GPU.
    """

    def __init__(
        self,
        loggers: LoggerCollection,
        ranks: Ranks,
        device: torch.device,
        *,
        start_step: int,
        max_steps: float | None,
        log_steps: float = 20,
    ) -> None:
        self.loggers = loggers
        self.ranks = ranks
        self.device = device
        self.log_steps = log_steps
        self.bar = tqdm(
            total=max_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
            disable=not ranks.is_main_process,
        )
        self._reset()

    def update(self, step: int, losses: Mapping[str, Tensor], lr: float, num_images: int) -> None:
        """Count a step, and log means since the last logged step if the interval is over.

        Args:
            losses: Scalars, which are logged; other tensors are ignored.
            num_images: Number of images of the step, on all processes together.
        """
        self.bar.update()
        for name, value in losses.items():
            if not value.ndim:
                self.sums[name] = self.sums.get(name, torch.zeros(())) + value.detach()
        self.num_images += num_images
        self.num_steps += 1
        if step % self.log_steps and step != self.bar.total:
            return
        means = {name: float(v) / self.num_steps for name, v in self.sums.items()}
        means = self.ranks.all_reduce_mean(means)
        means |= {
            "lr": lr,
            "images_per_second": self.num_images / (time.monotonic() - self.start_time),
            "memory_gib": _get_peak_memory_gib(self.device),
        }
        texts = [text.format(means[name]) for name, text in BAR_FORMATS.items() if name in means]
        self.bar.set_postfix_str(", ".join(texts), refresh=False)
        self.loggers.log_scalars(step, means)
        self._reset()

    def close(self) -> None:
        self.bar.close()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_images = 0
        self.num_steps = 0
        self.start_time = time.monotonic()


def _get_peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of the GPU, or of this process on a CPU; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB, but not on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**30


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read columns and rows of a table, (["step"], []) if it does not exist."""
    if not path.exists():
        return ["step"], []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, restkey="", restval="")
        # A crash may truncate rows.
        rows = [row for row in reader if (row.get("step") or "").isdigit()]
        return list(reader.fieldnames or ["step"]), rows


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        write_atomically(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
