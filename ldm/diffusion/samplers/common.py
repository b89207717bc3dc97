"""Types of the samplers' arguments, and helpers for their steps."""

import math
from collections.abc import Callable, Generator
from functools import wraps
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "Constrain", "Denoise", "IntervalNoise", "NoiseSource", "StepCallback", "Steps", "add_churn",
    "choose_interval_noise", "compute_log_ratio", "compute_weighted_sum", "get_ancestral_step",
    "pair_sigmas", "sampler",
]  # fmt: skip

Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> denoised x
# like -> standard normal noise of its shape, regardless of the noise levels
NoiseSource = Callable[[Tensor], Tensor]
# (like, sigma, next sigma) -> noise of the step between them, as k-diffusion's `noise_sampler`
IntervalNoise = Callable[[Tensor, float, float], Tensor]
# (step, x after it, denoised), after each step
StepCallback = Callable[[int, Tensor, Tensor], None]
Constrain = Callable[[Tensor, float], Tensor]  # (x, sigma) -> constrained x, before each step
# yields (x, denoised) after each step, and is sent the x to continue from
Steps = Generator[tuple[Tensor, Tensor], Tensor, None]


def sampler(generate_steps: Callable[..., Steps]) -> Callable[..., Tensor]:
    """Decorate a generator of steps, (denoise, x, sigmas, options) -> Steps, to be a sampler.

    The sampler also takes `callback` and `constrain`, and returns x after the last step.
    """

    @wraps(generate_steps)
    def sample(
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        callback: StepCallback | None = None,
        constrain: Constrain | None = None,
        **options: object,
    ) -> Tensor:
        steps: Steps | None = None
        for i, sigma in enumerate(sigmas.tolist()[:-1]):
            x = constrain(x, sigma) if constrain else x
            if steps is None:
                steps = generate_steps(denoise, x, sigmas, **options)
                x, denoised = next(steps)
            else:
                x, denoised = steps.send(x)
            if callback:
                callback(i, x, denoised)
        return x

    return sample


def pair_sigmas(sigmas: Tensor) -> list[tuple[float, float]]:
    """List (sigma, next sigma) of each step."""
    return list(pairwise(sigmas.tolist()))


def add_churn(
    x: Tensor, sigma: float, gamma: float, noise_source: NoiseSource
) -> tuple[Tensor, float]:
    """Add noise to x, so that sigma grows by the factor 1 + gamma, at most √2; return both.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 2, lines 4 to 6.
    """
    sigma_hat = sigma * (1 + min(gamma, math.sqrt(2) - 1))
    return x + noise_source(x) * math.sqrt(sigma_hat**2 - sigma**2), sigma_hat


def get_ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return sigma_down, the level to step to, and sigma_up, the standard deviation of new noise.

        sigma_up = eta sigma_next sqrt(1 - (sigma_next / sigma)²)
        sigma_down² = sigma_next² - sigma_up²

    DDIM (arXiv:2010.02502), eq. 16. With eta 1, x is then distributed as after a step of DDPM.
    """
    sigma_up = eta * sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0))
    sigma_up = min(sigma_up, sigma_next)
    return math.sqrt(sigma_next**2 - sigma_up**2), sigma_up


def choose_interval_noise(
    noise_source: NoiseSource | None, interval_noise: IntervalNoise | None
) -> IntervalNoise | None:
    """Return `interval_noise`, such as a Brownian path, else `noise_source` for any levels."""
    if interval_noise is not None or noise_source is None:
        return interval_noise
    return lambda like, sigma, sigma_next: noise_source(like)


def compute_log_ratio(sigma: float, sigma_next: float) -> float:
    """Compute the length of a step, h = ln(sigma / sigma_next); infinite for a step to 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


def compute_weighted_sum(weights: tuple[float, ...] | list[float], tensors: list[Tensor]) -> Tensor:
    """Compute the sum of weights[k] * tensors[k]."""
    return torch.stack([w * x for w, x in zip(weights, tensors, strict=True)]).sum(dim=0)
