"""Tasks of models that see: pictures, or what CLIP says of them -> pictures like them.

unclip      prompts, pictures or embeddings    stable unCLIP
vary        pictures                           SD 1 fine-tuned for image variations
imagined    prompts -> embeddings              the Karlo prior, in front of unCLIP-L
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.guidance import Scale
from ldm.encoders.image import ImageEmbedding
from ldm.model import LatentDiffusion
from ldm.nets.karlo import Prior
from ldm.pipelines import karlo as karlo
from ldm.pipelines.frame import check_family, decoded, listed, made, seeded
from ldm.pipelines.sampling import Noise, sample

__all__ = ["imagined", "unclip", "vary"]


@torch.no_grad()
def unclip(
    model: LatentDiffusion,
    prompts: Sequence[str],
    images: Sequence[Tensor] = (),
    *,
    embeddings: Sequence[Tensor] = (),
    weights: Sequence[float] | None = None,
    noise_levels: Sequence[int] | int = 0,
    mix_level: int | None = None,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 10.0,
    tile: int | None = None,
    **options: Any,
) -> Tensor:
    """What the pictures have in common with each other and with each prompt.

        images: each (1, 3, H, W). embeddings: more of the same as CLIP gives them, (1 | B, D).
        weights: of images, then embeddings; they are made to sum to 1 (None = all alike).
        noise_levels: noise on each embedding, for all or one for each: more varies more.
        mix_level: noise on the mix (None = none).
    Raises ValueError if there is nothing to see, or for numbers that do not fit.
    """
    check_family(model, "unclip")
    n, noise = len(listed(prompts)), seeded(options, prompts)
    encoder = model.conditioner.get(ImageEmbedding)
    seen = [*(encoder.embed(image) for image in images), *embeddings]
    shares = _shares(weights, len(seen), as_given="weights" in options.get("legacy", ()))
    levels = [noise_levels] * len(seen) if isinstance(noise_levels, int) else list(noise_levels)
    if len(levels) != len(seen):
        raise ValueError(f"{len(levels)} noise levels were given for {len(seen)} pictures")
    mix = torch.zeros(())
    for embedding, share, level in zip(seen, shares, levels, strict=True):
        embedding = embedding.to(model.device, torch.float32).expand(n, -1)  # (B, D)
        mix = mix.to(embedding) + share * encoder.noise(embedding, level, noise(embedding))
    if mix_level is not None:
        embedding = mix[:, : encoder.noise.width]
        mix = encoder.noise(embedding, mix_level, noise(embedding))
    records = {"embedding": mix}  # (B, 2 D)
    nothing = {"embedding": [None] * n}
    return made(model, prompts, negative_prompt, records, scale, tile, without=nothing, **options)


@torch.no_grad()
def vary(
    model: LatentDiffusion,
    prompts: Sequence[str],
    images: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 3.0,
    tile: int | None = None,
    **options: Any,
) -> Tensor:
    """Pictures like the given ones, by a model that sees in place of reading.

    prompts: their number counts, their words have no meaning here.
    images, weights: as `unclip`.
    """
    check_family(model, "vary")
    n = len(listed(prompts))
    shares = _shares(weights, len(images), as_given=False)
    conds = [model.condition({"jpg": [image[0]]}) for image in images]
    tokens = [
        s * c.crossattn for s, c in zip(shares, conds, strict=True) if c.crossattn is not None
    ]
    cond = Cond(crossattn=torch.stack(tokens).sum(dim=0))  # (1, 1, D)
    uncond = None if scale == 1 else model.condition({"jpg": [None]}).repeat(n)
    z = sample(model, cond.repeat(n), uncond, scale=scale, **options)
    return decoded(model, z, tile)


def imagined(
    model: LatentDiffusion,
    prior: Prior,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    steps: int = 25,
    scale: float = 4.0,
    noise: Noise = torch.randn_like,
) -> Tensor:
    """What CLIP might say of pictures of the prompts, (B, D), by the Karlo prior.

    model: unCLIP-L, whose CLIP the prior was trained with.
    """
    check_family(model, "unclip")
    image = model.conditioner.get(ImageEmbedding)
    mean, std = image.noise.get_statistics()
    with torch.no_grad():
        return karlo.image_embedding(
            *(prior, image.clip, listed(prompts), negative_prompt),
            mean=mean,
            std=std,
            steps=steps,
            scale=scale,
            noise=noise,
        )


def _shares(weights: Sequence[float] | None, n: int, *, as_given: bool) -> list[float]:
    """How much each of n pictures counts."""
    weights = [1.0] * n if weights is None else list(weights)
    if not n:
        raise ValueError("there is nothing to see: give a picture")
    if len(weights) != n:
        raise ValueError(f"{len(weights)} weights were given for {n} pictures")
    total = n if as_given else sum(weights)
    if not total:
        raise ValueError(f"weights must not sum to 0, got {weights}")
    return [weight / total for weight in weights]
