"""Steps that tasks have in common: check the call, encode the condition, sample, decode."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ldm.conditioning import Cond
from ldm.diffusion.guidance import Scale
from ldm.model import LatentDiffusion
from ldm.pipelines.families import check_family
from ldm.pipelines.quirks import Noise, noise_source
from ldm.pipelines.sampling import SamplingOptions, check_sampling, default_scheduler, sample
from ldm.runtime.errors import ArgumentError, NonFinite, Stop, unknown_name

__all__ = ["TaskOptions", "decode_latent", "encode_image", "generate", "pipeline"]


class TaskOptions(SamplingOptions):
    """The keywords that all tasks take, for a batch of several prompts."""

    negative_prompt: Sequence[str]
    scale: float
    tile: int | None


P = ParamSpec("P")
TensorOrCond = TypeVar("TensorOrCond", Tensor, Cond)
FORMER_KEYWORDS = {"grid": "scheduler"}


def pipeline(*families: str) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorate a task to check model and keywords first, and to run without gradients.

    The decorated function raises WrongFamily for another model, and UnknownName for a keyword that
    it does not take.

    Args:
        families: the models that the task works with, names in FAMILIES.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        signature = inspect.signature(function)
        parameters = signature.parameters.values()
        allowed = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        allowed += SamplingOptions.__annotations__

        @wraps(function)
        @torch.no_grad()
        def call(*args: P.args, **keywords: P.kwargs) -> Tensor:
            for former, name in FORMER_KEYWORDS.items():
                if former in keywords:
                    keywords[name] = keywords.pop(former)
            for keyword in keywords:
                if keyword not in allowed:
                    kind = f"keyword of {function.__name__}"
                    raise unknown_name(kind, keyword, allowed[1:], argument=keyword)
            check_family(signature.bind(*args, **keywords).arguments["model"], *families)
            return function(*args, **keywords)

        return call

    return decorate


def generate(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str],
    inputs: Mapping[str, Tensor],
    scale: Scale,
    tile: int | None,
    *,
    noise: Noise,
    unconditional_inputs: Mapping[str, object] | None = None,
    z: Tensor | None = None,
    strength: float = 1.0,
    size: tuple[int, int] | None = None,
    constrain: Callable[[Tensor, float], Tensor] | None = None,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """Encode prompts, sample and decode.

    Args:
        inputs: batch of the keys that the model reads in addition to text, a row per prompt.
        unconditional_inputs: those that differ for the unconditional half of guidance.
        tile: side in latent pixels of the decoder's tiles; None = decode whole.
        scale, noise, z, strength, size, constrain, options: see `sample`.
    Returns:
        (B, 3, H, W) float32 in [-1, 1].
    Raises:
        NonFinite: a stage of the model gave NaN or infinity.
    """
    prompts = as_list(prompts)
    uncond = None
    if scale != 1:
        negatives = as_list(negative_prompt)
        if isinstance(negative_prompt, str):
            negatives *= len(prompts)
        if len(negatives) != len(prompts):
            raise ArgumentError(
                f"{len(negatives)} negative prompts were given for {len(prompts)} images",
                "negative_prompt",
            )
        uncond = encode_prompts(model, negatives, {**inputs, **(unconditional_inputs or {})})
    cond = check_finite(encode_prompts(model, prompts, inputs), "the text encoder")
    try:
        latent = sample(
            model, cond, uncond, scale=scale, noise=noise, z=z, strength=strength, size=size,
            constrain=constrain, **options,
        )  # fmt: skip
    except Stop as stop:
        if stop.latent is None:
            raise
        latent = stop.latent
    return decode_latent(model, latent, tile)


def make_noise(
    model: LatentDiffusion, prompts: Sequence[str], options: SamplingOptions, strength: float = 1.0
) -> Noise:
    """Make the noise source of a call, a row per prompt.

    Raises:
        ArgumentError: invalid sampling options; checked here, before any network runs.
    """
    sampler, scheduler = options.get("sampler", "ddim"), options.get("scheduler")
    legacy = options.get("legacy", ())
    check_sampling(
        sampler, scheduler, options.get("eta", 0.0), strength, options.get("rescale", 0.0), legacy
    )
    scheduler = scheduler or default_scheduler(model.schedule, sampler)
    model.schedule.step_sigmas(options.get("steps", 50), scheduler)  # raises ArgumentError
    return noise_source(options.get("seeds"), len(as_list(prompts)), legacy)


def encode_prompts(
    model: LatentDiffusion, prompts: Sequence[str], inputs: Mapping[str, object]
) -> Cond:
    """Encode prompts and inputs as a condition, a row per prompt; each distinct prompt once."""
    distinct = list(dict.fromkeys(prompts))
    cond = model.condition({"txt": distinct, **inputs})
    if cond.crossattn is None or len(distinct) == len(prompts):
        return cond
    rows = [distinct.index(prompt) for prompt in prompts]
    return replace(cond, crossattn=cond.crossattn[torch.tensor(rows).to(cond.crossattn.device)])


def decode_latent(model: LatentDiffusion, z: Tensor, tile: int | None) -> Tensor:
    """Decode z (B, C, h, w) to (B, 3, H, W) in [-1, 1]; raise NonFinite."""
    images = model.decode(check_finite(z, "the UNet"), tile=tile)
    return check_finite(images, "the VAE").clamp(-1, 1)


@torch.no_grad()
def encode_image(model: LatentDiffusion, image: Tensor, n: int, noise: Noise) -> Tensor:
    """Sample n latents (n, C, h, w) of one image (1, 3, H, W), padded to whole latent pixels."""
    image = pad_to_multiple(image.to(model.device), model.downscale)
    posterior = model.autoencoder.encode(image)
    mean = posterior.mean.float().expand(n, -1, -1, -1)
    z = mean + posterior.std.float() * noise(torch.empty(mean.shape, device=mean.device))
    return check_finite(z * model.scale_factor, "the VAE")


def as_list(prompts: str | Sequence[str]) -> list[str]:
    """Return one prompt or several as a list."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of an image (B, C, H, W) up to multiples."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def crop_like(padded: Tensor, image: Tensor) -> Tensor:
    """Cut off what `pad_to_multiple` added to the image."""
    return padded[..., : image.shape[-2], : image.shape[-1]]


def check_finite(value: TensorOrCond, stage: str) -> TensorOrCond:
    """Return the value; raise NonFinite if it holds NaN or infinity."""
    tensors = [value] if isinstance(value, Tensor) else value.tensors().values()
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise NonFinite(stage)
    return value
