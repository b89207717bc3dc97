"""DPM-Solver (arXiv:2206.00927) of mixed orders, which chooses its own sigmas between two.

These are the first and the last of `sigmas`; if the last is 0, the one before it, as in A1111, so
that the result keeps that noise. A single step to 0 is Euler's; A1111 would return x unchanged.
`callback` is called once for each step of `sigmas`, several times for a step of higher order.

In terms of sigma, DPM-Solver's steps are those of Euler's method with corrected slopes: its lambda
is -ln sigma, and its eps the slope (x - denoised) / sigma.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.samplers.common import (
    Constrain,
    Denoise,
    NoiseSource,
    StepCallback,
    compute_log_ratio,
    get_ancestral_step,
)
from ldm.diffusion.samplers.single_step import euler

__all__ = ["dpm_adaptive", "dpm_fast"]


def dpm_fast(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise_source: NoiseSource | None = None,
    callback: StepCallback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by DPM-Solver-fast: steps of order 3, evenly in log sigma, the last of lower order.

    A step of order k takes k evaluations; their total is the number of steps of `sigmas`.
    """
    sigma_start, sigma_end = _get_sigma_range(sigmas)
    if sigma_start == sigma_end:
        return euler(denoise, x, sigmas, callback=callback, constrain=constrain)
    num_evaluations = len(sigmas) - 1
    full_steps, remainder = divmod(num_evaluations, 3)
    orders = [3] * full_steps + [remainder] if remainder else [3] * (full_steps - 1) + [2, 1]
    log_sigmas = torch.linspace(
        math.log(sigma_start), math.log(sigma_end), len(orders) + 1, dtype=torch.float64
    )
    step_sigmas = [sigma_start, *log_sigmas[1:-1].exp().tolist(), sigma_end]
    for i, order in enumerate(orders):
        sigma, sigma_next = step_sigmas[i], step_sigmas[i + 1]
        x = constrain(x, sigma) if constrain else x
        sigma_down, sigma_up = _get_bounded_ancestral_step(sigma, sigma_next, sigma_end, eta)
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        if order == 1:
            x = x + slope * (sigma_down - sigma)
        elif order == 2:
            x, _ = _step_order_2(denoise, x, sigma, sigma_down, slope, 1 / 2)
        else:
            _, x = _step_orders_2_and_3(denoise, x, sigma, sigma_down, slope)
        if noise_source:
            x = x + noise_source(x) * sigma_up
        if callback:
            for step in range(sum(orders[:i]), sum(orders[: i + 1])):
                callback(step, x, denoised)
    return x


def dpm_adaptive(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    noise_source: NoiseSource | None = None,
    callback: StepCallback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by DPM-Solver-23, with steps adapted to the difference between orders 2 and 3.

    The whole batch has the same steps. The defaults are k-diffusion's.

    Args:
        rtol, atol: Relative and absolute tolerance.
        h_init: Initial step size, in log sigma.
        pcoeff, icoeff, dcoeff: Coefficients of the PID controller of the step size.
        accept_safety: A step is rejected if the step size would be multiplied by less than this.
    """
    sigma_start, sigma_end = _get_sigma_range(sigmas)
    if sigma_start == sigma_end:
        return euler(denoise, x, sigmas, callback=callback, constrain=constrain)
    error_order = 1.5 if eta else 3  # noise lowers it, as in k-diffusion
    exponents = [pcoeff + icoeff + dcoeff, -(pcoeff + 2 * dcoeff), dcoeff]
    sigma, h, steps_done = sigma_start, h_init, 0
    x_prev = x  # the last accepted result of order 2
    inverse_errors: list[float] = []  # newest first
    while compute_log_ratio(sigma, sigma_end) > 1e-5:
        x = constrain(x, sigma) if constrain else x
        sigma_next = max(sigma * math.exp(-h), sigma_end)
        sigma_down, sigma_up = _get_bounded_ancestral_step(sigma, sigma_next, sigma_end, eta)
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        x_low, x_high = _step_orders_2_and_3(denoise, x, sigma, sigma_down, slope)
        tolerance = (rtol * torch.maximum(x_low.abs(), x_prev.abs())).clamp(min=atol)
        error = float(((x_low - x_high) / tolerance).square().mean().sqrt())
        if not math.isfinite(error):  # smaller steps would not help
            return x_high
        inverse_errors = [1 / (error + 1e-8), *(inverse_errors or [1 / (error + 1e-8)] * 2)]
        h_factor = math.prod(
            inverse_error ** (exponent / error_order)
            for inverse_error, exponent in zip(inverse_errors, exponents, strict=True)
        )
        h_factor = 1 + math.atan(h_factor - 1)  # between 0.2 and 2.6
        h *= h_factor
        if h_factor < accept_safety:
            inverse_errors = inverse_errors[1:]
            continue
        inverse_errors = inverse_errors[:2]
        x_prev, x, sigma = x_low, x_high, sigma_next
        if noise_source:
            x = x + noise_source(x) * sigma_up
        if callback:
            progress = compute_log_ratio(sigma_start, sigma) / compute_log_ratio(
                sigma_start, sigma_end
            )
            steps = math.ceil(progress * (len(sigmas) - 1))
            for step in range(steps_done, steps):
                callback(step, x, denoised)
            steps_done = steps
    return x


def _get_sigma_range(sigmas: Tensor) -> tuple[float, float]:
    values = sigmas.tolist()
    return values[0], values[-1] or values[-2:][0]  # both are the only one of a run without steps


def _get_bounded_ancestral_step(
    sigma: float, sigma_next: float, sigma_end: float, eta: float
) -> tuple[float, float]:
    """Return sigma_down, at least `sigma_end`, and sigma_up; see `get_ancestral_step`."""
    sigma_down = (
        max(get_ancestral_step(sigma, sigma_next, eta)[0], sigma_end) if eta else sigma_next
    )
    return sigma_down, math.sqrt(max(sigma_next**2 - sigma_down**2, 0.0))


def _step_order_2(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, slope: Tensor, fraction: float
) -> tuple[Tensor, Tensor]:
    """Return x at sigma_next, and the change of the slope up to `fraction` of the step.

    DPM-Solver-2 with r_1 = `fraction`.
    """
    h = compute_log_ratio(sigma, sigma_next)
    sigma_mid = sigma * math.exp(-fraction * h)
    x_mid = x + slope * (sigma_mid - sigma)
    slope_change = (x_mid - denoise(x_mid, sigma_mid)) / sigma_mid - slope
    x = x + (slope + slope_change / (2 * fraction)) * (sigma_next - sigma)
    return x, slope_change


def _step_orders_2_and_3(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x at sigma_next by steps of order 2 and 3, which share an evaluation.

    DPM-Solver-3 with r_1 = 1/3 and r_2 = 2/3, and DPM-Solver-2 with r_1.
    """
    h = compute_log_ratio(sigma, sigma_next)
    x_low, slope_change_1 = _step_order_2(denoise, x, sigma, sigma_next, slope, 1 / 3)
    sigma_mid = sigma * math.exp(-2 / 3 * h)
    phi_2 = math.expm1(2 / 3 * h) / (2 / 3 * h) - 1
    x_mid = x + slope * (sigma_mid - sigma) - 2 * (sigma_mid * phi_2) * slope_change_1
    slope_change_2 = (x_mid - denoise(x_mid, sigma_mid)) / sigma_mid - slope
    phi_2 = math.expm1(h) / h - 1
    return x_low, x + slope * (sigma_next - sigma) - 3 / 2 * (sigma_next * phi_2) * slope_change_2
