"""The sampling loop of all tasks, and DDIM inversion.

sample     condition (and a latent to start from) -> latent
invert     latent -> the noisy latent from which DDIM returns to it
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from ldm.conditioning import AnyCond, Composition, Cond, ScheduledCond
from ldm.diffusion import names
from ldm.diffusion.brownian import BrownianPaths
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import (
    Guidance,
    Scale,
    StepCounter,
    add_guidance,
    follow_schedule,
)
from ldm.diffusion.guidance_embedding import imitate_guidance
from ldm.diffusion.names import FreeUFactors
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.samplers.common import Constrain, Denoise, IntervalNoise
from ldm.diffusion.samplers.single_step import euler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler_options import check_sigmas
from ldm.diffusion.step_noise import StepNoise
from ldm.model import Defaults, LatentDiffusion
from ldm.nets.circular import circular_padding
from ldm.nets.cpu import cache_weights
from ldm.nets.tiled import apply_tiled
from ldm.pipelines.families import file_name, is_sdxl
from ldm.pipelines.freeu import make_freeu
from ldm.pipelines.quirks import Noise, Quirks, noise_source, row_seeds
from ldm.runtime.errors import ArgumentError, check_name, unknown_name

__all__ = [
    "SamplingOptions",
    "check_few_steps",
    "check_sampling",
    "default_scale",
    "default_scheduler",
    "explain_excess",
    "explain_high_start",
    "invert",
    "latent_size",
    "run_sigmas",
    "sample",
]

Callback = Callable[[int, int, Tensor, Tensor], None]


class SamplingOptions(TypedDict, total=False):
    """Keywords of `sample` that every task takes; see there."""

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
    rescale: float
    guidance_interval: tuple[float, float] | None
    freeu: str | Sequence[float] | FreeUFactors | None
    freeu_version: str | None
    seeds: int | Sequence[int] | Noise | None
    x_T: Tensor | None
    callback: Callback | None
    unet_tile: int | None
    tiling: str
    legacy: Iterable[str]


@torch.no_grad()
@cache_weights()
def sample(
    model: LatentDiffusion,
    cond: AnyCond,
    uncond: Cond | ScheduledCond | None = None,
    *,
    z: Tensor | None = None,
    strength: float = 1.0,
    x_T: Tensor | None = None,
    z_t: Tensor | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    scheduler: str | None = None,
    rho: float | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    end: int | None = None,
    eta: float | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
    brownian: bool = False,
    scale: Scale | None = None,
    rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    freeu: str | Sequence[float] | FreeUFactors | None = None,
    freeu_version: str | None = None,
    guidance: Guidance | None = None,
    further: Sequence[Cond] = (),
    seeds: int | Sequence[int] | Noise | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    first_step: int = 0,
    unet_tile: int | None = None,
    tiling: str = "none",
    legacy: Iterable[str] = (),
    grid: str | None = None,
) -> Tensor:
    """Sample a latent for each sample of `cond`.

    Args:
        cond: the condition, which may compose prompts and depend on the step.
        uncond: the unconditional or negative condition of guidance; None = no guidance.
        z: (B, C, h, w), the latent to add noise to and start from; None = start from pure noise.
        strength: fraction of the steps to run on z, from 0 (keep it) to 1 (start from pure noise).
        x_T: (B, C, h, w), the noise to start from, standard normal; None = drawn.
        z_t: (B, C, h, w), a noisy latent at the first of `sigmas` to go on from, without new noise.
        size: (height, width) in pixels; None = the size of z or x_T, else the model's own.
        steps: number of steps, 1 … T; None = the model's default.
        sampler: a name in SAMPLERS; None = the model's default.
        scheduler: a name in SCHEDULERS; None = `default_scheduler`.
        rho: exponent of schedulers that have one; None = the scheduler's default.
        sigmas: noise levels of the run, descending; None = those of steps, scheduler and rho.
        end: index in sigmas of the level to stop at; the result is then noisy. None = the last.
        eta: amount of noise between steps, 0 (none) … 1 (DDPM) (arXiv:2010.02502, eq. 16), for
            samplers that have it; None = 0 for `ddim`, 0.3 for `tcd`, 1 for others.
        s_churn: amount of noise before each step of `euler`, `heun`, `dpm2` (arXiv:2206.00364,
            algorithm 2).
        s_tmin, s_tmax: sigmas between which there is churn; None = no upper limit.
        s_noise: standard deviation of the noise of churn and between steps.
        brownian: whether the noise of `dpmpp_sde`, `dpmpp_2m_sde`, `dpmpp_3m_sde` is a Brownian
            path over sigma for each of the seeds, as in k-diffusion; else independent of steps.
        scale: guidance scale; 1 = no guidance, None = `default_scale`. A model that embeds it
            evaluates the network once a step, without `uncond`.
        rescale: 0 … 1, see `add_guidance`.
        guidance_interval: (low, high) sigmas between which guidance acts; None = everywhere.
        freeu: factors of FreeU, the name of a preset, or "auto" for the preset of the model's
            family; None = off.
        freeu_version: a name in FREEU_VERSIONS; None = "1".
        guidance: how predictions are combined, a new object for each run; None = classifier-free
            guidance.
        further: conditions of `guidance.texts`, with a row for each row of `cond`.
        seeds: one per row, or the first of consecutive ones; None = drawn from torch's generator.
            The noise of a row depends on its own seed only.
        noise: (like) -> standard normal noise in its shape, instead of `seeds`.
        callback: called with (step, steps, x, denoised) after each step; may raise Stop with a
            latent, which tasks then decode.
        constrain: (x, sigma) -> x, applied before every step.
        first_step: number of the first step, for conditions that depend on the step.
        unet_tile: side in latent pixels of overlapping tiles to run the network on; None = whole.
        tiling: axes along which edges wrap around, by circular padding: "x" for panoramas, "y",
            "xy" for textures, or "none". Tasks apply it to the autoencoder, too.
        legacy: names in LEGACY.
        grid: former name of `scheduler`.
    Returns:
        (B, C, h, w) float32.
    Raises:
        ArgumentError: an unknown name, or a value out of range.
    """
    quirks = Quirks.of(model, legacy)
    scheduler, defaults = scheduler or grid, model.defaults
    sampler = sampler or defaults.sampler
    if eta is None and sampler == defaults.sampler:
        eta = defaults.eta
    step_noise = StepNoise(eta, s_churn, s_tmin, s_tmax, s_noise, brownian)
    check_sampling(sampler, scheduler, step_noise, strength, rescale)
    scale = default_scale(model, sampler) if scale is None else scale
    if not isinstance(sigmas, Tensor):
        options: SamplingOptions = {
            "steps": steps, "sampler": sampler, "scheduler": scheduler, "rho": rho,
            "sigmas": sigmas,
        }  # fmt: skip
        sigmas = run_sigmas(model, quirks, options)
        steps = len(sigmas) - 1 if options["sigmas"] is not None else steps
    elif (sigmas.diff() > 0).any():
        raise ArgumentError("sigmas must descend", "sigmas")
    steps = defaults.steps if steps is None else steps
    if model.guidance_embed_dim is not None:
        _check_embedded_guidance(guidance, rescale, guidance_interval)
    if reason := check_few_steps(model, steps, scale):
        warnings.warn(reason, stacklevel=2)
    noise = noise or noise_source(seeds, len(cond), quirks.names)
    shape = (len(cond), model.channels, *latent_size(model, size, x_T if z is None else z))
    first = 0
    if z_t is not None:
        x = z_t.to(model.device, torch.float32) * _std(sigmas[0])
    else:
        if x_T is None:
            x_T = noise(torch.empty(shape, device=model.device))
        x_T = x_T.to(model.device, torch.float32)
        if z is None:
            x = x_T * _std(sigmas[0])
        else:
            first, noise_level = quirks.first_step(strength, steps, len(sigmas) - 1)
            sigma, std = float(sigmas[noise_level]), _std(sigmas[noise_level])
            x = x_T * std if quirks.is_pure_noise(strength) else z.to(x_T) + sigma * x_T
            x = x * (_std(sigmas[first]) / std)
    sigmas = sigmas[first : None if end is None else max(end, first) + 1]
    if z_t is None and (reason := explain_high_start(sampler, scheduler, float(sigmas[0]))):
        warnings.warn(reason, stacklevel=2)
    denoiser = quirks.denoiser(model, sampler)
    if freeu is not None:
        changes = partial(denoiser.network, freeu=make_freeu(model, freeu, freeu_version))
        denoiser = replace(denoiser, network=changes)
    denoiser = _in_tiles(denoiser, unet_tile)
    unconds: deque[Tensor] = deque(maxlen=1)
    sampler_options = _sampler_options(
        model.schedule, sampler, step_noise, noise, "noise" in quirks, end is not None
    )
    if brownian and sampler_options["noise"] is not None:
        sampler_options["path"] = _brownian_path(seeds, len(cond), sigmas, s_noise)
    if names.SAMPLERS[sampler].takes_uncond:
        sampler_options["last_uncond"] = lambda: unconds[0] if unconds else None
    guide: Callable[[Cond | Composition, Cond | None], Denoise] = partial(
        add_guidance,
        denoiser,
        scale=scale,
        rescale=rescale,
        interval=guidance_interval,
        guidance=guidance,
        further=further,
        on_uncond=unconds.append if "last_uncond" in sampler_options else None,
    )
    if model.guidance_embed_dim is not None:
        guide = partial(imitate_guidance, denoiser, scale=scale, width=model.guidance_embed_dim)
    counter = StepCounter(first_step)
    with circular_padding(tiling):
        x = SAMPLERS[sampler](
            follow_schedule(guide, cond, uncond, counter),
            x,
            sigmas,
            callback=_with_steps(callback, len(sigmas) - 1, counter),
            constrain=constrain,
            **sampler_options,
        )
    quirks.draw_unused(sampler, sigmas, x)
    return x / _std(sigmas[-1])


@torch.no_grad()
@cache_weights()
def invert(
    model: LatentDiffusion,
    z: Tensor,
    cond: Cond,
    uncond: Cond | None = None,
    *,
    steps: int = 50,
    until: int | None = None,
    scheduler: str | None = None,
    scale: Scale = 1.0,
    legacy: Iterable[str] = (),
) -> Tensor:
    """Compute the noisy latent from which DDIM returns to z: DDIM inversion (Euler up the sigmas).

    Args:
        z: (B, C, h, w).
        steps: number of steps from z to pure noise.
        until: number of those steps to take; None = all.
        scheduler: a name in SCHEDULERS; None = "uniform".
    Returns:
        z_t, √ᾱ z + √(1-ᾱ) noise at the level reached, (B, C, h, w).
    """
    quirks = Quirks(frozenset(legacy))
    sigmas = quirks.sigmas(model.schedule, steps, scheduler or "uniform").flip(0)
    sigmas = sigmas[: (steps if until is None else until) + 1]
    denoise = quirks.inverse_denoise(model, sigmas, cond, uncond, scale)
    x = euler(denoise, z.float() * _std(sigmas[0]), sigmas)
    return x / _std(sigmas[-1])


def run_sigmas(model: LatentDiffusion, quirks: Quirks, options: SamplingOptions) -> Tensor:
    """Return the noise levels (n + 1,) of a run, float64: `sigmas`, else those of the scheduler.

    Raises:
        ArgumentError: steps, rho or sigmas are out of range, or exclude each other.
    """
    sampler, levels = options.get("sampler") or model.defaults.sampler, options.get("sigmas")
    steps, rho = options.get("steps"), options.get("rho")
    if levels is not None:
        sigmas = torch.as_tensor(levels, dtype=torch.float64)
        check_sigmas(sigmas.tolist())
        for name in ("scheduler", "rho"):
            if options.get(name) is not None:
                raise ArgumentError(f"sigmas are given, leave out {name}", name)
        if steps not in (None, len(sigmas) - 1):
            raise ArgumentError(f"sigmas have {len(sigmas) - 1} steps, not {steps}", "steps")
        highest = float(model.schedule.sigmas[-1])
        if sigmas[0] > 1.001 * highest:  # users pass rounded levels
            message = f"the model has noise levels up to {highest:g}, not {float(sigmas[0]):g}"
            raise ArgumentError(message, "sigmas")
        return sigmas
    steps = model.defaults.steps if steps is None else steps
    scheduler = options.get("scheduler") or default_scheduler(model, sampler)
    if is_sdxl(model) and scheduler in names.SCHEDULERS:
        scheduler = names.SCHEDULERS[scheduler].for_sdxl or scheduler
    sigmas = quirks.sigmas(model.schedule, steps, scheduler, rho)
    most = names.SCHEDULERS[scheduler].max_steps or len(model.schedule)
    if names.SAMPLERS[sampler].skips_last_level and sigmas[-1] == 0 and steps < most:
        sigmas = quirks.sigmas(model.schedule, steps + 1, scheduler, rho)
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    return sigmas


def default_scheduler(model: LatentDiffusion, sampler: str) -> str:
    """Return the sampler's own scheduler, else the model's, else "uniform".

    With zero terminal SNR it is "trailing", as sampling must begin at the last timestep
    (arXiv:2305.08891, §3.3), except for samplers that cannot begin there.
    """
    row = names.SAMPLERS[sampler]
    if row.wide_scheduler and model.schedule.sigmas[-1] > names.MAX_LEVEL:
        return row.wide_scheduler
    own = row.scheduler or model.defaults.scheduler
    return own or ("trailing" if model.schedule.zero_snr else "uniform")


def explain_high_start(sampler: str, scheduler: str | None, sigma: float) -> str | None:
    """Return, in one line, why a sampler cannot begin at a level; None if it can.

    Args:
        scheduler: that was asked for, if any.
    """
    remedy = names.SAMPLERS[sampler].wide_scheduler
    if remedy in (None, scheduler) or sigma <= names.MAX_LEVEL:
        return None
    choice = "sigmas" if scheduler is None else f"scheduler `{scheduler}`"
    return (
        f"sampler `{sampler}` makes broken images from noise levels above {names.MAX_LEVEL:g}, and "
        f"{choice} begins at {sigma:.4g}: take scheduler `{remedy}`"
    )


def default_scale(model: LatentDiffusion, sampler: str | None) -> float:
    """Return the default guidance scale of the sampler, else of the model."""
    own = names.SAMPLERS[sampler or model.defaults.sampler].scale
    return model.defaults.scale if own is None else own


def check_few_steps(model: LatentDiffusion, steps: int | None, scale: Scale | None) -> str | None:
    """Return a warning if a few-step model gets too many steps or too high a scale, else None.

    Args:
        scale: guidance scale; a function of sigma is not checked.
    """
    found = model.provenance.get("variant")
    name = f"`{found['file']}`" if found else file_name(model)  # a LoRA, or the model itself
    return explain_excess(model.defaults, name, steps, scale)


def explain_excess(
    defaults: Defaults, name: str, steps: int | None, scale: Scale | None
) -> str | None:
    """Do the same for the defaults of a model or LoRA with a name."""
    most, limit = defaults.max_steps, defaults.max_scale
    excess = []
    if most is not None and (steps or 0) > most:
        excess.append(f"{steps} steps")
    if limit is not None and isinstance(scale, int | float) and scale > limit:
        excess.append(f"guidance scale {scale:g}")
    if not excess:
        return None
    return (
        f"{name} is made for {defaults.steps} steps and guidance scale {defaults.scale:g}: "
        f"{' and '.join(excess)} will make images worse"
    )


def check_sampling(
    sampler: str,
    scheduler: str | None,
    step_noise: StepNoise,
    strength: float = 1.0,
    rescale: float = 0.0,
    legacy: Iterable[str] = (),
) -> None:
    """Raise ArgumentError for an unknown name or a value out of range, before any network runs."""
    check_name("sampler", sampler, names.SAMPLERS, argument="sampler")
    if scheduler is not None and scheduler not in names.SCHEDULERS:
        raise unknown_name("scheduler", scheduler, names.SCHEDULERS, argument="scheduler")
    step_noise.check(sampler)
    for name, value in (("strength", strength), ("rescale", rescale)):
        if not 0 <= value <= 1:
            raise ArgumentError(f"{name} must be in 0 … 1, got {value}", name)
    Quirks(frozenset(legacy))


def _check_embedded_guidance(
    guidance: Guidance | None, rescale: float, interval: tuple[float, float] | None
) -> None:
    """Raise ArgumentError for options that need an unconditional prediction; none is computed."""
    given = {
        "a guidance method": guidance is not None,
        "rescale": bool(rescale),
        "guidance_interval": interval is not None,
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise ArgumentError(
            f"{name} has no effect on a model that embeds the guidance scale: leave it out"
        )


def _in_tiles(denoiser: Denoiser, tile: int | None) -> Denoiser:
    """Run the denoiser's network on overlapping tiles and blend the results."""
    if tile is None:
        return denoiser

    def network(z_t: Tensor, t: Tensor, **slots: Tensor | None) -> Tensor:
        return apply_tiled(lambda patch: denoiser.network(patch, t, **slots), z_t, tile)

    return replace(denoiser, network=network)


