"""Text -> CLIP image embedding: sampling the Karlo prior.

The prior is a diffusion model of its own: its latent is the embedding that CLIP would give to a
picture of the text, its network `ldm.nets.prior.Prior` predicts x0. It is walked by the samplers of
every other model; the text tower belongs to the CLIP whose embeddings it makes.

    texts --CLIP's text tower--> Cond --sampling--> embedding (B, D) --noise--> a unCLIP model

Ramesh et al. 2022 (arXiv:2204.06125), section 2.2.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.samplers import SAMPLERS, STOCHASTIC
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders import tokenizer
from ldm.encoders.image import CLIPVision
from ldm.nets.karlo import Prior

__all__ = ["LIMIT", "image_embedding", "sample", "spaced", "text_condition"]

LIMIT = 10.0  # no number of a normalised embedding is estimated beyond this


def image_embedding(
    prior: Prior,
    clip: CLIPVision,
    texts: Sequence[str],
    negative: Sequence[str] | str = "",
    *,
    mean: Tensor,
    std: Tensor,
    steps: int = 25,
    scale: float = 4.0,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """What CLIP might say of pictures of the texts: embeddings (B, D) float32.

    clip: has the text tower of the CLIP that the prior was trained on.
    negative: what to steer away from, for all or one per text.
    mean, std: D numbers each, the statistics of CLIP's embeddings (Karlo's file).
    steps, scale, noise: see `sample`.
    """
    negatives = [negative] * len(texts) if isinstance(negative, str) else negative
    cond, uncond = text_condition(clip, texts), text_condition(clip, negatives)
    x = sample(prior, cond, uncond, steps=steps, scale=scale, noise=noise)  # (B, D)
    return x * std.to(x) + mean.to(x)


def text_condition(clip: CLIPVision, texts: Sequence[str]) -> Cond:
    """crossattn (B, 77, D): token vectors, zeros beyond the end; vector (B, D): the embedding.

    Raises ValueError if this CLIP was kept without its text tower.
    """
    tower = clip.model
    if not tower.blocks:
        raise ValueError("the prior needs CLIP's text tower, which this model does not have")
    tokens = tokenizer.tokenize(texts, tokenizer.CLIP, len(tower.positional_embedding))
    tokens = tokens.to(tower.positional_embedding.device)  # (B, 77)
    ends = tokens.argmax(dim=1)  # (B,); the first end token has the greatest id
    x = tower(tokens)  # (B, 77, D)
    text = x[torch.arange(len(x), device=x.device), ends] @ tower.text_projection  # (B, D)
    inside = torch.arange(x.shape[1], device=x.device) <= ends[:, None]  # (B, 77)
    return Cond(crossattn=x * inside[..., None], vector=text)


def sample(
    prior: Prior,
    cond: Cond,
    uncond: Cond,
    *,
    steps: int = 25,
    scale: float = 4.0,
    sampler: str = "ddim",
    eta: float = 1.0,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    sigmas: Tensor | None = None,
) -> Tensor:
    """Normalised embeddings (B, D), one per row of `cond`, by the sampler of the original.

        cond, uncond: as `text_condition` makes them.
        steps: of the grid `spaced`; sigmas: a grid of your own.
        scale: guidance. sampler, eta: DDIM with eta 1 is ancestral sampling, Karlo's.
        noise: (like) -> standard normal of its shape: first for the start, then for each step.
    Raises ValueError for an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler `{sampler}`, choose one of {', '.join(SAMPLERS)}")
    schedule = Schedule(make_betas("squaredcos_cap_v2"))
    sigmas = spaced(schedule, steps) if sigmas is None else sigmas
    denoise = guided(Denoiser(prior, schedule, "x0"), cond, uncond, scale)
    shape = (len(cond), prior.out_proj.out_features)
    start = noise(torch.empty(shape, device=prior.out_proj.weight.device))
    options = {"noise": noise} if sampler in STOCHASTIC else {}
    return SAMPLERS[sampler](
        lambda x, sigma: denoise(x, sigma).clamp(-LIMIT, LIMIT),
        start * math.sqrt(1 + float(sigmas[0]) ** 2),
        sigmas,
        **options,
        **({"eta": eta} if sampler == "ddim" else {}),
    )


def spaced(schedule: Schedule, steps: int) -> Tensor:
    """Noise levels of timesteps spread from the first to the last, both included, and 0.

    steps: 2 or more. Returns (steps + 1,) float64, descending (Nichol & Dhariwal 2021, sec. 4).
    """
    if not 2 <= steps <= len(schedule):
        raise ValueError(f"steps of the prior must be in 2 … {len(schedule)}, got {steps}")
    t = torch.linspace(0, len(schedule) - 1, steps, dtype=torch.float64).round().long()
    return torch.cat([schedule.sigmas[t].flip(0), torch.zeros(1, dtype=torch.float64)])
