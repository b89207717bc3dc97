"""Progress of a job that runs in a thread, for the page that shows it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from ldm.generate.output import RunListener
from ldm.generate.provenance import Info
from ldm.imaging.pixels import make_grid, to_pil
from ldm.model import LatentDiffusion
from ldm.pipelines.preview import fit_preview
from ldm.runtime.errors import Stop, explain

__all__ = ["Progress", "follow"]

INTERVAL = 0.1  # seconds between two updates, and between two previews
PREVIEW_COLUMNS = 4

log = logging.getLogger(__name__)


@dataclass
class Progress(RunListener):
    """Progress of one job.

    Args:
        total: number of images to make.
        step: finished sampling steps of the current batch.
        steps: all sampling steps of the current batch.
        images: infos of finished images.
        warnings: lines that follow the result.
        preview: grid of the current batch, a pixel for each latent pixel.
        message: the current status, finally the result.
        has_failed: whether the message is an error.
        stop: set to stop the job.
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
    _to_rgb: Callable[[Tensor], Tensor] | None = None
    _batch: int = 1
    _last_preview: float = 0.0

    @property
    def fraction(self) -> float:
        """Fraction of the job that is done, 0 … 1."""
        batch = min(self._batch, self.total - len(self.images))
        done = len(self.images) + batch * self.step / (self.steps or 1)
        return min(done / self.total, 1.0)

    def set_message(self, message: str) -> None:
        """Set the message; raise Stop if the job is to stop."""
        if self.stop.is_set():
            raise Stop
        self.message = message

    def begin(self, model: LatentDiffusion, total: int) -> None:
        self.total = total
        self._to_rgb = fit_preview(model)
        self.set_message("sampling")

    def on_step(self, step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        self.step, self.steps, self._batch = step + 1, steps, len(x)
        self.set_message(f"step {step + 1} of {steps}")
        now = time.monotonic()
        if self._to_rgb is not None and now - self._last_preview > INTERVAL:
            previews = to_pil(self._to_rgb(denoised.nan_to_num()))
            self.preview = make_grid(previews, PREVIEW_COLUMNS)
            self._last_preview = now

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def add_image(self, info: Info) -> None:
        self.images.append(info)
        self.step = 0


def follow(
    progress: Progress,
    work: Callable[[Progress], str],
    hint: Callable[[BaseException], str] = lambda error: "",
) -> Iterator[Progress]:
    """Run `work` in a thread; yield the progress every INTERVAL, and once when it has ended.

    Closing the iterator stops the job.

    Args:
        work: returns the final message; an error becomes the message, too.
        hint: returns what to append to the message of an error.
    """
    thread = threading.Thread(target=_run, args=(progress, work, hint), daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            yield progress
            thread.join(INTERVAL)
    finally:
        progress.stop.set()
        thread.join()
    yield progress


def _run(
    progress: Progress,
    work: Callable[[Progress], str],
    hint: Callable[[BaseException], str],
) -> None:
    try:
        progress.message = "; ".join([work(progress), *progress.warnings])
    except Stop:
        when = f"at step {progress.step} of {progress.steps}" if progress.step else "between steps"
        done = f"{len(progress.images)} of {progress.total} images are finished"
        progress.message = f"stopped {when}, {done}"
    except Exception as error:  # top level: any error becomes the message
        log.debug("a job failed", exc_info=True)
        progress.message = (explain(error) + hint(error)).replace("\n", " — ")
        progress.has_failed = True
    progress.preview = None
