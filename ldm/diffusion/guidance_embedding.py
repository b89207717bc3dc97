"""Guidance that a distilled network imitates in one pass, told of its scale (arXiv:2310.04378)."""

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

FACTOR = 1000
MAX_PERIOD = 1e4


def embed_scale(scale: float, width: int) -> Tensor:
    """Embed a guidance scale for a network, (1, width): sines and cosines of 1000 (scale - 1)."""
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
    """Build `denoise(x, sigma)` of a network that reads the guidance scale, in one pass.

    Args:
        uncond: Not used.
        scale: Guidance scale, which may depend on sigma.
        width: Features of its embedding.
    Raises:
        ArgumentError: several prompts are composed, which takes a pass for each.
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
