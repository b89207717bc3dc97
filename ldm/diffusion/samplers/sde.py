"""SDE-DPM-Solver++ (arXiv:2211.01095): solvers of the diffusion SDE.

Their noise is independent in each step, or that of a path between its levels.
"""

import math
from functools import partial

from torch import Tensor

from ldm.diffusion.samplers.common import (
    Callback,
    Constrain,
    Denoise,
    IntervalNoise,
    Noise,
    ancestral_step,
    interval_noise,
    log_ratio,
    sigma_pairs,
)

__all__ = ["dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "dpmpp_sde"]


def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    path: IntervalNoise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by SDE-DPM-Solver++ of order 2, single step: noise in the middle of each step, too."""
    draw = interval_noise(noise, path)
    for i, (sigma, sigma_next) in enumerate(sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = estimate = denoise(x, sigma)
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            sigma_down, sigma_up = ancestral_step(sigma, middle, eta)
            x_middle = denoised + (x - denoised) * (sigma_down / sigma)
            if draw:
                x_middle = x_middle + draw(x, sigma, middle) * sigma_up
            estimate = denoise(x_middle, middle)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = estimate + (x - estimate) * (sigma_down / sigma)
        if draw:
            x = x + draw(x, sigma, sigma_next) * sigma_up
        if callback:
            callback(i, x, denoised)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    heun: bool = False,
    noise: Noise | None = None,
    path: IntervalNoise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by SDE-DPM-Solver++ 2M (arXiv:2211.01095, eq. 19), the stochastic `dpmpp_2m`.

    Args:
        eta: Amount of new noise: 0 is `dpmpp_2m`.
        heun: Whether to integrate the line through two estimates exactly, else by its midpoint.
    """
    old_denoised, h_last = None, 0.0
    draw = interval_noise(noise, path)
    for i, (sigma, sigma_next) in enumerate(sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        h = log_ratio(sigma, sigma_next)
        estimate = denoised
        eta_h = eta * h if eta else 0.0
        if old_denoised is not None and sigma_next > 0:
            k = h + eta_h
            weight = 1 / -math.expm1(-k) - 1 / k if heun else 1 / 2
            estimate = denoised + (denoised - old_denoised) * (h / h_last * weight)
        x = (sigma_next / sigma) * math.exp(-eta_h) * x - math.expm1(-h - eta_h) * estimate
        if draw:
            x = x + draw(x, sigma, sigma_next) * (sigma_next * math.sqrt(-math.expm1(-2 * eta_h)))
        old_denoised, h_last = denoised, h
        if callback:
            callback(i, x, denoised)
    return x


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    path: IntervalNoise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by SDE-DPM-Solver++ 3M: the parabola through the last three estimates."""
    older: list[tuple[Tensor, float]] = []  # estimates with the length of their step, newest first
    draw = interval_noise(noise, path)
    for i, (sigma, sigma_next) in enumerate(sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        h = log_ratio(sigma, sigma_next)
        k = h * (1 + eta)
        x = math.exp(-k) * x - math.expm1(-k) * denoised
        if sigma_next > 0 and older:
            phi_2 = math.expm1(-k) / k + 1
            ratio = older[0][1] / h
            first = (denoised - older[0][0]) / ratio
            if len(older) > 1:
                ratio_2 = older[1][1] / h
                second = (older[0][0] - older[1][0]) / ratio_2
                bend = (first - second) / (ratio + ratio_2)
                first = first + ratio * bend
                x = x - (phi_2 / k - 0.5) * bend
            x = x + phi_2 * first
        if draw:
            x = x + draw(x, sigma, sigma_next) * (
                sigma_next * math.sqrt(-math.expm1(-2 * eta * h) if eta else 0.0)
            )
        older = [(denoised, h), *older[:1]]
        if callback:
            callback(i, x, denoised)
    return x


dpmpp_2m_sde_heun = partial(dpmpp_2m_sde, heun=True)
