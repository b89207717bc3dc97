"""Encode prompts, sample and decode, for all tasks with prompts.

A refiner continues where the model stops, or an x2 latent upscaler doubles the latents.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

from torch import Tensor
from typing_extensions import Unpack

from ldm.diffusion.guidance import Guidance, GuidanceScale
from ldm.diffusion.samplers.common import Constrain, NoiseSource
from ldm.model import LatentDiffusion
from ldm.pipelines.conditions import ConditionInputs, EncodedConds
from ldm.pipelines.finite import check_finite
from ldm.pipelines.guidance import make_guidance
from ldm.pipelines.images import decode_latent
from ldm.pipelines.latent_upscaling import Upscaling, sample_upscaled_latent
from ldm.pipelines.options import TextOptions, select_sampling_options, select_sdxl_options
from ldm.pipelines.prompts import PromptBatch, repeat_texts
from ldm.pipelines.quirks import Quirks, make_noise_source
from ldm.pipelines.sampling import sample
from ldm.pipelines.sampling_options import (
    Callback,
    SamplingOptions,
    get_default_scale,
    get_latent_shape,
    get_sigmas,
)
from ldm.pipelines.sdxl import check_size, find_handover
from ldm.prompts import PLAIN
from ldm.runtime.errors import Stop
from ldm.runtime.warn import warn_caller

__all__ = ["generate", "make_task_noise_source"]


class RunOptions(SamplingOptions, total=False):
    """Keywords of `sample`: those that callers of a task pass, and those that the task sets."""

    scale: GuidanceScale | None
    noise_source: NoiseSource
    constrain: Constrain | None
    z: Tensor | None
    z_t: Tensor | None
    strength: float
    size: tuple[int, int] | None
    end_step: int
    first_step_number: int
    guidance: Guidance | None


def make_task_noise_source(prompts: Sequence[str], options: SamplingOptions) -> NoiseSource:
    """Make the noise source of a task from its seeds; noise has a row per prompt."""
    return make_noise_source(options.get("seeds"), len(prompts), options.get("legacy", ()))


def generate(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str],
    inputs: Mapping[str, Tensor],
    scale: GuidanceScale | None,
    vae_tile: int | None,
    *,
    noise_source: NoiseSource,
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
        unconditional_inputs: The inputs that differ for the unconditional prediction; None = no
            input differs.
        vae_tile: Side in latent pixels of the decoder's tiles; None = no tiles.
        scale, noise_source, z, strength, size, constrain: See `sample`.
        constrain_refiner: `constrain` for the steps of a refiner; None = no constraint.
        upscaling: Upscaler that doubles the latents before they are decoded; None = no upscaler.
        options: See `sample` and `SDXLOptions`.
    Returns:
        (B, C, H, W) float32 in [-1, 1]; C = 3, or 4 or 6 for models with depth.
    """
    sampling, sdxl = select_sampling_options(options), select_sdxl_options(options)
    if sdxl.get("refiner") is not None:  # it is sampled with the defaults of the base, too
        sampler, eta = sampling.get("sampler") or model.defaults.sampler, sampling.get("eta")
        eta = model.defaults.eta if eta is None and sampler == model.defaults.sampler else eta
        sampling = {**sampling, "sampler": sampler, "eta": eta}
        scale = get_default_scale(model, sampler) if scale is None else scale
    quirks = Quirks.for_model(model, sampling.get("legacy", ()))
    guidance, syntax = make_guidance(options, quirks), options.get("syntax", PLAIN)
    shape = get_latent_shape(model, len(prompts), size, z=z, x_T=sampling.get("x_T"))
    height, width = shape[-2:]
    pixel_size = (height * model.downscale_factor, width * model.downscale_factor)
    check_size(model, pixel_size, sdxl)
    if upscaling is not None:
        upscaling.check_run(model, height, width, syntax)
    run_options = cast(RunOptions, {
        **sampling, "scale": scale, "guidance": guidance, "z": z, "strength": strength,
        "size": size, "noise_source": noise_source, "constrain": constrain,
    })  # fmt: skip
    sigmas = get_sigmas(model, quirks, run_options)
    total_steps, first_step = len(sigmas) - 1, 0
    if z is not None:
        default_steps = model.defaults.steps if sampling.get("sigmas") is None else total_steps
        requested_steps = sampling.get("steps") or default_steps
        first_step, _ = quirks.find_first_step(strength, requested_steps, total_steps)
    steps = total_steps - first_step
    prompt_batch = PromptBatch.parse(prompts, negative_prompt, sdxl, guidance, syntax, steps)
    prompt_batch.warn(model)
    condition_inputs = ConditionInputs(
        prompt_batch, inputs, unconditional_inputs or {}, sdxl, pixel_size, scale, guidance,
        sampling.get("sampler"),
    )  # fmt: skip
    conds = condition_inputs.encode(model, quirks)
    try:
        if upscaling is not None:
            negatives = repeat_texts(negative_prompt, len(prompts), "negative_prompt")
            texts = (prompts, negatives)
            latent = _sample_and_upscale(model, upscaling, conds, texts, run_options, steps)
        elif (refiner := sdxl.get("refiner")) is not None:
            refiner_conds = condition_inputs.encode(refiner, quirks, after_base=True)
            handover = find_handover(model.schedule, sigmas, sdxl, quirks)
            latent = _sample_with_refiner(
                model, refiner, conds, refiner_conds, run_options, constrain_refiner, sigmas,
                first_step, max(handover, first_step),
            )  # fmt: skip
        else:
            latent = _sample(model, conds, run_options)
        if guidance is not None and (reason := guidance.explain_no_effect()):
            warn_caller(reason)
    except Stop as stop:
        if stop.latent is None:
            raise
        latent = stop.latent
    return decode_latent(model, latent, vae_tile, options.get("on_latent"))


