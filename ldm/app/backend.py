"""Make the images of all visitors of the page.

For safety, paths in requests and images are never used: models are looked up by name, uploads by
hash, and all other files are refused.
"""

import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ldm.app.catalog import CatalogEntry, check_lora
from ldm.app.jobs import MAX_GALLERY_IMAGES
from ldm.app.library import ADDONS, Library, remove_folders
from ldm.app.limits import Limits
from ldm.app.model_cache import ModelCache
from ldm.app.progress import Progress
from ldm.app.uploads import Uploads
from ldm.encoders.safety import SafetyChecker
from ldm.generate.groups import SDXL, ModelOptions, Sampling, UpscalerOptions
from ldm.generate.info import Info, make_run_info
from ldm.generate.load import Models, load_models
from ldm.generate.option_parsers import parse_lora
from ldm.generate.options import Value, get_options
from ldm.generate.replay import (
    compare_infos,
    compare_results,
    get_prompt_line_values,
    get_recorded_defaults,
    get_recorded_files,
    read_request,
    reproduce_image,
)
from ldm.generate.request import Request
from ldm.generate.run import run_request
from ldm.generate.tasks import PreparedTask, Task
from ldm.generate.tasks.depth2img import Depth2ImgTask
from ldm.imaging.mesh import can_save_meshes, save_mesh
from ldm.imaging.metadata import read_info
from ldm.imaging.output import OutputFolder, get_depth_path
from ldm.imaging.reading import open_image
from ldm.loading.addons.embeddings import load_embeddings
from ldm.loading.addons.lora import set_loras
from ldm.loading.addons.safety import SAFETY_CHECKER, load_safety_checker
from ldm.loading.files.checkpoint import compute_short_hash
from ldm.loading.load import load
from ldm.model import LatentDiffusion
from ldm.pipelines.latent_upscaling import LATENT_UPSCALE_FACTOR
from ldm.runtime.device import get_total_memory, pick_device
from ldm.runtime.errors import ArgumentError
from ldm.runtime.types import JsonMapping

__all__ = ["Backend"]

log = logging.getLogger(__name__)


