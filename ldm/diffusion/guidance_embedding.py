"""Guidance distilled into a network that takes the scale as an input (arXiv:2310.04378)."""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ldm.conditioning import Composition, Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Scale
from ldm.diffusion.samplers.common import Denoise
from ldm.runtime.errors import ArgumentError

__all__ = ["embed_scale", "imitate_guidance"]

FACTOR = 1000  # these two as in diffusers' `get_guidance_scale_embedding`
MAX_PERIOD = 1e4


def embed_scale(scale: float, width: int) -> Tensor:
    """Embed a guidance scale as sines and cosines of 1000 (scale - 1), (1, width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) / (half - 1) * torch.arange(half))
    angles = FACTOR * (scale - 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()])[None]


def imitate_guidance(
    denoiser: Denoiser,
    cond: Cond | Composition,
    uncond: Cond | None = None,
    *,
    scale: Scale,
    width: int,
) -> Denoise:
    """Build `denoise(x, sigma)` for a network that takes the guidance scale: one evaluation each.

    Args:
        uncond: Ignored, for the signature of `add_guidance`.
        scale: Guidance scale, or a function of sigma.
        width: Number of features of its embedding.
    Raises:
        ArgumentError: `cond` is a composition, which needs an evaluation for each prompt.
    """
    if isinstance(cond, Composition):
        raise ArgumentError(
            "prompts joined by AND need a model that does not embed the guidance scale", "prompt"
        )

    def denoise(x: Tensor, sigma: float) -> Tensor:
        current_scale = scale(sigma) if callable(scale) else scale
        embedding = embed_scale(current_scale, width).to(x.device)
        network = partial(denoiser.network, guidance_embedding=embedding)
        return replace(denoiser, network=network)(x, sigma, cond)

    return denoise
