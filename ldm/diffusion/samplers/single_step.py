"""Single-step solvers: a step does not use earlier estimates.

A sampler repeats a step, (denoise, x, sigma, next sigma, denoised) -> x at the next sigma, by one
of two functions: `sample_with_churn` adds noise before steps, `sample_ancestral` after them.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ldm.diffusion.samplers.common import (
    Constrain,
    Denoise,
    NoiseSource,
    StepCallback,
    Steps,
    add_churn,
    compute_log_ratio,
    get_ancestral_step,
    pair_sigmas,
    sampler,
)

__all__ = [
    "ddim", "dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral", "euler", "euler_ancestral", "heun",
    "restart",
]  # fmt: skip

Step = Callable[[Denoise, Tensor, float, float, Tensor], Tensor]


@sampler
def sample_with_churn(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    step: Step,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    noise_source: NoiseSource = torch.randn_like,
) -> Steps:
    """Sample by steps of the ODE, with noise before them (arXiv:2206.00364, algorithm 2)."""
    for sigma, sigma_next in pair_sigmas(sigmas):
        if s_churn and s_tmin <= sigma <= s_tmax:
            x, sigma = add_churn(x, sigma, s_churn / (len(sigmas) - 1), noise_source)
        denoised = denoise(x, sigma)
        x = step(denoise, x, sigma, sigma_next, denoised)
        x = yield x, denoised


@sampler
def sample_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    step: Step,
    eta: float = 1.0,
    noise_source: NoiseSource | None = None,
) -> Steps:
    """Sample by steps to sigma_down, below the next sigma, each followed by new noise.

    Args:
        eta: Amount of new noise: 0 is deterministic, 1 is ancestral sampling as in DDPM.
    """
    for sigma, sigma_next in pair_sigmas(sigmas):
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, eta)
        x = step(denoise, x, sigma, sigma_down, denoised)
        if noise_source:
            x = x + noise_source(x) * sigma_up
        x = yield x, denoised


def step_euler(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor
) -> Tensor:
    """Step by Euler's method, along the slope dx/dsigma = (x - denoised) / sigma."""
    return x + (x - denoised) / sigma * (sigma_next - sigma)


def step_heun(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor
) -> Tensor:
    """Step by Heun's method (arXiv:2206.00364, algorithm 1): two evaluations."""
    slope = (x - denoised) / sigma
    if sigma_next > 0:
        x_next = x + slope * (sigma_next - sigma)
        slope = (slope + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
    return x + slope * (sigma_next - sigma)


def step_dpm2(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor
) -> Tensor:
    """Step by DPM-Solver-2 (arXiv:2206.00927, algorithm 1).

    Euler's method with the slope at the middle of the step in log sigma.
    """
    slope = (x - denoised) / sigma
    if sigma_next > 0:
        sigma_mid = math.sqrt(sigma * sigma_next)
        x_mid = x + slope * (sigma_mid - sigma)
        slope = (x_mid - denoise(x_mid, sigma_mid)) / sigma_mid
    return x + slope * (sigma_next - sigma)


def step_ddim(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor
) -> Tensor:
    """Step by DDIM (arXiv:2010.02502, eq. 12): x' = D + (x - D) sigma' / sigma."""
    return denoised + (x - denoised) * (sigma_next / sigma)


def step_dpmpp_2s(
    denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor
) -> Tensor:
    """Step by DPM-Solver++ 2S (arXiv:2211.01095, algorithm 1).

    The estimate at sigma_m, halfway in log sigma, serves the whole step:

        x_m = (sigma_m / sigma) x - (e^-h - 1) D,    h = ln(sigma / sigma_m)
        x' = D(x_m) + (x - D(x_m)) sigma' / sigma
    """
    if sigma_next > 0:
        sigma_mid = math.sqrt(sigma * sigma_next)
        h = compute_log_ratio(sigma, sigma_mid)
        x_mid = (sigma_mid / sigma) * x - math.expm1(-h) * denoised
        denoised = denoise(x_mid, sigma_mid)
    return denoised + (x - denoised) * (sigma_next / sigma)


euler = partial(sample_with_churn, step=step_euler)
heun = partial(sample_with_churn, step=step_heun)
dpm2 = partial(sample_with_churn, step=step_dpm2)
ddim = partial(sample_ancestral, step=step_ddim, eta=0.0)
euler_ancestral = partial(sample_ancestral, step=step_ddim)
dpm2_ancestral = partial(sample_ancestral, step=step_dpm2)
dpmpp_2s_ancestral = partial(sample_ancestral, step=step_dpmpp_2s)


def restart(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise_source: NoiseSource = torch.randn_like,
    callback: StepCallback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by Heun's method with restarts from sigma 0.1 back to 2 (arXiv:2306.14878).

    As in A1111: from 20 steps on, only the first and last sigma and the number of steps are used;
    levels are those of Karras et al., with one restart, or two from 36 steps on. With fewer than 20
    steps there is no restart.
    """
    steps_done, sigma = 0, math.inf
    for levels in _split_at_restarts(sigmas.tolist()):
        if levels[0] > sigma:  # a restart
            x = x + noise_source(x) * math.sqrt(levels[0] ** 2 - sigma**2)
        x = heun(
            denoise,
            x,
            torch.tensor(levels, dtype=torch.float64),
            callback=callback and _offset_steps(callback, steps_done),
            constrain=constrain,
        )
        steps_done, sigma = steps_done + len(levels) - 1, levels[-1]
    return x


def _split_at_restarts(levels: list[float]) -> list[list[float]]:
    """Return lists of levels, separated by restarts, with as many steps in total as `levels`."""
    steps = len(levels) - 1
    if steps < 20:
        return [levels]
    restart_steps, restarts = (steps // 4, 2) if steps >= 36 else (9, 1)
    final_zero = [] if levels[-1] else [0.0]
    n = steps + 1 - restart_steps * restarts - len(final_zero)
    base = _make_karras_levels(n, levels[0], levels[-1 - len(final_zero)]) + final_zero
    # Restarts lead from the level next to 0.1 back to the one next to 2.
    i_low, i_high = (min(range(len(base)), key=lambda i: abs(base[i] - s)) for s in (0.1, 2.0))
    if not i_low > i_high or base[i_low] == 0:  # the levels do not reach from 2 to 0.1
        return [levels]
    restart_levels = _make_karras_levels(restart_steps + 1, base[i_high], base[i_low])
    return [base[: i_low + 1], *[restart_levels] * restarts, base[i_low:]]


def _make_karras_levels(n: int, sigma_max: float, sigma_min: float) -> list[float]:
    """Return n levels, evenly spaced in sigma^(1/7) (arXiv:2206.00364, eq. 5)."""
    ramp = torch.linspace(sigma_max ** (1 / 7), sigma_min ** (1 / 7), n, dtype=torch.float64)
    return (ramp**7).tolist()


def _offset_steps(callback: StepCallback, offset: int) -> StepCallback:
    return lambda i, x, denoised: callback(offset + i, x, denoised)
