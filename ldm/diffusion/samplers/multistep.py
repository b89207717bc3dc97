"""Multistep solvers of the diffusion ODE: each step uses earlier estimates."""

import math

import torch
from torch import Tensor

from ldm.diffusion.samplers.common import (
    Denoise,
    Steps,
    compute_log_ratio,
    compute_weighted_sum,
    pair_sigmas,
    sampler,
)

__all__ = ["deis", "dpmpp_2m", "lms", "plms", "unipc"]

# Order -> weights of the last slopes, newest first.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@sampler
def plms(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Steps:
    """Sample by PLMS (arXiv:2202.09778): one Heun step, then Adams–Bashforth of orders 2, 3 and 4.

    As in the original, the weights are those for equal steps, even if steps differ.
    """
    slopes: list[Tensor] = []  # newest first
    for sigma, sigma_next in pair_sigmas(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        slopes = [slope, *slopes[:3]]
        if len(slopes) == 1 and sigma_next > 0:
            x_next = x + slope * (sigma_next - sigma)
            slope = (slope + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
        elif len(slopes) > 1:
            slope = compute_weighted_sum(ADAMS_BASHFORTH[len(slopes)], slopes)
        denoised = x - slope * sigma
        x = x + slope * (sigma_next - sigma)
        x = yield x, denoised


@sampler
def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, *, order: int = 4) -> Steps:
    """Sample by the linear multistep method of k-diffusion.

    The polynomial through the last slopes is integrated over sigma.

    Args:
        order: Maximum number of slopes, 1 … 4.
    """
    sigma_list = sigmas.tolist()
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        nodes = [sigma_list[i - j] for j in range(len(slopes))]
        x = x + compute_weighted_sum(_integrate_lagrange(nodes, sigma, sigma_next), slopes)
        x = yield x, denoised


@sampler
def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, lower_order_final: bool = True
) -> Steps:
    """Sample by DPM-Solver++ 2M (arXiv:2211.01095, algorithm 2).

        x' = (sigma' / sigma) x - (e^-h - 1) (D + h / (2 h_prev) (D - D_prev))
        h = ln(sigma / sigma')

    Args:
        lower_order_final: Whether the last of fewer than 15 steps is of order 1. A step to sigma 0
            always is.
    """
    steps = len(sigmas) - 1
    first_order_step = steps - 1 if lower_order_final and steps < 15 else None
    denoised_prev, h_prev = None, 0.0
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        denoised = denoise(x, sigma)
        h = compute_log_ratio(sigma, sigma_next)
        extrapolated = denoised
        if denoised_prev is not None and sigma_next > 0 and i != first_order_step:
            extrapolated = denoised + (denoised - denoised_prev) * (h / h_prev / 2)
        x = (sigma_next / sigma) * x - math.expm1(-h) * extrapolated
        denoised_prev, h_prev = denoised, h
        x = yield x, denoised


@sampler
def deis(denoise: Denoise, x: Tensor, sigmas: Tensor, *, order: int = 3) -> Steps:
    """Sample by DEIS (arXiv:2204.13902), with polynomials in log sigma as in diffusers ("logrho").

    The polynomial through the last slopes is integrated over sigma, with dsigma = sigma dlog sigma.
    With fewer than 15 steps, the order (number of slopes) falls to 1 towards the end.
    """
    sigma_list = sigmas.tolist()
    steps = len(sigma_list) - 1
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        if sigma_next > 0:
            current_order = min(len(slopes), steps - i) if steps < 15 else len(slopes)
            nodes = [math.log(sigma_list[i - j]) for j in range(current_order)]
            weights = _integrate_lagrange_over_log(nodes, math.log(sigma), math.log(sigma_next))
            x = x + compute_weighted_sum(weights, slopes[:current_order])
        else:
            x = denoised
        x = yield x, denoised


@sampler
def unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, *, order: int = 3) -> Steps:
    """Sample by UniPC, variant bh2 (arXiv:2302.04867): each step also corrects the previous one.

    The estimate at the predicted x also serves the corrector, so a step takes one evaluation.

    Args:
        order: Maximum number of estimates that the predictor uses.
    """
    steps = len(sigmas) - 1
    history: list[tuple[float, Tensor]] = []  # (sigma, estimate), newest first
    x_prev, current_order = x, 1
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        denoised = denoise(x, sigma)
        if history:
            x = _step_unipc(x_prev, history, sigma, current_order, denoised)
        history = [(sigma, denoised), *history[: order - 1]]
        x_prev = x
        current_order = min(order, len(history), steps - i)
        x = _step_unipc(x, history, sigma_next, current_order) if sigma_next > 0 else denoised
        x = yield x, denoised


