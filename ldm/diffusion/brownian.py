"""Brownian paths over sigma: the noise of SDE samplers as k-diffusion and A1111 draw it.

The noise of a step from sigma to sigma' is (W(sigma') - W(sigma)) / sqrt(|sigma' - sigma|), where W
is a Brownian motion that the seed of a sample fixes. So the increment of a step is the sum of those
of smaller steps over the same interval, and images change little with the number of steps.

W has the values of torchsde's `BrownianTree` on the CPU: starting from its increment over the whole
range, intervals are halved (a Brownian bridge) down to sigma. Li et al. 2020 (arXiv:2001.01328),
section 4.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["BrownianPaths"]

SIGMA_DECIMALS = 6  # sigmas are rounded to these, as in torchsde
SEED_POOL_SIZE = 24  # of numpy's SeedSequence: torchsde's default
MAX_CACHED_SIGMAS = 3  # start, middle and end of a step; the end is the start of the next one


class BrownianPaths:
    """One path for each seed, from sigma_min to sigma_max."""

    def __init__(self, seeds: Sequence[int], sigma_min: float, sigma_max: float) -> None:
        self.seeds = [seed % (1 << 64) for seed in seeds]
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self._values: dict[float, Tensor] = {}  # W (B, C, h, w) at the last sigmas

    def __call__(self, like: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Return the standard normal noise of a step, in the shape of `like`."""
        before, after = self._get_values(sigma, like), self._get_values(sigma_next, like)
        return (after - before) / math.sqrt(max(abs(sigma - sigma_next), 10**-SIGMA_DECIMALS))

    def _get_values(self, sigma: float, like: Tensor) -> Tensor:
        if sigma not in self._values:
            if len(self._values) == MAX_CACHED_SIGMAS:
                self._values.pop(next(iter(self._values)))
            values = [self._compute_value(seed, sigma, like.shape[1:]) for seed in self.seeds]
            self._values[sigma] = torch.stack(values).to(like.device)
        return self._values[sigma]

    def _compute_value(self, seed: int, sigma: float, shape: torch.Size) -> Tensor:
        """Compute W(sigma) of one path, with W(sigma_min) = 0."""
        start, end = round(self.sigma_min, SIGMA_DECIMALS), round(self.sigma_max, SIGMA_DECIMALS)
        sigma = min(max(round(sigma, SIGMA_DECIMALS), start), end)
        value = torch.zeros(shape)  # W(start)
        std = math.sqrt(self.sigma_max - self.sigma_min)
        increment = std * _draw_noise(seed, (), shape)  # W(end) - W(start)
        if sigma in (start, end):
            return increment if sigma == end else value
        key, depth, middle = 0, 0, start  # key and depth identify a node of the tree
        while middle != sigma:
            middle = round((start + end) / 2, SIGMA_DECIMALS)
            before, after = middle - start, end - middle
            std = math.sqrt(before * after / (end - start))
            noise = _draw_noise(seed, (key, depth), shape)
            first_half = before / (end - start) * increment + std * noise
            key, depth = 2 * key, depth + 1
            if sigma < middle:
                end, increment = middle, first_half
            else:
                start, increment, key = middle, increment - first_half, key + 1
                value = value + first_half
        return value


def _draw_noise(seed: int, node: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Draw standard normal noise for a node of the tree."""
    sequence = np.random.SeedSequence(seed, spawn_key=node, pool_size=SEED_POOL_SIZE)
    (node_seed,) = sequence.generate_state(1).tolist()
    return torch.randn(shape, generator=torch.Generator().manual_seed(node_seed))
