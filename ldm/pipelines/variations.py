"""Tasks of models that read images instead of text or in addition to it.

unclip          prompts, images or embeddings      stable unCLIP
vary            images                             SD 1 fine-tuned for image variations
sample_prior    prompts -> image embeddings        the Karlo prior, in front of unCLIP-L
"""

from collections.abc import Sequence, Sized

import torch
from torch import Tensor
from typing_extensions import Unpack

from ldm.conditioning import Cond
from ldm.diffusion.guidance import GuidanceScale
from ldm.diffusion.samplers.common import NoiseSource
from ldm.encoders.image import ImageEmbedding
from ldm.model import LatentDiffusion
from ldm.nets.karlo import Prior
from ldm.pipelines import karlo
from ldm.pipelines.families import quote_name
from ldm.pipelines.generate import generate, make_task_noise_source
from ldm.pipelines.images import decode_latent
from ldm.pipelines.options import GuidedOptions, UnguidedOptions, select_sampling_options
from ldm.pipelines.sampling import sample
from ldm.pipelines.sampling_options import get_default_scale, needs_uncond
from ldm.pipelines.task import task
from ldm.runtime.errors import ArgumentError, MissingArgument
from ldm.runtime.warn import warn_caller

__all__ = ["sample_prior", "unclip", "vary"]


@task("unclip")
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
    scale: GuidanceScale | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    **options: Unpack[GuidedOptions],
) -> Tensor:
    """Make variations of the weighted mean of image embeddings, one per prompt.

    Args:
        images: Each (1, 3, H, W).
        embeddings: CLIP image embeddings to mix with the images', each (1 | B, D).
        weights: Of images, then embeddings; normalized to sum to 1. None = equal weights.
        noise_levels: Timesteps of the noise on the embeddings, one for all or one for each; more
            noise, more variation.
        mix_level: Timestep of the noise on the mean; None = no noise.
        scale: Guidance scale; None = the default of the sampler or the model, else 10.
        negative_prompt, size, tile, options: See `txt2img`.
    """
    scale = get_default_scale(model, options.get("sampler"), 10.0) if scale is None else scale
    noise_source = make_task_noise_source(prompts, options)
    n, encoder = len(prompts), model.conditioner.get(ImageEmbedding)
    embed_dim = encoder.noise.embed_dim
    for embedding in embeddings:
        if embedding.shape[-1:] != (embed_dim,) or embedding[..., 0].numel() not in (1, n):
            message = f"embeddings must be tensors (1 or {n}, {embed_dim}), got "
            raise ArgumentError(f"{message}{tuple(embedding.shape)}", "embeddings")
    num_sources = len(images) + len(embeddings)
    levels = list(noise_levels) if isinstance(noise_levels, Sized) else [noise_levels] * num_sources
    if len(levels) != num_sources:
        message = f"{len(levels)} noise levels were given for {num_sources} images"
        raise ArgumentError(message, "noise_levels")
    max_level = encoder.noise.max_noise_level - 1
    mix_levels = [] if mix_level is None else [mix_level]
    for name, values in (("noise_levels", levels), ("mix_level", mix_levels)):
        for level in values:
            if not 0 <= level <= max_level:
                raise ArgumentError(f"{name}: noise levels are 0 … {max_level}, got {level}", name)
    is_legacy = "weights" in options.get("legacy", ())
    weights = _normalize_weights(weights, num_sources, is_legacy)
    embeddings = [*(encoder.embed(image) for image in images), *embeddings]
    mean = torch.zeros((), device=model.device)
    for embedding, weight, level in zip(embeddings, weights, levels, strict=True):
        embedding = embedding.to(model.device, torch.float32).expand(n, -1)  # (B, D)
        mean = mean + weight * encoder.noise(embedding, level, noise_source(embedding))
    if mix_level is not None:
        embedding = mean[:, :embed_dim]  # without the embedding of the noise level
        mean = encoder.noise(embedding, mix_level, noise_source(embedding))
    return generate(
        model, prompts, negative_prompt, {"embedding": mean}, scale, tile,
        noise_source=noise_source, size=size, unconditional_inputs={"embedding": [None] * n},
        **options,
    )  # fmt: skip


@task("variation")
def vary(
    model: LatentDiffusion,
    prompts: Sequence[str],
    images: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    negative_prompt: str | Sequence[str] = "",
    scale: GuidanceScale | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    **options: Unpack[UnguidedOptions],
) -> Tensor:
    """Make variations of the weighted mean of images, by a model that reads no text.

    Args:
        prompts: Only their number is used: the number of images to make.
        images, weights: See `unclip`.
        scale: Guidance scale; None = the default of the sampler or the model, else 3.
        negative_prompt: Ignored with a warning, as the model does not read text.
        size, tile, options: See `txt2img`.
    """
    if any(negative_prompt):  # of a text, or of a list of texts
        warn_caller(f"{quote_name(model)} does not read a negative prompt: ignored")
    scale = get_default_scale(model, options.get("sampler"), 3.0) if scale is None else scale
    noise_source = make_task_noise_source(prompts, options)
    n = len(prompts)
    weights = _normalize_weights(weights, len(images))
    conds = [model.condition({"jpg": [image[0]]}) for image in images]
    tokens = [
        weight * cond.crossattn
        for weight, cond in zip(weights, conds, strict=True)
        if cond.crossattn is not None
    ]
    cond = Cond(crossattn=torch.stack(tokens).sum(dim=0))  # (1, 1, D)
    is_guided = needs_uncond(model, options.get("sampler"), scale)
    uncond = model.condition({"jpg": [None]}).repeat(n) if is_guided else None
    sampling = select_sampling_options(options)
    z = sample(
        model, cond.repeat(n), uncond, scale=scale, size=size, noise_source=noise_source, **sampling
    )
    return decode_latent(model, z, tile, options.get("on_latent"))


@task("unclip")
def sample_prior(
    model: LatentDiffusion,
    prior: Prior,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    steps: int = 25,
    scale: float = 4.0,
    noise_source: NoiseSource = torch.randn_like,
) -> Tensor:
    """Sample CLIP image embeddings (B, D) of prompts with the Karlo prior.

    Args:
        model: UnCLIP-L, whose CLIP the prior was trained with.
        steps: Sampling steps of the prior.
        scale: Guidance scale of the prior.
    """
    encoder = model.conditioner.get(ImageEmbedding)
    mean, std = encoder.noise.get_statistics()
    return karlo.sample_image_embeddings(
        prior,
        encoder.clip,
        prompts,
        negative_prompt,
        mean=mean,
        std=std,
        steps=steps,
        scale=scale,
        noise_source=noise_source,
    )


def _normalize_weights(
    weights: Sequence[float] | None, n: int, is_legacy: bool = False
) -> list[float]:
    """Scale weights of n images to sum 1; under the quirk "weights", divide them by n."""
    weights = [1.0] * n if weights is None else list(weights)
    if not n:
        raise MissingArgument("no image is given", "images")
    if len(weights) != n:
        raise ArgumentError(f"{len(weights)} weights were given for {n} images", "weights")
    total = n if is_legacy else sum(weights)
    if not total:
        raise ArgumentError(f"weights must not sum to 0, got {weights}", "weights")
    return [weight / total for weight in weights]
