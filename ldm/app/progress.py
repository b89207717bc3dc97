"""Track the progress of a job: its thread writes it, the page shows it."""

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
PREVIEW_PAUSE_FACTOR = 9  # pause per duration of a preview, as TAESD is slow on a CPU
PREVIEW_COLUMNS = 4


@dataclass
class Progress(RunListener):
    """Progress of one job.

    Args:
        total: Number of images to make.
        step: Number of finished sampling steps of the current batch.
        steps: Number of all sampling steps of the current batch.
        infos: Infos of the images so far, including unfinished ones.
        warnings: Lines to append to the final message.
        preview: Grid of previews of the current batch.
        message: The current status, at the end the result.
        has_failed: Whether the message is an error.
        stop_event: Set to stop the job.
        make_previewer: Model -> function from latents to previews in [-1, 1].
        on_image: Called with (index in the run, info) of each image that the gallery shows.
    """

    total: int = 1
    step: int = 0
    steps: int = 0
    infos: list[Info] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    preview: Image.Image | None = None
    message: str = "queued"
    has_failed: bool = False
    stop_event: threading.Event = field(default_factory=threading.Event)
    make_previewer: Callable[[LatentDiffusion], Callable[[Tensor], Tensor]] = fit_preview
    on_image: Callable[[int, Info], None] = lambda index, info: None
    _previewer: Callable[[Tensor], Tensor] | None = None
    _batch_size: int = 1
    _next_preview_time: float = 0.0
    _start_time: float = field(default_factory=time.monotonic)

    @property
    def fraction(self) -> float:
        """Finished fraction of the job, 0 … 1."""
        batch_size = min(self._batch_size, self.total - len(self.infos))
        finished = len(self.infos) + batch_size * self.step / (self.steps or 1)
        return min(finished / self.total, 1.0)

    def set_message(self, message: str) -> None:
        """Set the message; raise Stop if the job should stop."""
        if self.stop_event.is_set():
            raise Stop
        self.message = message

    def on_start(self, model: LatentDiffusion, total: int) -> None:
        self.total = total
        self._previewer = self.make_previewer(model)
        self.set_message("sampling")
        self._start_time = time.monotonic()

    def on_step(self, step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        self.step, self.steps, self._batch_size = step + 1, steps, len(x)
        if self.stop_event.is_set():
            self.stopped_at = step + 1
            raise Stop(denoised)
        self.message = self._describe_step()
        now = time.monotonic()
        if self._previewer is not None and now > self._next_preview_time:
            # NaN cannot be converted to pixels; the run itself reports it.
            previews = to_pil(self._previewer(denoised.nan_to_num()))
            self.preview = make_grid(previews, PREVIEW_COLUMNS)
            end = time.monotonic()
            pause = max(MIN_PREVIEW_INTERVAL, PREVIEW_PAUSE_FACTOR * (end - now))
            self._next_preview_time = end + pause

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def add_image(self, info: Info) -> None:
        if "seed" in info and info.get("path", "") is not None:  # None = not saved
            self.on_image(len(self.infos), info)
        self.infos.append(info)
        self.step = 0

    def describe_stop(self) -> str:
        """Return the final message of a job that was stopped."""
        unfinished = sum("unfinished" in info for info in self.infos)
        counts = f"{len(self.infos) - unfinished} of {self.total} images are finished"
        if self.stopped_at is None:
            return f"stopped between steps, {counts}"
        return (
            f"stopped at step {self.stopped_at} of {self.steps}, {counts}, {unfinished} unfinished"
        )

    def _describe_step(self) -> str:
        first = len(self.infos) + 1
        last = min(first + self._batch_size - 1, self.total)
        images = f"{first}–{last}" if last > first else f"{first}"
        text = f"image {images} of {self.total}, step {self.step} of {self.steps}"
        elapsed = time.monotonic() - self._start_time
        remaining = elapsed / self.fraction - elapsed if self.fraction else 0
        return f"{text}, {remaining:.0f} s left" if elapsed > 1 and remaining >= 1 else text
