"""A run: from a request to images on disk.

Request -> plan_batches -> prepare (files) -> load_model -> generate each batch -> save
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ldm.generate.load import load_model
from ldm.generate.output import GRID_LIMIT, add_watermark, print_result, save_grid, save_image
from ldm.generate.plan import Batch, plan_batches
from ldm.generate.provenance import Info, describe_image, describe_run, job_of
from ldm.generate.request import Request
from ldm.generate.start_noise import seed_globally, start_noise
from ldm.generate.tasks import PreparedTask
from ldm.runtime.errors import NonFinite
from ldm.runtime.ranks import rank_and_world_size

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.model import LatentDiffusion

__all__ = ["generate_batches", "remake_image", "run_request"]

log = logging.getLogger(__name__)

Callback = Callable[[int, int, "Tensor", "Tensor"], None]  # of `ldm.sample`
Report = Callable[[Info], None]


def run_request(request: Request) -> None:
    """Make and save all images that a request asks for; their paths go to stdout.

    Raises:
        ValueError, OSError: about an argument or a file, before the model is loaded where it can.
        NonFinite: an image is NaN even in float32.
    """
    batches = plan_batches(request)
    model: LatentDiffusion | None = None
    for inputs in request.inputs.each():
        single = replace(request, inputs=inputs)
        prepared = single.task.prepare(single)
        if model is None:
            model = load_model(single)
        generate_batches(single, prepared, batches, model)


def generate_batches(
    request: Request,
    prepared: PreparedTask,
    batches: list[Batch],
    model: "LatentDiffusion",
    *,
    callback: Callback | None = None,
    report: Report | None = None,
    without_folders: bool = False,
) -> None:
    """Make each batch and save its images; if one fails, finished images still get their grid.

    Args:
        callback: called after each step with (step, steps, x, denoised).
        report: called with the info of each image and its path; None = print them.
        without_folders: leave folders out of the request that images record.
    """
    from tqdm import tqdm

    from ldm.imaging.output import OutputFolder
    from ldm.imaging.pixels import to_pil

    output, size = request.output, prepared.output_size(model)
    folder = OutputFolder(output.outdir, request.inputs.output_name)
    makes_grid = not output.skip_grid and request.inputs.output_name is None
    grid_images: list[tuple[Image.Image, Info]] = []
    run_info = describe_run(request, model, size, without_folders)
    protected = prepared.protected_pixels()
    if run_info["watermark"] is None and not output.no_watermark:
        log.warning("images of %dx%d are too small for a watermark: saved without", *size)
    if sum(map(len, batches)) > GRID_LIMIT and makes_grid:
        log.info("the grid will hold the first %d images", GRID_LIMIT)
    prepared.begin(model)
    seed_globally(request, model, size)
    try:
        for number, batch in enumerate(tqdm(batches, "Sampling", disable=_hides_progress())):
            on_step = _advance_bar(request, callback)
            images = _generate_or_retry(request, prepared, batch, model, on_step)
            run_info["dtype"] = str(model.dtype).removeprefix("torch.")
            for row, image in enumerate(to_pil(images, "truncate" in request.sampling.legacy)):
                info = run_info | describe_image(request, batches, number, row)
                info["path"] = None
                if not output.skip_save:
                    info["path"] = save_image(folder, image, info, protected)
                if report is None:
                    print_result(info, output.json)
                else:
                    report(info)
                if makes_grid and len(grid_images) < GRID_LIMIT:
                    grid_images.append((image, info))
    finally:
        if grid_images:
            save_grid(folder, grid_images, request)
    log.info("Your samples are ready and waiting for you here: \n%s \n \nEnjoy.", output.outdir)


def remake_image(
    request: Request,
    prepared: PreparedTask,
    model: "LatentDiffusion",
    info: Mapping[str, Any],
    callback: Callback | None = None,
) -> "Image.Image":
    """Make one image again, in a batch of the same shape.

    Args:
        request: of the run that made it.
        info: of the image.
    """
    from ldm.imaging.pixels import to_pil

    job, legacy = job_of(info), request.sampling.legacy
    prepared.begin(model)
    seed_globally(request, model, prepared.output_size(model))
    for rows in info.get("earlier", ()):  # they drew from the same generator
        _generate(request, prepared, [job] * rows, model, callback)
    images = _generate(request, prepared, [job] * info["rows"], model, callback)
    image = images[info["row"] : info["row"] + 1]
    return add_watermark(to_pil(image, "truncate" in legacy)[0], info, prepared.protected_pixels())


def _generate(
    request: Request,
    prepared: PreparedTask,
    batch: Batch,
    model: "LatentDiffusion",
    callback: Callback | None,
) -> "Tensor":
    """The images of one batch, (B, 3, H, W) in [-1, 1]."""
    sampling, size = request.sampling, prepared.output_size(model)
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
            "x_T": start_noise(request, model, size, batch),
            "legacy": sampling.legacy,
            "callback": callback,
        },
    )


def _generate_or_retry(
    request: Request,
    prepared: PreparedTask,
    batch: Batch,
    model: "LatentDiffusion",
    callback: Callback | None,
) -> "Tensor":
    """Make a batch; if NaN appears in half precision, switch to float32 and make it again."""
    import torch

    try:
        return _generate(request, prepared, batch, model, callback)
    except NonFinite as error:
        if model.dtype == torch.float32:
            raise
        dtype = str(model.dtype).removeprefix("torch.")
        log.warning("%s in %s: continuing in float32", error, dtype)
    model.float()
    return _generate(request, prepared, batch, model, callback)


def _latent_pixels(pixels: int | None, model: "LatentDiffusion") -> int | None:
    return None if pixels is None else max(pixels // model.downscale, 1)


def _advance_bar(request: Request, callback: Callback | None) -> Callback:
    """A callback that advances a progress bar over the steps of one batch."""
    from tqdm import tqdm

    sampling = request.sampling
    bar = tqdm(desc=sampling.sampler, total=sampling.steps, leave=False, disable=_hides_progress())

    def advance(step: int, steps: int, x: "Tensor", denoised: "Tensor") -> None:
        bar.total = steps
        bar.update()
        if step + 1 == steps:
            bar.close()
        if callback is not None:
            callback(step, steps, x, denoised)

    return advance


def _hides_progress() -> bool:
    """Whether stderr is not a terminal, or this is not the first process."""
    return not sys.stderr.isatty() or rank_and_world_size()[0] > 0
