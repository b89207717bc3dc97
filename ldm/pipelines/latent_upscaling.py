"""The x2 latent upscaler, alone or after another model.

It is sampled as in k-diffusion's notebook: the last noise level is above 0, and its noise stays in
the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ldm.conditioning import Cond
from ldm.diffusion.guidance import GuidanceScale
from ldm.diffusion.samplers.common import NoiseSource
from ldm.encoders.concat_images import LowResLatent
from ldm.model import LatentDiffusion
from ldm.nets.circular import get_circular_axes
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.pipelines.arguments import check_arguments
from ldm.pipelines.families import find_family, quote_name
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling import sample
from ldm.pipelines.sampling_options import (
    SamplingOptions,
    get_default_scale,
    get_sigmas,
    needs_uncond,
)
from ldm.prompts import PLAIN
from ldm.runtime.errors import ArgumentError, check_name

__all__ = [
    "LATENT_UPSCALE_FACTOR", "Upscaling", "check_latent", "check_noise", "check_plain_syntax",
    "check_sides_for_tiling", "sample_upscaled_latent",
]  # fmt: skip

LATENT_UPSCALE_FACTOR = 2  # of the sides


@dataclass(frozen=True)
class Upscaling:
    """An x2 latent upscaler that doubles the latents of another model, and its options.

    Args:
        model: The upscaler.
        steps: Its sampling steps; None = its default.
        scale: Its guidance scale; None = its default.
    """

    model: LatentDiffusion
    steps: int | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        check_arguments(self.model, vars(self), Upscaling.__annotations__)

    def check_run(self, base: LatentDiffusion, height: int, width: int, syntax: str) -> None:
        """Raise ArgumentError unless `model` can upscale latents (height, width) of the base."""
        self.check(base)
        check_sides_for_tiling(self.model, height, width)
        check_plain_syntax(syntax)

    def check(self, base: LatentDiffusion) -> None:
        """Raise ArgumentError unless `model` is an upscaler for the latents of the base model."""
        if find_family(self.model.conditioner) != "latent-upscaling":
            name = quote_name(self.model)
            raise ArgumentError(f"{name} is not an x2 latent upscaler", "upscaler")
        get_sigmas(self.model, Quirks(), {"steps": self.steps})  # raises ArgumentError
        if not self.model.latent_space.matches(base.latent_space):
            raise ArgumentError(
                f"{quote_name(base)} has another latent space than the upscaler, which takes "
                "latents of Stable Diffusion 1 and 2: save the images, then upscale them",
                "upscaler",
            )


def check_plain_syntax(syntax: str) -> None:
    """Raise ArgumentError unless prompts are plain: the upscaler reads no other syntax."""
    if syntax != PLAIN:
        message = "an x2 latent upscaler takes prompts of syntax plain only"
        raise ArgumentError(message, "syntax")


def check_noise(model: LatentDiffusion, sigma: float, noise_kind: str) -> None:
    """Raise ArgumentError for noise on the low-res latent that an upscaler does not support."""
    check_name("kind of noise", noise_kind, LowResLatent.NOISE_KINDS, argument="noise_kind")
    if not sigma >= 0:
        raise ArgumentError(f"noise_sigma must be 0 or more, got {sigma}", "noise_sigma")
    assert isinstance(model.unet, LatentUpscalerUNet)
    if sigma and not model.unet.uses_noise_level:
        raise ArgumentError(
            f"{quote_name(model)} comes from diffusers, which leaves out the embedding of noise "
            f"levels: noise_sigma must be 0, got {sigma}",
            "noise_sigma",
        )


def check_latent(model: LatentDiffusion, latent: Tensor, n: int) -> None:
    """Raise ArgumentError unless a latent has the model's channels, and one row or n."""
    shape = tuple(latent.shape)
    if latent.dim() != 4 or shape[1] != model.channels or shape[0] not in (1, n):
        raise ArgumentError(
            f"a latent has the shape (1 or {n}, {model.channels}, height, width), got {shape}",
            "latent",
        )


def check_sides_for_tiling(model: LatentDiffusion, height: int, width: int) -> None:
    """Raise ArgumentError if a latent (height, width) would be padded along a circular axis."""
    assert isinstance(model.unet, LatentUpscalerUNet)
    multiple = model.unet.size_multiple // LATENT_UPSCALE_FACTOR
    for axis, side in (("y", height), ("x", width)):
        if axis in get_circular_axes() and side != _round_up(side, multiple):
            pixels = multiple * model.downscale_factor
            raise ArgumentError(
                f"with tiling the x2 latent upscaler takes sides that are multiples of {pixels} "
                f"pixels, from {2 * pixels}, got {side * model.downscale_factor}",
                "tiling",
            )


