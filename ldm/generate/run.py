"""Run a request: generate its images and save them.

Request -> plan_batches -> prepare (read inputs) -> load_models -> generate each batch -> save
"""

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from tqdm import tqdm

from ldm.generate.batch import generate_with_fallback, set_up_task
from ldm.generate.checks import (
    check_loras,
    check_steps,
    find_few_step_warnings,
    find_option_warnings,
)
from ldm.generate.defaults import log_variant
from ldm.generate.info import Info, get_dtype_name, get_final_size, make_image_info, make_run_info
from ldm.generate.listener import RunListener, is_progress_hidden
from ldm.generate.load import Models, load_models
from ldm.generate.lora_tags import Loras
from ldm.generate.output import ImageWriter
from ldm.generate.plan import Batch, LineOptions, plan_batches
from ldm.generate.prompt_checks import find_prompt_warnings, find_syntax_warnings
from ldm.generate.request import Request
from ldm.generate.tasks import PreparedTask
from ldm.imaging.mesh import check_can_save_meshes
from ldm.imaging.output import check_outdir
from ldm.loading.addons.lora import set_loras
from ldm.runtime.errors import Stop

__all__ = ["run_request"]

log = logging.getLogger(__name__)

PreparedTasks = Mapping[LineOptions, PreparedTask]  # key (): for lines that set no options


def run_request(
    request: Request,
    listener: RunListener,
    *,
    load: Callable[[Request, PreparedTask], Models] = lambda request, _: load_models(request),
    without_folders: bool = False,
    list_loras: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Generate and save all images of a request.

    Args:
        listener: Its callbacks get progress, images and warnings.
        load: Loads the models of a request for a prepared task.
        without_folders: See `make_run_info`.
        list_loras: See `plan_batches`.
    Raises:
        ValueError, OSError: An argument or file is invalid; raised before the model is loaded
            where possible.
        NonFinite: The model returned NaN or infinity even in float32.
        Stop: The listener stopped the run; finished images and their grid are saved.
    """
    check_outdir(request.output.outdir)
    batches = plan_batches(request, list_loras)
    syntax_warnings = find_syntax_warnings(batches, request)
    if request.output.glb:
        check_can_save_meshes()
    inputs_by_image = request.inputs.split_by_image()
    models: Models | None = None
    issued_warnings: list[str] = []
    for inputs in inputs_by_image:
        tasks = _prepare_tasks(replace(request, inputs=inputs), batches)
        if models is None:  # loading is slow: an invalid first input should fail before it
            for prepared in tasks.values():
                check_steps(prepared.request)
            issued_warnings = find_few_step_warnings(tasks, batches)
            _warn(listener, issued_warnings)
            models = load(_with_common_loras(tasks[()].request, batches), tasks[()])
            check_loras(models.base, batches)
            model_warnings = [
                *syntax_warnings,
                *find_prompt_warnings(batches, request, models.base),
                *find_option_warnings(tasks, models.base),
            ]
            _warn(listener, model_warnings)
            issued_warnings += model_warnings
            listener.on_start(models.base, len(inputs_by_image) * sum(map(len, batches)))
        with warnings.catch_warnings():
            for message in issued_warnings:  # the pipelines would repeat them
                warnings.filterwarnings("ignore", re.escape(message))
            _InputRun(tasks, batches, models, listener, without_folders).generate_images()
    log.info(
        "Your samples are ready and waiting for you here: \n%s \n \nEnjoy.", request.output.outdir
    )


def _prepare_tasks(request: Request, batches: Sequence[Batch]) -> PreparedTasks:
    """Prepare the task of a request, and again for each combination of line options."""
    tasks: dict[LineOptions, PreparedTask] = {(): request.task.prepare(request)}
    for options in dict.fromkeys(batch.line_options for batch in batches):
        if options not in tasks:
            line_request = request.with_values(dict(options))
            tasks[options] = line_request.task.prepare(line_request)
    return tasks


def _warn(listener: RunListener, messages: Sequence[str]) -> None:
    for message in messages:
        listener.warn(message)


def _with_common_loras(request: Request, batches: Sequence[Batch]) -> Request:
    """Return the request with the LoRAs that all batches share, or without LoRAs if they differ.

    In the latter case `_InputRun` sets the LoRAs of each batch.
    """
    combinations = {batch.loras for batch in batches}
    loras = batches[0].loras if len(combinations) == 1 else ()
    return replace(request, model=replace(request.model, lora=loras))


@dataclass
class _InputRun:
    """The run for one input image, or the only one of a task without input images."""

    tasks: PreparedTasks
    batches: Sequence[Batch]
    models: Models
    listener: RunListener
    without_folders: bool  # see `make_run_info`

    def __post_init__(self) -> None:
        self._set_up_tasks: set[LineOptions] = set()
        self._infos: dict[tuple[LineOptions, Loras], Info] = {}
        self.request = self.tasks[()].request
        self._sets_loras = len({batch.loras for batch in self.batches}) > 1

    def generate_images(self) -> None:
        """Generate and save the images of each batch; save the grid even if a batch fails."""
        total = sum(map(len, self.batches))
        writer = ImageWriter(self.request, self.models, self.listener, total)
        bar = tqdm(self.batches, "Sampling", disable=is_progress_hidden())
        try:
            for batch_index, batch in enumerate(bar):
                prepared = self._set_up(batch)
                info = self._get_shared_info(batch)
                # A second one is added if the decoder overflows and the batch is retried.
                latents: list[Tensor] = []
                on_latent = latents.append if self.request.output.save_latents else None
                images = generate_with_fallback(
                    prepared, batch, self.models, self.listener, on_latent
                )
                info["dtype"] = get_dtype_name(self.models.base)
                if self.listener.stopped_at is not None:
                    info["unfinished"] = self.listener.stopped_at
                infos = [
                    info | make_image_info(self.request, self.batches, batch_index, k)
                    for k in range(len(batch))
                ]
                batch_latents = latents[-1] if latents else None
                writer.save(images, infos, prepared.get_protected_pixels(), batch_latents)
                if self.listener.stopped_at is not None:
                    raise Stop
        finally:
            writer.save_grid()

    def _set_up(self, batch: Batch) -> PreparedTask:
        """Set the LoRAs of a batch, and return its task, set up for the model."""
        if self._sets_loras:
            set_loras(self.models.base, batch.loras)
        prepared = self.tasks[batch.line_options]
        if batch.line_options not in self._set_up_tasks:
            set_up_task(prepared, self.models.base)
            self._set_up_tasks.add(batch.line_options)
        return prepared

    def _get_shared_info(self, batch: Batch) -> Info:
        """Return the info that all images with the options and LoRAs of a batch share."""
        key = batch.line_options, batch.loras
        if key not in self._infos:
            prepared = self.tasks[batch.line_options]
            size = prepared.get_output_size(self.models.base)
            info = make_run_info(prepared.request, self.models, size, self.without_folders)
            if batch.line_options:
                values = self.request.to_json(self.without_folders)
                info |= {"request": values, "line": dict(batch.line_options)}
            self._log_size_and_variant(info, prepared.request)
            self._infos[key] = info
        return self._infos[key]

    def _log_size_and_variant(self, info: Info, request: Request) -> None:
        """Warn, once per size, of images too small for a watermark; log the few-step LoRA."""
        size = get_final_size(info)
        is_new_size = size not in map(get_final_size, self._infos.values())
        if is_new_size and info["watermark"] is None and not self.request.output.no_watermark:
            height, width = size
            log.warning(
                "images of %dx%d are too small for a watermark: saved without one", width, height
            )
        if self._sets_loras:
            log_variant(request, self.models.base)