class Backend:
    """Makes the images of the page; loaded models are cached.

    Args:
        library: The files that runs may use.
        outdir: Folder for `samples`, `uploads`, `replays`, and `served`: files for browsers.
        model_options: Device, precision and attention of all runs.
        limits: Limits of each run.
        max_model_bytes: Maximum size of all cached models; None = half of the device's memory.
    """

    def __init__(
        self,
        library: Library,
        outdir: str | Path,
        model_options: ModelOptions,
        limits: Limits,
        max_model_bytes: float | None = None,
    ) -> None:
        self.library = library
        self.outdir = Path(outdir).resolve()
        self.model_options = model_options
        self.limits = limits
        self.max_model_bytes = max_model_bytes
        self.uploads = Uploads(self.outdir / "uploads")
        self._model_cache: ModelCache | None = None

    @property
    def device(self) -> str:
        """Name of the device that models run on."""
        return str(pick_device(self.model_options.device))

    def build_request(
        self, task: Task, model_name: str | None, values: Mapping[str, object]
    ) -> Request:
        """Build the request of a run.

        Args:
            values: Values of options by name: images are paths of uploads, LoRAs `NAME:WEIGHT`, and
                add-ons names in the page's lists.
        Raises:
            ArgumentError: The model does not exist or support the task, or a value is invalid.
        """
        entry = self.library.find_model(model_name, task)
        lora_texts = values.get("lora") or ()
        if not isinstance(lora_texts, Sequence):
            raise ArgumentError("lora is not a list", "lora")
        loras = self.library.find_lora_files(parse_lora(str(text)) for text in lora_texts)
        addons = self.library.find_addon_files(values)
        ignored = {"lora", *get_options(UpscalerOptions if entry.is_sdxl else SDXL)}
        if SAFETY_CHECKER not in addons:
            ignored.add("unsafe")
        if "refiner" not in addons and entry.family != "refiner":
            ignored |= {"aesthetic_score", "negative_aesthetic_score"}
        values = {key: value for key, value in values.items() if key not in ADDONS} | addons
        values = {key: value for key, value in values.items() if key not in ignored}
        if values.get("dynamic_prompts"):
            values["wildcards"] = self.library.find_wildcard_folder()
        embeddings = self.library.list_embedding_paths()
        return self._set_model_files(task.build_request(values), entry, loras, embeddings)

    def generate(self, request: Request, progress: Progress) -> str:
        """Make and save images; return the final message for the user."""
        self.limits.check(request)
        progress.make_previewer = self.library.make_previewer
        start_time = time.monotonic()
        run_request(
            request,
            progress,
            load=partial(self._load_models, progress=progress),
            without_folders=True,
            list_loras=self.library.list_lora_files,
        )
        num_images = len(progress.infos)
        images = "1 image" if num_images == 1 else f"{num_images} images"
        return f"done: {images} in {time.monotonic() - start_time:.1f} s"

    def replay(self, path: str | Path, progress: Progress) -> str:
        """Reproduce an image file; return "identical", or how the result differs."""
        self.uploads.add(path)
        info = read_info(path)
        if info and "task" not in info:
            raise ArgumentError('made by another program: use "Send to" to copy its parameters')
        request = self._build_recorded_request(info, Path(path).name)
        self.limits.check(request)
        prepared = request.task.prepare(request)
        models = self._load_models(request, prepared, progress, threads=info["threads"])
        progress.make_previewer = self.library.make_previewer
        progress.on_start(models.base, 1)
        image, depth = reproduce_image(prepared, models, info, progress.on_step)
        info.pop("image", None)
        new_path = OutputFolder(self.outdir / "replays").save_sample(image, info, depth)
        progress.add_image(info | {"path": str(new_path)})
        with open_image(path) as original:
            difference = compare_results(read_info(path), original, image, depth)
        if difference is None:
            return "identical"
        new_info = make_run_info(request, models, prepared.get_output_size(models.base))
        return "; ".join([difference, *compare_infos(info, new_info)])

    def estimate_depth(self, request: Request, progress: Progress) -> str:
        """Estimate the depth of the input image; add it to the progress as a 16-bit PNG."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "depth.png")
            request = request.with_values({"save_depth": str(path)})
            prepared = request.task.prepare(request)
            assert isinstance(prepared, Depth2ImgTask)
            prepared.estimate_depth(self._load_models(request, prepared, progress).base)
            progress.add_image({"task": "depth", "path": self.uploads.add(path)})
        return "depth estimated"

    def list_recent_infos(self) -> list[Info]:
        """Return the infos of the newest images in the output folder, of the newest run first."""
        files = (self.outdir / "samples").glob("[0-9]*.png")
        paths = sorted((path for path in files if path.stem.isdecimal()), key=lambda p: int(p.stem))
        infos = [_read_info_with_path(path) for path in paths[-MAX_GALLERY_IMAGES:]]
        runs = [list(run) for _, run in groupby(infos, key=lambda info: info.get("request"))]
        return [info for run in reversed(runs) for info in run if "seed" in info]

    def save_relief(self, info: JsonMapping) -> tuple[str, int] | None:
        """Save an image with depth as a 3D mesh; return its path and number of triangles.

        Returns:
            None if the image has no depth, or the package trimesh is not installed.
        """
        path, depth_path = Path(info["path"]), get_depth_path(info["path"])
        if info.get("image") == "depth" or not depth_path.is_file() or not can_save_meshes():
            return None
        folder = self.outdir / "served"
        folder.mkdir(exist_ok=True)
        target = folder / f"{path.stem}-{secrets.token_hex(4)}.glb"
        with open_image(path) as image, open_image(depth_path) as depth:
            return str(target), save_mesh(target, image, depth)

    def _find_recorded_addon(self, addon_type: str, info: JsonMapping) -> str | None:
        """Find the file of an image's add-on by its hash; None if it was made without one."""
        recorded, title = get_recorded_files(info, addon_type), ADDONS[addon_type]
        files = map(str, self.library.list_addons(addon_type).values())
        folder = "vae" if addon_type == "vae" else ""
        return next(iter(_find_by_hashes(recorded, files, title, folder)), None)

    def _set_model_files(
        self,
        request: Request,
        entry: CatalogEntry,
        loras: Sequence[tuple[str, float | str]],
        embeddings: Sequence[str],
    ) -> Request:
        model = replace(
            self.model_options,
            ckpt=str(entry.path),
            config=str(entry.config) if entry.config else None,
            lora=tuple(loras),
            embedding=tuple(embeddings),
            vae=request.model.vae,
            ema=request.model.ema,
        )
        output = replace(request.output, outdir=str(self.outdir), skip_grid=True)
        return replace(request, model=model, output=output)

    def _load_models(
        self,
        request: Request,
        prepared: PreparedTask,
        progress: Progress,
        threads: int | None = None,
    ) -> Models:
        if self._model_cache is None:
            default = get_total_memory(pick_device(request.model.device)) / 2
            max_bytes = self.max_model_bytes or default
            self._model_cache = ModelCache(max_bytes, _load_with_compatible_embeddings)
        progress.set_message(f"loading {Path(request.model.ckpt or '').name}")
        # The recorded number gives the same rounding, but an image may record any number.
        threads = threads and min(threads, os.cpu_count() or 1)
        try:
            for lora, _ in request.model.lora:
                check_lora(lora, Path(request.model.ckpt or ""))
            models = load_models(
                request, threads=threads, load=self._model_cache, load_checker=_load_safety_checker
            )
        except ValueError as error:
            files = [file for file, _ in request.model.lora]
            raise ValueError(remove_folders(str(error), files)) from error
        if request.model.lora and (models.refiner or models.upscaler):
            # Loading the second model from the cache removed them from the base.
            set_loras(models.base, request.model.lora)
        height, width = prepared.get_output_size(models.base)
        factor = 1 if models.upscaler is None else LATENT_UPSCALE_FACTOR
        is_upscaled = request.task.upscales or factor > 1
        self.limits.check_output(factor * width, factor * height, is_upscaled)
        return models

    def _build_recorded_request(self, info: dict[str, Any], name: str) -> Request:
        """Build the request that made an image, with the server's own files.

        Args:
            name: Name of the image file, for messages.
        """
        recorded = read_request(info, name).with_values(get_prompt_line_values(info))
        if recorded.model.overrides or info["overrides"]:
            raise ArgumentError("the image was made with overrides: use `ldm replay`")
        entry = self.library.find_recorded_model(info, recorded.task)
        request = recorded.task.build_request(self._find_recorded_values(info, recorded))
        names = {file: name for name, (file, _) in self.library.loras.items()}
        recorded_loras = info.get("loras", ())
        files = _find_by_hashes(recorded_loras, names, "LoRA", "loras")
        weights = [lora.get("weight", 1.0) for lora in recorded_loras]
        loras = self.library.find_lora_files(
            zip((names[file] for file in files), weights, strict=True)
        )
        embeddings = _find_by_hashes(
            info.get("embeddings", ()),
            self.library.list_embedding_paths(),
            "embedding",
            "embeddings",
        )
        return self._set_model_files(request, entry, loras, embeddings)

    def _find_recorded_values(self, info: dict[str, Any], recorded: Request) -> dict[str, Value]:
        """Return the recorded options that a visitor may set, with the server's own files."""
        input_options = get_options(recorded.task.inputs)
        allowed = {name for name, option in input_options.items() if not option.is_path}
        allowed |= get_options(Sampling).keys() | get_options(SDXL).keys()
        allowed |= get_options(UpscalerOptions).keys() | {"no_watermark", "syntax"}
        values = {key: value for key, value in recorded.get_values().items() if key in allowed}
        for key, files in info.get("inputs", {}).items():
            paths = [str(self.uploads.find(file["sha256"])) for file in files]
            option = input_options.get(key)
            if paths and not (option and option.is_input_file and option.label):
                raise ArgumentError(f"the image was made with a file as `{key}`: use `ldm replay`")
            if paths and option:
                values[key] = paths if option.is_list else paths[0]
        values |= {"prompt": info["prompt"], "negative_prompt": info["negative_prompt"]}
        batch_sizes = [*info.get("earlier", ()), info["rows"]]  # of the image's run up to its batch
        values |= {"n_samples": max(batch_sizes), "n_iter": len(batch_sizes)}
        values |= get_recorded_defaults(info, recorded)
        for addon_type in ("vae", "refiner", "upscaler"):
            if addon_type in recorded.task.options:
                values[addon_type] = self._find_recorded_addon(addon_type, info)
        return values


