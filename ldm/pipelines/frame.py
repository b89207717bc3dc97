"""The frame of every task: check the call, encode the condition, sample, decode."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import ParamSpec, TypeVar, cast

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
from ldm.runtime.errors import ArgumentError, NonFinite, unknown_name

__all__ = ["TaskOptions", "decode_latent", "encode_image", "generate", "pipeline"]


class TaskOptions(SamplingOptions):
    """The keywords that all tasks take, in the form that suits a batch of several prompts."""

    negative_prompt: Sequence[str]
    scale: float
    tile: int | None


P = ParamSpec("P")
Checked = TypeVar("Checked", Tensor, Cond)
FORMER_KEYWORDS = {"grid": "scheduler"}


def pipeline(*families: str) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorate a task: before any network runs, refuse what does not fit.

    Args:
        families: names in FAMILIES of the models that the task serves.
    Returns:
        A decorator. The decorated function raises WrongFamily for another model, UnknownName for a
        keyword that it does not take (with the nearest that it does), and ArgumentError for a
        value that `sample` does not allow. It runs without gradients.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        parameters = inspect.signature(function).parameters.values()
        own = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        allowed = [*own, *SamplingOptions.__annotations__]

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
            check_family(cast(LatentDiffusion, (*args, *keywords.values())[0]), *families)
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
    """Condition, sample and decode: what all tasks that read text share.

    Args:
        inputs: batch keys that the model reads beside text, a row for each prompt.
        unconditional_inputs: those of them that differ in the unconditional half of guidance.
        tile: side in latent pixels of the tiles of the decoder; None = decode whole.
        noise: the source of all noise.
        z, strength, size, constrain, options: see `sample`.
    Returns:
        (B, 3, H, W) float32 in [-1, 1].
    Raises:
        NonFinite: a stage of the model gave NaN or infinity.
    """
    prompts, uncond = as_list(prompts), None
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
    latent = sample(
        model, cond, uncond, scale=scale, noise=noise, z=z, strength=strength, size=size,
        constrain=constrain, **options,
    )  # fmt: skip
    return decode_latent(model, latent, tile)


def check_options(
    model: LatentDiffusion, prompts: Sequence[str], options: SamplingOptions, strength: float = 1.0
) -> Noise:
    """Raise ArgumentError for options that `sample` would refuse; the noise source of the rows."""
    sampler, scheduler = options.get("sampler", "ddim"), options.get("scheduler")
    legacy = options.get("legacy", ())
    check_sampling(
        sampler, scheduler, options.get("eta", 0.0), strength, options.get("rescale", 0.0), legacy
    )
    model.schedule.steps(
        options.get("steps", 50), scheduler or default_scheduler(model.schedule, sampler)
    )
    return noise_source(options.get("seeds"), len(as_list(prompts)), legacy)


def encode_prompts(
    model: LatentDiffusion, prompts: Sequence[str], inputs: Mapping[str, object]
) -> Cond:
    """The condition of the rows; a prompt that several share is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    cond = model.condition({"txt": distinct, **inputs})
    if cond.crossattn is None or len(distinct) == len(prompts):
        return cond
    rows = [distinct.index(prompt) for prompt in prompts]
    return replace(cond, crossattn=cond.crossattn[torch.tensor(rows).to(cond.crossattn.device)])


def decode_latent(model: LatentDiffusion, z: Tensor, tile: int | None) -> Tensor:
    """z (B, C, h, w) -> (B, 3, H, W) in [-1, 1]; raises NonFinite."""
    return check_finite(model.decode(check_finite(z, "the UNet"), tile=tile), "the VAE").clamp(
        -1, 1
    )


@torch.no_grad()
def encode_image(model: LatentDiffusion, image: Tensor, n: int, noise: Noise) -> Tensor:
    """n draws from the posterior of the latent of one image (1, 3, H, W): (n, C, h, w).

    The image is padded to whole latent pixels.
    """
    image = pad_to_multiple(image.to(model.device), model.downscale)
    posterior = model.autoencoder.encode(image)
    mean = posterior.mean.float().expand(n, -1, -1, -1)
    drawn = noise(torch.empty(mean.shape, device=mean.device))
    return check_finite((mean + posterior.std.float() * drawn) * model.scale_factor, "the VAE")


def as_list(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several, as a list."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """The image (B, C, H, W) with its last row and column repeated up to multiples."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def crop_like(padded: Tensor, image: Tensor) -> Tensor:
    """Cut off what `pad_to_multiple` added to the image."""
    return padded[..., : image.shape[-2], : image.shape[-1]]


def check_finite(value: Checked, stage: str) -> Checked:
    """The value; raises NonFinite if NaN or infinity is in it."""
    tensors = [value] if isinstance(value, Tensor) else value.filled().values()
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise NonFinite(stage)
    return value
