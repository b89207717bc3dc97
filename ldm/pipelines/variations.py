"""Tasks of models that see: images, or their CLIP embeddings -> images like them.

unclip          prompts, images or embeddings      stable unCLIP
vary            images                             SD 1 fine-tuned for image variations
sample_prior    prompts -> image embeddings        the Karlo prior, in front of unCLIP-L
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from ldm.conditioning import Cond
from ldm.diffusion.guidance import Scale
from ldm.encoders.image import ImageEmbedding
from ldm.model import LatentDiffusion
from ldm.nets.karlo import Prior
from ldm.pipelines import karlo as karlo
from ldm.pipelines.frame import as_list, check_options, decode_latent, generate, pipeline
from ldm.pipelines.quirks import Noise
from ldm.pipelines.sampling import SamplingOptions, sample
from ldm.runtime.errors import ArgumentError, MissingArgument

__all__ = ["sample_prior", "unclip", "vary"]


@pipeline("unclip")
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
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """What the images have in common with each other and with each prompt.

    Args:
        images: each (1, 3, H, W).
        embeddings: more of them as CLIP gives them, (1 | B, D).
        weights: of images, then embeddings; normalised to sum to 1 (None = all alike).
        noise_levels: timestep of the noise on each embedding, for all or one for each: more varies
            more.
        mix_level: timestep of the noise on the mix (None = none).
    Raises:
        MissingArgument: there is neither an image nor an embedding.
        ArgumentError: numbers that do not fit.
    """
    noise = check_options(model, prompts, options)
    n, encoder = len(as_list(prompts)), model.conditioner.get(ImageEmbedding)
    sources = [*(encoder.embed(image) for image in images), *embeddings]
    weights = _normalise(weights, len(sources), as_given="weights" in options.get("legacy", ()))
    levels = [noise_levels] * len(sources) if isinstance(noise_levels, int) else list(noise_levels)
    if len(levels) != len(sources):
        message = f"{len(levels)} noise levels were given for {len(sources)} images"
        raise ArgumentError(message, "noise_level")
    mix = torch.zeros(())
    for embedding, weight, level in zip(sources, weights, levels, strict=True):
        embedding = embedding.to(model.device, torch.float32).expand(n, -1)  # (B, D)
        mix = mix.to(embedding) + weight * encoder.noise(embedding, level, noise(embedding))
    if mix_level is not None:
        embedding = mix[:, : encoder.noise.width]
        mix = encoder.noise(embedding, mix_level, noise(embedding))
    return generate(
        model, prompts, negative_prompt, {"embedding": mix}, scale, tile, noise=noise, size=size,
        unconditional_inputs={"embedding": [None] * n}, **options,
    )  # fmt: skip


@pipeline("variation")
def vary(
    model: LatentDiffusion,
    prompts: Sequence[str],
    images: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    negative_prompt: str | Sequence[str] = "",
    scale: Scale = 3.0,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """Images like the given ones, by a model that reads an image in place of text.

    Args:
        prompts: their number is the number of images to make; their words are not read.
        images, weights: as `unclip`.
    """
    noise = check_options(model, prompts, options)
    n = len(as_list(prompts))
    weights = _normalise(weights, len(images), as_given=False)
    conds = [model.condition({"jpg": [image[0]]}) for image in images]
    tokens = [
        weight * cond.crossattn
        for weight, cond in zip(weights, conds, strict=True)
        if cond.crossattn is not None
    ]
    cond = Cond(crossattn=torch.stack(tokens).sum(dim=0))  # (1, 1, D)
    uncond = None if scale == 1 else model.condition({"jpg": [None]}).repeat(n)
    z = sample(model, cond.repeat(n), uncond, scale=scale, size=size, noise=noise, **options)
    return decode_latent(model, z, tile)


@pipeline("unclip")
def sample_prior(
    model: LatentDiffusion,
    prior: Prior,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    steps: int = 25,
    scale: float = 4.0,
    noise: Noise = torch.randn_like,
) -> Tensor:
    """CLIP image embeddings (B, D) that the Karlo prior samples for the prompts.

    Args:
        model: unCLIP-L, with whose CLIP the prior was trained.
        steps: sampling steps of the prior.
        scale: guidance scale of the prior.
    """
    encoder = model.conditioner.get(ImageEmbedding)
    mean, std = encoder.noise.get_statistics()
    return karlo.image_embedding(
        prior,
        encoder.clip,
        as_list(prompts),
        negative_prompt,
        mean=mean,
        std=std,
        steps=steps,
        scale=scale,
        noise=noise,
    )


def _normalise(weights: Sequence[float] | None, n: int, *, as_given: bool) -> list[float]:
    """Weights of n images, made to sum to 1; as given, they are divided by n."""
    weights = [1.0] * n if weights is None else list(weights)
    if not n:
        raise MissingArgument("there is no image: give one", "image")
    if len(weights) != n:
        raise ArgumentError(f"{len(weights)} weights were given for {n} images", "weight")
    total = n if as_given else sum(weights)
    if not total:
        raise ArgumentError(f"weights must not sum to 0, got {weights}", "weight")
    return [weight / total for weight in weights]
