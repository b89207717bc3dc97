"""What the world asks of a run while it trains.

SIGTERM, SIGINT     end after the step under way; at once if it comes again
SIGUSR1             save
"""

import signal
from types import TracebackType
from typing import Any

__all__ = ["Wishes"]

MEANINGS = {"SIGTERM": "stop", "SIGINT": "stop", "SIGUSR1": "save"}


class Wishes:
    """Signals of this process, heard inside `with`."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.kept: dict[int, Any] = {}

    def take(self) -> set[str]:
        """What was asked for since this was called last."""
        count = len(self.heard)
        taken, self.heard[:count] = set(self.heard[:count]), []
        return taken

    def __enter__(self) -> "Wishes":
        numbers = {getattr(signal, name): name for name in MEANINGS if hasattr(signal, name)}
        self.kept = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self.kept.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        wish = MEANINGS[signal.Signals(number).name]
        if wish == "stop":
            signal.signal(number, self.kept[number])
        self.heard.append(wish)
