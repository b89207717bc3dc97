"""Reproduce an image from its info, and compare it with the file.

info in the PNG -> read_request -> make_replay_request -> reproduce_image -> compare_results
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.generate.batch import generate_batch, set_up_task
from ldm.generate.info import COMPARED_KEYS, FILE_KEYS
from ldm.generate.load import Models
from ldm.generate.options import Value, get_options
from ldm.generate.output import add_watermark, to_8_bit_rgb
from ldm.generate.plan import Batch, ImageSpec
from ldm.generate.request import Request
from ldm.generate.safety import hide_flagged
from ldm.generate.tasks import TASKS, PreparedTask, Task
from ldm.imaging.metadata import hash_pixels
from ldm.imaging.rgbd import split_depth
from ldm.loading.files.checkpoint import compute_short_hash
from ldm.loading.load import DEMO_CHECKPOINT
from ldm.loading.published import resolve_checkpoint
from ldm.pipelines.sampling_options import Callback
from ldm.runtime.device import pick_device
from ldm.runtime.errors import ArgumentError, MissingFile
from ldm.runtime.files import find_file
from ldm.runtime.hashes import get_sha256
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "check_inputs", "compare_infos", "compare_results", "get_prompt_line_values",
    "get_recorded_defaults", "get_recorded_eta", "get_recorded_files", "make_replay_request",
    "read_request", "reproduce_image",
]  # fmt: skip

PRECISION_BY_DTYPE = {"float32": "full", "float16": "fp16", "bfloat16": "bf16"}
# Key of an info without "request" (version 0.1) -> option, where they differ.
V0_1_KEYS = {"grid": "scheduler", "tile": "vae_tile"}


def read_request(info: JsonMapping, where: str) -> Request:
    """Return the request of the run that made an image.

    Args:
        where: File of the image, for messages.
    Raises:
        ArgumentError: The info is not that of a single image made by this program.
    """
    if not info:
        raise ArgumentError(f"{where} contains no generation parameters")
    if info.get("task") == "grid":
        files = [str(image["file"]) for image in info.get("images", []) if image.get("file")]
        advice = f"replay its images: {', '.join(files[:3])}, …" if files else "of unsaved images"
        raise ArgumentError(f"{where} is a grid, {advice}")
    if info.get("unfinished"):
        raise ArgumentError(f"{where} is unfinished: it was stopped at step {info['unfinished']}")
    missing = [key for key in ("prompt", "seed", "rows", *COMPARED_KEYS) if key not in info]
    task = TASKS.get(str(info.get("task")))
    if task is None or missing:
        reason = f"`{missing[0]}` is missing" if missing else f"unknown task `{info.get('task')}`"
        raise ArgumentError(f"{where}: {reason}: it was not written by this program")
    values = info.get("request") or _read_values_of_v0_1(task, info)
    if not isinstance(values, Mapping):
        raise ArgumentError(f"{where}: the request in it is damaged")
    values = {**values, "eta": get_recorded_eta(values), **_get_input_paths(task, info)}
    # The default scale may have changed since; if the line set a scale, it is not that of the run.
    if values.get("scale") is None and "scale" not in get_prompt_line_values(info):
        values["scale"] = info.get("scale")
    options = task.options
    return task.build_request({name: value for name, value in values.items() if name in options})


def get_prompt_line_values(info: JsonMapping) -> JsonObject:
    """Return the options that a line of the prompt file set for an image."""
    line: JsonObject = info.get("line") or {}
    return line


def get_recorded_eta(values: JsonMapping) -> float | None:
    """Return the recorded eta; None = the default of the sampler.

    Older versions supported eta only for DDIM, and recorded 0 for all samplers.
    """
    eta: float | None = values.get("eta")
    return None if eta == 0 and "s_churn" not in values else eta


def _read_spec(info: JsonMapping) -> ImageSpec:
    """Return the spec of an image from its info."""
    return ImageSpec(
        info["index"],
        info["prompt"],
        info["negative_prompt"],
        seed=info["seed"],
        initial_noise_seed=info.get("start_seed", info["seed"]),
        prompt_2=info.get("prompt_2"),
        negative_prompt_2=info.get("negative_prompt_2"),
    )


def check_inputs(info: JsonMapping) -> None:
    """Raise MissingFile or ArgumentError unless all input files exist and are unchanged."""
    for files in info.get("inputs", {}).values():
        for file in files:
            _check_unchanged(file, get_sha256, "sha256")


def make_replay_request(info: JsonMapping, request: Request, changes: JsonMapping) -> Request:
    """Return the request to reproduce one image, with the options of its line and recorded files.

    The checkpoint may be another file of the same name, which `compare_infos` reports. As the image
    may be untrusted, no package that it names is imported, and no file that it names is written.

    Args:
        changes: Options that replace the recorded ones.
    Raises:
        MissingFile, ArgumentError: A file is missing, or one besides the checkpoint has changed; or
            packages are needed that `changes` do not allow.
    """
    request = request.with_values(get_prompt_line_values(info))
    if request.model.allow_module and "allow_module" not in changes:
        packages = ", ".join(f"`{package}`" for package in request.model.allow_module)
        message = f"made with classes of {packages}: allow it again if you trust the image"
        raise ArgumentError(message, "allow_module")
    values: JsonObject = {"precision": PRECISION_BY_DTYPE[info["dtype"]]}
    values |= get_recorded_defaults(info, request)
    values["device"] = _find_recorded_device(info["device"])
    if request.model.variant is None and "variant" in info:  # files may have been renamed
        values["variant"] = info["variant"]
    # `reproduce_image` repeats the recorded action of the safety checker.
    reset = {"safety_checker", "unsafe", "save_depth"} & request.task.options.keys()
    values |= dict.fromkeys(reset)
    for key, name in FILE_KEYS.items():
        if name in changes or name not in request.task.options:
            continue
        files = get_recorded_files(info, key)
        for file in files:
            _check_unchanged(file, compute_short_hash, "hash", name)
        paths = [(file["path"], file["weight"]) if "weight" in file else file["path"]
                 for file in files]  # fmt: skip
        values[name] = _unwrap_single(request.task, name, paths)
    if not {"ckpt", "config"} & changes.keys():
        values["ckpt"] = _find_recorded_checkpoint(info, request)
    return request.with_values({**values, **changes})


def reproduce_image(
    prepared: PreparedTask, models: Models, info: JsonMapping, callback: Callback | None = None
) -> tuple[Image.Image, Image.Image | None]:
    """Reproduce one image, in a batch of the same shape.

    Args:
        prepared: The task of the run, from the request of `make_replay_request`.
        info: Info of the image.
    Returns:
        (image, depth); depth is None for models without depth.
    """
    spec, request, model = _read_spec(info), prepared.request, models.base
    set_up_task(prepared, model)
    for batch_size in info.get("earlier", ()):  # batches that drew from the same generator
        generate_batch(prepared, Batch([spec] * batch_size), models, callback)
    # Only the number of the other images in its batch matters, for kernels and random numbers.
    images = generate_batch(prepared, Batch([spec] * info["rows"]), models, callback)
    tensor = images[info["row"] : info["row"] + 1]
    generated = to_8_bit_rgb(tensor, info, truncate="truncate" in request.sampling.legacy)[0]
    image, depth = hide_flagged(generated, next(iter(split_depth(tensor)), None), info)
    assert image is not None, "an image that was dropped has no file"
    protected = prepared.get_protected_pixels() if image is generated else None
    return add_watermark(image, info, protected), depth


def get_recorded_defaults(info: JsonMapping, request: Request) -> JsonObject:
    """Return the recorded ema, and scale, steps and sampler if they were not set.

    Their defaults may have changed since.
    """
    sampling = vars(request.sampling)
    names = [name for name in ("scale", "steps", "sampler") if sampling[name] is None]
    return {name: info[name] for name in ("ema", *names)}


def get_recorded_files(info: JsonMapping, key: str) -> list[JsonObject]:
    """Return the files recorded under a key of FILE_KEYS; a single file as a list, too."""
    files = info.get(key) or []
    return [files] if isinstance(files, dict) else files


def compare_infos(recorded: JsonMapping, current: JsonMapping) -> list[str]:
    """List differences that may explain another result: `torch: 2.10.0 then, 2.11.0 now`."""
    labels = {"checkpoint_hash": "checkpoint"}
    values = {labels.get(key, key): (recorded[key], current[key]) for key in COMPARED_KEYS}
    values |= {
        key: (_describe_files(recorded, key), _describe_files(current, key)) for key in FILE_KEYS
    }
    return [f"{label}: {old} then, {new} now" for label, (old, new) in values.items() if old != new]


def compare_results(
    info: JsonMapping, old: Image.Image, new: Image.Image, new_depth: Image.Image | None
) -> str | None:
    """Describe how much the file of an image, or of its depth, differs from the reproduced one.

    Args:
        old: Image or depth in the file.
    Returns:
        None if neither image nor depth differ.
    """
    if info.get("image") == "depth" and new_depth is not None:
        return _compare_images(old, new_depth)
    difference = _compare_images(old, new)
    if difference is None and new_depth is not None:
        is_same = hash_pixels(new_depth) == info.get("sha256_depth")
        return None if is_same else "the depth differs, the colors do not"
    return difference


def _compare_images(old: Image.Image, new: Image.Image) -> str | None:
    """Describe how much two images differ; None = not at all."""
    if old.size != new.size:
        return f"the size is {old.width}x{old.height} in the file and {new.width}x{new.height} now"
    is_depth = old.mode == new.mode == "I;16"
    images = (image if is_depth else image.convert("RGB") for image in (old, new))
    old_pixels, new_pixels = (np.asarray(image, np.int32) for image in images)
    difference = np.abs(old_pixels - new_pixels).reshape(*old_pixels.shape[:2], -1)
    if not difference.any():
        return None
    fraction = (difference.max(-1) > 0).mean()
    largest, mean = difference.max(), difference.mean()
    max_value = 65535 if is_depth else 255
    summary = f"{fraction:.2%} of the pixels differ"
    return f"{summary}, by {largest} of {max_value} at most, {mean:.4f} on average"


def _read_values_of_v0_1(task: Task, info: JsonMapping) -> JsonObject:
    """Return the values of options from an info without "request" (version 0.1)."""
    names = {**{name: name for name in task.options}, **V0_1_KEYS}
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


def _get_input_paths(task: Task, info: JsonMapping) -> dict[str, Value]:
    """Return the options that name input files, with the recorded absolute paths."""
    files = {name: info.get("inputs", {}).get(name) for name in get_options(task.inputs)}
    return {
        name: _unwrap_single(task, name, [file["path"] for file in recorded])
        for name, recorded in files.items()
        if recorded
    }


def _unwrap_single(task: Task, name: str, values: list[Value]) -> Value:
    """Return the values of a list option, else the only value; None if there is none."""
    return values if task.options[name].is_list else next(iter(values), None)


def _describe_files(info: JsonMapping, key: str) -> list[str]:
    return [
        " ".join(str(file[k]) for k in ("hash", "weight") if k in file) + " EMA" * ("ema" in file)
        for file in get_recorded_files(info, key)
    ]


def _check_unchanged(
    file: JsonMapping, compute_hash: Callable[[str], str], key: str, option: str | None = None
) -> None:
    path = file["path"]
    advice = ": pass the path of that file" if option else ""
    if not Path(path).exists():
        raise MissingFile(f"made from `{path}`, which is missing{advice}", option)
    if compute_hash(path) != file[key]:
        raise ArgumentError(f"`{path}` has changed since this image was made{advice}", option)


def _find_recorded_device(device: str) -> str | None:
    """Return the recorded device type if it is available, else None for the default."""
    try:
        return str(pick_device(device))
    except ValueError:
        return None


def _find_recorded_checkpoint(info: JsonMapping, request: Request) -> str | None:
    """Find the checkpoint at its recorded path, or by its name in `checkpoints`."""
    name = Path(info["checkpoint"]).name
    if request.uses_demo_model and name == Path(DEMO_CHECKPOINT).name:
        return None
    ckpt = request.model.ckpt
    # Never download a file only because an image names it.
    if ckpt is not None and (path := resolve_checkpoint(ckpt, download=False)).exists():
        return str(path)
    try:
        return str(find_file(Path("checkpoints") / name))
    except FileNotFoundError as error:
        message = f"made with {name} (hash {info['checkpoint_hash']}): pass its path"
        raise MissingFile(message, "ckpt") from error