def _integrate_lagrange(nodes: list[float], start: float, end: float) -> list[float]:
    """Integrate the Lagrange basis polynomials of the nodes over [start, end].

    Two Gauss-Legendre points are exact up to degree 3, that is for up to 4 nodes.
    """
    middle, half = (start + end) / 2, (end - start) / 2
    points = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]
    return [
        half * sum(math.prod((p - m) / (n - m) for m in nodes if m != n) for p in points)
        for n in nodes
    ]


def _integrate_lagrange_over_log(nodes: list[float], start: float, end: float) -> list[float]:
    """Integrate the Lagrange basis polynomials in log sigma, times sigma, over [start, end]."""
    # Ten Gauss-Legendre points and weights, from eigenvectors (Golub and Welsch 1969).
    k = torch.arange(1, 10, dtype=torch.float64)
    off_diagonal = k / (4 * k * k - 1).sqrt()
    matrix = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    points, vectors = torch.linalg.eigh(matrix)
    middle, half = (start + end) / 2, (end - start) / 2
    log_sigmas = middle + half * points
    weights = half * 2 * vectors[0].square() * log_sigmas.exp()
    bases = [
        math.prod(((log_sigmas - m) / (n - m) for m in nodes if m != n), start=weights)
        for n in nodes
    ]
    return [float(basis.sum()) for basis in bases]


def _step_unipc(
    x: Tensor,
    history: list[tuple[float, Tensor]],
    sigma_next: float,
    order: int,
    denoised_next: Tensor | None = None,
) -> Tensor:
    """Step from the newest level of `history` to sigma_next, by the predictor or the corrector.

        x' = (sigma' / sigma) x - (e^-h - 1) (D + sum of a_m (D_m - D) / r_m)

    with D at the newest level, and the other estimates D_m at distances r_m h in log sigma. The
    weights a solve R a = b of the paper.

    Args:
        history: (sigma, estimate) of the last levels, newest first.
        order: Number of estimates of `history` to use.
        denoised_next: Estimate at sigma_next for the corrector; None = the predictor.
    """
    sigma, denoised = history[0]
    h = compute_log_ratio(sigma, sigma_next)
    h_phi_1 = math.expm1(-h)  # the authors' name; also B(h) of bh2
    ratios = [-compute_log_ratio(level, sigma) / h for level, _ in history[1:order]]
    differences = [
        (estimate - denoised) / ratio
        for ratio, (_, estimate) in zip(ratios, history[1:order], strict=True)
    ]
    if denoised_next is not None:
        ratios, differences = [*ratios, 1.0], [*differences, denoised_next - denoised]
    x = (sigma_next / sigma) * x - h_phi_1 * denoised
    if not differences:
        return x
    # b_j = h_phi_k j! / B(h), with h_phi_k = -h phi_{j+1}(-h)
    h_phi_k, factorial, b = h_phi_1 / -h - 1, 1, []
    for j in range(1, len(differences) + 1):
        factorial *= j
        b.append(h_phi_k * factorial / h_phi_1)
        h_phi_k = h_phi_k / -h - 1 / (factorial * (j + 1))
    if len(differences) == 1 and order <= 2:  # as in the authors' code, instead of the exact weight
        return x - h_phi_1 * 0.5 * differences[0]
    powers = [[ratio**power for ratio in ratios] for power in range(len(differences))]
    matrix = torch.tensor(powers, dtype=torch.float64)
    weights = torch.linalg.solve(matrix, torch.tensor(b, dtype=torch.float64)).tolist()
    return x - h_phi_1 * compute_weighted_sum(weights, differences)
