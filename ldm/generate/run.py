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
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.encoders.text import TextEncoder
from ldm.encoders.tokenizer import has_weight_syntax
from ldm.generate.load import (
    Models,
    describe_variant,
    explain_few_steps,
    explain_start,
    load_models,
    resolve_sampling,
)
from ldm.generate.lora_tags import Loras, remove_tags
from ldm.generate.options import Value
from ldm.generate.output import (
    GRID_LIMIT,
    RunListener,
    add_watermark,
    hides_progress,
    save_glb,
    save_grid,
    save_image,
    save_image_latent,
    to_images,
)
from ldm.generate.plan import Batch, looks_dynamic, plan_batches
from ldm.generate.provenance import Info, describe_depth, describe_image, describe_run, read_job
from ldm.generate.request import Request
from ldm.generate.safety import check_images, hide_flagged, report
from ldm.generate.start_noise import seed_globally, start_noise
from ldm.generate.tasks import PreparedTask
from ldm.imaging.mesh import check_can_save_meshes
from ldm.imaging.output import OutputFolder
from ldm.imaging.rgbd import place_beside, split_depth
from ldm.loading.addons.lora import read_changes, set_loras
from ldm.model import LatentDiffusion
from ldm.pipelines.common import TaskOptions, check_clip_skip
from ldm.pipelines.guidance import GuidanceOptions
from ldm.pipelines.latent_upscaling import Upscaling
from ldm.pipelines.prompts import QUOTED_WORDS, StepPrompts, find_lost_text, parse_constant
from ldm.prompts import PLAIN, parse_prompt
from ldm.runtime.errors import NonFinite, Stop
from ldm.runtime.types import JsonMapping

__all__ = ["remake_image", "run_request"]

log = logging.getLogger(__name__)

LineKey = tuple[tuple[str, Value], ...]  # options that a line of a prompt file sets

Callback = Callable[[int, int, Tensor, Tensor], None]  # of `ldm.sample`
OnLatent = Callable[[Tensor], object]  # of the tasks


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
    notes = _parse_prompts(batches, request)
    if request.output.glb:
        check_can_save_meshes()
    models: Models | None = None
    said: list[str] = []
    for inputs in request.inputs.split_by_image():
        single = replace(request, inputs=inputs)
        lines: dict[LineKey, PreparedTask] = {(): single.task.prepare(single)}
        for key in dict.fromkeys(map(_line_key, batches)):
            changed = single.with_values(dict(key))
            lines[key] = lines.get(key) or changed.task.prepare(changed)
        if models is None:
            said = _explain_few_steps(lines, batches)
            for excess in said:
                listener.warn(excess)
            models = load(_with_loras(lines[()], batches))
            _check_loras(models.base, batches)
            for note in notes:
                listener.warn(note)
            _warn_about_prompts(batches, request, models.base, listener)
            skip = max(prepared.request.sampling.clip_skip for prepared in lines.values())
            if reason := check_clip_skip(models.base, skip):
                listener.warn(reason)
            starts = {explain_start(each.request, models.base) for each in lines.values()}
            for start in filter(None, starts):
                listener.warn(start)
                said.append(start)
        with warnings.catch_warnings():
            for reason in said:  # which `sample` says, too
                warnings.filterwarnings("ignore", re.escape(reason))
            _generate_batches(lines, batches, models, listener, without_folders)


def _explain_few_steps(lines: Mapping[LineKey, PreparedTask], batches: list[Batch]) -> list[str]:
    """Say why steps and scales do not suit the models for few steps that batches have."""
    reasons = []
    for key, loras in dict.fromkeys((_line_key(batch), batch[0].loras) for batch in batches):
        request = lines[key].request
        choice = replace(request.model, lora=loras)
        reasons.append(explain_few_steps(replace(request, model=choice)))
    return list(dict.fromkeys(filter(None, reasons)))


def _line_key(batch: Batch) -> LineKey:
    """Return the options that the line of a batch sets, as a key."""
    return tuple(batch[0].values.items())


def _with_loras(prepared: PreparedTask, batches: Sequence[Batch]) -> PreparedTask:
    """Return the task with the LoRAs that all batches have in common, to load them at once."""
    request = prepared.request
    sets = {batch[0].loras for batch in batches} or {request.model.lora}
    loras = next(iter(sets)) if len(sets) == 1 else ()
    if loras == request.model.lora:
        return prepared
    changed = copy.copy(prepared)
    changed.request = replace(request, model=replace(request.model, lora=loras))
    return changed


