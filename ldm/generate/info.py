"""Make the info of images: their generation parameters, saved in PNGs and read by `replay`.

The info contains the request under "request", and what the run used: model, versions, hashes of all
files, batch size and index in the batch (kernels round differently for other shapes). Its keys are
listed in `imaging.metadata`.
"""

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.diffusion.names import SLD_CONCEPTS
from ldm.diffusion.step_noise import STEP_NOISE_OPTIONS
from ldm.generate.defaults import resolve_sampling
from ldm.generate.groups import SDXL, Sampling
from ldm.generate.load import Models, find_requested_checker
from ldm.generate.options import encode_option, get_options
from ldm.generate.plan import Batch
from ldm.generate.request import Request
from ldm.imaging.metadata import hash_pixels
from ldm.imaging.watermark import can_hold_watermark
from ldm.loading.files.checkpoint import compute_short_hash
from ldm.model import LatentDiffusion
from ldm.pipelines.families import is_sdxl
from ldm.pipelines.freeu import resolve_freeu_factors
from ldm.pipelines.latent_upscaling import LATENT_UPSCALE_FACTOR
from ldm.pipelines.sampling_options import get_default_scheduler
from ldm.pipelines.sdxl import REFINER_STRENGTH
from ldm.runtime.hashes import get_sha256
from ldm.runtime.types import JsonObject
from ldm.runtime.version import __version__

__all__ = [
    "COMPARED_KEYS", "FILE_KEYS", "FLOAT_WATERMARK", "INTEGER_WATERMARK", "Info",
    "choose_watermark_method", "get_dtype_name", "get_final_size", "make_depth_info",
    "make_image_info", "make_run_info",
]  # fmt: skip

Info = JsonObject  # the metadata of one image, or of all images of a run

FLOAT_WATERMARK = "dwtDct (floats)"  # embedded before pixels are rounded to integers
INTEGER_WATERMARK = "dwtDct"

# Keys of the info whose changes may explain why a reproduced image differs.
COMPARED_KEYS = (
    "checkpoint_hash", "ema", "config_hash", "overrides", "device", "dtype", "attention",
    "threads", "torch", "ldm",
)  # fmt: skip
FILE_KEYS = {  # key of the info -> option
    "loras": "lora", "embeddings": "embedding", "vae": "vae", "refiner": "refiner",
    "text_encoder": "text_encoder", "upscaler": "upscaler",
}  # fmt: skip


def make_run_info(
    request: Request, models: Models, size: tuple[int, int], without_folders: bool = False
) -> Info:
    """Return the info that images with the same options and LoRAs share.

    Args:
        size: (height, width) of the base model's images in pixels.
        without_folders: Record names of files instead of paths, except for input files, which
            `replay` must find. See also `Request.to_json`.
    """
    model, model_options = models.base, request.model
    sampling = resolve_sampling(request, model.defaults)
    assert sampling.sampler is not None
    checkpoint = model.provenance["checkpoint"]
    input_options, values = get_options(request.task.inputs), request.get_values()
    files = {
        name: encode_option(option, values[name])
        for name, option in input_options.items()
        if option.is_input_file
    }
    info = {
        "task": request.task.name,
        "sampler": sampling.sampler,
        "scheduler": sampling.scheduler,
        "scheduler_in_use": None
        if sampling.sigmas
        else sampling.scheduler
        or get_default_scheduler(model.schedule, model.defaults, sampling.sampler),
        "steps": sampling.steps,
        "scale": sampling.scale,
        "size": list(size),
        **{name: values[name] for name in input_options if name not in files},
        "inputs": {
            name: [
                {"path": str(Path(path).resolve()), "sha256": get_sha256(path)} for path in paths
            ]
            for name, paths in files.items()
        },
        **_make_optional_info(request, sampling, models),
        "tile": sampling.vae_tile,
        "tiling": sampling.tiling,
        "legacy": list(sampling.legacy),
        "syntax": request.prompts.syntax,
        "payload": choose_watermark_payload(model),
        "checkpoint": Path(checkpoint).name,
        "checkpoint_hash": compute_short_hash(checkpoint),
        "ema": model.provenance["ema"],
        "vae": model.provenance.get("vae"),
        "text_encoder": model.provenance.get("text_encoder"),
        "loras": model.provenance.get("loras", []),
        "embeddings": model.provenance.get("embeddings", []),
        "config": model_options.config,
        "config_hash": model.provenance["config_hash"],
        "overrides": list(model_options.overrides),
        "device": model.device.type,
        "dtype": get_dtype_name(model),
        "attention": model_options.attention,
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "torch": torch.__version__,
        "ldm": __version__,
        "request": request.to_json(without_folders),
    }
    info["watermark"] = choose_watermark_method(request, get_final_size(info), info["payload"])
    return _remove_folders(info) if without_folders else info


