"""Multistep solvers of the diffusion ODE: each step uses earlier estimates."""

import math

import torch
from torch import Tensor

from ldm.diffusion.samplers.common import (
    Callback,
    Constrain,
    Denoise,
    log_ratio,
    pair_sigmas,
    weighted_sum,
)

__all__ = ["deis", "dpmpp_2m", "lms", "plms", "unipc"]


def plms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by PLMS (arXiv:2202.09778): Adams–Bashforth of order 4, after one Heun step.

    As in the original, the weights are those of equal steps, whatever the steps are.
    """
    weights = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}
    weights[4] = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        x = constrain(x, sigma) if constrain else x
        slope = (x - denoise(x, sigma)) / sigma
        slopes = [slope, *slopes[:3]]
        if len(slopes) == 1 and sigma_next > 0:
            x_next = x + slope * (sigma_next - sigma)
            slope = (slope + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
        elif len(slopes) > 1:
            slope = weighted_sum(weights[len(slopes)], slopes)
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
    """Sample by the linear multistep method of k-diffusion.

    The polynomial through the last `order` slopes, at most 4, is integrated over sigma.
    """
    levels = sigmas.tolist()
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        nodes = [levels[i - j] for j in range(len(slopes))]
        x = x + weighted_sum(_integrate_lagrange(nodes, sigma, sigma_next), slopes)
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

        x' = (sigma' / sigma) x - (e^-h - 1) (D + h / (2 h_last) (D - D_last))
        h = ln(sigma / sigma')

    Args:
        lower_order_final: Whether the last of fewer than 15 steps is of order 1 at any sigma; a
            step to 0 always is.
    """
    steps = len(sigmas) - 1
    last = steps - 1 if lower_order_final and steps < 15 else steps
    old_denoised, h_last = None, 0.0
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        h = log_ratio(sigma, sigma_next)
        estimate = denoised
        if old_denoised is not None and sigma_next > 0 and i != last:
            estimate = denoised + (denoised - old_denoised) * (h / h_last / 2)
        x = (sigma_next / sigma) * x - math.expm1(-h) * estimate
        old_denoised, h_last = denoised, h
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

    It is integrated over sigma, with dsigma = sigma dlog sigma. With fewer than 15 steps the order
    falls to 1 towards the end.
    """
    levels = sigmas.tolist()
    steps = len(levels) - 1
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        if sigma_next > 0:
            current_order = min(len(slopes), steps - i) if steps < 15 else len(slopes)
            nodes = [math.log(levels[i - j]) for j in range(current_order)]
            weights = _integrate_lagrange_over_log(nodes, math.log(sigma), math.log(sigma_next))
            x = x + weighted_sum(weights, slopes[:current_order])
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

    The estimate at the predicted x also serves the corrector, so a step takes one evaluation.
    """
    levels = sigmas.tolist()
    steps = len(levels) - 1
    history: list[tuple[float, Tensor]] = []  # (sigma, estimate), newest first
    x_last, current_order = x, 1
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        if history:
            x = _step_unipc(x_last, history, sigma, current_order, denoised)
        history = [(sigma, denoised), *history[: order - 1]]
        x_last = x
        current_order = min(order, len(history), steps - i)
        x = _step_unipc(x, history, sigma_next, current_order) if sigma_next > 0 else denoised
        if callback:
            callback(i, x, denoised)
    return x


def _integrate_lagrange(nodes: list[float], start: float, end: float) -> list[float]:
    """Integrate the Lagrange basis polynomials of the nodes over [start, end].

    By two Gauss-Legendre points: exact for up to 4 nodes, that is up to degree 3.
    """
    middle, half = (start + end) / 2, (end - start) / 2
    points = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]
    return [
        half * sum(math.prod((p - m) / (n - m) for m in nodes if m != n) for p in points)
        for n in nodes
    ]


def _integrate_lagrange_over_log(nodes: list[float], start: float, end: float) -> list[float]:
    """Integrate the Lagrange basis polynomials in log sigma, times sigma, over [start, end]."""
    # Points and weights of Gauss-Legendre of order 10 are an eigenproblem (Golub and Welsch 1969).
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


def _step_unipc(
    x: Tensor,
    history: list[tuple[float, Tensor]],
    sigma_next: float,
    order: int,
    denoised_next: Tensor | None = None,
) -> Tensor:
    """Step from the newest level to the next: predict, or correct with the estimate there.

        x' = (sigma' / sigma) x - (e^-h - 1) (D + sum of a_m (D_m - D) / r_m)

    with the estimates D_m at ratios r_m of the step; the weights a solve R a = b of the paper.

    Args:
        history: (sigma, estimate) of the last levels, newest first.
        order: Number of estimates in `history` to use.
        denoised_next: Estimate at sigma_next for the corrector; None for the predictor.
    """
    sigma, denoised = history[0]
    h = log_ratio(sigma, sigma_next)
    shrink = math.expm1(-h)  # e^-h - 1; also B(h) of bh2
    ratios = [-log_ratio(level, sigma) / h for level, _ in history[1:order]]
    slopes = [
        (estimate - denoised) / ratio
        for ratio, (_, estimate) in zip(ratios, history[1:order], strict=True)
    ]
    if denoised_next is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, denoised_next - denoised]
    x = (sigma_next / sigma) * x - shrink * denoised
    if not slopes:
        return x
    # b_j = q phi_{j+1}(q) j! / B(h) with q = -h
    q_phi, factorial, targets = shrink / -h - 1, 1, []
    for j in range(1, len(slopes) + 1):
        factorial *= j
        targets.append(q_phi * factorial / shrink)
        q_phi = q_phi / -h - 1 / (factorial * (j + 1))
    if len(slopes) == 1 and order <= 2:  # as in the authors' code, instead of the exact weight
        return x - shrink * 0.5 * slopes[0]
    powers = [[ratio**power for ratio in ratios] for power in range(len(slopes))]
    matrix = torch.tensor(powers, dtype=torch.float64)
    target = torch.tensor(targets, dtype=torch.float64)
    return x - shrink * weighted_sum(torch.linalg.solve(matrix, target).tolist(), slopes)
