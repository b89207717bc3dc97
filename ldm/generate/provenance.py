"""Generation metadata, the "info" of an image: describe a run, read the info back, compare results.

    request, models, job -> info in the PNG -> request -> the same image, or what differs

The info contains the whole request under "request", and facts of the run: model, versions, hashes
of all files, batch size and row in the batch (kernels round differently for other shapes). Its keys
are listed in `imaging.metadata`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.diffusion.names import SLD_CONCEPTS
from ldm.diffusion.step_noise import STEP_NOISE
from ldm.generate.load import Models, find_checker, resolve_sampling
from ldm.generate.options import Value, options_of
from ldm.generate.plan import Batch, Job
from ldm.generate.request import Request, Sampling
from ldm.generate.tasks import TASKS, Task
from ldm.imaging.metadata import fingerprint
from ldm.imaging.watermark import MIN_PIXELS
from ldm.loading.files.checkpoint import short_hash
from ldm.loading.load import DEMO_CHECKPOINT
from ldm.loading.published import find_checkpoint
from ldm.model import LatentDiffusion
from ldm.pipelines.families import is_sdxl
from ldm.pipelines.freeu import find_factors
from ldm.pipelines.latent_upscaling import FACTOR
from ldm.pipelines.sampling import default_scheduler
from ldm.runtime.device import pick_device
from ldm.runtime.errors import ArgumentError, MissingFile
from ldm.runtime.files import find_file, sha256_of_file
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.runtime.version import __version__

Info = JsonObject  # JSON

FLOAT_WATERMARK = "dwtDct (floats)"  # embedded before pixels are rounded to integers

REFINER_STRENGTH = 0.15  # default of the pipelines
PRECISIONS = {"float32": "full", "float16": "fp16", "bfloat16": "bf16"}
# Keys of the info that may explain why a reproduced image differs.
ENVIRONMENT = (
    "checkpoint_hash", "ema", "config_hash", "overrides", "device", "dtype", "attention",
    "threads", "torch", "ldm",
)  # fmt: skip
FILE_KEYS = {  # key of the info -> option
    "loras": "lora", "embeddings": "embedding", "vae": "vae", "refiner": "refiner",
    "text_encoder": "text_encoder", "upscaler": "upscaler",
}  # fmt: skip
# Key of an info without "request" (version 0.1) -> option, where they differ.
FORMER_KEYS = {"grid": "scheduler", "tile": "vae_tile"}


def describe_run(
    request: Request,
    models: Models,
    size: tuple[int, int],
    without_folders: bool = False,
) -> Info:
    """Return the info that all images of a run share.

    Args:
        without_folders: see `Request.to_json`.
    """
    model, choice = models.base, request.model
    factor = 1 if models.upscaler is None else FACTOR
    result_size = (factor * size[0], factor * size[1])
    sampling = resolve_sampling(request, model.defaults)
    assert sampling.sampler is not None
    checkpoint = model.provenance["checkpoint"]
    own, values = options_of(request.task.inputs), request.get_values()
    files = {name: _as_list(values[name]) for name, (row, _) in own.items() if row.is_input_file}
    return {
        "task": request.task.name,
        "sampler": sampling.sampler,
        "scheduler": sampling.scheduler,
        "scheduler_in_use": None
        if sampling.sigmas
        else sampling.scheduler or default_scheduler(model, sampling.sampler),
        **{name: value for name in ("rho", "sigmas") if (value := vars(sampling)[name])},
        "steps": sampling.steps,
        **{name: value for name in STEP_NOISE if (value := vars(sampling)[name]) is not None},
        "scale": sampling.scale,
        "size": list(size),
        **{name: values[name] for name in own if name not in files},
        "inputs": {
            name: [
                {"path": str(Path(path).resolve()), "sha256": sha256_of_file(path)}
                for path in paths
            ]
            for name, paths in files.items()
        },
        **_describe_sdxl(request, models, without_folders),
        **_describe_upscaler(request, models, without_folders),
        **_describe_guidance(sampling, model),
        **_describe_checker(request, without_folders),
        **({"clip_skip": sampling.clip_skip} if sampling.clip_skip > 1 else {}),
        "tile": sampling.vae_tile,
        "tiling": sampling.tiling,
        "legacy": list(sampling.legacy),
        "syntax": request.prompts.syntax,
        "watermark": watermark_method(request, result_size, watermark_payload(model)),
        "payload": watermark_payload(model),
        "checkpoint": Path(checkpoint).name,
        "checkpoint_hash": short_hash(checkpoint),
        "ema": choice.ema,
        **({"variant": found["name"]} if (found := model.provenance.get("variant")) else {}),
        "vae": model.provenance.get("vae"),
        "text_encoder": model.provenance.get("text_encoder"),
        "loras": model.provenance.get("loras", []),
        "embeddings": model.provenance.get("embeddings", []),
        "config": choice.config,
        "config_hash": model.provenance["config_hash"],
        "overrides": list(choice.overrides),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": choice.attention,
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "torch": torch.__version__,
        "ldm": __version__,
        "request": request.to_json(without_folders),
    }


def _describe_sdxl(request: Request, models: Models, without_folders: bool) -> Info:
    """Return the options of SDXL that are set, and the file of the refiner."""
    info: Info = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(request.sdxl).items()
        if value is not None
    }
    if models.refiner is not None:
        path = Path(models.refiner.provenance["checkpoint"]).resolve()
        shown = path.name if without_folders else str(path)
        info["refiner"] = {"path": shown, "hash": short_hash(path)}
        if request.sdxl.refiner_start is None:
            info.setdefault("refiner_strength", REFINER_STRENGTH)
    return info


def _describe_checker(request: Request, without_folders: bool) -> Info:
    """Return the file of the safety checker."""
    path = find_checker(request)
    if path is None:
        return {}
    shown = path.name if without_folders else str(path.resolve())
    return {"safety_checker": {"path": shown, "hash": short_hash(path)}}


def _describe_upscaler(request: Request, models: Models, without_folders: bool) -> Info:
    """Return file, steps and scale of the x2 latent upscaler; "size" is that of the base."""
    model, choice = models.upscaler, request.upscaling
    if model is None:
        return {}
    path = Path(model.provenance["checkpoint"]).resolve()
    steps, scale = choice.upscaler_steps, choice.upscaler_scale
    return {
        "upscaler": {"path": path.name if without_folders else str(path), "hash": short_hash(path)},
        "upscaler_steps": model.defaults.steps if steps is None else steps,
        "upscaler_scale": model.defaults.scale if scale is None else scale,
    }


def _describe_guidance(sampling: Sampling, model: LatentDiffusion) -> Info:
    """Return the parameters of guidance methods and FreeU, or the name of a preset."""
    info: Info = {}
    if sampling.sld is not None:
        concept = sampling.sld_concept or "original"
        info["sld"] = sampling.sld if isinstance(sampling.sld, str) else list(sampling.sld)
        info["sld_concept"] = SLD_CONCEPTS.get(concept, concept)
    if sampling.apg is not None:
        info["apg"] = list(sampling.apg)
    if sampling.freeu is not None:
        info["freeu"] = list(astuple(find_factors(model, sampling.freeu)))
        info["freeu_version"] = sampling.freeu_version
    scales = {"perp_neg": sampling.perp_neg, "pag": sampling.pag}
    return info | {name: value for name, value in scales.items() if value is not None}


def describe_image(request: Request, batches: Sequence[Batch], number: int, row: int) -> Info:
    """Return the info of a single image: prompts, seed, and its place in the batch.

    Args:
        number: index of the batch.
        row: index of the image in the batch.
    """
    batch = batches[number]
    job = batch[row]
    info: Info = {
        "index": job.index,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "row": row,
        "rows": len(batch),
    }
    texts = {"prompt_2": job.prompt_2, "negative_prompt_2": job.negative_prompt_2}
    info |= {name: text for name, text in texts.items() if text is not None}
    if request.sampling.fixed_code:
        info["start_seed"] = job.start_seed
    if "noise" in request.sampling.legacy:
        # One generator draws for the whole run: earlier batches are needed to reach its state.
        info["seed"] = request.sampling.seed
        info["earlier"] = [len(batch) for batch in batches[:number]]
    return info


def describe_depth(depth: Image.Image) -> Info:
    """Return the info of an image's depth: its range, and a hash to compare with."""
    return {"depth_range": list(depth.getextrema()), "sha256_depth": fingerprint(depth)}


