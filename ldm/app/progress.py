"""Progress of a job, written by its thread and shown by the page."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from ldm.generate.info import Info
from ldm.generate.listener import RunListener
from ldm.imaging.pixels import make_grid, to_pil
from ldm.model import LatentDiffusion
from ldm.pipelines.preview import fit_preview
from ldm.runtime.errors import Stop

__all__ = ["Progress"]

MIN_PREVIEW_INTERVAL = 0.1  # seconds
PREVIEW_PAUSE = 9  # after a preview, as a multiple of its duration: TAESD is slow on a CPU
PREVIEW_COLUMNS = 4


@dataclass
class Progress(RunListener):
    """Progress of one job.

    Args:
        total: Number of images to make.
        step: Finished sampling steps of the current batch.
        steps: Sampling steps of the current batch in total.
        images: Infos of the images so far, also of unfinished ones.
        warnings: Lines to append to the final message.
        preview: Grid of the current batch.
        message: The current status, finally the result.
        has_failed: Whether the message is an error.
        stop: Event that stops the job.
        make_previewer: Returns, for a model, a function from latents to previews in [-1, 1].
        on_image: Called with (index in the run, info) of each image that the gallery shows.
    """

    total: int = 1
    step: int = 0
    steps: int = 0
    images: list[Info] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    preview: Image.Image | None = None
    message: str = "queued"
    has_failed: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    make_previewer: Callable[[LatentDiffusion], Callable[[Tensor], Tensor]] = fit_preview
    on_image: Callable[[int, Info], None] = lambda position, info: None
    _to_rgb: Callable[[Tensor], Tensor] | None = None
    _batch: int = 1
    _next_preview: float = 0.0
    _start: float = field(default_factory=time.monotonic)

    @property
    def fraction(self) -> float:
        """Finished fraction of the job, 0 … 1."""
        batch = min(self._batch, self.total - len(self.images))
        done = len(self.images) + batch * self.step / (self.steps or 1)
        return min(done / self.total, 1.0)

    def set_message(self, message: str) -> None:
        """Set the message; raise Stop if the job should stop."""
        if self.stop.is_set():
            raise Stop
        self.message = message

    def on_start(self, model: LatentDiffusion, total: int) -> None:
        self.total = total
        self._to_rgb = self.make_previewer(model)
        self.set_message("sampling")
        self._start = time.monotonic()

    def on_step(self, step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        self.step, self.steps, self._batch = step + 1, steps, len(x)
        if self.stop.is_set():
            self.stopped_at = step + 1
            raise Stop(denoised)
        self.message = self._describe_step()
        now = time.monotonic()
        if self._to_rgb is not None and now > self._next_preview:
            # NaN cannot be converted to pixels; the run itself reports it.
            previews = to_pil(self._to_rgb(denoised.nan_to_num()))
            self.preview = make_grid(previews, PREVIEW_COLUMNS)
            end = time.monotonic()
            self._next_preview = end + max(MIN_PREVIEW_INTERVAL, PREVIEW_PAUSE * (end - now))

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def add_image(self, info: Info) -> None:
        if "seed" in info and info.get("path", "") is not None:  # None: it was not saved
            self.on_image(len(self.images), info)
        self.images.append(info)
        self.step = 0

    def describe_stop(self) -> str:
        """Return the final message of a job that was stopped."""
        unfinished = sum("unfinished" in info for info in self.images)
        counts = f"{len(self.images) - unfinished} of {self.total} images are finished"
        if self.stopped_at is None:
            return f"stopped between steps, {counts}"
        return (
            f"stopped at step {self.stopped_at} of {self.steps}, {counts}, {unfinished} unfinished"
        )

    def _describe_step(self) -> str:
        first = len(self.images) + 1
        last = min(first + self._batch - 1, self.total)
        images = f"{first}–{last}" if last > first else f"{first}"
        text = f"image {images} of {self.total}, step {self.step} of {self.steps}"
        elapsed = time.monotonic() - self._start
        left = elapsed / self.fraction - elapsed if self.fraction else 0
        return f"{text}, {left:.0f} s left" if elapsed > 1 and left >= 1 else text
