"""The list of unreadable files of a run, `broken.txt`, and the limit on their number."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from ldm.data.source import BatchSource

__all__ = ["UnreadableFiles"]

MIN_TRIED = 1000  # samples tried before the fraction is checked, if the total is unknown


class UnreadableFiles:
    """Lists the files that could not be read, one per line, and ends a run with too many.

    Args:
        path: The list, which all processes of a run append to and read.
        max_fraction: Fraction of all samples that may be unreadable.
        source: Source of the samples; None = their number is unknown.
    """

    def __init__(self, path: Path, max_fraction: float, source: BatchSource | None = None) -> None:
        self.path, self.source = path, source
        self.max_fraction = Fraction(str(max_fraction))  # exact: 0.01 of 100 samples is 1
        samples = None if source is None else source.get_batches_per_epoch(1)
        self.num_samples = None if samples is None else int(samples)  # in an epoch
        # Files listed before this session may be repaired: they count only if found again.
        self.previously_listed = self._read_list()
        self.listed: set[str] = set()  # listed in this session, by any process
        # Samples of an epoch by name; None = one each.
        self.name_counts: Counter[str] | None = None
        self.num_unreadable = 0  # samples of an epoch in `listed` files
        self.num_tried = 0  # samples that this process has tried to read
        self.num_failed = 0  # of these, samples that were unreadable

    def add(self, names: Sequence[str], batch_size: int) -> None:
        """Add the names that are not listed yet.

        Args:
            names: The batch's "unreadable".
            batch_size: Number of samples of the batch.
        Raises:
            ValueError: More than the allowed fraction of all samples is unreadable; if their number
                is unknown, significantly more than that of the samples that this process has read.
        """
        if not self.listed.issuperset(names):
            self._update_list(names)
            self._count_unreadable()
        self.num_failed += len(names)
        self.num_tried += batch_size
        if self.num_samples is not None:
            if self.num_unreadable > self.max_fraction * self.num_samples:
                raise self._make_error(f"{self.num_unreadable} of {self.num_samples} samples")
            return
        expected = float(self.max_fraction * self.num_tried)
        deviation = 3 * math.sqrt(expected)  # three standard deviations of a Poisson variable
        if self.num_tried >= MIN_TRIED and self.num_failed > expected + deviation:
            raise self._make_error(f"{self.num_failed} of the {self.num_tried} samples read")

    def _make_error(self, count: str) -> ValueError:
        return ValueError(
            f"{count} cannot be read, more than a fraction of {float(self.max_fraction):g}"
            f" (trainer.max_unreadable_fraction); they are listed in `{self.path}`"
        )

    def _update_list(self, names: Sequence[str]) -> None:
        """Append new names to the list, and add those of other processes to `self.listed`."""
        names_in_file = self._read_list()
        new_names = [name for name in dict.fromkeys(names) if name not in names_in_file]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in new_names)
        self.listed.update(names, self._read_list() - self.previously_listed)

    def _read_list(self) -> set[str]:
        if not self.path.exists():
            return set()
        text = self.path.read_text("utf-8", errors="surrogateescape")
        return set(text.split("\n")) - {""}

    def _count_unreadable(self) -> None:
        """Count the unreadable samples of an epoch, in which a file may be repeated."""
        if self.name_counts is None and self.source is not None:
            self.name_counts = self.source.count_names()
            if self.name_counts is not None:
                self.num_samples = self.name_counts.total()
        counts = self.name_counts
        self.num_unreadable = sum(1 if counts is None else counts[name] for name in self.listed)
