"""Keyword arguments of sampling: their defaults and checks, and the sigmas they select."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from ldm.diffusion.guidance import Guidance, GuidanceScale
from ldm.diffusion.names import HIGH_SIGMA, SAMPLERS, SCHEDULERS, FreeUFactors
from ldm.diffusion.samplers.common import NoiseSource
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler_options import check_sigmas
from ldm.diffusion.step_noise import StepNoise
from ldm.model import Defaults, LatentDiffusion
from ldm.pipelines.families import is_sdxl
from ldm.pipelines.quirks import Quirks
from ldm.runtime.errors import ArgumentError, check_name

__all__ = [
    "Callback", "SamplingOptions", "check_embedded_guidance", "check_no_conflict_with_sigmas",
    "check_sampling", "check_tiles", "get_default_scale", "get_default_scheduler",
    "get_few_step_warning", "get_high_sigma_warning", "get_latent_shape", "get_sigmas",
    "needs_uncond",
]  # fmt: skip

DEFAULT_SCALE = 9.0  # of the original's scripts; commands may have others

Callback = Callable[[int, int, Tensor, Tensor], None]  # (step, steps, x, denoised)


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `sample` that all tasks accept; see `sample`."""

    steps: int | None
    sampler: str | None
    scheduler: str | None
    rho: float | None
    sigmas: Tensor | Sequence[float] | None
    eta: float | None
    s_churn: float
    s_tmin: float
    s_tmax: float | None
    s_noise: float
    brownian: bool
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    freeu: str | Sequence[float] | FreeUFactors | None
    freeu_version: str | None
    seeds: int | Sequence[int] | NoiseSource | None
    x_T: Tensor | None
    callback: Callback | None
    unet_tile: int | None
    tiling: str
    legacy: Iterable[str]


def get_sigmas(model: LatentDiffusion, quirks: Quirks, options: SamplingOptions) -> Tensor:
    """Return the sigmas (steps + 1,) of a run, float64: the given ones, else the scheduler's.

    SDXL may use another scheduler, and a sampler may skip a sigma, see `ldm.diffusion.names`.
    """
    sampler = options.get("sampler") or model.defaults.sampler
    steps, rho = options.get("steps"), options.get("rho")
    if (given_sigmas := options.get("sigmas")) is not None:
        sigmas = torch.as_tensor(given_sigmas, dtype=torch.float64)
        check_sigmas(sigmas.tolist())
        check_no_conflict_with_sigmas(len(sigmas) - 1, steps, options.get("scheduler"), rho)
        highest = float(model.schedule.sigmas[-1])
        if sigmas[0] > 1.001 * highest:  # tolerance for rounded sigmas
            message = f"the model has noise levels up to {highest:g}, not {float(sigmas[0]):g}"
            raise ArgumentError(message, "sigmas")
        return sigmas
    steps = model.defaults.steps if steps is None else steps
    scheduler = options.get("scheduler") or get_default_scheduler(
        model.schedule, model.defaults, sampler
    )
    if is_sdxl(model) and scheduler in SCHEDULERS:
        scheduler = SCHEDULERS[scheduler].sdxl_scheduler or scheduler
    sigmas = quirks.get_sigmas(model.schedule, steps, scheduler, rho)
    max_steps = SCHEDULERS[scheduler].max_steps or len(model.schedule)
    if SAMPLERS[sampler].skips_last_level and sigmas[-1] == 0 and steps < max_steps:
        sigmas = quirks.get_sigmas(model.schedule, steps + 1, scheduler, rho)
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    return sigmas


def check_no_conflict_with_sigmas(
    total_steps: int, steps: int | None, scheduler: str | None, rho: float | None
) -> None:
    """Raise ArgumentError for options that the given sigmas, of `total_steps` steps, replace."""
    for name, value in (("scheduler", scheduler), ("rho", rho)):
        if value is not None:
            raise ArgumentError(f"sigmas are given, leave out {name}", name)
    if steps not in (None, total_steps):
        raise ArgumentError(f"sigmas have {total_steps} steps, not {steps}", "steps")


def get_default_scheduler(schedule: NoiseSchedule, defaults: Defaults, sampler: str) -> str:
    """Return the scheduler for a sampler and a model, the first of these that is set.

    1. The sampler's `high_sigma_scheduler`, if the model's sigmas exceed HIGH_SIGMA.
    2. The sampler's `scheduler`.
    3. The model's.
    4. "trailing" for zero terminal SNR, as sampling must begin at the last timestep
       (arXiv:2305.08891, §3.3), else "uniform".
    """
    spec = SAMPLERS[sampler]
    if spec.high_sigma_scheduler and schedule.sigmas[-1] > HIGH_SIGMA:
        return spec.high_sigma_scheduler
    scheduler = spec.scheduler or defaults.scheduler
    return scheduler or ("trailing" if schedule.zero_snr else "uniform")


def get_high_sigma_warning(sampler: str, scheduler: str | None, sigma: float) -> str | None:
    """Return a warning if a sampler makes broken images from the first sigma, else None.

    Args:
        scheduler: The requested scheduler; None = `sigmas` were given.
    """
    alternative = SAMPLERS[sampler].high_sigma_scheduler
    if alternative in (None, scheduler) or sigma <= HIGH_SIGMA:
        return None
    origin = "sigmas" if scheduler is None else f"scheduler `{scheduler}`"
    return (
        f"sampler `{sampler}` makes broken images from noise levels above {HIGH_SIGMA:g}, and "
        f"{origin} begins at {sigma:.4g}: take scheduler `{alternative}`"
    )


