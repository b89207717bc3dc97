"""Samplers of consistency models: each step goes to the estimate, and adds new noise."""

import math
from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.samplers.common import Denoise, NoiseSource, Steps, pair_sigmas, sampler

__all__ = ["lcm", "tcd"]


@sampler
def lcm(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, noise_source: NoiseSource | None = None
) -> Steps:
    """Sample a latent consistency model (arXiv:2310.04378): x' = D + sigma' noise."""
    for sigma, sigma_next in pair_sigmas(sigmas):
        x = denoised = denoise(x, sigma)
        if noise_source and sigma_next > 0:
            x = x + noise_source(x) * sigma_next
        x = yield x, denoised


@sampler
def tcd(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.3,
    scale_timestep: Callable[[float, float], float] = lambda sigma, factor: factor * sigma,
    noise_source: NoiseSource | None = None,
) -> Steps:
    """Sample by TCD (arXiv:2402.19159): step below the next level, then add noise up to it.

        x' = D + (x - D) sigma_down / sigma + sqrt(sigma'² - sigma_down²) noise

    Args:
        eta: The paper's gamma, 0 … 1: 0 is DDIM, 1 steps down to the lowest level.
        scale_timestep: (sigma, factor) -> sigma at `factor` times the timestep of sigma, see
            `NoiseSchedule.scale_timestep`.
    """
    for sigma, sigma_next in pair_sigmas(sigmas):
        denoised = denoise(x, sigma)
        sigma_down = min(scale_timestep(sigma_next, 1 - eta), sigma_next)
        x = denoised + (x - denoised) * (sigma_down / sigma)
        if noise_source:
            x = x + noise_source(x) * math.sqrt(sigma_next**2 - sigma_down**2)
        x = yield x, denoised