def read_job(info: JsonMapping) -> Job:
    """Return the job of an image from its info."""
    seed = info["seed"]
    start = info.get("start_seed", seed)
    second = info.get("prompt_2"), info.get("negative_prompt_2")
    return Job(info["index"], info["prompt"], info["negative_prompt"], seed, start, *second)


def watermark_method(request: Request, size: tuple[int, int], payload: str) -> str | None:
    """Return the watermark method for images of a size (height, width); None = no watermark."""
    if request.output.no_watermark or size[0] * size[1] < MIN_PIXELS:
        return None
    if payload == "SDXL" and "float-watermark" in request.sampling.legacy:
        return FLOAT_WATERMARK
    return "dwtDct" if "watermark" in request.sampling.legacy else "dwtDctSvd"


def watermark_payload(model: LatentDiffusion) -> str:
    """Return the name in PAYLOADS of the original scripts' watermark for a model's generation."""
    if is_sdxl(model):
        return "SDXL"
    text = model.conditioner.text
    return "StableDiffusionV1" if text is not None and text.generation == 1 else "SDV2"


def read_request(info: JsonMapping, where: str) -> Request:
    """Return the request of the run that made an image.

    Args:
        where: name of the image, for messages.
    Raises:
        ArgumentError: the info is not that of a single image made by this program.
    """
    if not info:
        raise ArgumentError(f"{where} contains no generation metadata")
    if info.get("task") == "grid":
        names = ", ".join(str(image.get("file")) for image in info.get("images", [])[:3])
        raise ArgumentError(f"{where} is a grid, replay its images: {names}, …")
    if info.get("unfinished"):
        raise ArgumentError(f"{where} is unfinished: it was stopped at step {info['unfinished']}")
    missing = [key for key in ("prompt", "seed", "rows", *ENVIRONMENT) if key not in info]
    task = TASKS.get(str(info.get("task")))
    if task is None or missing:
        what = f"`{missing[0]}` is missing" if missing else f"unknown task `{info.get('task')}`"
        raise ArgumentError(f"{where}: {what}: it was not written by this program")
    values = info.get("request") or _former_values(task, info)
    if not isinstance(values, Mapping):
        raise ArgumentError(f"{where}: the request in it is damaged")
    values = {**values, "eta": eta_of(values), **_input_paths(task, info)}
    if values.get("scale") is None:  # it was the default, which may have changed since
        values["scale"] = info.get("scale")
    options = task.options()
    return task.request({name: value for name, value in values.items() if name in options})