def get_default_scale(
    model: LatentDiffusion, sampler: str | None, default: float = DEFAULT_SCALE
) -> float:
    """Return the sampler's default guidance scale, else the model's, else `default`.

    Args:
        sampler: A name in SAMPLERS; None = the model's default.
    """
    scale = SAMPLERS[sampler or model.defaults.sampler].scale
    if scale is None:
        scale = model.defaults.scale
    return default if scale is None else scale


def needs_uncond(model: LatentDiffusion, sampler: str | None, scale: GuidanceScale) -> bool:
    """Return whether a run predicts unconditionally: for guidance, or for a CFG++ sampler."""
    return scale != 1 or SAMPLERS[sampler or model.defaults.sampler].is_cfg_pp


def get_few_step_warning(
    defaults: Defaults, name: str, steps: int | None, scale: GuidanceScale | None
) -> str | None:
    """Return a warning if a few-step model gets too many steps or too high a scale, else None.

    Args:
        defaults: Defaults of the few-step model, or of the LoRA that makes a model few-step.
        name: File name of the model or LoRA, for the message.
        steps: Number of sampling steps; None = not checked.
        scale: Guidance scale; None or a function of sigma = not checked.
    """
    max_steps, max_scale = defaults.max_steps, defaults.max_scale
    excess = []
    if max_steps is not None and steps is not None and steps > max_steps:
        excess.append(f"{steps} steps")
    if max_scale is not None and isinstance(scale, int | float) and scale > max_scale:
        excess.append(f"guidance scale {scale:g}")
    if not excess:
        return None
    purpose = f"{defaults.steps} steps"
    if defaults.scale is not None:
        purpose += f" and guidance scale {defaults.scale:g}"
    return f"{name} is made for {purpose}: {' and '.join(excess)} will make images worse"


def check_sampling(
    sampler: str,
    scheduler: str | None,
    step_noise: StepNoise,
    strength: float = 1.0,
    guidance_rescale: float = 0.0,
    seeds: int | Sequence[int] | NoiseSource | None = None,
    guidance_interval: tuple[float, float] | None = None,
) -> None:
    """Raise ArgumentError for an unknown name or a value out of range, before any network runs."""
    check_name("sampler", sampler, SAMPLERS, argument="sampler")
    if scheduler is not None:
        check_name("scheduler", scheduler, SCHEDULERS, argument="scheduler")
    step_noise.check(sampler)
    if step_noise.brownian and callable(seeds):
        raise ArgumentError("brownian needs seeds, not a noise source", "brownian")
    for name, value in (("strength", strength), ("guidance_rescale", guidance_rescale)):
        if not 0 <= value <= 1:
            raise ArgumentError(f"{name} must be in 0 … 1, got {value}", name)
    if guidance_interval is not None and guidance_interval[0] > guidance_interval[1]:
        message = f"guidance_interval must be (low, high), got {guidance_interval}"
        raise ArgumentError(message, "guidance_interval")


def check_tiles(**sides: int | None) -> None:
    """Raise ArgumentError for a tile whose side is below 1; sides are passed by argument name."""
    for name, side in sides.items():
        if side is not None and side < 1:
            raise ArgumentError(f"{name} must be 1 or more, got {side}", name)


def check_embedded_guidance(
    model: LatentDiffusion,
    guidance: Guidance | None,
    guidance_rescale: float,
    interval: tuple[float, float] | None,
) -> None:
    """Raise ArgumentError for options without effect on a model that embeds the guidance scale."""
    if model.guidance_embed_dim is None:
        return
    for name, is_given in (
        ("a guidance method", guidance is not None),
        ("guidance_rescale", bool(guidance_rescale)),
        ("guidance_interval", interval is not None),
    ):
        if is_given:
            raise ArgumentError(
                f"{name} has no effect on a model that embeds the guidance scale: leave it out"
            )


def get_latent_shape(
    model: LatentDiffusion, n: int, size: tuple[int, int] | None, **latents: Tensor | None
) -> tuple[int, int, int, int]:
    """Return the shape (n, C, h, w) of a run's latents.

    Args:
        size: (H, W) in pixels; None = the size of the first of `latents`, else the training size.
        latents: Initial latents by argument name; None = not given.
    """
    given_latents = {name: latent for name, latent in latents.items() if latent is not None}
    like = next(iter(given_latents.values()), None)
    shape = (n, model.channels, *_get_latent_size(model, size, like))
    for name, latent in given_latents.items():
        if latent.shape[1:] != shape[1:] or len(latent) not in (1 if name == "z" else n, n):
            message = f"{name} must be a tensor {shape}, got a tensor {tuple(latent.shape)}"
            raise ArgumentError(message, name)
    return shape


def _get_latent_size(
    model: LatentDiffusion, size: tuple[int, int] | None, like: Tensor | None
) -> tuple[int, int]:
    """Return (h, w) of latents for `size` (H, W) in pixels; None = of `like`, else in training."""
    if size is None:
        return model.latent_size if like is None else (like.shape[-2], like.shape[-1])
    multiple = model.size_multiple
    height, width = map(operator.index, size)
    if any(pixels <= 0 or pixels % multiple for pixels in (height, width)):
        raise ArgumentError(
            f"height and width must be multiples of {multiple}, got {height} x {width}", "size"
        )
    return height // model.downscale_factor, width // model.downscale_factor
