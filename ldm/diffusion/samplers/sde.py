"""SDE-DPM-Solver++ (arXiv:2211.01095): solvers of the diffusion SDE.

The noise of a step is independent of other steps, or the increment of a Brownian path, see
`brownian`. A step of length h = ln(sigma / sigma') with eta, the amount of noise, decays x like one
of length k = (1 + eta) h, and adds noise of standard deviation sigma' sqrt(1 - e^(-2 eta h)).
"""

import math
from functools import partial

from torch import Tensor

from ldm.diffusion.samplers.common import (
    Denoise,
    IntervalNoise,
    NoiseSource,
    Steps,
    choose_interval_noise,
    compute_log_ratio,
    get_ancestral_step,
    pair_sigmas,
    sampler,
)

__all__ = ["dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "dpmpp_sde"]


@sampler
def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise_source: NoiseSource | None = None,
    interval_noise: IntervalNoise | None = None,
) -> Steps:
    """Sample by SDE-DPM-Solver++ of order 2, single step, as k-diffusion's `sample_dpmpp_sde`.

    Like `dpmpp_2s_ancestral`, but also with noise in the middle of each step.
    """
    draw_noise = choose_interval_noise(noise_source, interval_noise)
    for sigma, sigma_next in pair_sigmas(sigmas):
        denoised = denoised_2 = denoise(x, sigma)
        if sigma_next > 0:
            sigma_mid = math.sqrt(sigma * sigma_next)
            sigma_down, sigma_up = get_ancestral_step(sigma, sigma_mid, eta)
            x_mid = denoised + (x - denoised) * (sigma_down / sigma)
            if draw_noise:
                x_mid = x_mid + draw_noise(x, sigma, sigma_mid) * sigma_up
            denoised_2 = denoise(x_mid, sigma_mid)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, eta)
        x = denoised_2 + (x - denoised_2) * (sigma_down / sigma)
        if draw_noise:
            x = x + draw_noise(x, sigma, sigma_next) * sigma_up
        x = yield x, denoised


@sampler
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    heun: bool = False,
    noise_source: NoiseSource | None = None,
    interval_noise: IntervalNoise | None = None,
) -> Steps:
    """Sample by SDE-DPM-Solver++ 2M (arXiv:2211.01095, eq. 19), the stochastic `dpmpp_2m`.

        x' = e^-k x - (e^-k - 1) (D + weight h / h_prev (D - D_prev)) + noise

    Args:
        eta: Amount of new noise: 0 is `dpmpp_2m`.
        heun: Whether to integrate the line through the last two estimates exactly, so that weight
            is 1 / (1 - e^-k) - 1 / k, instead of taking its value at the midpoint, 1 / 2.
    """
    denoised_prev, h_prev = None, 0.0
    draw_noise = choose_interval_noise(noise_source, interval_noise)
    for sigma, sigma_next in pair_sigmas(sigmas):
        denoised = denoise(x, sigma)
        h = compute_log_ratio(sigma, sigma_next)
        extrapolated = denoised
        eta_h = eta * h if eta else 0.0
        if denoised_prev is not None and sigma_next > 0:
            k = h + eta_h
            weight = 1 / -math.expm1(-k) - 1 / k if heun else 1 / 2
            extrapolated = denoised + (denoised - denoised_prev) * (h / h_prev * weight)
        x = (sigma_next / sigma) * math.exp(-eta_h) * x - math.expm1(-h - eta_h) * extrapolated
        if draw_noise:
            x = x + draw_noise(x, sigma, sigma_next) * (
                sigma_next * math.sqrt(-math.expm1(-2 * eta_h))
            )
        denoised_prev, h_prev = denoised, h
        x = yield x, denoised


@sampler
def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise_source: NoiseSource | None = None,
    interval_noise: IntervalNoise | None = None,
) -> Steps:
    """Sample by SDE-DPM-Solver++ 3M, as k-diffusion's `sample_dpmpp_3m_sde`.

    It integrates the parabola through the last three estimates; in the first two steps, a constant
    and a line.
    """
    history: list[tuple[Tensor, float]] = []  # (estimate, h) of earlier steps, newest first
    draw_noise = choose_interval_noise(noise_source, interval_noise)
    for sigma, sigma_next in pair_sigmas(sigmas):
        denoised = denoise(x, sigma)
        h = compute_log_ratio(sigma, sigma_next)
        k = h * (1 + eta)
        x = math.exp(-k) * x - math.expm1(-k) * denoised
        if sigma_next > 0 and history:
            phi_2 = math.expm1(-k) / k + 1
            ratio = history[0][1] / h
            slope = (denoised - history[0][0]) / ratio
            if len(history) > 1:
                ratio_2 = history[1][1] / h
                older_slope = (history[0][0] - history[1][0]) / ratio_2
                curvature = (slope - older_slope) / (ratio + ratio_2)
                slope = slope + ratio * curvature
                x = x - (phi_2 / k - 0.5) * curvature
            x = x + phi_2 * slope
        if draw_noise:
            x = x + draw_noise(x, sigma, sigma_next) * (
                sigma_next * math.sqrt(-math.expm1(-2 * eta * h) if eta else 0.0)
            )
        history = [(denoised, h), *history[:1]]
        x = yield x, denoised


dpmpp_2m_sde_heun = partial(dpmpp_2m_sde, heun=True)
