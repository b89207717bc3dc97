"""Signals of a training run: SIGTERM and SIGINT stop it after the step, SIGUSR1 saves a state.

A second SIGTERM or SIGINT has its usual effect, and ends the process immediately.
"""

import signal
from collections.abc import Callable
from types import FrameType

__all__ = ["SignalHandler"]

# SIGBREAK: Ctrl+Break on Windows, where there is no SIGUSR1
SIGNAL_ACTIONS = {"SIGTERM": "stop", "SIGINT": "stop", "SIGBREAK": "stop", "SIGUSR1": "save"}
Handler = Callable[[int, FrameType | None], object] | int | None


class SignalHandler:
    """Collects the actions that signals request, within its context."""

    def __init__(self) -> None:
        self.pending_actions: list[str] = []
        self.previous_handlers: dict[int, Handler] = {}

    def take_actions(self) -> set[str]:
        """Return and clear the requested actions, "stop" and "save"."""
        count = len(self.pending_actions)  # a signal may add one at any moment
        actions = set(self.pending_actions[:count])
        del self.pending_actions[:count]
        return actions

    def __enter__(self) -> "SignalHandler":
        for number in signal.valid_signals():
            if isinstance(number, signal.Signals) and number.name in SIGNAL_ACTIONS:
                self.previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        action = SIGNAL_ACTIONS[signal.Signals(number).name]
        if action == "stop":
            signal.signal(number, self.previous_handlers[number])
        self.pending_actions.append(action)
