"""When a run does what it does beside training, and how long it has trained."""

import math
import time
from collections import deque
from statistics import median

from ldm.train.config.schema import Callbacks

__all__ = ["Clock", "Every", "cadences"]


def cadences(options: Callbacks) -> dict[str, "Every"]:
    """When to do what, by the name of the method of a `Run`; options: `lightning.callbacks`."""
    early = options.image_early
    return {
        "save": Every(minutes=options.save_minutes, steps=options.save_steps),
        "draw": Every(minutes=options.image_minutes, steps=options.image_steps, early=early),
        "validate": Every(steps=options.validate_steps),
        "export_step": Every(steps=options.export_steps),
    }


class Every:
    """True now and then: after so many minutes, so many steps, or at steps 1, 2, 4, 8 … (early)."""

    def __init__(
        self, *, minutes: float | None = None, steps: float | None = None, early: bool = False
    ) -> None:
        self.minutes, self.steps, self.early = minutes or math.inf, steps, early
        self.last = time.monotonic()

    def __call__(self, step: int) -> bool:
        late = time.monotonic() - self.last >= 60 * self.minutes
        early = self.early and step & (step - 1) == 0
        if late or early or (self.steps and step % self.steps == 0):
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
