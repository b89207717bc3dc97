"""Types of the samplers' arguments, and parts of steps that several samplers share."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "Callback",
    "Constrain",
    "Denoise",
    "IntervalNoise",
    "Noise",
    "ancestral_step",
    "churn",
    "interval_noise",
    "log_ratio",
    "sigma_pairs",
    "weighted_sum",
]

Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> denoised x
Noise = Callable[[Tensor], Tensor]  # like -> standard normal noise in its shape
IntervalNoise = Callable[[Tensor, float, float], Tensor]  # (like, sigma, next sigma) -> noise
Callback = Callable[[int, Tensor, Tensor], None]  # (step, x after it, denoised), after each step
Constrain = Callable[[Tensor, float], Tensor]  # (x, sigma) -> changed x, before each step


def sigma_pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """Return (sigma, next sigma) of each step."""
    return list(pairwise(sigmas.tolist()))


def churn(x: Tensor, sigma: float, factor: float, noise: Noise) -> tuple[Tensor, float]:
    """Add noise to x, raising sigma by 1 + factor, at most √2; return x and the new sigma."""
    sigma_hat = sigma * (1 + min(factor, math.sqrt(2) - 1))
    return x + noise(x) * math.sqrt(sigma_hat**2 - sigma**2), sigma_hat


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return (sigma to step down to, noise to add then): down² + up² = sigma_next².

    Args:
        eta: 0 adds no noise, 1 as much as DDPM.
    """
    up = eta * sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0))
    up = min(up, sigma_next)
    return math.sqrt(sigma_next**2 - up**2), up


def interval_noise(noise: Noise | None, path: IntervalNoise | None) -> IntervalNoise | None:
    """Return the path, else noise that is independent in each step, else None."""
    if path is not None or noise is None:
        return path
    return lambda like, sigma, sigma_next: noise(like)


def log_ratio(sigma: float, sigma_next: float) -> float:
    """Return the length of a step in log sigma, infinite for a step to 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


def weighted_sum(weights: tuple[float, ...] | list[float], slopes: list[Tensor]) -> Tensor:
    """Return the weighted sum of slopes."""
    return torch.stack([w * s for w, s in zip(weights, slopes, strict=True)]).sum(dim=0)
