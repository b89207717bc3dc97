"""Solvers whose steps are independent of each other."""

import math
from functools import partial

import torch
from torch import Tensor

from ldm.diffusion.samplers.common import (
    Callback,
    Constrain,
    Denoise,
    Noise,
    ancestral_step,
    churn,
    log_ratio,
    sigma_pairs,
)

__all__ = [
    "ddim",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_2s_ancestral",
    "euler",
    "euler_ancestral",
    "heun",
]


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Step along the slope dx/dsigma = (x - denoised) / sigma: Euler's method."""
    for i, (sigma, sigma_next) in enumerate(sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        if s_churn and s_tmin <= sigma <= s_tmax:
            x, sigma = churn(x, sigma, s_churn / (len(sigmas) - 1), noise)
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        x = x + slope * (sigma_next - sigma)
        if callback:
            callback(i, x, denoised)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Step to a lower noise level, then add new noise: DDIM (arXiv:2010.02502).

    Args:
        eta: Amount of new noise: 0 is deterministic, 1 is ancestral sampling as in DDPM.
    """
    for i, (sigma, sigma_next) in enumerate(sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = denoised + (x - denoised) * (sigma_down / sigma)
        if noise:
            x = x + noise(x) * sigma_up
        if callback:
            callback(i, x, denoised)
    return x


euler_ancestral = partial(ddim, eta=1.0)


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    noise: Noise = torch.randn_like,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by Heun's method (arXiv:2206.00364, algorithm 1): two evaluations per step."""
    for i, (sigma, sigma_next) in enumerate(sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        if s_churn and s_tmin <= sigma <= s_tmax:
            x, sigma = churn(x, sigma, s_churn / (len(sigmas) - 1), noise)
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        x_next = x + slope * (sigma_next - sigma)
        if sigma_next > 0:
            slope = (slope + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
        x = x + slope * (sigma_next - sigma)
        if callback:
            callback(i, x, denoised)
    return x


def dpm2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by DPM2 (arXiv:2206.00927): the slope in the middle of log sigma."""
    return dpm2_ancestral(
        denoise, x, sigmas, eta=0.0, noise=None, callback=callback, constrain=constrain
    )


def dpm2_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by ancestral DPM2: `dpm2` to a lower level, then new noise."""
    for i, (sigma, sigma_next) in enumerate(sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        slope = (x - denoised) / sigma
        if sigma_down > 0:
            middle = math.sqrt(sigma * sigma_down)
            x_middle = x + slope * (middle - sigma)
            slope = (x_middle - denoise(x_middle, middle)) / middle
        x = x + slope * (sigma_down - sigma)
        if noise:
            x = x + noise(x) * sigma_up
        if callback:
            callback(i, x, denoised)
    return x


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by ancestral DPM-Solver++ 2S: a second evaluation in the middle of log sigma."""
    for i, (sigma, sigma_next) in enumerate(sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = estimate = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        if sigma_down > 0:
            middle = math.sqrt(sigma * sigma_down)
            h = log_ratio(sigma, middle)
            x_middle = (middle / sigma) * x - math.expm1(-h) * denoised
            estimate = denoise(x_middle, middle)
        x = estimate + (x - estimate) * (sigma_down / sigma)
        if noise:
            x = x + noise(x) * sigma_up
        if callback:
            callback(i, x, denoised)
    return x
