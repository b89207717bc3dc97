"""The list of unreadable files of a run, `broken.txt`, and the limit on their number."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from ldm.data.source import BatchSource

__all__ = ["UnreadableFiles"]

MIN_READ = 1000  # samples read before the fraction is checked, if the total is unknown


class UnreadableFiles:
    """Lists the files that could not be read, one per line, and ends a run with too many.

    Args:
        path: The list, which all processes of a run append to and read.
        limit: Fraction of all samples that may be unreadable.
        source: Source of the samples; None = their number is unknown.
    """

    def __init__(self, path: Path, limit: float, source: BatchSource | None = None) -> None:
        self.path, self.source = path, source
        self.limit = Fraction(str(limit))  # exact: 0.01 of 100 samples is 1
        samples = None if source is None else source.get_batches_per_epoch(1)
        self.total = None if samples is None else int(samples)  # samples in an epoch
        # Files listed before this session may be repaired: they count only if found again.
        self.listed_before = self._read_list()
        self.names: set[str] = set()  # listed in this session, by any process
        self.counts: Counter[str] | None = None  # samples of an epoch by name; None = one each
        self.unreadable = 0  # samples of an epoch with one of `names`
        self.local_unreadable = 0  # those of `local_read` that were unreadable
        self.local_read = 0  # samples that this process has read or tried to read

    def add(self, names: Sequence[str], read: int) -> None:
        """Add the names that are not listed yet.

        Args:
            names: The batch's "unreadable".
            read: Number of samples of the batch.
        Raises:
            ValueError: More than the limit of all samples is unreadable; or, where their number is
                unknown, significantly more than the limit among the samples read here.
        """
        if not self.names.issuperset(names):
            self._update_list(names)
            self._count_unreadable()
        self.local_unreadable += len(names)
        self.local_read += read
        if self.total is not None:
            if self.unreadable > self.limit * self.total:
                raise self._make_error(f"{self.unreadable} of {self.total} samples")
            return
        expected = float(self.limit * self.local_read)
        deviation = 3 * math.sqrt(expected)  # three standard deviations of a Poisson variable
        if self.local_read >= MIN_READ and self.local_unreadable > expected + deviation:
            raise self._make_error(f"{self.local_unreadable} of the {self.local_read} samples read")

    def _make_error(self, count: str) -> ValueError:
        return ValueError(
            f"{count} cannot be read, more than a fraction of {float(self.limit):g}"
            f" (trainer.max_unreadable_fraction); they are listed in `{self.path}`"
        )

    def _update_list(self, names: Sequence[str]) -> None:
        """Append new names to the list, and add those of other processes to `names`."""
        listed = self._read_list()
        new = [name for name in dict.fromkeys(names) if name not in listed]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in new)
        self.names.update(names, self._read_list() - self.listed_before)

    def _read_list(self) -> set[str]:
        if not self.path.exists():
            return set()
        text = self.path.read_text("utf-8", errors="surrogateescape")
        return set(text.split("\n")) - {""}

    def _count_unreadable(self) -> None:
        """Count the unreadable samples of an epoch, in which a file may be repeated."""
        if self.counts is None and self.source is not None:
            self.counts = self.source.count_names()
            if self.counts is not None:
                self.total = self.counts.total()
        counts = self.counts
        self.unreadable = sum(1 if counts is None else counts[name] for name in self.names)
