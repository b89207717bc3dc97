"""A run: from a request to images on disk.

Request -> plan_batches -> prepare (files) -> load_model -> generate each batch -> save
"""

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.encoders.text import TextEncoder
from ldm.encoders.tokenizer import has_weight_syntax
from ldm.generate.load import load_model
from ldm.generate.output import (
    GRID_LIMIT,
    RunListener,
    add_watermark,
    hides_progress,
    save_grid,
    save_image,
)
from ldm.generate.plan import Batch, plan_batches
from ldm.generate.provenance import Info, describe_image, describe_run, job_of
from ldm.generate.request import Request
from ldm.generate.start_noise import seed_globally, start_noise
from ldm.generate.tasks import PreparedTask
from ldm.imaging.output import OutputFolder
from ldm.imaging.pixels import to_pil
from ldm.model import LatentDiffusion
from ldm.runtime.errors import NonFinite, Stop
from ldm.runtime.types import JsonMapping

__all__ = ["remake_image", "run_request"]

QUOTED_WORDS = 4  # of a prompt, in warnings

log = logging.getLogger(__name__)

Callback = Callable[[int, int, Tensor, Tensor], None]  # of `ldm.sample`


def run_request(
    request: Request,
    listener: RunListener,
    *,
    load: Callable[[PreparedTask], LatentDiffusion] = lambda prepared: load_model(prepared.request),
    without_folders: bool = False,
) -> None:
    """Make and save all images that a request asks for.

    Args:
        load: loads the model.
        without_folders: leave folders out of the request that images record.
    Raises:
        ValueError, OSError: about an argument or a file, before the model is loaded where it can.
        NonFinite: an image is NaN even in float32.
    """
    batches = plan_batches(request)
    model: LatentDiffusion | None = None
    for inputs in request.inputs.per_image():
        single = replace(request, inputs=inputs)
        prepared = single.task.prepare(single)
        if model is None:
            model = load(prepared)
            _warn_about_prompts(batches, model, listener)
        _generate_batches(prepared, batches, model, listener, without_folders)


def _generate_batches(
    prepared: PreparedTask,
    batches: list[Batch],
    model: LatentDiffusion,
    listener: RunListener,
    without_folders: bool,
) -> None:
    """Make each batch and save its images; if one fails, finished images still get their grid."""
    request, size = prepared.request, prepared.output_size(model)
    output, total = request.output, sum(map(len, batches))
    folder = OutputFolder(output.outdir, request.inputs.output_name)
    makes_grid = not output.skip_grid and request.inputs.output_name is None
    grid_images: list[tuple[Image.Image, Info]] = []
    run_info = describe_run(request, model, size, without_folders)
    protected = prepared.protected_pixels()
    if run_info["watermark"] is None and not output.no_watermark:
        log.warning("images of %dx%d are too small for a watermark: saved without", *size)
    if total > GRID_LIMIT and makes_grid:
        log.info("the grid will hold the first %d images", GRID_LIMIT)
    listener.begin(model, total)
    prepared.begin(model)
    seed_globally(request, model, size)
    try:
        for number, batch in enumerate(tqdm(batches, "Sampling", disable=hides_progress())):
            images = _generate_or_retry(prepared, batch, model, listener.on_step)
            run_info["dtype"] = str(model.dtype).removeprefix("torch.")
            if listener.stopped_at is not None:
                run_info["unfinished"] = listener.stopped_at
            for row, image in enumerate(to_pil(images, "truncate" in request.sampling.legacy)):
                info = run_info | describe_image(request, batches, number, row)
                info["path"] = None
                if not output.skip_save:
                    info["path"] = save_image(folder, image, info, protected)
                listener.add_image(info)
                if makes_grid and len(grid_images) < GRID_LIMIT:
                    grid_images.append((image, info))
            if listener.stopped_at is not None:
                raise Stop
    finally:
        if grid_images:
            save_grid(folder, grid_images, request)
    log.info("Your samples are ready and waiting for you here: \n%s \n \nEnjoy.", output.outdir)


def _warn_about_prompts(
    batches: list[Batch], model: LatentDiffusion, listener: RunListener
) -> None:
    """Warn of the first prompt that is too long, and of the first with A1111's weights."""
    encoders = model.conditioner.find_all(TextEncoder)
    if not encoders:
        return
    prompts = dict.fromkeys(job.prompt for batch in batches for job in batch)
    prompts |= dict.fromkeys(job.negative_prompt for batch in batches for job in batch)
    for encoder, prompt in itertools.product(encoders, prompts):
        if lost := encoder.truncated_text(prompt):
            limit, words = encoder.length - 2, " ".join(lost.split()[:QUOTED_WORDS])
            listener.warn(f"a prompt is longer than {limit} tokens: `{words} …` is left out")
            break
    for weighted in filter(has_weight_syntax, prompts):
        words = " ".join(weighted.split()[:QUOTED_WORDS])
        listener.warn(f"A1111's syntax for weights is read as plain text: `{words} …`")
        break


def remake_image(
    prepared: PreparedTask,
    model: LatentDiffusion,
    info: JsonMapping,
    callback: Callback | None = None,
) -> Image.Image:
    """Make one image again, in a batch of the same shape.

    Args:
        prepared: the task of the run that made it.
        info: of the image.
    """
    job, request = job_of(info), prepared.request
    prepared.begin(model)
    seed_globally(request, model, prepared.output_size(model))
    for rows in info.get("earlier", ()):  # they drew from the same generator
        _generate(prepared, [job] * rows, model, callback)
    images = _generate(prepared, [job] * info["rows"], model, callback)
    image = images[info["row"] : info["row"] + 1]
    shown = to_pil(image, "truncate" in request.sampling.legacy)[0]
    return add_watermark(shown, info, prepared.protected_pixels())


def _generate(
    prepared: PreparedTask, batch: Batch, model: LatentDiffusion, callback: Callback | None
) -> Tensor:
    """Make the images of one batch, (B, 3, H, W) in [-1, 1]."""
    request = prepared.request
    sampling = request.sampling
    return prepared.generate(
        model,
        [job.prompt for job in batch],
        {
            "seeds": [job.seed for job in batch],
            "negative_prompt": [job.negative_prompt for job in batch],
            "scale": request.scale,
            "tile": _latent_pixels(sampling.vae_tile, model),
            "unet_tile": _latent_pixels(sampling.unet_tile, model),
            "steps": sampling.steps,
            "sampler": sampling.sampler,
            "scheduler": sampling.scheduler,
            "eta": request.eta,
            "rescale": sampling.rescale,
            "guidance_interval": sampling.guidance_interval,
            "x_T": start_noise(request, model, prepared.output_size(model), batch),
            "legacy": sampling.legacy,
            "callback": callback,
        },
    )


def _generate_or_retry(
    prepared: PreparedTask, batch: Batch, model: LatentDiffusion, callback: Callback
) -> Tensor:
    """Make a batch; if NaN appears in half precision, switch to float32 and make it again."""
    try:
        return _generate(prepared, batch, model, callback)
    except NonFinite as error:
        if model.dtype == torch.float32:
            raise
        dtype = str(model.dtype).removeprefix("torch.")
        log.warning("%s in %s: continuing in float32", error, dtype)
    model.float()
    return _generate(prepared, batch, model, callback)


def _latent_pixels(pixels: int | None, model: LatentDiffusion) -> int | None:
    return None if pixels is None else max(pixels // model.downscale, 1)
