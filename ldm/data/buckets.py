"""Sizes of about one area for pictures of all proportions, so that little has to be cut off.

    size 512, step 64:   256 x 1024 … 448 x 576   512 x 512   576 x 448 … 1024 x 256

Every batch holds pictures of one size. The method is NovelAI's (2022).
"""

import math
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Buckets"]


@dataclass(frozen=True)
class Buckets:
    """A set of sizes, of at most size x size pixels each.

    size: side of the square one. step: what all sides are multiples of.
    shortest, longest: limits of the sides, by default half of `size` and twice `size`.
    """

    size: int
    step: int = 64
    shortest: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.step < 1 or self.size % self.step:
            raise ValueError(f"buckets: size {self.size} is no multiple of step {self.step}")
        if not self.sizes:
            raise ValueError(f"buckets: no sides from {self.shortest} to {self.longest}")

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """All (width, height), from tall to wide."""
        step, area = self.step, self.size**2
        shortest = self.shortest or max(step, self.size // 2)
        longest = self.longest or 2 * self.size
        sides = range(math.ceil(shortest / step) * step, longest + 1, step)
        found = set()
        for side in sides:
            other = min(area // side, longest) // step * step
            if other >= shortest:
                found |= {(side, other), (other, side)}
        return sorted(found, key=lambda size: size[0] / size[1])

    def index(self, width: int, height: int) -> int:
        """The place in `sizes` of the nearest proportions; of these, the largest area."""

        def distance(place: int) -> tuple[float, int]:
            w, h = self.sizes[place]
            return abs(math.log(w / h * height / width)), -w * h

        return min(range(len(self.sizes)), key=distance)
