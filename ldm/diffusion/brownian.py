"""Brownian paths over noise levels: the noise of SDE samplers as k-diffusion and A1111 draw it.

Each sample has a path of its own, which its seed fixes: half of an interval follows from the whole
by a Brownian bridge, down to any level. So the noise of a step is that of the steps into which it
may be divided, and images change little with the number of steps. The numbers are those of
torchsde's `BrownianTree` (Li et al. 2020, arXiv:2001.01328), on the CPU.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["BrownianPaths"]

DIGITS = 6  # of levels
POOL_SIZE = 24  # words of entropy
LEVELS_OF_STEP = 3


class BrownianPaths:
    """One path for each row of a batch.

    Args:
        seeds: Of the rows.
        low, high: Ends of the paths, sigmas.
    """

    def __init__(self, seeds: Sequence[int], low: float, high: float) -> None:
        self.seeds = [seed % (1 << 64) for seed in seeds]
        self.low = low
        self.high = high
        self._values: dict[float, Tensor] = {}  # at the last levels

    def __call__(self, like: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Return the noise between two levels, standard normal, of the shape of `like`."""
        before, after = self._at(sigma, like), self._at(sigma_next, like)
        return (after - before) / math.sqrt(max(abs(sigma - sigma_next), 10**-DIGITS))

    def _at(self, sigma: float, like: Tensor) -> Tensor:
        if sigma not in self._values:
            if len(self._values) == LEVELS_OF_STEP:
                self._values.pop(next(iter(self._values)))
            paths = [self._path(seed, sigma, like.shape[1:]) for seed in self.seeds]
            self._values[sigma] = torch.stack(paths).to(like.device)
        return self._values[sigma]

    def _path(self, seed: int, sigma: float, shape: torch.Size) -> Tensor:
        """Return W(sigma) - W(low) of one path."""
        start, end = round(self.low, DIGITS), round(self.high, DIGITS)
        level = min(max(round(sigma, DIGITS), start), end)
        value = torch.zeros(shape)
        increment = _draw(seed, (), shape) * math.sqrt(self.high - self.low)
        if level in (start, end):
            return increment if level == end else value
        key, depth, middle = 0, 0, start
        while middle != level:
            middle = round((start + end) / 2, DIGITS)
            before, after = middle - start, end - middle
            std = math.sqrt(before * after / (end - start))
            half = before / (end - start) * increment + std * _draw(seed, (key, depth), shape)
            key, depth = 2 * key, depth + 1
            if level < middle:
                end, increment = middle, half
            else:
                start, increment, key, value = middle, increment - half, key + 1, value + half
        return value


def _draw(seed: int, place: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Draw standard normal noise for a place in the tree."""
    words = np.random.SeedSequence(seed, spawn_key=place, pool_size=POOL_SIZE).generate_state(1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(words[0])))
