"""Generate the images of one batch: pass the options of a request to the pipeline of its task."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ldm.generate.defaults import resolve_sampling
from ldm.generate.info import get_dtype_name
from ldm.generate.initial_noise import draw_initial_noise, save_rng_state, seed_legacy_noise
from ldm.generate.listener import RunListener
from ldm.generate.load import Models
from ldm.generate.plan import Batch
from ldm.generate.request import Request
from ldm.generate.tasks import PreparedTask
from ldm.model import LatentDiffusion
from ldm.pipelines.guidance import GuidanceOptions
from ldm.pipelines.latent_upscaling import Upscaling
from ldm.pipelines.options import TaskOptions
from ldm.pipelines.sampling_options import Callback, SamplingOptions
from ldm.pipelines.task import get_clip_skip_warning
from ldm.prompts import PLAIN
from ldm.runtime.errors import NonFinite

__all__ = ["generate_batch", "generate_with_fallback", "set_up_task"]

LatentCallback = Callable[[Tensor], object]  # see `DecodingOptions`


def set_up_task(prepared: PreparedTask, model: LatentDiffusion) -> None:
    """Set up a task for the model before its first batch, and seed torch for legacy `noise`."""
    prepared.set_up(model)
    seed_legacy_noise(prepared.request, model, prepared.get_output_size(model))


def generate_with_fallback(
    prepared: PreparedTask,
    batch: Batch,
    models: Models,
    listener: RunListener,
    on_latent: LatentCallback | None = None,
) -> Tensor:
    """Generate a batch as `generate_batch`; if half precision overflows, retry it in float32.

    The models then stay in float32.

    Raises:
        NonFinite: The model returned NaN or infinity in float32, too, or its weights contain them.
    """
    restore_rng_state = save_rng_state(models.base)
    try:
        return generate_batch(prepared, batch, models, listener.on_step, on_latent)
    except NonFinite as error:
        if models.base.dtype == torch.float32 or error.cause:  # NaN weights stay NaN in float32
            raise
        listener.warn(f"{error} in {get_dtype_name(models.base)}: continuing in float32")
    # Outside the handler, as the traceback of the error keeps the tensors of the failed batch.
    models.to_float32()
    restore_rng_state()  # for legacy `noise`
    return generate_batch(prepared, batch, models, listener.on_step, on_latent)


def generate_batch(
    prepared: PreparedTask,
    batch: Batch,
    models: Models,
    callback: Callback | None,
    on_latent: LatentCallback | None = None,
) -> Tensor:
    """Generate the images of a batch.

    Args:
        callback: Called after each step, see `ldm.sample`; None = not called.
        on_latent: Called with the final latents, see `DecodingOptions`; None = not called.
    Returns:
        (B, 3, H, W) in [-1, 1], or (B, 4, H, W) with depth.
    """
    request, model = prepared.request, models.base
    arguments = _make_sampling_arguments(request, model)
    arguments |= _make_sdxl_arguments(request, batch, models)
    arguments |= {
        "negative_prompt": [spec.negative_prompt for spec in batch.images],
        "seeds": [spec.seed for spec in batch.images],
        "x_T": draw_initial_noise(request, model, prepared.get_output_size(model), batch),
        "callback": callback,
        "on_latent": on_latent,
    }
    if models.upscaler is not None:
        options = request.upscaling
        arguments["upscaling"] = Upscaling(
            models.upscaler, options.upscaler_steps, options.upscaler_scale
        )
    prompts = [spec.prompt for spec in batch.images]
    return prepared.generate(model, prompts, cast(TaskOptions, arguments))


def _make_sampling_arguments(request: Request, model: LatentDiffusion) -> dict[str, object]:
    """Return the keyword arguments that all images share; most have the names of their options."""
    sampling = resolve_sampling(request, model.defaults)
    values = vars(sampling)
    arguments = {name: values[name] for name in SamplingOptions.__annotations__ if name in values}
    arguments |= {
        "scale": sampling.scale,
        "guidance_rescale": sampling.rescale,
        "tile": _to_latent_pixels(sampling.vae_tile, model),
        "unet_tile": _to_latent_pixels(sampling.unet_tile, model),
    }
    # Only if they are set, as pipelines without prompts do not accept them.
    guidance = {name: values[name] for name in GuidanceOptions.__annotations__}
    arguments |= {name: value for name, value in guidance.items() if value is not None}
    if request.prompts.syntax != PLAIN:
        arguments["syntax"] = request.prompts.syntax
    if sampling.clip_skip > 1 and get_clip_skip_warning(model, sampling.clip_skip) is None:
        arguments["clip_skip"] = sampling.clip_skip
    return arguments


def _to_latent_pixels(pixels: int | None, model: LatentDiffusion) -> int | None:
    return None if pixels is None else max(pixels // model.downscale_factor, 1)


def _make_sdxl_arguments(request: Request, batch: Batch, models: Models) -> dict[str, object]:
    """Return the keyword arguments for SDXL that are not None."""
    images = batch.images
    arguments = {
        **vars(request.sdxl),
        "refiner": models.refiner,
        "prompt_2": _fill_prompts([(spec.prompt_2, spec.prompt) for spec in images]),
        "negative_prompt_2": _fill_prompts(
            [(spec.negative_prompt_2, spec.negative_prompt) for spec in images]
        ),
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _fill_prompts(prompts: Sequence[tuple[str | None, str]]) -> list[str] | None:
    """Return the prompt of the second text encoder for each image; None if no image has its own.

    Args:
        prompts: (prompt of the second encoder or None, prompt of the first) of each image.
    """
    if all(second is None for second, _ in prompts):
        return None
    return [first if second is None else second for second, first in prompts]