def _sampler_options(
    schedule: NoiseSchedule,
    sampler: str,
    step_noise: StepNoise,
    noise: Noise,
    always_draws: bool,
    is_continued: bool,
) -> dict[str, object]:
    """Return the keyword arguments of the sampler's function.

    Args:
        always_draws: draw noise even where eta is 0, as the original did.
        is_continued: whether another model samples on from the result.
    """
    row, s_noise, s_tmax = names.SAMPLERS[sampler], step_noise.s_noise, step_noise.s_tmax
    scaled_noise = noise if s_noise == 1 else lambda like: s_noise * noise(like)
    options: dict[str, object] = {}
    if row.takes_noise or row.takes_churn:
        options["noise"] = scaled_noise
    if row.takes_churn:
        options["s_churn"], options["s_tmin"] = step_noise.s_churn, step_noise.s_tmin
        options["s_tmax"] = math.inf if s_tmax is None else s_tmax
    if row.eta is not None:
        options["eta"] = eta = row.eta if step_noise.eta is None else step_noise.eta
        if eta == 0 and not always_draws:
            options["noise"] = None
    if row.scales_time:
        options["scale_time"] = schedule.scale_time
    if row.function == "dpmpp_2m" and is_continued:
        options["lower_order_final"] = False
    return options


def _brownian_path(
    seeds: int | Sequence[int] | Noise | None, n: int, sigmas: Tensor, s_noise: float
) -> IntervalNoise:
    """Return the noise between two levels of a run."""
    if callable(seeds):
        raise ArgumentError("brownian needs seeds, not a source of noise", "brownian")
    levels = sigmas[sigmas > 0].tolist()
    paths = BrownianPaths(row_seeds(seeds, n), levels[-1], levels[0])
    return lambda like, sigma, sigma_next: s_noise * paths(like, sigma, sigma_next)


def _with_steps(
    callback: Callback | None, steps: int, counter: StepCounter
) -> Callable[[int, Tensor, Tensor], None]:
    """Add the number of steps to the callback's arguments, and advance the counter."""
    first = counter.step

    def after_step(step: int, x: Tensor, denoised: Tensor) -> None:
        counter.step = first + step + 1
        if callback:
            callback(step, steps, x, denoised)

    return after_step


def _std(sigma: Tensor) -> float:
    """Return the standard deviation of x at `sigma` for a z of standard deviation 1."""
    return math.sqrt(1 + float(sigma) ** 2)


def latent_size(
    model: LatentDiffusion, size: tuple[int, int] | None, like: Tensor | None
) -> tuple[int, int]:
    """Return the (h, w) of latents: for a size (H, W) in pixels, else of `like`, else the model's.

    Raises:
        ArgumentError: the size is not a multiple of the downscaling factor.
    """
    if size is None:
        return model.latent_size if like is None else (like.shape[-2], like.shape[-1])
    f = model.downscale
    if any(pixels <= 0 or pixels % f for pixels in size):
        raise ArgumentError(
            f"height and width must be multiples of {f}, got {size[0]} x {size[1]}", "size"
        )
    return size[0] // f, size[1] // f
