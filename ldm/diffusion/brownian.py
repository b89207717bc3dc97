"""Brownian paths over noise levels: the noise of SDE samplers as k-diffusion and A1111 draw it.

The noise of a step from sigma to sigma' is (W(sigma') - W(sigma)) / sqrt(|sigma' - sigma|), where W
is a Brownian motion that the seed of a sample fixes. So it is the sum of the noise of smaller steps
over the same interval, and images change little with the number of steps.

W is computed with the numbers of torchsde's `BrownianTree` on the CPU: from its increment over the
whole range, by halving intervals (a Brownian bridge) down to the level. Li et al. 2020
(arXiv:2001.01328), section 4.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["BrownianPaths"]

DIGITS = 6  # decimals that levels are rounded to
POOL_SIZE = 24  # of numpy's SeedSequence: torchsde's default
CACHED_LEVELS = 3  # start, middle and end of a step; the end is the start of the next one


class BrownianPaths:
    """One path for each seed, between the sigmas `low` and `high`."""

    def __init__(self, seeds: Sequence[int], low: float, high: float) -> None:
        self.seeds = [seed % (1 << 64) for seed in seeds]
        self.low = low
        self.high = high
        self._values: dict[float, Tensor] = {}  # W (B, C, h, w) at the last levels, by sigma

    def __call__(self, like: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Return the noise between two levels, standard normal, of the shape of `like`."""
        before, after = self._get_value(sigma, like), self._get_value(sigma_next, like)
        return (after - before) / math.sqrt(max(abs(sigma - sigma_next), 10**-DIGITS))

    def _get_value(self, sigma: float, like: Tensor) -> Tensor:
        if sigma not in self._values:
            if len(self._values) == CACHED_LEVELS:
                self._values.pop(next(iter(self._values)))
            values = [self._compute_value(seed, sigma, like.shape[1:]) for seed in self.seeds]
            self._values[sigma] = torch.stack(values).to(like.device)
        return self._values[sigma]

    def _compute_value(self, seed: int, sigma: float, shape: torch.Size) -> Tensor:
        """Compute W(sigma) of one path, with W(low) = 0."""
        start, end = round(self.low, DIGITS), round(self.high, DIGITS)
        level = min(max(round(sigma, DIGITS), start), end)
        value = torch.zeros(shape)  # W(start)
        increment = _draw(seed, (), shape) * math.sqrt(self.high - self.low)  # W(end) - W(start)
        if level in (start, end):
            return increment if level == end else value
        key, depth, middle = 0, 0, start  # key and depth identify a node of the tree
        while middle != level:
            middle = round((start + end) / 2, DIGITS)
            before, after = middle - start, end - middle
            std = math.sqrt(before * after / (end - start))
            first_half = before / (end - start) * increment + std * _draw(seed, (key, depth), shape)
            key, depth = 2 * key, depth + 1
            if level < middle:
                end, increment = middle, first_half
            else:
                start, increment, key = middle, increment - first_half, key + 1
                value = value + first_half
        return value


def _draw(seed: int, node: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Draw standard normal noise for a node of the tree."""
    seed_words = np.random.SeedSequence(seed, spawn_key=node, pool_size=POOL_SIZE).generate_state(1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed_words[0])))
