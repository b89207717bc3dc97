"""The sampling loop of all tasks, and DDIM inversion.

sample     condition (and a latent to start from) -> latent
invert     latent -> the noisy latent from which DDIM returns to it
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ldm.conditioning import AnyCond, Composition, Cond, ScheduledCond
from ldm.diffusion.brownian import BrownianPaths
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import (
    CurrentStep,
    Guidance,
    GuidanceScale,
    add_guidance,
    build_scheduled_denoise,
)
from ldm.diffusion.guidance_embedding import add_embedded_guidance
from ldm.diffusion.names import SAMPLERS, FreeUFactors
from ldm.diffusion.samplers import SAMPLERS as SAMPLER_FUNCTIONS
from ldm.diffusion.samplers.common import Constrain, Denoise, IntervalNoise, NoiseSource
from ldm.diffusion.samplers.single_step import euler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.step_noise import StepNoise
from ldm.model import LatentDiffusion
from ldm.nets.circular import circular_padding
from ldm.nets.cpu import cache_weights
from ldm.nets.tiled import apply_tiled
from ldm.pipelines.arguments import check_arguments
from ldm.pipelines.families import quote_name
from ldm.pipelines.freeu import make_freeu
from ldm.pipelines.quirks import Quirks, get_row_seeds, make_noise_source
from ldm.pipelines.sampling_options import (
    Callback,
    SamplingOptions,
    check_embedded_guidance,
    check_no_conflict_with_sigmas,
    check_sampling,
    check_tiles,
    get_default_scale,
    get_few_step_warning,
    get_high_sigma_warning,
    get_latent_shape,
    get_sigmas,
)
from ldm.runtime.arguments import as_list
from ldm.runtime.errors import ArgumentError
from ldm.runtime.warn import warn_caller

__all__ = ["invert", "sample"]

# Argument of `sample` -> the argument that it needs, or that replaces it.
REQUIRES = {"strength": "z", "freeu_version": "freeu", "extra_conds": "guidance"}
EXCLUDED_BY = {"z": "z_t", "x_T": "z_t", "seeds": "noise_source", "grid": "scheduler"}


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
    end_step: int | None = None,
    eta: float | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
    brownian: bool = False,
    scale: GuidanceScale | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    freeu: str | Sequence[float] | FreeUFactors | None = None,
    freeu_version: str | None = None,
    guidance: Guidance | None = None,
    extra_conds: Sequence[Cond] = (),
    seeds: int | Sequence[int] | NoiseSource | None = None,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    first_step_number: int = 0,
    unet_tile: int | None = None,
    tiling: str = "none",
    legacy: Iterable[str] = (),
    grid: str | None = None,
) -> Tensor:
    """Sample a latent for each row of `cond`.

    Args:
        cond: The condition, which may compose prompts and depend on the step. For a model without
            conditions, `model.condition({})`, it has no rows: there are then as many latents as
            rows of z_t, x_T, z or `seeds`, else one.
        uncond: The unconditional or negative condition of guidance; None = no guidance; a
            `scale` other than 1 then raises ArgumentError, unless the model embeds it.
        z: (1 | B, C, h, w), the latent to add noise to and start from; None = start from pure
            noise.
        strength: Fraction of the steps to run on z, from 0 (keep it) to 1 (start from pure noise).
        x_T: (B, C, h, w), the initial noise, standard normal; None = drawn.
        z_t: (B, C, h, w), a noisy latent √ᾱ z + √(1-ᾱ) noise, at the first of `sigmas`, to continue
            from without new noise; None = start from z or from pure noise.
        size: (height, width) in pixels; None = the size of z or x_T, else the training size.
        steps: Number of steps, 1 … T; None = the model's default.
        sampler: A name in SAMPLERS; None = the model's default.
        scheduler: A name in SCHEDULERS; None = `get_default_scheduler`.
        rho: Exponent of schedulers that have one; None = the scheduler's default.
        sigmas: Noise levels of the run, descending; None = those of steps, scheduler and rho.
        end_step: Index in sigmas of the level to stop at, not before the first one that `strength`
            selects; the result is then noisy. None = the last.
        eta: Amount of noise between steps, 0 (none) … 1 (DDPM) (arXiv:2010.02502, eq. 16), for
            samplers that have it; None = the model's default for its default sampler, else 0 for
            `ddim`, 0.3 for `tcd`, 1 for others.
        s_churn: Amount of noise before each step of `euler`, `heun`, `dpm2` (arXiv:2206.00364,
            algorithm 2).
        s_tmin, s_tmax: sigmas between which there is churn; None = no upper limit.
        s_noise: Standard deviation of the noise of churn and between steps.
        brownian: Whether the noise of `dpmpp_sde`, `dpmpp_2m_sde`, `dpmpp_2m_sde_heun` and
            `dpmpp_3m_sde` is a Brownian path over sigma for each of the seeds, as in k-diffusion;
            else it is independent for each step.
        scale: Guidance scale; 1 = no guidance, None = `get_default_scale`. A model that embeds it
            evaluates the network once a step, without `uncond`.
        guidance_rescale: Strength, 0 … 1, of rescaling guided predictions to the standard deviation
            of the conditional ones (phi of arXiv:2305.08891, §3.4), against over-exposure.
        guidance_interval: (low, high) sigmas between which guidance acts; None = everywhere.
        freeu: Factors of FreeU, the name of a preset, or "auto" for the preset of the model's
            family; None = off.
        freeu_version: A name in FREEU_VERSIONS; None = "1".
        guidance: The guidance method, a new object for each run; None = classifier-free guidance.
        extra_conds: Conditions of the texts that the guidance method needs besides the prompts,
            `guidance.texts`; each has as many rows as `cond`.
        seeds: One per row, or the first of consecutive ones, less than 2^64; or a noise source;
            None = drawn from torch's generator. A row's noise depends on its seed only.
        noise_source: Function (like) -> standard normal noise in the shape of `like`; None = that
            of `seeds`. If both are given, `seeds` are only for `brownian`.
        callback: Called with (step, steps, x, denoised) after each step; may raise Stop with a
            latent, which tasks then decode. None = not called.
        constrain: (x, sigma) -> x, applied before every step; None = no constraint.
        first_step_number: Number that the first step has for conditions that depend on the step,
            above 0 for a run that continues another. No step is skipped.
        unet_tile: Side in latent pixels of overlapping tiles that the network runs on; None = no
            tiles.
        tiling: Axes along which edges wrap around, by circular padding: "x" for panoramas, "y",
            "xy" for textures, or "none". Tasks also apply it to the autoencoder.
        legacy: Quirks of the original to reproduce, names in LEGACY.
        grid: Former name of `scheduler`.
    Returns:
        (B, C, h, w) float32.
    """
    arguments = dict(locals())
    check_arguments(model, arguments, sample.__annotations__)
    _check_combinations(arguments)
    quirks = Quirks.for_model(model, legacy)
    scheduler, sampler = scheduler or grid, sampler or model.defaults.sampler
    if eta is None and sampler == model.defaults.sampler:
        eta = model.defaults.eta
    step_noise = StepNoise(eta, s_churn, s_tmin, s_tmax, s_noise, brownian)
    check_sampling(
        sampler, scheduler, step_noise, strength, guidance_rescale, seeds, guidance_interval
    )
    if s_churn == 0 and (s_tmin > 0 or s_tmax is not None):
        warn_caller("s_tmin and s_tmax have no effect without s_churn")
    check_tiles(unet_tile=unet_tile)
    if uncond is not None and len(uncond) != len(cond):
        message = f"uncond must have as many rows as cond, {len(cond)}, got {len(uncond)}"
        raise ArgumentError(message, "uncond")
    scale = get_default_scale(model, sampler) if scale is None else scale
    _check_guidance(model, arguments, sampler, scale)
    if steps is None:
        steps = model.defaults.steps if sigmas is None else len(sigmas) - 1
    if not isinstance(sigmas, Tensor):
        options: SamplingOptions = {
            "steps": steps, "sampler": sampler, "scheduler": scheduler, "rho": rho,
            "sigmas": sigmas,
        }  # fmt: skip
        sigmas = get_sigmas(model, quirks, options)
    elif not len(sigmas) or (sigmas.diff() > 0).any():  # tasks check them before, as a whole run
        raise ArgumentError("sigmas must be one or more, in descending order", "sigmas")
    else:
        # The quirk `strength` counts the requested steps, not the steps of the run.
        requested_steps = None if "strength" in quirks else steps
        check_no_conflict_with_sigmas(len(sigmas) - 1, requested_steps, scheduler, rho)
    check_embedded_guidance(model, guidance, guidance_rescale, guidance_interval)
    variant = model.provenance.get("variant")  # of a LoRA that makes the model few-step
    model_name = f"`{variant['file']}`" if variant else quote_name(model)
    if warning := get_few_step_warning(model.defaults, model_name, steps, scale):
        warn_caller(warning)
    n = len(cond) or _count_rows(z_t, x_T, z, seeds)
    noise_source = noise_source or make_noise_source(seeds, n, quirks.names)
    shape = get_latent_shape(model, n, size, z=z, x_T=x_T, z_t=z_t)
    if z_t is not None:
        x, first_step = z_t.to(model.device, torch.float32) * _compute_ve_factor(sigmas[0]), 0
    else:
        if x_T is None:
            x_T = noise_source(torch.empty(shape, device=model.device))
        x_T = x_T.to(model.device, torch.float32)
        x, first_step = _add_initial_noise(z, x_T, sigmas, quirks, strength, steps)
    if end_step is not None:
        if not first_step <= end_step < len(sigmas):
            allowed = f"{first_step} … {len(sigmas) - 1}, the levels of the run"
            raise ArgumentError(f"end_step must be in {allowed}, got {end_step}", "end_step")
        sigmas = sigmas[: end_step + 1]
    sigmas = sigmas[first_step:]
    if z_t is None and (warning := get_high_sigma_warning(sampler, scheduler, float(sigmas[0]))):
        warn_caller(warning)
    denoiser = quirks.get_denoiser(model, sampler)
    if freeu is not None:
        network = partial(denoiser.network, freeu=make_freeu(model, freeu, freeu_version))
        denoiser = replace(denoiser, network=network)
    denoiser = _tile_network(denoiser, unet_tile)
    uncond_denoised: deque[Tensor] = deque(maxlen=1)  # the latest unconditional estimate of z
    sampler_options = _get_sampler_options(
        model.schedule, sampler, step_noise, noise_source, "noise" in quirks, end_step is not None
    )
    if brownian and sampler_options["noise_source"] is not None:
        sampler_options["interval_noise"] = _make_interval_noise(seeds, n, sigmas, s_noise)
    if is_cfg_pp := SAMPLERS[sampler].is_cfg_pp:
        sampler_options["get_uncond_denoised"] = lambda: next(iter(uncond_denoised), None)
    build_denoise: Callable[[Cond | Composition, Cond | None], Denoise] = partial(
        add_guidance,
        denoiser,
        scale=scale,
        guidance_rescale=guidance_rescale,
        interval=guidance_interval,
        guidance=guidance,
        extra_conds=extra_conds,
        on_uncond_denoised=uncond_denoised.append if is_cfg_pp else None,
    )
    if model.guidance_embed_dim is not None:
        dim = model.guidance_embed_dim
        build_denoise = partial(add_embedded_guidance, denoiser, scale=scale, dim=dim)
    current_step = CurrentStep(first_step_number)
    with circular_padding(tiling):
        x = SAMPLER_FUNCTIONS[sampler](
            build_scheduled_denoise(build_denoise, cond, uncond, current_step),
            x,
            sigmas,
            callback=_wrap_callback(callback, len(sigmas) - 1, current_step),
            constrain=constrain,
            **sampler_options,
        )
    quirks.draw_unused_noise(sampler, sigmas, x)
    return x / _compute_ve_factor(sigmas[-1])


@torch.no_grad()
@cache_weights()
def invert(
    model: LatentDiffusion,
    z: Tensor,
    cond: Cond,
    uncond: Cond | None = None,
    *,
    sigmas: Tensor,
    scale: GuidanceScale = 1.0,
    legacy: Iterable[str] = (),
) -> Tensor:
    """Compute the noisy latent from which DDIM returns to z: DDIM inversion (Euler up the sigmas).

    Args:
        z: (B, C, h, w).
        sigmas: Noise levels of the run from the result back to z, descending.
        cond, uncond, scale, legacy: See `sample`.
    Returns:
        z_t, √ᾱ z + √(1-ᾱ) noise at the first of `sigmas`, (B, C, h, w).
    """
    if uncond is None and scale != 1:
        raise ArgumentError("scale needs uncond", "scale")
    sigmas = sigmas.flip(0).clamp(min=float(model.schedule.sigmas[0]))  # Euler divides by sigma
    names: list[str] = as_list(legacy)
    denoise = Quirks(frozenset(names)).build_inversion_denoise(model, sigmas, cond, uncond, scale)
    x = euler(denoise, z.float() * _compute_ve_factor(sigmas[0]), sigmas)
    return x / _compute_ve_factor(sigmas[-1])


def _check_combinations(arguments: Mapping[str, object]) -> None:
    """Raise ArgumentError for an argument of `sample` that others leave without effect."""
    given_names = {name for name, value in arguments.items() if value is not None}
    is_allowed = {"strength": arguments["strength"] == 1,
                  "extra_conds": not arguments["extra_conds"],
                  "seeds": arguments["brownian"]}  # fmt: skip
    given_names -= {name for name in is_allowed if is_allowed[name]}
    for name, other in REQUIRES.items():
        if name in given_names and other not in given_names:
            raise ArgumentError(f"{name} needs {other}", name)
    for name, other in EXCLUDED_BY.items():
        if name in given_names and other in given_names:
            raise ArgumentError(f"{other} is given, leave out {name}", name)


def _check_guidance(
    model: LatentDiffusion, arguments: Mapping[str, object], sampler: str, scale: GuidanceScale
) -> None:
    """Raise ArgumentError for options of guidance without `uncond`; warn of those without effect.

    Args:
        arguments: Those of `sample`.
        scale: The guidance scale that is used.
    """
    if model.guidance_embed_dim is not None:
        return  # see `check_embedded_guidance`
    guidance = arguments["guidance"]
    # Guidance that perturbs the network works without `uncond`.
    needs_perturbed = isinstance(guidance, Guidance) and guidance.needs_perturbed
    names = ["scale"] if needs_perturbed else ["scale", "guidance", "guidance_interval"]
    given_names = [name for name in names if arguments[name] is not None]
    if arguments["guidance_rescale"] and not needs_perturbed:
        given_names.append("guidance_rescale")
    has_uncond = arguments["uncond"] is not None
    if given_names and scale != 1 and not has_uncond:
        raise ArgumentError(f"{given_names[0]} needs uncond", given_names[0])
    if scale == 1 and not (has_uncond and SAMPLERS[sampler].is_cfg_pp):
        for name in given_names:
            if name in ("guidance_rescale", "guidance_interval"):
                warn_caller(f"{name} has no effect at a guidance scale of 1")


def _count_rows(*values: object) -> int:
    """Return the length of the first value that has a length; 1 if none has."""
    for value in values:
        if isinstance(value, Sized) and not (isinstance(value, Tensor) and value.dim() == 0):
            return len(value)
    return 1


def _add_initial_noise(
    z: Tensor | None, x_T: Tensor, sigmas: Tensor, quirks: Quirks, strength: float, steps: int
) -> tuple[Tensor, int]:
    """Return the x that a run starts from, and the index of its noise level in sigmas.

    Args:
        z: The latent to start from; None = start from pure noise.
        steps: Requested number of steps.
    """
    if z is None:
        return x_T * _compute_ve_factor(sigmas[0]), 0
    counts = (steps, len(sigmas) - 1)
    first_step, noise_index = quirks.find_first_step(strength, *counts)
    sigma, std = float(sigmas[noise_index]), _compute_ve_factor(sigmas[noise_index])
    x = x_T * std if quirks.starts_from_noise(strength, *counts) else z.to(x_T) + sigma * x_T
    # With a quirk, noise_index is not first_step: the VP-scaled latent is used as is at first_step.
    return x * (_compute_ve_factor(sigmas[first_step]) / std), first_step


def _tile_network(denoiser: Denoiser, tile: int | None) -> Denoiser:
    """Return a denoiser whose network runs on overlapping tiles, with blended results."""
    if tile is None:
        return denoiser

    def network(z_t: Tensor, t: Tensor, **conditioning: Tensor | None) -> Tensor:
        return apply_tiled(lambda patch: denoiser.network(patch, t, **conditioning), z_t, tile)

    return replace(denoiser, network=network)


def _get_sampler_options(
    schedule: NoiseSchedule,
    sampler: str,
    step_noise: StepNoise,
    noise_source: NoiseSource,
    always_draws: bool,
    ends_early: bool,
) -> dict[str, object]:
    """Return the keyword arguments of the sampler's function.

    Args:
        always_draws: Whether to draw noise even where eta is 0, as the original did.
        ends_early: Whether the result is noisy, for another model to continue from.
    """
    spec, s_noise, s_tmax = SAMPLERS[sampler], step_noise.s_noise, step_noise.s_tmax
    scaled_noise = noise_source if s_noise == 1 else lambda like: s_noise * noise_source(like)
    options: dict[str, object] = {}
    if spec.takes_noise or spec.takes_churn:
        options["noise_source"] = scaled_noise
    if spec.takes_churn:
        options["s_churn"], options["s_tmin"] = step_noise.s_churn, step_noise.s_tmin
        options["s_tmax"] = math.inf if s_tmax is None else s_tmax
    if spec.eta is not None:
        options["eta"] = eta = spec.eta if step_noise.eta is None else step_noise.eta
        if eta == 0 and not always_draws:
            options["noise_source"] = None  # nothing is drawn; the original drew noise, times 0
    if spec.scales_timesteps:
        options["scale_timestep"] = schedule.scale_timestep
    if spec.function_name == "dpmpp_2m" and ends_early:
        options["lower_order_final"] = False  # as its last step is not the last of the run
    return options


def _make_interval_noise(
    seeds: int | Sequence[int] | NoiseSource | None, n: int, sigmas: Tensor, s_noise: float
) -> IntervalNoise:
    """Make (like, sigma, next sigma) -> noise between the levels, from a Brownian path per row."""
    assert not callable(seeds)  # as `check_sampling` has checked
    levels = sigmas[sigmas > 0].tolist()
    paths = BrownianPaths(get_row_seeds(seeds, n), levels[-1], levels[0])
    return lambda like, sigma, sigma_next: s_noise * paths(like, sigma, sigma_next)


def _wrap_callback(
    callback: Callback | None, steps: int, current_step: CurrentStep
) -> Callable[[int, Tensor, Tensor], None]:
    """Add the number of steps to the callback's arguments, and update the current step."""
    first = current_step.step

    def after_step(step: int, x: Tensor, denoised: Tensor) -> None:
        current_step.step = first + step + 1
        if callback:
            callback(step, steps, x, denoised)

    return after_step


def _compute_ve_factor(sigma: Tensor) -> float:
    """Return x / z_t at `sigma`: the standard deviation of x for a z of standard deviation 1."""
    return math.sqrt(1 + float(sigma) ** 2)
