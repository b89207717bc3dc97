"""What a run does beside training: saves, exports, draws pictures, and says how it goes."""

import csv
import logging
import math
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ldm.data.source import Source, collate
from ldm.imaging import pixels
from ldm.loading import checkpoint, legacy, statistics
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.pipelines import sample
from ldm.pipelines.frame import reads
from ldm.train.objective import on_device
from ldm.train.parallel import Ranks, whole

__all__ = ["Every", "Progress", "draw", "export"]

log = logging.getLogger(__name__)

MEASURED = 256  # pictures that the statistics of an autoencoder's latents are taken from


class Every:
    """True now and then: after so many seconds, or so many steps."""

    def __init__(self, *, seconds: float | None = None, steps: int | None = None) -> None:
        self.seconds, self.steps = seconds, steps
        self.last = time.monotonic()

    def __call__(self, step: int) -> bool:
        late = self.seconds is not None and time.monotonic() - self.last >= self.seconds
        if late or (self.steps is not None and step % self.steps == 0):
            self.last = time.monotonic()
            return True
        return False


class Clock:
    """Seconds of training since it was made, restarted, or read the last time.

    A step that takes much longer than most is counted as PATIENCE ordinary ones: the process slept
    (SIGSTOP, a closed lid), and that is no training.
    """

    PATIENCE = 10

    def __init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=101)
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def __call__(self) -> float:
        seconds = time.monotonic() - self.since
        usual = median(self.steps) if len(self.steps) >= 5 else math.inf
        self.steps.append(seconds)
        self.restart()
        return min(seconds, self.PATIENCE * usual)


class Progress:
    """A tqdm line with loss, learning rate and images per second, and the same as log.csv.

    A step costs nothing here but its number: losses are read every `every` steps.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, *, start: int, steps: int | None, every: int = 20
    ) -> None:
        from tqdm import tqdm

        self.ranks = ranks
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=5,
            disable=not ranks.is_first,
        )
        self.path, self.every = folder / "log.csv", every
        self.sums: dict[str, float] = {}
        self.images, self.since = 0, time.monotonic()

    def __call__(self, step: int, losses: dict[str, Tensor], lr: float, images: int) -> None:
        self.bar.update()
        for name, value in losses.items():
            if value.ndim:
                continue  # one number per sample
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach()) / self.every
        self.images += images
        if step % self.every:
            return
        now = time.monotonic()
        rate = self.images / (now - self.since)
        row = {"step": step, "lr": lr, "images_per_second": rate, **self.ranks.mean(self.sums)}
        self.bar.set_postfix_str(
            ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step"), refresh=False
        )
        if self.ranks.is_first:
            self._write(row)
        self.sums, self.images, self.since = {}, 0, now

    def close(self) -> None:
        self.bar.close()

    def _write(self, row: dict[str, Any]) -> None:
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow({key: f"{value:.6g}" for key, value in row.items()})


def export(
    task: Any, path: Path, source: Source, ranks: Ranks, *, config: str = "", step: int = 0
) -> None:
    """Writes the weights as they are now, half precision, with the original's names.

    source: of pictures, for statistics of the latents.
    ranks: the first process writes; all call this, as weights may be split over them.
    config: text of the YAML, kept in the file.
    """
    images = (sample["jpg"] for sample in source.first(MEASURED))
    weights = whole(task.weights_to_export(images), keep=ranks.is_first)
    if not ranks.is_first:
        return
    is_whole = isinstance(task.model, LatentDiffusion)
    tables = task.model.schedule.buffers() if is_whole else {}
    tables |= statistics.tables(task.model.conditioner) if is_whole else {}
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in legacy.rename_back(weights, tables).items()
    }
    checkpoint.write(path, state, {"global_step": step, "ldm.config": config})


@torch.no_grad()  # not inference_mode: gathered weights of split models are used for training again
def draw(
    model: LatentDiffusion | AutoencoderKL,
    source: Source,
    path: Path,
    n: int = 16,
    *,
    write: bool = True,
) -> None:
    """A grid of n samples of a data set of pictures, written if this is the process that writes.

    An autoencoder shows pictures above their reconstructions; a model that sees more than text
    shows the picture that its condition was made of before each sample.
    """
    batch: dict[str, Any] = collate(source.first(n))
    was_training = model.training
    model.eval()
    image = batch["jpg"].to(next(model.parameters()).device)  # (n, 3, H, W)
    if isinstance(model, AutoencoderKL):
        columns, made = n, model.decode(model.encode(image).mode())
        pictures = torch.cat([image, made])
    else:
        columns, made = max(1, round(n**0.5)), sampled(model, batch)
        pictures = made
        if reads(model) != {"txt"}:
            columns, pictures = 2 * columns, torch.stack([image, made], dim=1).flatten(0, 1)
    model.train(was_training)
    if not write:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels.grid(pixels.to_pil(pictures), columns).save(path)
    if "txt" in batch:
        path.with_suffix(".txt").write_text("\n".join(batch["txt"]) + "\n", encoding="utf-8")


def sampled(model: LatentDiffusion, batch: dict[str, Any]) -> Tensor:
    """One image (3, H, W) for every record of a batch of pictures, whatever the model reads."""
    n, f = len(batch["jpg"]), model.downscale
    height, width = batch["jpg"].shape[-2:]
    batch = model.prepare(on_device(batch, model.device), (height // f, width // f))
    cond, uncond = model.condition(batch), model.condition(batch, drop=1.0)
    z = sample(
        *(model, cond, uncond), size=(height, width), steps=20, scale=3.0, seeds=list(range(n))
    )
    return model.decode(z).clamp(-1, 1)
