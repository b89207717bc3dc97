"""Classifier-free guidance: from a denoiser and its conditions to `denoise(x, sigma)`.

Ho and Salimans 2022 (arXiv:2207.12598); rescale: Lin et al. 2023 (arXiv:2305.08891, §3.4);
interval: Kynkäänniemi et al. 2024 (arXiv:2404.07724).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser

__all__ = ["Denoise", "Scale", "guided", "interval"]

Denoise = Callable[[Tensor, float], Tensor]
Scale = float | Callable[[float], float]


def guided(
    denoiser: Denoiser,
    cond: Cond,
    uncond: Cond | None = None,
    scale: Scale = 1.0,
    *,
    rescale: float = 0.0,
) -> Denoise:
    """`denoise(x, sigma)` with the conditions closed over.

        scale: 1 is none, and then the unconditional half is not computed; may depend on sigma.
        rescale: 0 … 1, how far the guided prediction is brought back to the spread of the
            conditional one (remedy for over-exposure at high scales).

    Both halves go through the network in one call, unconditional first. Guidance acts on the
    network's own prediction, like the original's.
    """
    if uncond is None or scale == 1:
        return lambda x, sigma: denoiser(x, sigma, cond)
    both = uncond.cat(cond)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        strength = scale(sigma) if callable(scale) else scale
        if strength == 1:
            return denoiser(x, sigma, cond)
        without, with_ = denoiser.predict(torch.cat([x, x]), sigma, both).chunk(2)
        prediction = without + strength * (with_ - without)
        if rescale:
            prediction = _rescaled(prediction, with_, rescale)
        return denoiser.denoised(x, sigma, prediction)

    return denoise


def interval(scale: float, low: float, high: float) -> Scale:
    """`scale` while low <= sigma <= high, and 1 (no guidance, half the work) outside."""
    return lambda sigma: scale if low <= sigma <= high else 1.0


def _rescaled(prediction: Tensor, cond: Tensor, share: float) -> Tensor:
    dims = tuple(range(1, cond.dim()))
    ratio = cond.std(dims, keepdim=True) / prediction.std(dims, keepdim=True)
    return prediction * (1 - share + share * ratio)
