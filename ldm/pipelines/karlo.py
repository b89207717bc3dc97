"""Sampling from the Karlo prior: texts -> CLIP image embeddings, the input of unCLIP.

The prior is a diffusion model over image embeddings: `ldm.nets.karlo.Prior` predicts x0, sampled by
DDIM. Its embeddings belong to the CLIP whose text encoder encodes the texts.

    texts --CLIP's text encoder--> Cond --sampling--> embedding (B, D) --noise--> unCLIP model

Ramesh et al. 2022 (arXiv:2204.06125), section 2.2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import add_guidance
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.samplers.common import NoiseSource
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders import tokenizer
from ldm.encoders.image import CLIPVision
from ldm.nets.karlo import Prior
from ldm.pipelines.prompts import repeat_texts
from ldm.runtime.errors import ArgumentError

__all__ = [
    "check_prior_steps", "encode_texts", "get_prior_sigmas", "sample_image_embeddings",
    "sample_normalized_embeddings",
]  # fmt: skip

NUM_TIMESTEPS = 1000  # of the noise schedule that the prior was trained with
MAX_PREDICTION = 10.0  # limit of predicted values, in standard deviations; as in Karlo


def sample_image_embeddings(
    prior: Prior,
    clip: CLIPVision,
    texts: Sequence[str],
    negative_prompt: Sequence[str] | str = "",
    *,
    mean: Tensor,
    std: Tensor,
    steps: int = 25,
    scale: float = 4.0,
    noise_source: NoiseSource = torch.randn_like,
) -> Tensor:
    """Sample CLIP image embeddings of texts, (B, D) float32.

    Args:
        clip: The CLIP that the prior was trained with, with its text encoder.
        negative_prompt: One negative prompt for all texts, or one for each.
        mean, std: (D,) mean and standard deviation of CLIP's embeddings, from Karlo's file.
        steps, scale, noise_source: See `sample_normalized_embeddings`.
    """
    negatives = repeat_texts(negative_prompt, len(texts), "negative_prompt")
    cond, uncond = encode_texts(clip, texts), encode_texts(clip, negatives)
    x = sample_normalized_embeddings(
        prior, cond, uncond, steps=steps, scale=scale, noise_source=noise_source
    )
    return x * std.to(x) + mean.to(x)


def encode_texts(clip: CLIPVision, texts: Sequence[str]) -> Cond:
    """Encode texts for the prior.

    Returns:
        crossattn (B, 77, D): token embeddings, zeros after the EOS token; vector (B, D): CLIP text
            embedding.
    """
    model = clip.model
    if not model.blocks:
        raise ArgumentError("the prior needs CLIP's text encoder, which this model does not have")
    tokens = tokenizer.tokenize(texts, tokenizer.CLIP, len(model.positional_embedding))
    tokens = tokens.to(model.positional_embedding.device)  # (B, 77)
    eos_positions = tokens.argmax(dim=1)  # (B,); the first EOS token has the greatest id
    x, text = model(tokens, len(model.blocks), eos_positions=eos_positions)  # (B, 77, D), (B, D)
    mask = torch.arange(x.shape[1], device=x.device) <= eos_positions[:, None]  # (B, 77)
    return Cond(crossattn=x * mask[..., None], vector=text)


def sample_normalized_embeddings(
    prior: Prior,
    cond: Cond,
    uncond: Cond,
    *,
    steps: int = 25,
    scale: float = 4.0,
    eta: float = 1.0,
    noise_source: NoiseSource = torch.randn_like,
    sigmas: Tensor | None = None,
) -> Tensor:
    """Sample embeddings (B, D), normalized to mean 0 and std 1, one per row of `cond`, by DDIM.

    Args:
        cond, uncond: From `encode_texts`, of prompts and of negative prompts.
        steps: Number of steps, see `get_prior_sigmas`.
        eta: 1 is ancestral sampling, as in the original; 0 is deterministic.
        noise_source: (like) -> standard normal noise in the shape of `like`, called for the initial
            noise, then for each step.
        sigmas: Noise levels (n + 1,), descending; None = those of `steps`.
    """
    schedule = Schedule(make_betas("squaredcos_cap_v2", NUM_TIMESTEPS))
    sigmas = get_prior_sigmas(schedule, steps) if sigmas is None else sigmas
    denoise = add_guidance(Denoiser(prior, schedule, "x0"), cond, uncond, scale)
    shape = (len(cond), prior.out_proj.out_features)
    initial_noise = noise_source(torch.empty(shape, device=prior.out_proj.weight.device))
    return SAMPLERS["ddim"](
        lambda x, sigma: denoise(x, sigma).clamp(-MAX_PREDICTION, MAX_PREDICTION),
        initial_noise * math.sqrt(1 + float(sigmas[0]) ** 2),
        sigmas,
        eta=eta,
        noise_source=noise_source,
    )


def get_prior_sigmas(schedule: Schedule, steps: int) -> Tensor:
    """Return noise levels of at least 2 evenly spaced timesteps, from the last to the first, and 0.

    Nichol and Dhariwal 2021 (arXiv:2102.09672), section 4.

    Returns:
        (steps + 1,) float64, descending.
    """
    check_prior_steps(steps)
    t = torch.linspace(0, len(schedule) - 1, steps, dtype=torch.float64).round().long()
    return torch.cat([schedule.sigmas[t].flip(0), torch.zeros(1, dtype=torch.float64)])


def check_prior_steps(steps: int) -> None:
    """Raise ArgumentError for a number of steps that the prior does not support."""
    if not 2 <= steps <= NUM_TIMESTEPS:
        raise ArgumentError(f"steps of the prior must be in 2 … {NUM_TIMESTEPS}, got {steps}")
