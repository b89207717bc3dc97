"""Progress of a running job, shared with the thread that shows it.

follow(progress, work)    work(progress) in a thread, and the progress again and again until it ends
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ldm.generate.provenance import Info
from ldm.runtime.errors import Stop, explain

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.model import LatentDiffusion

__all__ = ["Progress", "follow"]

INTERVAL = 0.1  # seconds between two updates, and between two previews
PREVIEW_COLUMNS = 4

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far one job is.

    Args:
        total: images to make.
        step: sampling steps done of the batch at hand. steps: of it.
        images: infos of finished images.
        preview: of the batch at hand, side by side, a pixel for each latent pixel.
        message: what is going on, in the end how it went.
        has_failed: whether the message is an error.
        stop: set it to stop the job.
    """

    total: int = 1
    step: int = 0
    steps: int = 0
    images: list[Info] = field(default_factory=list)
    preview: "Image.Image | None" = None
    message: str = "queued"
    has_failed: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    _to_rgb: "Callable[[Tensor], Tensor] | None" = None
    _batch: int = 1
    _last_preview: float = 0.0

    @property
    def fraction(self) -> float:
        """How much of the job is done, 0 … 1."""
        rows = min(self._batch, self.total - len(self.images)) * self.step / (self.steps or 1)
        return min((len(self.images) + rows) / self.total, 1.0)

    def set_message(self, message: str) -> None:
        """Say what is going on; raises Stop if the job is to stop."""
        if self.stop.is_set():
            raise Stop
        self.message = message

    def begin_sampling(self, model: "LatentDiffusion") -> None:
        """Prepare previews of this model."""
        from ldm.pipelines.preview import fit_preview

        self._to_rgb = fit_preview(model)
        self.set_message("sampling")

    def on_step(self, step: int, steps: int, x: "Tensor", denoised: "Tensor") -> None:
        """The callback of `ldm.sample`."""
        self.step, self.steps, self._batch = step + 1, steps, len(x)
        self.set_message(f"step {step + 1} of {steps}")
        now = time.monotonic()
        if self._to_rgb is not None and now - self._last_preview > INTERVAL:
            from ldm.imaging.pixels import make_grid, to_pil

            rows = self._to_rgb(denoised.nan_to_num())
            self.preview, self._last_preview = make_grid(to_pil(rows), PREVIEW_COLUMNS), now

    def add_image(self, info: Info) -> None:
        """An image is finished."""
        self.images.append(info)
        self.step = 0


def follow(
    progress: Progress,
    work: Callable[[Progress], str],
    hint: Callable[[BaseException], str] = lambda error: "",
) -> Iterator[Progress]:
    """Work in a thread; yield several times a second until it ends, and once more then.

    Whoever closes the iterator stops the job.

    Args:
        work: returns what to say in the end; its errors become the message.
        hint: what to add to the message of an error.
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
        progress.message = work(progress)
    except Stop:
        when = f"at step {progress.step} of {progress.steps}" if progress.step else "between steps"
        done = f"{len(progress.images)} of {progress.total} images are finished"
        progress.message = f"stopped {when}, {done}"
    except Exception as error:  # the edge of the program: every error becomes a line
        log.debug("a job failed", exc_info=True)
        progress.message = (explain(error) + hint(error)).replace("\n", " — ")
        progress.has_failed = True
    progress.preview = None
