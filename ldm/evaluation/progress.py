"""Progress of long evaluations, as a bar on a terminal or as lines in a log."""

import logging
import time

from tqdm import tqdm

from ldm.generate.listener import is_progress_hidden

__all__ = ["Progress"]

LOG_INTERVAL = 60  # seconds between log lines

log = logging.getLogger(__name__)


class Progress:
    """A progress bar on a terminal, else a log line per minute with the remaining time."""

    def __init__(self, total: int, title: str) -> None:
        self.total = total
        self.title = title
        self.count = 0
        self.start_time = self.last_log_time = time.monotonic()
        self.bar = tqdm(total=total, desc=title, unit="image", disable=is_progress_hidden())

    def add(self, count: int) -> None:
        """Add a number of finished images."""
        self.count += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self.last_log_time > LOG_INTERVAL:
            self.last_log_time = now
            seconds_per_image = (now - self.start_time) / self.count
            minutes_left = seconds_per_image * (self.total - self.count) / 60
            log.info(
                "%s: %d of %d images, %.2f s each, %.0f minutes left",
                self.title, self.count, self.total, seconds_per_image, minutes_left,
            )  # fmt: skip

    def close(self) -> None:
        """Close the bar."""
        self.bar.close()
