"""Samplers: solvers of the diffusion ODE and SDE, as pure functions.

All start from x = z + sigma·noise and integrate over `sigmas`; network, condition and guidance are
inside `denoise(x, sigma)`, which estimates the clean latent z. Read `euler` first.

    Args:
        denoise: (x, sigma) -> estimate of z, in the shape of x.
        x: z + sigmas[0]·noise, (B, C, h, w) float32.
        sigmas: Noise levels (n + 1,) float64, descending; the last may be 0.
        callback: Called after step i with (i, x at sigmas[i + 1], denoised).
        constrain: (x, sigma) -> x, applied before every step, as for inpainting.
        noise: (like) -> standard normal noise of its shape, the only source of randomness.
        s_churn, s_tmin, s_tmax: Amount of noise before steps, and where (algorithm 2).

    Returns:
        x at sigmas[-1].

Churn raises sigma to sigma (1 + min(s_churn / n, √2 - 1)) before each of n steps from s_tmin to
s_tmax. What other programs call s_noise is the standard deviation of `noise`.

Formulation: Karras et al. 2022 (arXiv:2206.00364); names as in k-diffusion.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion import names

__all__ = ["SAMPLERS", "STOCHASTIC"]

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]
Constrain = Callable[[Tensor, float], Tensor]


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
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        if s_churn and s_tmin <= sigma <= s_tmax:
            x, sigma = _churn(x, sigma, s_churn / (len(sigmas) - 1), noise)
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
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = _ancestral_step(sigma, sigma_next, eta)
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
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        if s_churn and s_tmin <= sigma <= s_tmax:
            x, sigma = _churn(x, sigma, s_churn / (len(sigmas) - 1), noise)
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        x_next = x + slope * (sigma_next - sigma)
        if sigma_next > 0:
            slope = (slope + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
        x = x + slope * (sigma_next - sigma)
        if callback:
            callback(i, x, denoised)
    return x


def plms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by PLMS (arXiv:2202.09778): Adams–Bashforth of order 4, after one Heun step."""
    weights = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}
    weights[4] = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        slope = (x - denoise(x, sigma)) / sigma
        slopes = [slope, *slopes[:3]]
        if len(slopes) == 1 and sigma_next > 0:
            x_next = x + slope * (sigma_next - sigma)
            slope = (slope + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
        elif len(slopes) > 1:
            slope = _weighted_sum(weights[len(slopes)], slopes)
        denoised = x - slope * sigma
        x = x + slope * (sigma_next - sigma)
        if callback:
            callback(i, x, denoised)
    return x


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    order: int = 4,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by linear multistep: integrates the polynomial through the last `order` slopes."""
    levels = sigmas.tolist()
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        nodes = [levels[i - j] for j in range(len(slopes))]
        x = x + _weighted_sum(_lagrange_integrals(nodes, sigma, sigma_next), slopes)
        if callback:
            callback(i, x, denoised)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    lower_order_final: bool = True,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by DPM-Solver++ 2M (arXiv:2211.01095, algorithm 2).

    Args:
        lower_order_final: Whether the last of less than 15 steps is of order 1 wherever it ends; a
            step to 0 always is.
    """
    steps = len(sigmas) - 1
    last = steps - 1 if lower_order_final and steps < 15 else steps
    old_denoised, h_last = None, 0.0
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        h = _log_ratio(sigma, sigma_next)
        estimate = denoised
        if old_denoised is not None and sigma_next > 0 and i != last:
            estimate = denoised + (denoised - old_denoised) * (h / h_last / 2)
        x = (sigma_next / sigma) * x - math.expm1(-h) * estimate
        old_denoised, h_last = denoised, h
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
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = estimate = denoise(x, sigma)
        sigma_down, sigma_up = _ancestral_step(sigma, sigma_next, eta)
        if sigma_down > 0:
            middle = math.sqrt(sigma * sigma_down)
            h = _log_ratio(sigma, middle)
            x_middle = (middle / sigma) * x - math.expm1(-h) * denoised
            estimate = denoise(x_middle, middle)
        x = estimate + (x - estimate) * (sigma_down / sigma)
        if noise:
            x = x + noise(x) * sigma_up
        if callback:
            callback(i, x, denoised)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by SDE-DPM-Solver++ 2M (arXiv:2211.01095, eq. 19), the stochastic `dpmpp_2m`.

    Args:
        eta: Amount of new noise: 0 is `dpmpp_2m`.
    """
    old_denoised, h_last = None, 0.0
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        h = _log_ratio(sigma, sigma_next)
        estimate = denoised
        if old_denoised is not None and sigma_next > 0:
            estimate = denoised + (denoised - old_denoised) * (h / h_last / 2)
        eta_h = eta * h if eta else 0.0
        x = (sigma_next / sigma) * math.exp(-eta_h) * x - math.expm1(-h - eta_h) * estimate
        if noise:
            x = x + noise(x) * (sigma_next * math.sqrt(-math.expm1(-2 * eta_h)))
        old_denoised, h_last = denoised, h
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
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = _ancestral_step(sigma, sigma_next, eta)
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


def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by SDE-DPM-Solver++ of order 2, single step: noise in the middle of each step, too."""
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = estimate = denoise(x, sigma)
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            sigma_down, sigma_up = _ancestral_step(sigma, middle, eta)
            x_middle = denoised + (x - denoised) * (sigma_down / sigma)
            if noise:
                x_middle = x_middle + noise(x) * sigma_up
            estimate = denoise(x_middle, middle)
        sigma_down, sigma_up = _ancestral_step(sigma, sigma_next, eta)
        x = estimate + (x - estimate) * (sigma_down / sigma)
        if noise:
            x = x + noise(x) * sigma_up
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
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by SDE-DPM-Solver++ 3M: the parabola through the last three estimates."""
    older: list[tuple[Tensor, float]] = []  # estimates with the length of their step, newest first
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        h = _log_ratio(sigma, sigma_next)
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
        if noise:
            x = x + noise(x) * (sigma_next * math.sqrt(-math.expm1(-2 * eta * h) if eta else 0.0))
        older = [(denoised, h), *older[:1]]
        if callback:
            callback(i, x, denoised)
    return x


def deis(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    order: int = 3,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by DEIS (arXiv:2204.13902): a polynomial in log sigma through the last slopes.

    With less than 15 steps the order falls to 1 towards the end.
    """
    levels = sigmas.tolist()
    steps = len(levels) - 1
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        if sigma_next > 0:
            used = min(len(slopes), steps - i) if steps < 15 else len(slopes)
            nodes = [math.log(levels[i - j]) for j in range(used)]
            weights = _exponential_integrals(nodes, math.log(sigma), math.log(sigma_next))
            x = x + _weighted_sum(weights, slopes[:used])
        else:
            x = denoised
        if callback:
            callback(i, x, denoised)
    return x


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    order: int = 3,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by UniPC, variant bh2 (arXiv:2302.04867): each step corrects the one before.

    The estimate at the predicted x serves as corrector, too, so there is one evaluation a step.
    """
    levels = sigmas.tolist()
    steps = len(levels) - 1
    known: list[tuple[float, Tensor]] = []  # (sigma, estimate), newest first
    x_before, used = x, 1
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        if known:
            x = _unipc_step(x_before, known, sigma, used, denoised)
        known = [(sigma, denoised), *known[: order - 1]]
        x_before = x
        used = min(order, len(known), steps - i)
        x = _unipc_step(x, known, sigma_next, used) if sigma_next > 0 else denoised
        if callback:
            callback(i, x, denoised)
    return x


def lcm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample a latent consistency model (arXiv:2310.04378): the estimate, with new noise."""
    for i, (sigma, sigma_next) in enumerate(_sigma_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        x = denoised = denoise(x, sigma)
        if noise and sigma_next > 0:
            x = x + noise(x) * sigma_next
        if callback:
            callback(i, x, denoised)
    return x


# Rows of `ldm.diffusion.names.SAMPLERS` say which function of this module each name stands for.
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    name: globals()[row.function] for name, row in names.SAMPLERS.items()
}
STOCHASTIC = frozenset(name for name, row in names.SAMPLERS.items() if row.takes_noise)


def _sigma_pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    return list(pairwise(sigmas.tolist()))


def _churn(x: Tensor, sigma: float, factor: float, noise: Noise) -> tuple[Tensor, float]:
    """Add noise to x up to a level at most √2 times sigma; return both."""
    sigma_hat = sigma * (1 + min(factor, math.sqrt(2) - 1))
    return x + noise(x) * math.sqrt(sigma_hat**2 - sigma**2), sigma_hat


def _ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return the noise level to step down to, and noise to add: down² + up² = sigma_next²."""
    up = eta * sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0))
    up = min(up, sigma_next)
    return math.sqrt(sigma_next**2 - up**2), up


def _log_ratio(sigma: float, sigma_next: float) -> float:
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


def _weighted_sum(weights: tuple[float, ...] | list[float], slopes: list[Tensor]) -> Tensor:
    return torch.stack([w * s for w, s in zip(weights, slopes, strict=True)]).sum(dim=0)


def _lagrange_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """Integrate the Lagrange basis polynomials over [start, end]; exact for up to 4 nodes."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]
    return [
        half * sum(math.prod((p - m) / (n - m) for m in nodes if m != n) for p in points)
        for n in nodes
    ]


def _exponential_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """Integrate the Lagrange basis polynomials in log sigma, times sigma, over [start, end]."""
    # Gauss-Legendre points and weights are an eigenproblem (Golub and Welsch 1969).
    k = torch.arange(1, 10, dtype=torch.float64)
    off_diagonal = k / (4 * k * k - 1).sqrt()
    matrix = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    points, vectors = torch.linalg.eigh(matrix)
    middle, half = (start + end) / 2, (end - start) / 2
    logs = middle + half * points
    weights = half * 2 * vectors[0].square() * logs.exp()
    bases = [
        math.prod(((logs - m) / (n - m) for m in nodes if m != n), start=weights) for n in nodes
    ]
    return [float(basis.sum()) for basis in bases]


def _unipc_step(
    x: Tensor,
    known: list[tuple[float, Tensor]],
    sigma_next: float,
    order: int,
    denoised_next: Tensor | None = None,
) -> Tensor:
    """Step from the newest level to the next: predict, or correct with the estimate there.

    Args:
        known: (sigma, estimate) of the last levels, newest first.
        order: Number of estimates in `known` to use.
    """
    sigma, denoised = known[0]
    h = _log_ratio(sigma, sigma_next)
    shrink = math.expm1(-h)  # e^q - 1, q = -h; also B(h) of bh2
    ratios = [-_log_ratio(level, sigma) / h for level, _ in known[1:order]]
    slopes = [
        (estimate - denoised) / ratio
        for ratio, (_, estimate) in zip(ratios, known[1:order], strict=True)
    ]
    if denoised_next is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, denoised_next - denoised]
    x = (sigma_next / sigma) * x - shrink * denoised
    if not slopes:
        return x
    phi, factorial, targets = shrink / -h - 1, 1, []
    for j in range(1, len(slopes) + 1):
        factorial *= j
        targets.append(phi * factorial / shrink)
        phi = phi / -h - 1 / (factorial * (j + 1))
    if len(slopes) == 1 and order <= 2:
        return x - shrink * 0.5 * slopes[0]
    rows = [[ratio**power for ratio in ratios] for power in range(len(slopes))]
    matrix, target = (
        torch.tensor(rows, dtype=torch.float64),
        torch.tensor(targets, dtype=torch.float64),
    )
    return x - shrink * _weighted_sum(torch.linalg.solve(matrix, target).tolist(), slopes)