def _check_loras(model: LatentDiffusion, batches: Sequence[Batch]) -> None:
    """Raise what a LoRA of a later image would, where images have their own, before the first."""
    sets = dict.fromkeys(batch[0].loras for batch in batches)
    if len(sets) > 1:
        for file, weight in dict.fromkeys(lora for loras in sets for lora in loras):
            read_changes(file, model, weight)


def _generate_batches(
    lines: Mapping[LineKey, PreparedTask],
    batches: list[Batch],
    models: Models,
    listener: RunListener,
    without_folders: bool,
) -> None:
    """Make each batch and save its images; if one fails, the grid of earlier ones is still saved.

    Args:
        lines: prepared tasks by the options that a line sets; under () that of the run itself.
    """
    request, model = lines[()].request, models.base
    output, total = request.output, sum(map(len, batches))
    folder = OutputFolder(output.outdir, request.inputs.output_name)
    makes_grid = not output.skip_grid and request.inputs.output_name is None
    has_own_loras = len({batch[0].loras for batch in batches}) > 1
    grid_images: list[tuple[Image.Image, Info]] = []
    run_infos: dict[tuple[LineKey, Loras], Info] = {}
    if total > GRID_LIMIT and makes_grid:
        log.info("the grid will hold the first %d images", GRID_LIMIT)
    begun: set[LineKey] = set()
    listener.begin(model, total)
    latents: list[Tensor] = []  # of each batch, if they are to be saved
    on_latent = latents.append if output.save_latents else None
    try:
        for number, batch in enumerate(tqdm(batches, "Sampling", disable=hides_progress())):
            key, loras = _line_key(batch), batch[0].loras
            prepared = lines[key]
            if has_own_loras:
                set_loras(model, loras)
            if key not in begun:
                _begin(prepared, model)
                begun.add(key)
            if (key, loras) not in run_infos:
                info = _describe(prepared, models, request, key, without_folders)
                if info["size"] not in [other["size"] for other in run_infos.values()]:
                    _check_watermark(info, request)
                run_infos[key, loras] = info
                if has_own_loras:
                    describe_variant(prepared.request, model)
            run_info = run_infos[key, loras]
            protected = prepared.protected_pixels()
            images = generate_batch(prepared, batch, models, listener.on_step, on_latent)
            run_info["dtype"] = str(model.dtype).removeprefix("torch.")
            if listener.stopped_at is not None:
                run_info["unfinished"] = listener.stopped_at
            truncate = "truncate" in request.sampling.legacy
            depths = split_depth(images)
            originals = to_images(images, run_info, truncate=truncate)
            verdicts = check_images(models.safety_checker, originals, output.unsafe)
            for row, original in enumerate(originals):
                info = run_info | describe_image(request, batches, number, row) | verdicts[row]
                image, depth = hide_flagged(original, depths[row] if depths else None, info)
                if depth is not None:
                    info |= describe_depth(depth)
                info["path"] = None
                if image is not None and not output.skip_save:
                    kept = protected if image is original else None
                    info |= save_image(folder, image, info, kept, depth)
                    if depth is not None and output.glb:
                        info |= save_glb(info["path"], image, depth)
                    if latents and image is original:  # not of hidden images
                        info |= save_image_latent(info, latents[-1][row], model)
                report(info, listener)
                listener.add_image(info)
                if image is not None and makes_grid and len(grid_images) < GRID_LIMIT:
                    cell = image if depth is None else place_beside(image, depth)
                    grid_images.append((cell, info))
            latents.clear()
            if listener.stopped_at is not None:
                raise Stop
    finally:
        if grid_images:
            save_grid(folder, grid_images, request)
    log.info("Your samples are ready and waiting for you here: \n%s \n \nEnjoy.", output.outdir)


def _begin(prepared: PreparedTask, model: LatentDiffusion) -> None:
    """Prepare for the first batch of a line's options."""
    prepared.begin(model)
    seed_globally(prepared.request, model, prepared.output_size(model))