def _remove_folders(info: Info) -> Info:
    """Reduce the paths of recorded files to their names, except those of inputs."""

    def remove(value: Any) -> Any:
        if isinstance(value, list):
            return [remove(item) for item in value]
        if not isinstance(value, dict) or "path" not in value:
            return value
        return {**value, "path": Path(value["path"]).name}

    return {key: value if key == "inputs" else remove(value) for key, value in info.items()}


def get_final_size(info: Info) -> tuple[int, int]:
    """Return (height, width) of the saved images: "size", doubled by an x2 latent upscaler."""
    height, width = info["size"]
    factor = LATENT_UPSCALE_FACTOR if "upscaler" in info else 1
    return factor * height, factor * width


def get_dtype_name(model: LatentDiffusion) -> str:
    """Return the name of a model's data type, such as float16."""
    return str(model.dtype).removeprefix("torch.")


def _make_optional_info(request: Request, sampling: Sampling, models: Models) -> Info:
    """Return the keys that are only present for options that are set and additional models."""
    model, upscaler, values = models.base, models.upscaler, request.to_json()
    optional = ("rho", "sigmas", "sld", "apg", "perp_neg", "pag", *get_options(SDXL))
    info = {name: values.get(name) for name in optional}
    info |= {name: vars(sampling)[name] for name in STEP_NOISE_OPTIONS}
    if sampling.sld is not None:
        concept = sampling.sld_concept or "original"
        info["sld_concept"] = SLD_CONCEPTS.get(concept, concept)
    if sampling.freeu is not None:
        info["freeu"] = list(astuple(resolve_freeu_factors(model, sampling.freeu)))
        info["freeu_version"] = sampling.freeu_version
    if sampling.clip_skip > 1:
        info["clip_skip"] = sampling.clip_skip
    if variant := model.provenance.get("variant"):
        info["variant"] = variant["name"]
    if models.refiner is not None:
        provenance = models.refiner.provenance
        uses_ema = {"ema": True} if provenance["ema"] else {}
        info["refiner"] = _make_file_info(provenance["checkpoint"]) | uses_ema
        if info["refiner_strength"] is None and info["refiner_start"] is None:
            info["refiner_strength"] = REFINER_STRENGTH
    if upscaler is not None:
        steps, scale = request.upscaling.upscaler_steps, request.upscaling.upscaler_scale
        info["upscaler"] = _make_file_info(upscaler.provenance["checkpoint"])
        info["upscaler_steps"] = upscaler.defaults.steps if steps is None else steps
        info["upscaler_scale"] = upscaler.defaults.scale if scale is None else scale
    if (checker := find_requested_checker(request)) is not None:
        info["safety_checker"] = _make_file_info(checker)
    return {name: value for name, value in info.items() if value is not None}


def _make_file_info(file: str | Path) -> Info:
    path = Path(file).resolve()
    return {"path": str(path), "hash": compute_short_hash(path)}


def make_image_info(
    request: Request, batches: Sequence[Batch], batch_index: int, index_in_batch: int
) -> Info:
    """Return the info of a single image: its prompts, seed and index in the batch.

    Args:
        batch_index: Index of the batch in the run.
    """
    batch = batches[batch_index]
    spec = batch.images[index_in_batch]
    info: Info = {
        "index": spec.index,
        "prompt": spec.prompt,
        "negative_prompt": spec.negative_prompt,
        "seed": spec.seed,
        "row": index_in_batch,
        "rows": len(batch),
    }
    second_prompts = {"prompt_2": spec.prompt_2, "negative_prompt_2": spec.negative_prompt_2}
    info |= {name: prompt for name, prompt in second_prompts.items() if prompt is not None}
    if request.sampling.fixed_code:
        info["start_seed"] = spec.initial_noise_seed
    if "noise" in request.sampling.legacy:
        # All batches draw from one generator, so a replay must repeat the earlier ones.
        info["seed"] = request.sampling.seed
        info["earlier"] = [len(batch) for batch in batches[:batch_index]]
    return info


def make_depth_info(depth: Image.Image) -> Info:
    """Return the info of an image's depth: its range and a hash of its pixels."""
    return {"depth_range": list(depth.getextrema()), "sha256_depth": hash_pixels(depth)}


def choose_watermark_method(request: Request, size: tuple[int, int], payload: str) -> str | None:
    """Return the watermark method for images of this (height, width); None = no watermark."""
    if request.output.no_watermark or not can_hold_watermark(size[::-1]):
        return None
    if payload == "SDXL" and "float-watermark" in request.sampling.legacy:
        return FLOAT_WATERMARK
    return INTEGER_WATERMARK if "watermark" in request.sampling.legacy else "dwtDctSvd"


def choose_watermark_payload(model: LatentDiffusion) -> str:
    """Return the name in PAYLOADS of the text that the original scripts embed for a model."""
    if is_sdxl(model):
        return "SDXL"
    encoder = model.conditioner.text
    return "StableDiffusionV1" if encoder is not None and encoder.sd_version == 1 else "SDV2"
