"""Encode the prompts of a call, sample and decode: what the tasks with prompts have in common.

A refiner continues where the model stops, or an x2 latent upscaler doubles the latents.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

from torch import Tensor
from typing_extensions import Unpack

from ldm.diffusion.guidance import Guidance, Scale
from ldm.diffusion.samplers.common import Constrain, NoiseSampler
from ldm.model import LatentDiffusion
from ldm.pipelines.conditions import ConditionInputs, EncodedConds
from ldm.pipelines.finite import check_finite
from ldm.pipelines.guidance import make_guidance
from ldm.pipelines.images import decode_latent
from ldm.pipelines.latent_upscaling import Upscaling, sample_upscaled_latent
from ldm.pipelines.options import TextOptions, select_sampling, select_sdxl
from ldm.pipelines.prompts import PromptBatch, repeat_texts
from ldm.pipelines.quirks import Quirks, make_noise_sampler
from ldm.pipelines.sampling import sample
from ldm.pipelines.sampling_options import Callback, SamplingOptions, get_latent_shape, get_sigmas
from ldm.pipelines.sdxl import Handover, check_size
from ldm.prompts import PLAIN
from ldm.runtime.errors import Stop
from ldm.runtime.warn import warn_caller

__all__ = ["generate", "make_task_noise"]


class RunOptions(SamplingOptions, total=False):
    """Keywords of `sample` that tasks set themselves, besides those of the caller."""

    scale: Scale | None
    noise: NoiseSampler
    constrain: Constrain | None
    z: Tensor | None
    z_t: Tensor | None
    strength: float
    size: tuple[int, int] | None
    end: int
    first_step: int
    guidance: Guidance | None


def make_task_noise(prompts: Sequence[str], options: SamplingOptions) -> NoiseSampler:
    """Return the noise source of a call, a row per prompt, for its seeds."""
    return make_noise_sampler(options.get("seeds"), len(prompts), options.get("legacy", ()))


def generate(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str],
    inputs: Mapping[str, Tensor],
    scale: Scale | None,
    tile: int | None,
    *,
    noise: NoiseSampler,
    unconditional_inputs: Mapping[str, object] | None = None,
    z: Tensor | None = None,
    strength: float = 1.0,
    size: tuple[int, int] | None = None,
    constrain: Constrain | None = None,
    constrain_refiner: Constrain | None = None,
    upscaling: Upscaling | None = None,
    **options: Unpack[TextOptions],
) -> Tensor:
    """Encode prompts, sample and decode.

    Args:
        inputs: Values of the batch keys that the model reads besides text, a row per prompt.
        unconditional_inputs: Those that differ for the unconditional prediction; None = none do.
        tile: Side in latent pixels of the decoder's tiles; None = decode whole.
        scale, noise, z, strength, size, constrain: See `sample`.
        constrain_refiner: `constrain` for the steps of a refiner; None = no constraint.
        upscaling: Upscaler that doubles the latents before they are decoded; None = none.
        options: See `sample` and `SDXLOptions`.
    Returns:
        (B, C, H, W) float32 in [-1, 1]; C = 3, or 4 or 6 for models with depth.
    """
    sampling, sdxl = select_sampling(options), select_sdxl(options)
    quirks = Quirks.for_model(model, sampling.get("legacy", ()))
    guidance, syntax = make_guidance(options, quirks), options.get("syntax", PLAIN)
    shape = get_latent_shape(model, len(prompts), size, z=z, x_T=sampling.get("x_T"))
    height, width = shape[-2:]
    size_in_pixels = (height * model.downscale, width * model.downscale)
    check_size(model, size_in_pixels, sdxl)
    if upscaling is not None:
        upscaling.check_run(model, height, width, syntax)
    start = {"z": z, "strength": strength, "size": size, "noise": noise, "constrain": constrain}
    run = cast(RunOptions, {**sampling, "scale": scale, "guidance": guidance, **start})
    sigmas = get_sigmas(model, quirks, run)
    total, first = len(sigmas) - 1, 0
    if z is not None:
        default = model.defaults.steps if run.get("sigmas") is None else total
        first, _ = quirks.find_first_step(strength, run.get("steps") or default, total)
    steps = total - first
    texts = PromptBatch.parse(prompts, negative_prompt, sdxl, guidance, syntax, steps)
    texts.warn(model)
    condition_inputs = ConditionInputs(
        texts,
        inputs,
        unconditional_inputs or {},
        sdxl,
        size_in_pixels,
        scale,
        guidance,
        sampling.get("sampler"),
    )
    conds = condition_inputs.encode(model, quirks)
    try:
        if upscaling is not None:
            negatives = repeat_texts(negative_prompt, len(prompts), "negative_prompt")
            latent = _sample_and_upscale(model, upscaling, conds, (prompts, negatives), run, steps)
        elif (refiner := sdxl.get("refiner")) is not None:
            refiner_conds = condition_inputs.encode(refiner, quirks, after_base=True)
            handover = Handover.from_options(sdxl).find_index(model.schedule, sigmas, quirks)
            latent = _sample_with_refiner(
                model, refiner, conds, refiner_conds, run, constrain_refiner, sigmas,
                first, max(handover, first),
            )  # fmt: skip
        else:
            latent = _sample(model, conds, run)
        if guidance is not None and (reason := guidance.explain_no_effect()):
            warn_caller(reason)
    except Stop as stop:
        if stop.latent is None:
            raise
        latent = stop.latent
    return decode_latent(model, latent, tile, options.get("on_latent"))


def _sample(model: LatentDiffusion, conds: EncodedConds, run: RunOptions) -> Tensor:
    return sample(model, conds.cond, conds.uncond, further=conds.guidance_conds, **run)


def _sample_with_refiner(
    model: LatentDiffusion,
    refiner: LatentDiffusion,
    conds: EncodedConds,
    refiner_conds: EncodedConds,
    run: RunOptions,
    constrain_refiner: Constrain | None,
    sigmas: Tensor,
    first: int,
    end: int,
) -> Tensor:
    """Sample with the base until the handover, then with the refiner, without new noise.

    Args:
        sigmas: Noise levels of a run from pure noise.
        first: Index in sigmas at which the run begins.
        end: Index in sigmas of the handover.
    """
    on_step = partial(_shift_steps, run.get("callback"), len(sigmas) - 1 - first)
    base_run: RunOptions = {**run, "sigmas": sigmas, "end": end, "callback": on_step(0)}
    z_t = _sample(model, conds, base_run)
    if "unused-draws" in Quirks.for_model(model, run.get("legacy", ())):
        run["noise"](z_t)
    refiner_run: RunOptions = {
        **run, "sigmas": sigmas[end:], "z_t": z_t, "z": None, "x_T": None,
        "callback": on_step(end - first), "constrain": constrain_refiner,
        "first_step": end - first,
        "freeu": None, "freeu_version": None,  # its factors are for the base model
    }  # fmt: skip
    return _sample(refiner, refiner_conds, refiner_run)


def _sample_and_upscale(
    model: LatentDiffusion,
    upscaling: Upscaling,
    conds: EncodedConds,
    texts: tuple[Sequence[str], Sequence[str]],
    run: RunOptions,
    steps: int,
) -> Tensor:
    """Sample a latent, then double its size with the x2 latent upscaler.

    Args:
        texts: (prompts, negative prompts) for the upscaler.
        steps: Number of steps of the model.
    """
    upscaler_steps = len(get_sigmas(upscaling.model, Quirks(), {"steps": upscaling.steps})) - 1
    on_step = partial(_shift_steps, run.get("callback"), steps + upscaler_steps)
    latent = _sample(model, conds, {**run, "callback": on_step(0)})
    return sample_upscaled_latent(
        upscaling.model,
        *texts,
        check_finite(latent, "the UNet"),
        noise=run["noise"],
        scale=upscaling.scale,
        steps=upscaling.steps,
        callback=on_step(steps),
        unet_tile=run.get("unet_tile"),
        legacy=run.get("legacy", ()),
    )


def _shift_steps(callback: Callback | None, total: int, offset: int) -> Callback | None:
    """Return a callback that counts the steps of one of two models in those of both."""
    return callback and (lambda step, _, *latents: callback(step + offset, total, *latents))
