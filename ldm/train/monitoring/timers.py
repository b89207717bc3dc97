"""Timers of a run: when an action is due, and how long a step took."""

import math
import time
from collections import deque
from statistics import median

__all__ = ["StepTimer", "Trigger"]


class Trigger:
    """Tells, at each step, whether an action is due.

    Args:
        minutes, steps: Intervals between actions; None or 0 = never.
        early: Whether the action is also due at steps 1, 2, 4, 8 ….
    """

    def __init__(
        self, *, minutes: float | None = None, steps: float | None = None, early: bool = False
    ) -> None:
        self.minutes = minutes or math.inf
        self.steps = steps
        self.early = early
        self.last_due_time = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether the action is due now; if so, count the minutes from now again."""
        is_due_by_time = time.monotonic() - self.last_due_time >= 60 * self.minutes
        is_due_early = self.early and step & (step - 1) == 0  # powers of two
        is_due_by_steps = self.steps is not None and self.steps > 0 and step % self.steps == 0
        if is_due := is_due_by_time or is_due_early or is_due_by_steps:
            self.last_due_time = time.monotonic()
        return is_due


class StepTimer:
    """Measures the training time of a step, in seconds, between `start` and `stop`.

    A step counts as at most MAX_RATIO median steps: a longer one means that the process was
    suspended (SIGSTOP, a closed laptop).
    """

    MAX_RATIO = 10

    def __init__(self) -> None:
        self.durations: deque[float] = deque(maxlen=101)
        self.start()

    def start(self) -> None:
        self.start_time = time.monotonic()

    def stop(self) -> float:
        """Return the seconds since `start` or the last `stop`."""
        seconds = time.monotonic() - self.start_time
        median_seconds = median(self.durations) if len(self.durations) >= 5 else math.inf
        self.durations.append(seconds)
        self.start()
        return min(seconds, self.MAX_RATIO * median_seconds)
