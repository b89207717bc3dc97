"""How a run goes: a line on the screen, and the same numbers and pictures in one or more logs.

    csv           log.csv, one row for each time that something was logged
    tensorboard   tensorboard/, left out with a note if the package is not there
    wandb         to Weights & Biases, if it is asked for

Only the first process logs.
"""

import csv
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.imaging import pixels, reading
from ldm.train.distributed.parallel import Ranks

__all__ = ["Csv", "Loggers", "Progress", "memory"]

log = logging.getLogger(__name__)

EXTRA = "pip install 'ldm-revived[train]'"


class Log(Protocol):
    """A place that numbers and pictures go to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """Several logs as one.

        names: "csv", "tensorboard", "wandb"; () on all processes but the first.
        start: the step that the run goes on from; what was logged later is logged again.
        settings: of wandb (project, name, …), and the config to show there.
    Raises ImportError if wandb is asked for and not there.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        start: int = 0,
        wandb: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.logs: list[Log] = []
        for name in dict.fromkeys(names):
            if name == "csv":
                self.logs.append(Csv(folder / "log.csv", start=start))
            elif name == "wandb":
                self.logs.append(Wandb(folder, wandb or {}, config or {}))
            elif (writer := _tensorboard(folder, start)) is not None:
                self.logs.append(writer)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing is written where there are no values."""
        for each in self.logs if values else ():
            each.scalars(step, values)

    def image(self, step: int, name: str, path: Path) -> None:
        """path: of a PNG."""
        for each in self.logs:
            each.image(step, name, path)

    def close(self) -> None:
        for each in self.logs:
            each.close()


class Csv:
    """A table whose columns grow: a row may have what no row before it had.

    start: rows of later steps are dropped, as they come again.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self.path = path
        self.columns, rows = _table(path)
        kept = [row for row in rows if _step(row) <= start]
        if len(kept) < len(rows):
            self._rewrite(kept)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": str(step), **{key: f"{value:.6g}" for key, value in values.items()}}
        new = [key for key in row if key not in self.columns]
        if new:
            _, rows = _table(self.path)
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)

    def image(self, step: int, name: str, path: Path) -> None:
        """Pictures have their own folder."""

    def close(self) -> None:
        """Nothing is open."""

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        part = self.path.with_name(self.path.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.path)


class TensorBoard:
    """Events in a folder that `tensorboard --logdir` shows."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        picture = pixels.to_tensor(reading.load_image(path))[0]  # (3, H, W) in [-1, 1]
        self.writer.add_image(name, (picture + 1) / 2, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run on Weights & Biases; `mode: offline` keeps it in the folder."""

    def __init__(self, folder: Path, options: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "lightning.callbacks.loggers: `wandb` is not installed, pip install "
                "'ldm-revived[wandb]'"
            ) from error
        named = {"name": folder.name, "id": folder.name, "resume": "allow"}
        self.wandb = wandb
        self.run = wandb.init(dir=str(folder), config=dict(config), **named | dict(options))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class Progress:
    """A tqdm line with losses, learning rate, images per second and memory; logged alike.

    A step costs nothing here but its count: losses stay where they are for `every` steps, or until
    the last of all.
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

        self.loggers, self.ranks, self.device, self.every = loggers, ranks, device, every
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
            disable=not ranks.is_first,
        )
        self.sums: dict[str, Any] = {}
        self.images, self.steps, self.since = 0, 0, time.monotonic()

    def __call__(self, step: int, losses: Mapping[str, Tensor], lr: float, images: int) -> None:
        """losses: those without dimensions are means of a batch. images: of all processes."""
        self.bar.update()
        for name, value in losses.items():
            if not value.ndim:
                self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.images, self.steps = self.images + images, self.steps + 1
        if step % self.every and step != self.bar.total:
            return
        rate = self.images / (time.monotonic() - self.since)
        means = self.ranks.mean({name: float(v) / self.steps for name, v in self.sums.items()})
        row = {**means, "lr": lr, "images_per_second": rate, "memory_gib": memory(self.device)}
        shown = {"loss": "loss {:.4f}", "lr": "lr {:.2e}", "images_per_second": "{:.3g} images/s",
                 "memory_gib": "{:.2f} GiB"}  # fmt: skip
        line = [text.format(row[name]) for name, text in shown.items() if name in row]
        self.bar.set_postfix_str(", ".join(line), refresh=False)
        self.loggers.scalars(step, row)
        self.sums, self.images, self.steps, self.since = {}, 0, 0, time.monotonic()

    def close(self) -> None:
        self.bar.close()


def memory(device: torch.device) -> float:
    """GiB at the peak so far: of the GPU, else of this process; NaN where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _tensorboard(folder: Path, start: int) -> Log | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no log for TensorBoard, the package is not installed\nhint: %s", EXTRA)
        return None
    return TensorBoard(SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1))


def _table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a file, nothing if it is not there; a row cut off by a crash is left."""
    if not path.exists():
        return ["step"], []
    with path.open(newline="") as file:
        reader = csv.DictReader(file, restkey="", restval="")
        rows = [row for row in reader if (row.get("step") or "").isdigit()]
        return list(reader.fieldnames or ["step"]), rows


def _step(row: Mapping[str, str]) -> int:
    return int(row["step"])
