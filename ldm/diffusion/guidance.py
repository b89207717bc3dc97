"""Classifier-free guidance: combines a denoiser and two conditions into `denoise(x, sigma)`.

Ho and Salimans 2022 (arXiv:2207.12598); rescale: Lin et al. 2023 (arXiv:2305.08891, §3.4);
interval: Kynkäänniemi et al. 2024 (arXiv:2404.07724).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers import Denoise

__all__ = ["Denoise", "Scale", "add_guidance", "limit_to_interval"]

Scale = float | Callable[[float], float]


def add_guidance(
    denoiser: Denoiser,
    cond: Cond,
    uncond: Cond | None = None,
    scale: Scale = 1.0,
    *,
    rescale: float = 0.0,
) -> Denoise:
    """Build `denoise(x, sigma)` with guidance.

    The network runs once for both conditions, the unconditional one first. Guidance combines
    predictions (eps, v or x0), not estimates of z, as in the original.

    Args:
        uncond: Condition of the empty or the negative prompt; None for no guidance.
        scale: Guidance scale, which may depend on sigma. At 1 only `cond` is computed.
        rescale: 0 … 1, strength of rescaling the prediction to the standard deviation of the
            conditional one, against over-exposure at high scales.
    """
    if uncond is None or scale == 1:
        return lambda x, sigma: denoiser(x, sigma, cond)
    conditions = uncond.cat(cond)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        current_scale = scale(sigma) if callable(scale) else scale
        if current_scale == 1:
            return denoiser(x, sigma, cond)
        pred_uncond, pred_cond = denoiser.predict(torch.cat([x, x]), sigma, conditions).chunk(2)
        prediction = pred_uncond + current_scale * (pred_cond - pred_uncond)
        if rescale:
            prediction = _rescale(prediction, pred_cond, rescale)
        return denoiser.convert_prediction(x, sigma, prediction)

    return denoise


def limit_to_interval(scale: Scale, low: float, high: float) -> Scale:
    """Limit guidance to noise levels (sigma) low … high; elsewhere the scale is 1."""

    def scale_at(sigma: float) -> float:
        if not low <= sigma <= high:
            return 1.0
        return scale(sigma) if callable(scale) else scale

    return scale_at


def _rescale(prediction: Tensor, pred_cond: Tensor, weight: float) -> Tensor:
    dims = tuple(range(1, pred_cond.dim()))
    ratio = pred_cond.std(dims, keepdim=True) / prediction.std(dims, keepdim=True)
    return prediction * (1 - weight + weight * ratio)