def line_values(info: JsonMapping) -> JsonObject:
    """Return the options that a line of the prompt file set for an image."""
    line: JsonObject = info.get("line") or {}
    return line


def eta_of(values: JsonMapping) -> float | None:
    """Return the eta in recorded values; None = the default of the sampler.

    Versions in which only DDIM had eta recorded 0 for all samplers.
    """
    eta: float | None = values.get("eta")
    return None if eta == 0 and "s_churn" not in values else eta


def check_inputs(info: JsonMapping) -> None:
    """Raise MissingFile or ArgumentError unless all input files exist and are unchanged."""
    for files in info.get("inputs", {}).values():
        for file in files:
            _check_unchanged(file, sha256_of_file, "sha256")


def locate_model(info: JsonMapping, request: Request, changes: JsonMapping) -> Request:
    """Return the request with current paths of the model's files, and the defaults of that time.

    Args:
        changes: options that replace the recorded ones.
    Raises:
        MissingFile, ArgumentError: a file is missing or has changed.
    """
    request = request.with_values(line_values(info))
    values: JsonObject = {"precision": PRECISIONS[info["dtype"]]}
    values |= recorded_defaults(info, request)
    values["device"] = _recorded_device(info["device"])
    if request.model.variant is None and "variant" in info:  # files may have been renamed
        values["variant"] = info["variant"]
    values |= {"safety_checker": None, "unsafe": None}  # the info contains the result
    for key, name in FILE_KEYS.items():
        if name in changes or name not in request.task.options():
            continue
        files = recorded_files(info, key)
        for file in files:
            _check_unchanged(file, short_hash, "hash", name)
        paths = [(file["path"], file["weight"]) if "weight" in file else file["path"]
                 for file in files]  # fmt: skip
        values[name] = _as_option(request.task, name, paths)
    if not {"ckpt", "config"} & changes.keys():
        values["ckpt"] = _find_checkpoint(info, request)
    return request.with_values({**values, **changes})


def recorded_defaults(info: JsonMapping, request: Request) -> JsonObject:
    """Return recorded values of options that were left at their defaults, which may have changed.

    Returns:
        value by option, of scale, steps and sampler.
    """
    sampling = vars(request.sampling)
    names = [name for name in ("scale", "steps", "sampler") if sampling[name] is None]
    return {name: info[name] for name in names}


def recorded_files(info: JsonMapping, key: str) -> list[JsonObject]:
    """Return the files recorded under a key of FILE_KEYS, as a list for one file, too."""
    files = info.get(key) or []
    return [files] if isinstance(files, dict) else files