@lru_cache(maxsize=1)
def _load_safety_checker(path: Path, *, device: torch.device) -> SafetyChecker:
    """Load a safety checker and keep it for the next run."""
    return load_safety_checker(path, device=device)


def _read_info_with_path(path: Path) -> Info:
    try:
        return read_info(path) | {"path": str(path)}
    except OSError:  # deleted in the meantime
        return {}


def _load_with_compatible_embeddings(
    config: Any = None, ckpt: Any = None, *, embeddings: Iterable[str] = (), **options: Any
) -> LatentDiffusion:
    """Load a model with the embeddings that fit its text encoders."""
    model = load(config, ckpt, **options)
    load_embeddings(model, embeddings, strict=False)
    return model


def _find_by_hashes(recorded: Any, files: Iterable[str], title: str, folder: str) -> list[str]:
    """Return the files with the hashes recorded in an image.

    Args:
        title: What the files are, for messages.
        folder: Where they belong in the models folder, for messages; "" = anywhere.
    """
    if not all(isinstance(file, dict) and {"hash", "path"} <= file.keys() for file in recorded):
        raise ArgumentError(f"the image's record of its {title} is damaged")
    by_hash = {compute_short_hash(file): file for file in files} if recorded else {}
    for file in recorded:
        if file["hash"] not in by_hash:
            place = f"the folder `{folder}` in the models folder" if folder else "the models folder"
            raise ArgumentError(
                f"the image was made with the {title} `{Path(file['path']).name}`, "
                f"which is not here: put it into {place}"
            )
    return [by_hash[file["hash"]] for file in recorded]
