"""Progress bar and loggers of a run.

    csv           log.csv, one row per logged step
    tensorboard   tensorboard/, left out with a note if the package is not installed
    wandb         to Weights & Biases

Only the first process logs.
"""

import csv
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ldm.imaging import pixels, reading
from ldm.runtime.files import replace_when_written
from ldm.runtime.types import JsonMapping
from ldm.train.distributed.parallel import Ranks

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["CsvLogger", "Loggers", "Progress", "peak_memory_gib"]

log = logging.getLogger(__name__)

EXTRA = "pip install 'ldm-revived[train]'"
# Shown in the progress bar.
FORMATS = {
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "images_per_second": "{:.3g} images/s",
    "memory_gib": "{:.2f} GiB",
}


class Logger(Protocol):
    """Takes numbers and images of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """Several loggers as one.

    Args:
        names: "csv", "tensorboard", "wandb"; () on all processes but the first.
        start: the step that the run resumes from; what was logged later is logged again.
        wandb: keywords of `wandb.init` (project, name, …).
        config: shown by wandb.
    Raises:
        ImportError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        start: int = 0,
        wandb: JsonMapping | None = None,
        config: JsonMapping | None = None,
    ) -> None:
        self.loggers: list[Logger] = []
        for name in dict.fromkeys(names):
            if name == "csv":
                self.loggers.append(CsvLogger(folder / "log.csv", start=start))
            elif name == "wandb":
                self.loggers.append(WandbLogger(folder, wandb or {}, config or {}))
            elif (logger := _make_tensorboard_logger(folder, start)) is not None:
                self.loggers.append(logger)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers by name; nothing if there are none."""
        for logger in self.loggers if values else ():
            logger.scalars(step, values)

    def image(self, step: int, name: str, path: Path) -> None:
        """Logs a PNG."""
        for logger in self.loggers:
            logger.image(step, name, path)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class CsvLogger:
    """A table that gets new columns when new values come.

    Args:
        start: rows of later steps are dropped, as they come again.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self.path = path
        self.columns, rows = _read_table(path)
        earlier = [row for row in rows if int(row["step"]) <= start]
        if len(earlier) < len(rows):
            self._rewrite(earlier)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": str(step), **{key: f"{value:.6g}" for key, value in values.items()}}
        new = [key for key in row if key not in self.columns]
        if new:
            _, rows = _read_table(self.path)
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)

    def image(self, step: int, name: str, path: Path) -> None:
        """Images have their own folder."""

    def close(self) -> None:
        """Nothing is open."""

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replace_when_written(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


class TensorBoardLogger:
    """Events in a folder that `tensorboard --logdir` shows."""

    def __init__(self, writer: "SummaryWriter") -> None:
        self.writer = writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        image = pixels.to_tensor(reading.load_image(path))[0]  # (3, H, W) in [-1, 1]
        self.writer.add_image(name, (image + 1) / 2, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """A run on Weights & Biases; `mode: offline` keeps it in the folder."""

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

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class Progress:
    """A tqdm bar with losses, learning rate, images per second and memory, which are logged too.

    Losses stay on their device, unread, for `every` steps or until the last step of the run.

    Args:
        start: the step that the run resumes from.
        steps: of the whole run; None = it ends by time.
    """

    def __init__(
        self,
        loggers: Loggers,
        ranks: Ranks,
        device: torch.device,
        *,
        start: int,
        steps: float | None,
        every: float = 20,
    ) -> None:
        from tqdm import tqdm

        self.loggers = loggers
        self.ranks = ranks
        self.device = device
        self.every = every
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
            disable=not ranks.is_first,
        )
        self._reset()

    def __call__(self, step: int, losses: Mapping[str, Tensor], lr: float, images: int) -> None:
        """Counts a step.

        Args:
            losses: scalars are logged, all else is ignored.
            images: of all processes.
        """
        self.bar.update()
        for name, value in losses.items():
            if not value.ndim:
                self.sums[name] = self.sums.get(name, torch.zeros(())) + value.detach()
        self.images += images
        self.steps += 1
        if step % self.every and step != self.bar.total:
            return
        rate = self.images / (time.monotonic() - self.since)
        means = self.ranks.mean({name: float(v) / self.steps for name, v in self.sums.items()})
        row = {
            **means,
            "lr": lr,
            "images_per_second": rate,
            "memory_gib": peak_memory_gib(self.device),
        }
        line = [text.format(row[name]) for name, text in FORMATS.items() if name in row]
        self.bar.set_postfix_str(", ".join(line), refresh=False)
        self.loggers.scalars(step, row)
        self._reset()

    def close(self) -> None:
        self.bar.close()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.images = 0
        self.steps = 0
        self.since = time.monotonic()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far, of the GPU or else of this process; NaN where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _make_tensorboard_logger(folder: Path, start: int) -> Logger | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no log for TensorBoard, the package is not installed\nhint: %s", EXTRA)
        return None
    return TensorBoardLogger(SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1))


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Reads columns and rows, none if there is no file; without a row cut off by a crash."""
    if not path.exists():
        return ["step"], []
    with path.open(newline="") as file:
        reader = csv.DictReader(file, restkey="", restval="")
        rows = [row for row in reader if (row.get("step") or "").isdigit()]
        return list(reader.fieldnames or ["step"]), rows