def compare_infos(then: JsonMapping, now: JsonMapping) -> list[str]:
    """List differences that may explain another result: `torch: 2.10.0 then, 2.11.0 now`."""
    names = {"checkpoint_hash": "another checkpoint"}
    pairs = {names.get(key, key): (then[key], now[key]) for key in ENVIRONMENT}
    pairs |= {key: (_contents(then, key), _contents(now, key)) for key in FILE_KEYS}
    return [f"{key}: {old} then, {new} now" for key, (old, new) in pairs.items() if old != new]


def compare_results(
    info: JsonMapping, old: Image.Image, new: Image.Image, new_depth: Image.Image | None
) -> str | None:
    """Describe by how much a file differs from its reproduction.

    Args:
        info: of the file.
        old: content of the file, an image or a depth.
        new, new_depth: the reproduction; new_depth is None without depth.
    Returns:
        None if neither image nor depth differ.
    """
    if info.get("image") == "depth" and new_depth is not None:
        return compare_images(old, new_depth)
    difference = compare_images(old, new)
    if difference is None and new_depth is not None:
        is_same = fingerprint(new_depth) == info.get("sha256_depth")
        return None if is_same else "the depth differs, the colours do not"
    return difference


def compare_images(old: Image.Image, new: Image.Image) -> str | None:
    """Describe by how much two images differ; None = they are equal."""
    if old.size != new.size:
        return f"the size is {old.width}x{old.height} in the file and {new.width}x{new.height} now"
    is_depth = old.mode == new.mode == "I;16"
    images = (image if is_depth else image.convert("RGB") for image in (old, new))
    then, now = (np.asarray(image, np.int32) for image in images)
    difference = np.abs(then - now).reshape(*then.shape[:2], -1)
    if not difference.any():
        return None
    fraction = (difference.max(-1) > 0).mean()
    most, mean = difference.max(), difference.mean()
    white = 65535 if is_depth else 255
    return (
        f"{fraction:.2%} of the pixels differ, by {most} of {white} at most, {mean:.4f} on average"
    )


def _former_values(task: Task, info: JsonMapping) -> JsonObject:
    """Return values of options from an info without "request" (version 0.1)."""
    names = {**{name: name for name in task.options()}, **FORMER_KEYS}
    skipped = ("size", "device", "prompt", "negative_prompt")
    values = {
        name: info[key]
        for key, name in names.items()
        if key in info and key not in skipped and info[key] is not None
    }
    values["height"], values["width"] = info.get("fit", info["size"])
    values["n_samples"] = info.get("n_samples", info["rows"])
    values["n_iter"] = 1 + len(info.get("earlier", ()))
    values["no_watermark"] = info["watermark"] is None
    values["prompt"], values["negative_prompt"] = info["prompt"], info["negative_prompt"]
    return values


def _input_paths(task: Task, info: JsonMapping) -> dict[str, Value]:
    """Return the options that name input files, with the recorded absolute paths."""
    files = {name: info.get("inputs", {}).get(name) for name in options_of(task.inputs)}
    return {
        name: _as_option(task, name, [file["path"] for file in recorded])
        for name, recorded in files.items()
        if recorded
    }


def _as_option(task: Task, name: str, values: list[Value]) -> Value:
    return values if task.options()[name][0].is_list else next(iter(values), None)


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _contents(info: JsonMapping, key: str) -> list[str]:
    files = recorded_files(info, key)
    return [" ".join(str(file[k]) for k in ("hash", "weight") if k in file) for file in files]


def _check_unchanged(
    file: JsonMapping, hash_of: Callable[[str], str], key: str, option: str | None = None
) -> None:
    path = file["path"]
    hint = ": pass the path of that file" if option else ""
    if not Path(path).exists():
        raise MissingFile(f"made from `{path}`, which is missing{hint}", option)
    if hash_of(path) != file[key]:
        raise ArgumentError(f"`{path}` has changed since this image was made{hint}", option)


def _recorded_device(device: str) -> str | None:
    """Return the recorded kind of device if it is available, else None for the default."""
    try:
        return str(pick_device(device))
    except ValueError:
        return None


def _find_checkpoint(info: JsonMapping, request: Request) -> str | None:
    """Find the checkpoint at its recorded path, or by its name in `checkpoints`."""
    name = Path(info["checkpoint"]).name
    if request.uses_demo_model and name == Path(DEMO_CHECKPOINT).name:
        return None
    ckpt = request.model.ckpt
    # Never download a file only because an image names it.
    if ckpt is not None and (path := find_checkpoint(ckpt, fetch=False)).exists():
        return str(path)
    try:
        return str(find_file(Path("checkpoints") / name))
    except FileNotFoundError as error:
        message = f"made with {name} (hash {info['checkpoint_hash']}): pass its path"
        raise MissingFile(message, "ckpt") from error
