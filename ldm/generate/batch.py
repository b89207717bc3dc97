"""Make the images of one batch: options of the request -> keywords of the task's pipeline."""

import logging
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ldm.generate.defaults import resolve_sampling
from ldm.generate.load import Models
from ldm.generate.plan import Batch
from ldm.generate.request import Request
from ldm.generate.start_noise import seed_globally, start_noise
from ldm.generate.tasks import PreparedTask
from ldm.model import LatentDiffusion
from ldm.pipelines.guidance import GuidanceOptions
from ldm.pipelines.latent_upscaling import Upscaling
from ldm.pipelines.options import TaskOptions
from ldm.pipelines.sampling_options import Callback, SamplingOptions
from ldm.pipelines.task import check_clip_skip
from ldm.prompts import PLAIN
from ldm.runtime.errors import NonFinite

__all__ = ["begin", "generate_batch", "generate_images"]

log = logging.getLogger(__name__)

OnLatent = Callable[[Tensor], object]  # see `DecodingOptions`


def begin(prepared: PreparedTask, model: LatentDiffusion) -> None:
    """Do what needs the model before the first batch of a task."""
    prepared.begin(model)
    seed_globally(prepared.request, model, prepared.output_size(model))


def generate_batch(
    prepared: PreparedTask,
    batch: Batch,
    models: Models,
    callback: Callback,
    on_latent: OnLatent | None = None,
) -> Tensor:
    """Make a batch; if it contains NaN in half precision, switch to float32 and make it again.

    See `generate_images`.

    Raises:
        NonFinite: an image contains NaN even in float32.
    """
    try:
        return generate_images(prepared, batch, models, callback, on_latent)
    except NonFinite as error:
        if models.base.dtype == torch.float32 or error.cause:
            raise
        dtype = str(models.base.dtype).removeprefix("torch.")
        log.warning("%s in %s: continuing in float32", error, dtype)
    # Not in the handler: the error holds the frames, and with them the tensors, of what failed.
    models.float()
    return generate_images(prepared, batch, models, callback, on_latent)


def generate_images(
    prepared: PreparedTask,
    batch: Batch,
    models: Models,
    callback: Callback | None,
    on_latent: OnLatent | None = None,
) -> Tensor:
    """Make the images of a batch.

    Args:
        callback: called after each step, see `ldm.sample`; None = not called.
        on_latent: called with the final latents, see `DecodingOptions`; None = not called.
    Returns:
        (B, 3, H, W) in [-1, 1], or (B, 4, H, W) with depth.
    """
    request, model = prepared.request, models.base
    keywords = _sampling_keywords(request, model) | _sdxl_keywords(request, batch, models)
    keywords |= {
        "negative_prompt": [spec.negative_prompt for spec in batch],
        "seeds": [spec.seed for spec in batch],
        "x_T": start_noise(request, model, prepared.output_size(model), batch),
        "callback": callback,
        "on_latent": on_latent,
    }
    if models.upscaler is not None:
        choice = request.upscaling
        keywords["upscaling"] = Upscaling(
            models.upscaler, choice.upscaler_steps, choice.upscaler_scale
        )
    prompts = [spec.prompt for spec in batch]
    return prepared.generate(model, prompts, cast(TaskOptions, keywords))


def _sampling_keywords(request: Request, model: LatentDiffusion) -> dict[str, object]:
    """Return the keywords that hold for all batches, by the options of the same names."""
    sampling = resolve_sampling(request, model.defaults)
    values = vars(sampling)
    keywords = {name: values[name] for name in SamplingOptions.__annotations__ if name in values}
    keywords |= {
        "scale": sampling.scale,
        "tile": _latent_pixels(sampling.vae_tile, model),
        "unet_tile": _latent_pixels(sampling.unet_tile, model),
    }
    # Models that read no prompt take none of the following.
    guidance = {name: values[name] for name in GuidanceOptions.__annotations__}
    keywords |= {name: value for name, value in guidance.items() if value is not None}
    if request.prompts.syntax != PLAIN:
        keywords["syntax"] = request.prompts.syntax
    if sampling.clip_skip > 1 and check_clip_skip(model, sampling.clip_skip) is None:
        keywords["clip_skip"] = sampling.clip_skip
    return keywords


def _latent_pixels(pixels: int | None, model: LatentDiffusion) -> int | None:
    return None if pixels is None else max(pixels // model.downscale, 1)


def _sdxl_keywords(request: Request, batch: Batch, models: Models) -> dict[str, object]:
    """Return the keywords for SDXL that have a value."""
    keywords = {**vars(request.sdxl), "refiner": models.refiner}
    pairs = [(spec.prompt_2, spec.prompt) for spec in batch]
    negative_pairs = [(spec.negative_prompt_2, spec.negative_prompt) for spec in batch]
    keywords["prompt_2"] = _second_prompts(pairs)
    keywords["negative_prompt_2"] = _second_prompts(negative_pairs)
    return {name: value for name, value in keywords.items() if value is not None}


def _second_prompts(pairs: Sequence[tuple[str | None, str]]) -> list[str] | None:
    """Return the prompt of the second text encoder for each image; None if all equal the first's.

    Args:
        pairs: (prompt of the second encoder, prompt of the first) of each image; None = the same.
    """
    if all(second is None for second, _ in pairs):
        return None
    return [first if second is None else second for second, first in pairs]