def _describe(
    prepared: PreparedTask,
    models: Models,
    request: Request,
    key: LineKey,
    without_folders: bool,
) -> Info:
    """Return the info of the images of a line with the LoRAs that the model has now.

    Args:
        request: of the whole run.
        key: options that the line sets.
    """
    size = prepared.output_size(models.base)
    info = describe_run(prepared.request, models, size, without_folders)
    info["loras"] = _describe_loras(models.base, without_folders)
    if key:
        info |= {"request": request.to_json(without_folders), "line": dict(key)}
    return info


def _check_watermark(info: Info, request: Request) -> None:
    if info["watermark"] is None and not request.output.no_watermark:
        log.warning("images of %dx%d are too small for a watermark: saved without", *info["size"])


def _describe_loras(model: LatentDiffusion, without_folders: bool) -> list[JsonMapping]:
    loras: list[JsonMapping] = model.provenance.get("loras", [])
    if not without_folders:
        return loras
    return [{**lora, "path": Path(lora["path"]).name} for lora in loras]


def _parse_prompts(batches: list[Batch], request: Request) -> list[str]:
    """Return what prompts have that is read literally, though it looks like syntax.

    Raises:
        ArgumentError: a prompt is invalid in the syntax.
    """
    syntax = request.prompts.syntax
    if syntax == PLAIN:
        return []
    jobs = [job for batch in batches for job in batch]
    prompts = (text for job in jobs for text in (job.prompt, job.prompt_2))
    parsed = [parse_prompt(text, syntax) for text in dict.fromkeys(filter(None, prompts))]
    negatives = (text for job in jobs for text in (job.negative_prompt, job.negative_prompt_2))
    for text in dict.fromkeys(filter(None, negatives)):
        parsed.append(parse_prompt(text, syntax, is_negative=True))
    for name, text in _constant_texts(request).items():
        constant = parse_constant(text, syntax, name)
        assert isinstance(constant, StepPrompts)
        parsed.append(constant.first)
    return list(dict.fromkeys(note for one in parsed for note in one.notes))


def _constant_texts(request: Request) -> dict[str, str]:
    """Return the texts that hold for the whole run, by option."""
    values = request.get_values()
    names = ("sld_concept", "source_prompt")
    return {name: str(values[name]) for name in names if values.get(name)}


def _warn_about_prompts(
    batches: list[Batch], request: Request, model: LatentDiffusion, listener: RunListener
) -> None:
    """Warn about prompts that are too long, or whose syntax is read as plain text."""
    jobs = [job for batch in batches for job in batch]
    prompts: list[str | None] = []
    if request.prompts.syntax == PLAIN:
        prompts += _constant_texts(request).values()
        prompts += [text for job in jobs for text in (job.prompt, job.negative_prompt)]
        prompts += [text for job in jobs for text in (job.prompt_2, job.negative_prompt_2)]
    texts = list(dict.fromkeys(filter(None, prompts)))
    if not model.conditioner.find_all(TextEncoder):
        return
    negatives = (job.negative_prompt for job in jobs)
    if tagged := next((text for text in negatives if remove_tags(text) != text), None):
        listener.warn(f"a LoRA in a negative prompt is read as plain text: `{tagged}`")
    expands = request.prompts.dynamic_prompts or request.prompts.wildcards is not None
    dynamic = next((job.prompt for job in jobs if looks_dynamic(job.prompt)), None)
    if dynamic is not None and not expands:
        listener.warn(f"dynamic prompts are off: `{dynamic}` is read as plain text")
    if lost := find_lost_text(model, texts):
        listener.warn(lost)
    for weighted in filter(has_weight_syntax, texts):
        words = " ".join(weighted.split()[:QUOTED_WORDS])
        listener.warn(f"A1111's syntax for weights is read as plain text: `{words} …`")
        break


def remake_image(
    prepared: PreparedTask,
    models: Models,
    info: JsonMapping,
    callback: Callback | None = None,
) -> tuple[Image.Image, Image.Image | None]:
    """Make one image again, in a batch of the same shape; return it and its depth.

    Args:
        prepared: the task of the run that made it.
        info: of the image.
    Returns:
        (image, depth); depth is None for models without.
    """
    job, request, model = read_job(info), prepared.request, models.base
    _begin(prepared, model)
    for rows in info.get("earlier", ()):  # they drew from the same generator
        _generate(prepared, [job] * rows, models, callback)
    images = _generate(prepared, [job] * info["rows"], models, callback)
    image = images[info["row"] : info["row"] + 1]
    original = to_images(image, info, truncate="truncate" in request.sampling.legacy)[0]
    shown, depth = hide_flagged(original, next(iter(split_depth(image)), None), info)
    assert shown is not None, "an image that was dropped has no file"
    kept = prepared.protected_pixels() if shown is original else None
    return add_watermark(shown, info, kept), depth


