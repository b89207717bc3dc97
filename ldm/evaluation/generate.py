"""Generate images of prompts with several models, samplers, numbers of steps and guidance scales.

    OUT/prompts.txt                              the prompts, one per line; of a later run with
                                                 fewer ones the first N in prompts-N.txt
    OUT/<model>-<sampler>-<steps>/options.json   options shared by all images of the folder
    OUT/<model>-<sampler>-<steps>/scale-<s>/00000.png …

In each folder, image k has prompt k // repeat and seed + k: all scales start from the same noise,
and images do not depend on each other, on the batch size or on the number of processes. Files are
written atomically, and running the command again generates only the missing ones.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.diffusion.names import SAMPLERS
from ldm.evaluation.progress import Progress
from ldm.generate.batch import generate_with_fallback
from ldm.generate.info import Info, get_dtype_name, make_image_info, make_run_info
from ldm.generate.listener import RunListener
from ldm.generate.load import Models, load_models
from ldm.generate.output import add_watermark, to_8_bit_rgb
from ldm.generate.plan import Batch, plan_batches
from ldm.generate.prompt_file import read_prompt_file
from ldm.generate.request import Request
from ldm.generate.tasks import PreparedTask
from ldm.imaging.metadata import hash_pixels, write_png
from ldm.runtime.errors import ArgumentError
from ldm.runtime.files import read_text, write_atomically
from ldm.runtime.ranks import get_rank_and_world_size
from ldm.runtime.types import JsonObject

__all__ = ["Setting", "generate_images", "wait_for_images", "write_prompts"]

# Options that do not change images, except by rounding.
OPTIONS_WITHOUT_EFFECT = ("device", "attention", "offload", "outdir", "n_samples", "n_rows",
                          "skip_grid", "skip_save", "json", "from_file", "torchscript", "ipex",
                          "laion400m")  # fmt: skip
OPTIONS_IN_FOLDER_NAMES = ("scale", "sampler", "steps", "ckpt")

CHECKPOINT_HASH_KEY = "checkpoint_hash"
WAIT_TIMEOUT = 1800.0  # seconds without a new image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """A model and the options of its images, which are written into one folder.

    Args:
        model_label: Name of the model in folder names.
        request: Request with a prompt file and a guidance scale.
    """

    model_label: str
    request: Request

    @property
    def series(self) -> str:
        """Name of the curve in the figure, and of the folder with one subfolder per scale."""
        sampling = self.request.sampling
        return f"{self.model_label}-{sampling.sampler}-{sampling.steps}"

    def get_folder(self, outdir: Path) -> Path:
        """Return the folder of the images."""
        return outdir / self.series / f"scale-{self.request.sampling.scale:g}"

    def list_files(self, outdir: Path) -> list[Path]:
        """Return the paths of the images, which may not exist yet."""
        folder, count = self.get_folder(outdir), _count_images(self.request)
        return [_get_image_path(folder, k) for k in range(count)]


def write_prompts(outdir: Path, lines: Sequence[str]) -> Path:
    """Write the prompts of an evaluation to its folder; return the path of the file.

    An existing `prompts.txt` may have more or fewer prompts, if the first ones are the same. If it
    has more, which describe images in the folder, it is kept, and another file is written.

    Raises:
        ArgumentError: The folder has images of other prompts.
    """
    path = outdir / "prompts.txt"
    if path.is_file():
        existing_lines = read_text(path).splitlines()
        count = min(len(existing_lines), len(lines))
        if existing_lines[:count] != list(lines[:count]):
            raise ArgumentError(
                f"{outdir} has images of other prompts, choose another folder", "outdir"
            )
        if existing_lines == list(lines):
            return path
        if len(existing_lines) > len(lines):
            path = path.with_name(f"prompts-{len(lines)}.txt")
    outdir.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def generate_images(settings: Sequence[Setting], outdir: Path) -> None:
    """Generate the missing images of all settings; each process generates only its own batches.

    Each batch of prompts is generated with all settings of a model before the next batch, so that
    an interrupted run has equally many images of each setting.

    Args:
        settings: Settings, grouped by model.

    Raises:
        ArgumentError: There are fewer images than processes, or the folder has images with other
            options.
        NonFinite: An image has NaN or infinite values even in float32.
    """
    rank, world_size = get_rank_and_world_size()
    _record_options(settings, outdir)
    # With adaptive steps, an image depends on the rest of its batch, so that the sampler needs
    # batch size 1. All settings then have it, as they share the batches.
    samplers = (SAMPLERS[setting.request.sampling.sampler or "ddim"] for setting in settings)
    max_batch_size = 1 if any(sampler.is_adaptive for sampler in samplers) else None
    requests = [_limit_batch_size(setting.request, max_batch_size) for setting in settings]
    plans = [(s, plan_batches(request)) for s, request in zip(settings, requests, strict=True)]
    for setting, batches in plans:
        _check_prompts(setting, batches)
    num_missing = _count_missing(plans, outdir)
    log.info("%d images to generate, %d settings", num_missing, len(settings))
    progress = Progress(num_missing, "Sampling")
    for label in dict.fromkeys(setting.model_label for setting in settings):
        model_plans = [(s, batches) for s, batches in plans if s.model_label == label]
        if _count_missing(model_plans, outdir):
            _generate_with_model(model_plans, outdir, progress)
    progress.close()
    if world_size > 1:
        log.info("rank %d of %d processes has generated its images", rank, world_size)


def _check_prompts(setting: Setting, batches: Sequence[Batch]) -> None:
    """Raise ArgumentError for a prompt with per-prompt options."""
    for batch in batches:
        option_names = [name for name, _ in batch.line_options]
        if batch.loras != setting.request.model.lora:
            option_names.append("a LoRA")
        if option_names:
            message = f"`{batch.images[0].prompt}` has {', '.join(option_names)}"
            raise ArgumentError(
                f"{message}: per-prompt options are not allowed in an evaluation", "from_file"
            )


def _generate_with_model(
    plans: Sequence[tuple[Setting, list[Batch]]], outdir: Path, progress: Progress
) -> None:
    """Generate the missing images of all settings of one model."""
    tasks = [setting.request.task.prepare(setting.request) for setting, _ in plans]
    models = load_models(tasks[0].request)
    size = tasks[0].get_output_size(models.base)
    run_infos = [make_run_info(task.request, models, size, without_folders=True) for task in tasks]
    for setting, _ in plans:
        path = outdir / setting.series / "options.json"
        _record_checkpoint(path, run_infos[0][CHECKPOINT_HASH_KEY])
    tasks[0].set_up(models.base)
    num_batches = len(plans[0][1])
    for index in range(num_batches):
        for (setting, batches), task, run_info in zip(plans, tasks, run_infos, strict=True):
            batch = _filter_missing(batches[index], setting, outdir)
            if batch:
                _generate_batch(task, batch, models, run_info, setting.get_folder(outdir))
                progress.add(len(batch))


def _generate_batch(
    prepared: PreparedTask, batch: Batch, models: Models, run_info: Info, folder: Path
) -> None:
    images = generate_with_fallback(prepared, batch, models, RunListener())
    run_info["dtype"] = get_dtype_name(models.base)
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(to_8_bit_rgb(images, run_info, truncate=False)):
        info = run_info | make_image_info(prepared.request, [batch], 0, k)
        info["sha256_unmarked"] = hash_pixels(image)
        with write_atomically(_get_image_path(folder, batch.images[k].index)) as partial:
            write_png(partial, add_watermark(image, info), info)


def _limit_batch_size(request: Request, max_batch_size: int | None) -> Request:
    """Limit the batch size so that each process has a batch.

    Args:
        max_batch_size: Largest batch size; None = any.
    """
    _, world_size = get_rank_and_world_size()
    count = _count_images(request)
    if count < world_size:
        message = f"{count} images for {world_size} processes: start fewer processes"
        raise ArgumentError(message, "prompts")
    limit = min(count // world_size, max_batch_size or count)
    output = replace(request.output, n_samples=min(request.output.n_samples, limit), n_iter=1)
    return replace(request, output=output)


def _record_options(settings: Sequence[Setting], outdir: Path) -> None:
    """Write the options of each series; raise ArgumentError if its folder has other options."""
    for setting in {setting.series: setting for setting in settings}.values():
        path = outdir / setting.series / "options.json"
        options = _get_shared_options(setting)
        if path.is_file():
            recorded = json.loads(path.read_text("utf-8"))
            recorded.pop(CHECKPOINT_HASH_KEY, None)
            names = options.keys() | recorded
            changed = sorted(name for name in names if options.get(name) != recorded.get(name))
            if changed:
                name = changed[0]
                option = setting.request.task.options.get(name)
                default = None if option is None else option.default
                old, new = recorded.get(name, default), options.get(name, default)
                message = f"{path.parent} has images with {name} {old}, not {new}"
                raise ArgumentError(f"{message}: choose another folder", name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, options)


def _record_checkpoint(path: Path, checkpoint_hash: str) -> None:
    """Add the hash of the model to `options.json`; raise ArgumentError if it has another hash."""
    options = json.loads(path.read_text("utf-8"))
    if options.setdefault(CHECKPOINT_HASH_KEY, checkpoint_hash) != checkpoint_hash:
        message = f"{path.parent} has images of another model of this name: choose another folder"
        raise ArgumentError(message, "outdir")
    _write_json(path, options)


def _write_json(path: Path, options: JsonObject) -> None:
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(options, indent=1), "utf-8")


def _get_shared_options(setting: Setting) -> JsonObject:
    request = setting.request
    values = request.to_json()
    defaults = {name: option.default for name, option in request.task.options.items()}
    return {
        name: value
        for name, value in values.items()
        if name not in (*OPTIONS_WITHOUT_EFFECT, *OPTIONS_IN_FOLDER_NAMES)
        and value != json.loads(json.dumps(defaults[name]))
    }


def _count_missing(plans: Sequence[tuple[Setting, list[Batch]]], outdir: Path) -> int:
    return sum(len(_filter_missing(batch, s, outdir)) for s, batches in plans for batch in batches)


def _filter_missing(batch: Batch, setting: Setting, outdir: Path) -> Batch:
    folder = setting.get_folder(outdir)
    images = [image for image in batch.images if not _get_image_path(folder, image.index).exists()]
    return replace(batch, images=images)


def _get_image_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def wait_for_images(settings: Sequence[Setting], outdir: Path) -> None:
    """Wait for the images of other processes.

    Raises:
        TimeoutError: There was no new image for WAIT_TIMEOUT seconds.
    """
    paths = [path for setting in settings for path in setting.list_files(outdir)]
    last_num_missing, last_change = -1, time.monotonic()
    while num_missing := sum(not path.exists() for path in paths):
        if num_missing != last_num_missing:
            last_num_missing, last_change = num_missing, time.monotonic()
        elif time.monotonic() - last_change > WAIT_TIMEOUT:
            raise TimeoutError(f"{num_missing} of {len(paths)} images are missing: run this again")
        time.sleep(1)


def _count_images(request: Request) -> int:
    assert request.prompts.from_file is not None
    lines = read_prompt_file(Path(request.prompts.from_file), request.task)
    return sum(line.count for line in lines) * request.prompts.repeat