def sample_upscaled_latent(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    latent: Tensor,
    *,
    noise_source: NoiseSource,
    noise_sigma: float = 0.0,
    noise_kind: str = "gaussian",
    scale: GuidanceScale | None = None,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """Sample latents (B, C, 2h, 2w), one per prompt, from low-res latents (1 | B, C, h, w).

    The low-res latent is padded to sides that the UNet supports, and the result is cropped; tiles
    of the UNet are enlarged to such sides.

    Args:
        noise_sigma, noise_kind: See `upscale_latent`.
        scale: Guidance scale; 0 = the negative prompt only, None = `get_default_scale`.
        options: See `sample`; x_T may be smaller than the padded latents.
    """
    n, (height, width) = len(prompts), latent.shape[-2:]
    assert isinstance(model.unet, LatentUpscalerUNet)
    check_sides_for_tiling(model, height, width)
    tile = options.get("unet_tile")
    if tile is not None:
        options["unet_tile"] = _round_up(tile, model.unet.size_multiple)
    latent = latent.to(model.device, torch.float32).expand(n, -1, -1, -1)
    latent = _pad(latent, model.unet.size_multiple // LATENT_UPSCALE_FACTOR)
    adds_noise = noise_sigma > 0 and noise_kind == "gaussian"
    lowres = model.conditioner.get(LowResLatent).add_noise(
        latent, noise_sigma, noise_source(latent) if adds_noise else None
    )
    quirks = Quirks.for_model(model, options.get("legacy", ()))

    def encode(texts: Sequence[str]) -> Cond:
        sigma = torch.full((n,), noise_sigma, device=model.device)
        cond = model.condition({"txt": texts, "lowres_latent": lowres, "noise_sigma": sigma})
        return replace(cond, context_mask=None) if "unmasked" in quirks else cond

    sampler = options.get("sampler")
    scale = get_default_scale(model, sampler) if scale is None else scale
    cond = encode(negative_prompts if scale == 0 else prompts)
    is_guided = scale != 0 and needs_uncond(model, sampler, scale)
    uncond = encode(negative_prompts) if is_guided else None
    sigmas = get_sigmas(model, quirks, options)
    x_T = _draw_initial_noise(latent, options.get("x_T"), noise_source)
    # `sample` takes and returns latents scaled to the same variance at every level; this model
    # needs x itself.
    first_sigma, last_sigma = float(sigmas[0]), float(sigmas[-1])
    run_options: SamplingOptions = {
        **options, "x_T": None, "sigmas": sigmas, "steps": None, "scheduler": None, "rho": None
    }  # fmt: skip
    z = sample(
        model,
        cond,
        uncond,
        z_t=x_T * (first_sigma / math.hypot(1, first_sigma)),
        scale=1 if uncond is None else scale,
        noise_source=noise_source,
        **run_options,
    )
    z = z[..., : LATENT_UPSCALE_FACTOR * height, : LATENT_UPSCALE_FACTOR * width]
    return z * math.hypot(1, last_sigma)


def _round_up(side: int, multiple: int) -> int:
    """Round a side up to a multiple, at least twice `multiple`."""
    return max(side + -side % multiple, 2 * multiple)


def _pad(latent: Tensor, multiple: int) -> Tensor:
    """Pad to sides of `_round_up` by repeating the last row and column."""
    height, width = (_round_up(side, multiple) for side in latent.shape[-2:])
    return F.pad(
        latent, (0, width - latent.shape[-1], 0, height - latent.shape[-2]), mode="replicate"
    )


def _draw_initial_noise(latent: Tensor, x_T: Tensor | None, noise_source: NoiseSource) -> Tensor:
    """Draw noise of twice the size of a padded latent.

    Args:
        x_T: Noise that replaces the top left corner, or all of it; None = nothing is replaced.
    """
    n, channels, height, width = latent.shape
    height, width = LATENT_UPSCALE_FACTOR * height, LATENT_UPSCALE_FACTOR * width
    like = latent.new_empty(n, channels, height, width)
    if x_T is None:
        return noise_source(like)
    if x_T.shape == like.shape:
        return x_T.to(like)
    if x_T.shape[:2] != like.shape[:2] or x_T.shape[2] > height or x_T.shape[3] > width:
        shapes = f"{tuple(like.shape)}, got a tensor {tuple(x_T.shape)}"
        raise ArgumentError(f"x_T must be a tensor of at most the shape {shapes}", "x_T")
    initial_noise = noise_source(like)
    initial_noise[..., : x_T.shape[-2], : x_T.shape[-1]] = x_T.to(like)
    return initial_noise
