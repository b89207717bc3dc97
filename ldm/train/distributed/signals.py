"""Signals of a training run: SIGTERM and SIGINT stop it after the step, SIGUSR1 saves its state.

A second SIGTERM or SIGINT has its usual effect, and ends the process immediately.
"""

import signal
from collections.abc import Callable
from types import FrameType

__all__ = ["SignalHandler"]

# SIGBREAK: Ctrl+Break on Windows, where there is no SIGUSR1
ACTIONS = {"SIGTERM": "stop", "SIGINT": "stop", "SIGBREAK": "stop", "SIGUSR1": "save"}
Handler = Callable[[int, FrameType | None], object] | int | None


class SignalHandler:
    """Collects the actions that signals request, within its context."""

    def __init__(self) -> None:
        self.pending: list[str] = []
        self.previous: dict[int, Handler] = {}

    def take(self) -> set[str]:
        """Return the actions requested since the last call, "stop" and "save"."""
        count = len(self.pending)  # a signal may add one at any moment
        actions = set(self.pending[:count])
        del self.pending[:count]
        return actions

    def __enter__(self) -> "SignalHandler":
        for number in signal.valid_signals():
            if isinstance(number, signal.Signals) and number.name in ACTIONS:
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        action = ACTIONS[signal.Signals(number).name]
        if action == "stop":
            signal.signal(number, self.previous[number])
        self.pending.append(action)