def _generate(
    prepared: PreparedTask,
    batch: Batch,
    models: Models,
    callback: Callback | None,
    on_latent: OnLatent | None = None,
) -> Tensor:
    """Make the images of one batch, (B, 3 or with depth more, H, W) in [-1, 1]."""
    request, model = prepared.request, models.base
    sampling = resolve_sampling(request, model.defaults)
    options = {
        "seeds": [job.seed for job in batch],
        "negative_prompt": [job.negative_prompt for job in batch],
        "scale": sampling.scale,
        "tile": _latent_pixels(sampling.vae_tile, model),
        "unet_tile": _latent_pixels(sampling.unet_tile, model),
        "steps": sampling.steps,
        "sampler": sampling.sampler,
        "scheduler": sampling.scheduler,
        "rho": sampling.rho,
        "sigmas": sampling.sigmas,
        "eta": sampling.eta,
        "s_churn": sampling.s_churn,
        "s_tmin": sampling.s_tmin,
        "s_tmax": sampling.s_tmax,
        "s_noise": sampling.s_noise,
        "brownian": sampling.brownian,
        "rescale": sampling.rescale,
        "guidance_interval": sampling.guidance_interval,
        "freeu": sampling.freeu,
        "freeu_version": sampling.freeu_version,
        "tiling": sampling.tiling,
        "x_T": start_noise(request, model, prepared.output_size(model), batch),
        "legacy": sampling.legacy,
        "callback": callback,
        "on_latent": on_latent,
        **_sdxl_options(request, batch, models),
    }
    if models.upscaler is not None:
        second = request.upscaling
        options["upscaling"] = Upscaling(
            models.upscaler, second.upscaler_steps, second.upscaler_scale
        )
    if request.prompts.syntax != PLAIN:
        options["syntax"] = request.prompts.syntax
    guidance = {name: vars(sampling)[name] for name in GuidanceOptions.__annotations__}
    options |= {name: value for name, value in guidance.items() if value is not None}
    if check_clip_skip(model, sampling.clip_skip) is None and sampling.clip_skip > 1:
        options["clip_skip"] = sampling.clip_skip
    prompts = [job.prompt for job in batch]
    return prepared.generate(model, prompts, cast(TaskOptions, options))


def _sdxl_options(request: Request, batch: Batch, models: Models) -> dict[str, object]:
    """Return the keywords of the pipelines for SDXL that have a value."""
    options = {**vars(request.sdxl), "refiner": models.refiner}
    pairs = [(job.prompt_2, job.prompt) for job in batch]
    negative_pairs = [(job.negative_prompt_2, job.negative_prompt) for job in batch]
    options["prompt_2"] = _second_texts(pairs)
    options["negative_prompt_2"] = _second_texts(negative_pairs)
    return {name: value for name, value in options.items() if value is not None}


def _second_texts(pairs: Sequence[tuple[str | None, str]]) -> list[str] | None:
    """Return the text for the second text encoder of each image; None if all equal the first's.

    Args:
        pairs: (text for the second encoder, text for the first); None = the same text.
    """
    if all(second is None for second, _ in pairs):
        return None
    return [first if second is None else second for second, first in pairs]


def generate_batch(
    prepared: PreparedTask,
    batch: Batch,
    models: Models,
    callback: Callback,
    on_latent: OnLatent | None = None,
) -> Tensor:
    """Make a batch; if it contains NaN in half precision, switch to float32 and make it again."""
    try:
        return _generate(prepared, batch, models, callback, on_latent)
    except NonFinite as error:
        if models.base.dtype == torch.float32 or error.cause:
            raise
        dtype = str(models.base.dtype).removeprefix("torch.")
        log.warning("%s in %s: continuing in float32", error, dtype)
    # Not in the handler: the error holds the frames, and with them the tensors, of what failed.
    models.float()
    return _generate(prepared, batch, models, callback, on_latent)


def _latent_pixels(pixels: int | None, model: LatentDiffusion) -> int | None:
    return None if pixels is None else max(pixels // model.downscale, 1)
