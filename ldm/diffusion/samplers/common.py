"""What samplers have in common: the types of their arguments, and parts of their steps."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "Callback",
    "Constrain",
    "Denoise",
    "Noise",
    "ancestral_step",
    "churn",
    "log_ratio",
    "sigma_pairs",
    "weighted_sum",
]

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]
Constrain = Callable[[Tensor, float], Tensor]


def sigma_pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """Return each level with the next."""
    return list(pairwise(sigmas.tolist()))


def churn(x: Tensor, sigma: float, factor: float, noise: Noise) -> tuple[Tensor, float]:
    """Add noise to x up to a level at most √2 times sigma; return both."""
    sigma_hat = sigma * (1 + min(factor, math.sqrt(2) - 1))
    return x + noise(x) * math.sqrt(sigma_hat**2 - sigma**2), sigma_hat


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return the noise level to step down to, and noise to add: down² + up² = sigma_next²."""
    up = eta * sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0))
    up = min(up, sigma_next)
    return math.sqrt(sigma_next**2 - up**2), up


def log_ratio(sigma: float, sigma_next: float) -> float:
    """Return the length of a step in log sigma."""
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


def weighted_sum(weights: tuple[float, ...] | list[float], slopes: list[Tensor]) -> Tensor:
    """Return the sum of slopes, each by its weight."""
    return torch.stack([w * s for w, s in zip(weights, slopes, strict=True)]).sum(dim=0)
