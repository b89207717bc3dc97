"""Guidance distilled into a network, which takes the scale as an input.

Meng et al. 2022 (arXiv:2210.03142); latent consistency models: Luo et al. 2023 (arXiv:2310.04378).
"""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ldm.conditioning import Composition, Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import GuidanceScale
from ldm.diffusion.samplers.common import Denoise
from ldm.runtime.errors import ArgumentError

__all__ = ["add_embedded_guidance", "embed_guidance_scale"]

# As in diffusers' `get_guidance_scale_embedding`.
EMBEDDING_FACTOR = 1000
MAX_PERIOD = 1e4


def embed_guidance_scale(scale: float, dim: int) -> Tensor:
    """Embed a guidance scale s as [sin(1000 (s - 1) f_k) … | cos …], (1, dim), for even dim.

    f_k = MAX_PERIOD ** (-k / (dim / 2 - 1)).
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) / (half - 1) * torch.arange(half))
    angles = EMBEDDING_FACTOR * (scale - 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()])[None]


def add_embedded_guidance(
    denoiser: Denoiser,
    cond: Cond | Composition,
    uncond: Cond | None = None,
    *,
    scale: GuidanceScale,
    dim: int,
) -> Denoise:
    """Build `denoise(x, sigma)` for a network that takes the guidance scale.

    The network runs once per call.

    Args:
        uncond: Unused, so that the signature is that of `add_guidance`.
        scale: Guidance scale, or a function of sigma.
        dim: Number of features of the embedding.
    """
    if isinstance(cond, Composition):
        raise ArgumentError(
            "prompts joined by AND need a model that does not embed the guidance scale", "prompt"
        )

    def denoise(x: Tensor, sigma: float) -> Tensor:
        current_scale = scale(sigma) if callable(scale) else scale
        embedding = embed_guidance_scale(current_scale, dim).to(x.device)
        network = partial(denoiser.network, guidance_embedding=embedding)
        return replace(denoiser, network=network)(x, sigma, cond)

    return denoise
