"""Integrators of the diffusion ODE and SDE, as pure functions.

Each walks a state x = z + sigma·noise along `sigmas`, asking only `denoise(x, sigma)` for an
estimate of the clean latent z. What the network is, how it is guided and what it listens to is
inside that callable. The plain Euler method comes first: it is the one to read.

    denoise: (x, sigma) -> estimate of z, shape of x.
    x: (B, C, h, w), z + sigmas[0]·noise, float32.
    sigmas: (n + 1,) float64, descending; may end at 0 or above.
    callback: called after step i with (i, x at sigmas[i + 1], denoised).
    constrain: (x, sigma) -> x, applied before every step, for what is already known of x.
    noise: (like) -> standard normal of its shape; the only source of randomness.
    Returns x at sigmas[-1].

Karras et al. 2022 (arXiv:2206.00364) for the formulation; k-diffusion made the names common.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

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
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Euler's method: follow the slope from here for one step."""
    for i, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
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
    """DDIM (arXiv:2010.02502): Euler steps to a lower level, and `eta` times fresh noise on top.

    eta: 0 is deterministic, 1 is the ancestral sampler of DDPM.
    """
    for i, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        down, up = _split(sigma, sigma_next, eta)
        x = denoised + (x - denoised) * (down / sigma)
        if noise:
            x = x + noise(x) * up
        if callback:
            callback(i, x, denoised)
    return x


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Ancestral Euler, which is DDIM with eta 1."""
    return ddim(denoise, x, sigmas, eta=1.0, noise=noise, callback=callback, constrain=constrain)


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Heun's second-order method (arXiv:2206.00364, algorithm 1): two evaluations per step."""
    for i, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        ahead = x + slope * (sigma_next - sigma)
        if sigma_next > 0:
            slope = (slope + (ahead - denoise(ahead, sigma_next)) / sigma_next) / 2
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
    """PLMS (arXiv:2202.09778): Adams–Bashforth of order 4 as if steps were even, Heun to start."""
    weights = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}
    weights[4] = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        slope = (x - denoise(x, sigma)) / sigma
        slopes = [slope, *slopes[:3]]
        if len(slopes) == 1 and sigma_next > 0:
            ahead = x + slope * (sigma_next - sigma)
            slope = (slope + (ahead - denoise(ahead, sigma_next)) / sigma_next) / 2
        elif len(slopes) > 1:
            slope = _combine(weights[len(slopes)], slopes)
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
    """Linear multistep: the slope is the polynomial through the last `order` ones, integrated."""
    grid = sigmas.tolist()
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        nodes = [grid[i - j] for j in range(len(slopes))]
        x = x + _combine(_lagrange_integrals(nodes, sigma, sigma_next), slopes)
        if callback:
            callback(i, x, denoised)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """DPM-Solver++ 2M (arXiv:2211.01095, algorithm 2); runs of under 15 steps end in order 1."""
    steps = len(sigmas) - 1
    before, h_before = None, 0.0
    for i, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        h = _log_ratio(sigma, sigma_next)
        estimate = denoised
        if before is not None and sigma_next > 0 and not (steps < 15 and i == steps - 1):
            estimate = denoised + (denoised - before) * (h / h_before / 2)
        x = (sigma_next / sigma) * x - math.expm1(-h) * estimate
        before, h_before = denoised, h
        if callback:
            callback(i, x, denoised)
    return x


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """DPM-Solver++ 2S with ancestral noise: two evaluations per step, halfway in log sigma."""
    for i, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = estimate = denoise(x, sigma)
        down, up = _split(sigma, sigma_next, eta=1.0)
        if down > 0:
            middle = math.sqrt(sigma * down)
            h = _log_ratio(sigma, middle)
            half = (middle / sigma) * x - math.expm1(-h) * denoised
            estimate = denoise(half, middle)
        x = estimate + (x - estimate) * (down / sigma)
        if noise:
            x = x + noise(x) * up
        if callback:
            callback(i, x, denoised)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """SDE-DPM-Solver++ 2M (arXiv:2211.01095, eq. 19): the stochastic twin of `dpmpp_2m`."""
    before, h_before = None, 0.0
    for i, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        h = _log_ratio(sigma, sigma_next)
        estimate = denoised
        if before is not None and sigma_next > 0:
            estimate = denoised + (denoised - before) * (h / h_before / 2)
        x = (sigma_next / sigma) * math.exp(-h) * x - math.expm1(-2 * h) * estimate
        if noise:
            x = x + noise(x) * (sigma_next * math.sqrt(-math.expm1(-2 * h)))
        before, h_before = denoised, h
        if callback:
            callback(i, x, denoised)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "plms": plms,
    "dpm": dpmpp_2m,
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "lms": lms,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2s_a": dpmpp_2s_ancestral,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}
# The samplers that take `noise`.
STOCHASTIC = frozenset({"ddim", "euler_a", "dpmpp_2s_a", "dpmpp_2m_sde"})


def _pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    return list(pairwise(sigmas.tolist()))


def _split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up): the level to step down to and the noise to add, down² + up² = sigma_next²."""
    up = eta * sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0))
    up = min(up, sigma_next)
    return math.sqrt(sigma_next**2 - up**2), up


def _log_ratio(sigma: float, sigma_next: float) -> float:
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


def _combine(weights: tuple[float, ...] | list[float], slopes: list[Tensor]) -> Tensor:
    return torch.stack([w * s for w, s in zip(weights, slopes, strict=True)]).sum(dim=0)


def _lagrange_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """∫ of each Lagrange basis polynomial over [start, end]; two Gauss points suit 4 nodes."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]
    return [
        half * sum(math.prod((p - m) / (n - m) for m in nodes if m != n) for p in points)
        for n in nodes
    ]
