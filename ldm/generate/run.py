"""Run a request: make its images and save them.

Request -> plan_batches -> prepare (read inputs) -> load_models -> generate each batch -> save
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ldm.generate.batch import begin, generate_batch
from ldm.generate.checks import (
    check_loras,
    check_steps,
    find_few_steps_warnings,
    find_option_warnings,
)
from ldm.generate.defaults import describe_variant
from ldm.generate.listener import RunListener, hides_progress
from ldm.generate.load import Models, load_models
from ldm.generate.output import ImageWriter
from ldm.generate.plan import Batch, LineOptions, line_options, plan_batches
from ldm.generate.prompt_checks import check_prompts, find_prompt_warnings
from ldm.generate.provenance import Info, describe_image, describe_run
from ldm.generate.request import Request
from ldm.generate.tasks import PreparedTask
from ldm.imaging.mesh import check_can_save_meshes
from ldm.loading.addons.lora import set_loras
from ldm.model import LatentDiffusion
from ldm.runtime.errors import Stop
from ldm.runtime.types import JsonMapping

__all__ = ["run_request"]

log = logging.getLogger(__name__)

# The prepared tasks of a run, by the options that a line of the prompt file sets; the first, under
# (), is that of the run itself.
Tasks = Mapping[LineOptions, PreparedTask]


def run_request(
    request: Request,
    listener: RunListener,
    *,
    load: Callable[[PreparedTask], Models] = lambda prepared: load_models(prepared.request),
    without_folders: bool = False,
    list_loras: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Make and save all images of a request.

    Args:
        listener: informed about progress, images and warnings.
        load: loads the models.
        without_folders: record file names, not whole paths, in the images' metadata.
        list_loras: returns the LoRA files that prompts may name; see `plan_batches`.
    Raises:
        ValueError, OSError: an argument or file is invalid; raised before the model is loaded
            where possible.
        NonFinite: an image contains NaN even in float32.
    """
    batches = plan_batches(request, list_loras)
    literal_syntax = check_prompts(batches, request)
    if request.output.glb:
        check_can_save_meshes()
    models: Models | None = None
    messages: list[str] = []
    for inputs in request.inputs.split_by_image():
        tasks = _prepare(replace(request, inputs=inputs), batches)
        if models is None:
            check_steps(tasks)
            early = find_few_steps_warnings(tasks, batches)
            _warn(listener, early)
            models = load(_with_loras(tasks[()], batches))
            check_loras(models.base, batches)
            late = [
                *literal_syntax,
                *find_prompt_warnings(batches, request, models.base),
                *find_option_warnings(tasks, models.base),
            ]
            _warn(listener, late)
            messages = early + late
        with warnings.catch_warnings():
            for message in messages:  # of which the pipelines would warn again
                warnings.filterwarnings("ignore", re.escape(message))
            _generate_batches(tasks, batches, models, listener, without_folders)


def _prepare(request: Request, batches: Sequence[Batch]) -> Tasks:
    """Read the inputs of a request, and those of each line that sets options."""
    tasks: dict[LineOptions, PreparedTask] = {(): request.task.prepare(request)}
    for options in dict.fromkeys(map(line_options, batches)):
        if options not in tasks:
            changed = request.with_values(dict(options))
            tasks[options] = changed.task.prepare(changed)
    return tasks


def _warn(listener: RunListener, messages: Sequence[str]) -> None:
    for message in messages:
        listener.warn(message)


def _with_loras(prepared: PreparedTask, batches: Sequence[Batch]) -> PreparedTask:
    """Return the task with the LoRAs that all batches have in common, to load them at once."""
    request = prepared.request
    choices = {batch[0].loras for batch in batches} or {request.model.lora}
    loras = next(iter(choices)) if len(choices) == 1 else ()
    if loras == request.model.lora:
        return prepared
    changed = copy.copy(prepared)
    changed.request = replace(request, model=replace(request.model, lora=loras))
    return changed


def _generate_batches(
    tasks: Tasks,
    batches: list[Batch],
    models: Models,
    listener: RunListener,
    without_folders: bool,
) -> None:
    """Make each batch and save its images; the grid is saved even if a later batch fails."""
    request, model = tasks[()].request, models.base
    total = sum(map(len, batches))
    writer = ImageWriter(request, models, listener, total)
    infos: dict[tuple[LineOptions, object], Info] = {}
    has_own_loras = len({batch[0].loras for batch in batches}) > 1
    latents: list[Tensor] = []  # of a batch, if they are to be saved
    on_latent = latents.append if request.output.save_latents else None
    listener.begin(model, total)
    try:
        for number, batch in enumerate(tqdm(batches, "Sampling", disable=hides_progress())):
            options, loras = line_options(batch), batch[0].loras
            prepared = tasks[options]
            if has_own_loras:
                set_loras(model, loras)
            if not any(options == earlier for earlier, _ in infos):
                begin(prepared, model)
            if (options, loras) not in infos:
                info = _describe(prepared, models, request, options, without_folders)
                if info["size"] not in [other["size"] for other in infos.values()]:
                    _check_watermark(info, request)
                infos[options, loras] = info
                if has_own_loras:
                    describe_variant(prepared.request, model)
            info = infos[options, loras]
            images = generate_batch(prepared, batch, models, listener.on_step, on_latent)
            info["dtype"] = str(model.dtype).removeprefix("torch.")
            if listener.stopped_at is not None:
                info["unfinished"] = listener.stopped_at
            rows = range(len(batch))
            image_infos = [info | describe_image(request, batches, number, row) for row in rows]
            latent = latents[-1] if latents else None
            writer.save(images, image_infos, prepared.protected_pixels(), latent)
            latents.clear()
            if listener.stopped_at is not None:
                raise Stop
    finally:
        writer.save_grid()
    log.info(
        "Your samples are ready and waiting for you here: \n%s \n \nEnjoy.", request.output.outdir
    )


def _describe(
    prepared: PreparedTask,
    models: Models,
    request: Request,
    options: LineOptions,
    without_folders: bool,
) -> Info:
    """Return the info of the images of a line with the LoRAs that the model has now.

    Args:
        request: of the whole run.
        options: those that the line sets.
    """
    size = prepared.output_size(models.base)
    info = describe_run(prepared.request, models, size, without_folders)
    info["loras"] = _describe_loras(models.base, without_folders)
    if options:
        info |= {"request": request.to_json(without_folders), "line": dict(options)}
    return info


def _check_watermark(info: Info, request: Request) -> None:
    if info["watermark"] is None and not request.output.no_watermark:
        log.warning("images of %dx%d are too small for a watermark: saved without", *info["size"])


def _describe_loras(model: LatentDiffusion, without_folders: bool) -> list[JsonMapping]:
    loras: list[JsonMapping] = model.provenance.get("loras", [])
    if not without_folders:
        return loras
    return [{**lora, "path": Path(lora["path"]).name} for lora in loras]
