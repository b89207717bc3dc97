"""Live: what is known of a run while it goes, for whoever watches it and may stop it.

follow(live, work)   work(live) in a thread ─── watch, report ──> live ──> shown, again and again
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ldm.runtime.errors import explain

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.model import LatentDiffusion

PAUSE = 0.1  # seconds between two looks at a run, and between two previews
COLUMNS = 4  # of previews

log = logging.getLogger(__name__)


@dataclass
class Live:
    """One run.

    total: pictures to come. step, steps: of the batch at hand. made: infos of finished pictures.
    preview: what the batch will look like, side by side, a pixel for each latent pixel.
    message: where it stands, in the end how it went; `failed` says that this is an error.
    stop: set by whoever wants no more of it.
    """

    total: int = 1
    step: int = 0
    steps: int = 0
    made: list[dict[str, Any]] = field(default_factory=list)
    preview: "Image.Image | None" = None
    message: str = "waiting for its turn"
    failed: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    _look: "Callable[[Tensor], Tensor] | None" = None
    _looked: float = 0.0

    @property
    def share(self) -> float:
        """How much of the run is done, 0 … 1."""
        rows = min(1, self.total - len(self.made)) * self.step / (self.steps or 1)
        return min((len(self.made) + rows) / self.total, 1.0)

    def say(self, message: str) -> None:
        """Something new begins, unless the run is to stop."""
        from ldm.pipelines import Stop

        if self.stop.is_set():
            raise Stop
        self.message = message

    def sampling(self, model: "LatentDiffusion") -> None:
        """Sampling begins; previews are those of this model."""
        from ldm.pipelines.preview import fit_preview

        self._look = fit_preview(model)
        self.say("sampling")

    def watch(self, step: int, steps: int, x: "Tensor", denoised: "Tensor") -> None:
        """The callback of `sample`."""
        self.step, self.steps = step + 1, steps
        self.say(f"step {step + 1} of {steps}")
        now = time.monotonic()
        if self._look is not None and now - self._looked > PAUSE:
            from ldm.imaging.pixels import make_grid, to_pil

            rows = self._look(denoised.nan_to_num())
            self.preview, self._looked = make_grid(to_pil(rows), COLUMNS), now

    def report(self, info: dict[str, Any]) -> None:
        """A picture is finished."""
        self.made.append(info)
        self.step = 0


def follow(live: Live, work: Callable[[Live], str]) -> Iterator[Live]:
    """Works in a thread; yields several times a second while it does, and once more in the end.

    work: returns what to say in the end; its errors become the message.
    Whoever closes the iterator stops the run.
    """
    thread = threading.Thread(target=_run, args=(live, work), daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            yield live
            thread.join(PAUSE)
    finally:
        live.stop.set()
        thread.join()
    yield live


def _run(live: Live, work: Callable[[Live], str]) -> None:
    from ldm.pipelines import Stop

    try:
        live.message = work(live)
    except Stop:
        done = f"at step {live.step} of {live.steps}" if live.step else "between steps"
        live.message = f"stopped {done}, {len(live.made)} of {live.total} pictures are finished"
    except Exception as error:  # the edge of the program: every error becomes a line
        log.debug("a run failed", exc_info=True)
        live.message, live.failed = explain(error).replace("\n", " — "), True
    live.preview = None
