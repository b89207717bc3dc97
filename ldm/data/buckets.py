"""Aspect-ratio buckets: sizes of similar area, so that images are cropped little.

    size 512, step 64:   256 x 1024 … 448 x 576   512 x 512   576 x 448 … 1024 x 256

Every batch holds images of one size. The method is NovelAI's (2022).
"""

import math
from dataclasses import dataclass
from functools import cached_property

from ldm.runtime.errors import ArgumentError

__all__ = ["Buckets"]


@dataclass(frozen=True)
class Buckets:
    """Bucket sizes of at most size x size pixels each.

    Args:
        size: Side of the square bucket, in pixels.
        step: Number of pixels that all sides are multiples of.
        shortest: Minimum side; None = half of `size`.
        longest: Maximum side; None = twice `size`.
    Raises:
        ArgumentError: `size` is not a multiple of `step`, or no bucket fits the limits.
    """

    size: int
    step: int = 64
    shortest: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.step < 1 or self.size % self.step:
            raise ArgumentError(f"buckets: size {self.size} is not a multiple of step {self.step}")
        if not self.sizes:
            shortest, longest = self._get_limits()
            raise ArgumentError(
                f"buckets: no bucket of size {self.size} has sides from {shortest} to {longest}"
            )

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """All (width, height), from tall to wide."""
        step, area = self.step, self.size**2
        shortest, longest = self._get_limits()
        sizes = set()
        for side in range(math.ceil(shortest / step) * step, longest + 1, step):
            other_side = min(area // side, longest) // step * step
            if other_side >= shortest:
                sizes |= {(side, other_side), (other_side, side)}
        return sorted(sizes, key=lambda size: size[0] / size[1])

    def find_nearest(self, width: int, height: int) -> int:
        """Return the index in `sizes` of the nearest aspect ratio; among equals, the largest."""

        def make_sort_key(index: int) -> tuple[float, int]:
            w, h = self.sizes[index]
            return abs(math.log(w / h * height / width)), -w * h

        return min(range(len(self.sizes)), key=make_sort_key)

    def _get_limits(self) -> tuple[int, int]:
        return self.shortest or max(self.step, self.size // 2), self.longest or 2 * self.size