def _sample(model: LatentDiffusion, conds: EncodedConds, options: RunOptions) -> Tensor:
    return sample(model, conds.cond, conds.uncond, extra_conds=conds.extra_conds, **options)


def _sample_with_refiner(
    model: LatentDiffusion,
    refiner: LatentDiffusion,
    conds: EncodedConds,
    refiner_conds: EncodedConds,
    options: RunOptions,
    constrain_refiner: Constrain | None,
    sigmas: Tensor,
    first_step: int,
    handover: int,
) -> Tensor:
    """Sample with the base until the handover, then with the refiner, without new noise.

    Args:
        sigmas: Noise levels of a run from pure noise.
        first_step: Index in sigmas at which the run begins.
        handover: Index in sigmas at which the refiner takes over.
    """
    make_callback = partial(_shift_steps, options.get("callback"), len(sigmas) - 1 - first_step)
    quirks = Quirks.for_model(model, options.get("legacy", ()))
    options = {**options, "sigmas": sigmas, "scheduler": None, "rho": None}
    base_options: RunOptions = {
        **options, "steps": options.get("steps") if "strength" in quirks else None,
        "end_step": handover, "callback": make_callback(0),
    }  # fmt: skip
    z_t = _sample(model, conds, base_options)
    if "unused-draws" in quirks:
        options["noise_source"](z_t)
    refiner_options: RunOptions = {
        **options, "sigmas": sigmas[handover:], "steps": None, "z_t": z_t, "z": None, "x_T": None,
        "strength": 1.0, "callback": make_callback(handover - first_step),
        "constrain": constrain_refiner, "first_step_number": handover - first_step,
        "freeu": None, "freeu_version": None,  # its factors are for the base model
    }  # fmt: skip
    return _sample(refiner, refiner_conds, refiner_options)


def _sample_and_upscale(
    model: LatentDiffusion,
    upscaling: Upscaling,
    conds: EncodedConds,
    texts: tuple[Sequence[str], Sequence[str]],
    options: RunOptions,
    steps: int,
) -> Tensor:
    """Sample a latent, then double its size with the x2 latent upscaler.

    Args:
        texts: (prompts, negative prompts) for the upscaler.
        steps: Number of steps of the model.
    """
    upscaler_steps = len(get_sigmas(upscaling.model, Quirks(), {"steps": upscaling.steps})) - 1
    make_callback = partial(_shift_steps, options.get("callback"), steps + upscaler_steps)
    latent = _sample(model, conds, {**options, "callback": make_callback(0)})
    return sample_upscaled_latent(
        upscaling.model,
        *texts,
        check_finite(latent, "the UNet"),
        noise_source=options["noise_source"],
        scale=upscaling.scale,
        steps=upscaling.steps,
        callback=make_callback(steps),
        unet_tile=options.get("unet_tile"),
        legacy=options.get("legacy", ()),
    )


def _shift_steps(callback: Callback | None, total: int, offset: int) -> Callback | None:
    """Wrap the callback for one of two models: its steps are counted over both."""
    return callback and (lambda step, _, *latents: callback(step + offset, total, *latents))
