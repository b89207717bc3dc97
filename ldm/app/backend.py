"""The server side of the page: lists models and LoRAs, and does the runs of all users.

For safety, paths in requests and in images are never used: models are looked up by name, uploads by
hash, and all other files are refused.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ldm.app.catalogue import (
    CatalogueEntry,
    check_lora,
    file_stats,
    list_addons,
    list_checkpoints,
    lora_fits,
    read_catalogue,
)
from ldm.app.form import STEPS
from ldm.app.jobs import GALLERY_LIMIT
from ldm.app.limits import Limits
from ldm.app.model_cache import ModelCache
from ldm.app.progress import Progress
from ldm.app.uploads import Uploads
from ldm.encoders.safety import SafetyChecker
from ldm.generate.groups import SDXL, ModelChoice, Sampling, UpscalerChoice
from ldm.generate.load import Models, load_models
from ldm.generate.lora_tags import find_loras, remove_tags
from ldm.generate.options import Value, options_of, parse_weighted_file
from ldm.generate.provenance import FILE_KEYS, Info, describe_run
from ldm.generate.replay import (
    compare_infos,
    compare_results,
    line_values,
    read_request,
    recorded_defaults,
    recorded_files,
    remake_image,
)
from ldm.generate.request import Request
from ldm.generate.run import run_request
from ldm.generate.tasks import PreparedTask, Task
from ldm.imaging.mesh import can_save_meshes, save_mesh
from ldm.imaging.metadata import read_info
from ldm.imaging.output import OutputFolder, depth_path
from ldm.imaging.reading import open_image
from ldm.loading.addons.embeddings import embedding_files, load_embeddings, read_embeddings
from ldm.loading.addons.lora import detect_few_steps
from ldm.loading.addons.lora_weights import LoRAWeight
from ldm.loading.addons.safety import COMPONENT, load_safety_checker
from ldm.loading.files.checkpoint import short_hash
from ldm.loading.load import load
from ldm.loading.report import inspect_checkpoint
from ldm.loading.tiny_autoencoder import is_for_xl, load_preview
from ldm.model import Defaults, LatentDiffusion
from ldm.pipelines.families import FAMILIES, is_sdxl
from ldm.pipelines.latent_upscaling import FACTOR
from ldm.pipelines.preview import fit_preview
from ldm.prompts.syntax import PLAIN, parse_prompt
from ldm.runtime.device import memory_of, pick_device
from ldm.runtime.errors import ArgumentError, MissingFile, unknown_name
from ldm.runtime.types import JsonMapping

__all__ = ["Backend"]

log = logging.getLogger(__name__)

MAX_LORA_WEIGHT = 10
# Files that a run may add to a model: option -> title.
ADDONS = {
    "vae": "VAE",
    "refiner": "refiner",
    "upscaler": "upscaler",
    COMPONENT: "safety checker",
}
ADDON_FAMILIES = {"refiner": "refiner", "upscaler": "latent-upscaling"}  # of models
WILDCARDS = "wildcards"  # subfolder of the models folder, in lower case


class Backend:
    """Lists files, and makes images; the models of all runs are cached.

    Args:
        models: folder of checkpoints.
        outdir: folder for `samples`, `uploads` and `replays`.
        choice: device, precision, attention and embeddings of all runs.
        limits: limits of each run.
        memory: bytes for loaded models; None = half of the device's memory.
        loras: LoRA files besides those in the folder, and their default weights.
        previews: files of TAESD for previews, besides those in the folder.
    Raises:
        MissingFile: the folder or a LoRA is missing.
        ArgumentError: two LoRAs have the same name, or a weight is too large.
    """

    def __init__(
        self,
        models: str | Path,
        outdir: str | Path,
        choice: ModelChoice,
        limits: Limits,
        memory: float | None = None,
        loras: Sequence[tuple[str, float | str]] = (),
        previews: Sequence[str] = (),
    ) -> None:
        list_checkpoints(models)  # raises for a missing folder
        self.folder = Path(models).expanduser()
        self.outdir = Path(outdir).resolve()
        self.choice = choice
        self.limits = limits
        self.memory = memory
        self._given_loras = _loras_by_name(loras)
        self._given_previews = _existing_files(previews, "preview")
        self.uploads = Uploads(self.outdir / "uploads")
        self._models: ModelCache | None = None

    @property
    def device(self) -> str:
        """Name of the device that models run on."""
        return str(pick_device(self.choice.device))

    @property
    def loras(self) -> dict[str, tuple[str, float | str]]:
        """(File, default weight) of each LoRA by its name: those of flags and in the folder."""
        files = list_addons(self.folder, "lora")
        return {name: (str(file), 1.0) for name, file in files.items()} | self._given_loras

    def _lora_files(self) -> dict[str, str]:
        return {name: file for name, (file, _) in self.loras.items()}

    def _wildcards(self) -> str | None:
        """Return the folder of wildcards, if there is one."""
        folders = (path for path in self.folder.iterdir() if path.name.lower() == WILDCARDS)
        return next((str(path) for path in folders if path.is_dir()), None)

    def fitting_loras(self, model: str | None) -> list[str]:
        """Return the names of the LoRAs that fit a model."""
        entry = read_catalogue(self.folder).models.get(model or "")
        if entry is None:
            return []
        return [name for name, (file, _) in self.loras.items() if lora_fits(file, entry)]

    def tokens(self) -> list[str]:
        """Return the tokens of all embeddings."""
        return sorted({token for tokens in self._embeddings() for token in tokens})

    def count_tokens(
        self, model: str | None, prompt: str, syntax: str = PLAIN, *, is_negative: bool = False
    ) -> tuple[int, int, str]:
        """Count the tokens of a prompt.

        Returns:
            (number of tokens, limit, text beyond the limit); the limit is 0 if it is unknown.
        """
        entry = read_catalogue(self.folder).models.get(model or "")
        if entry is None or entry.text_encoder is None:
            return 0, 0, ""
        text = entry.text_encoder
        text.added_embeddings = {
            token.lower(): vectors
            for tokens in self._embeddings()
            for token, towers in tokens.items()
            for vectors in towers
            if vectors.shape[1] == text.width
        }
        prompt = remove_tags(prompt)
        try:
            if syntax != PLAIN and text.context_length == text.length:
                parsed = parse_prompt(prompt, syntax, is_negative=is_negative)
                return *text.count_chunk_tokens(parsed), ""
        except ArgumentError:  # an invalid prompt; Generate reports the error
            return 0, 0, ""
        return text.count_tokens(prompt), text.length - 2, text.find_truncated_text(prompt)

    def make_preview(self, model: LatentDiffusion) -> Callable[[Tensor], Tensor]:
        """Return a function from a model's latents to previews: TAESD if available, else linear."""
        found = list_addons(self.folder, "preview").values() if self.folder.is_dir() else ()
        for path in (*self._given_previews, *found):
            if is_for_xl(path) == is_sdxl(model) and "encoder" not in path.stem:
                try:
                    return load_preview(path, model)
                except (ValueError, OSError) as error:
                    log.warning("no previews by `%s`: %s", path, error)
        return fit_preview(model)

    def addons(self, kind: str) -> dict[str, Path]:
        """Return files and folders that a run may add to a model, by name.

        Args:
            kind: a key of ADDONS.
        """
        if kind in ADDON_FAMILIES:
            models = read_catalogue(self.folder).models.items()
            family = ADDON_FAMILIES[kind]
            return {name: entry.path for name, entry in models if entry.family == family}
        if kind != COMPONENT:
            return list_addons(self.folder, kind)
        folders = {
            f"{name}/{COMPONENT}": path / COMPONENT
            for name, path in list_checkpoints(self.folder).items()
            if (path / COMPONENT).is_dir()
        }
        return list_addons(self.folder, COMPONENT) | folders

    def find_addon(self, kind: str, info: JsonMapping) -> str:
        """Return the name of an image's refiner or upscaler; "" = none, or not available here."""
        file = Path((info.get(kind) or {}).get("path", "")).name
        names = self.addons(kind)
        return next((name for name in names if file in (Path(name).name, Path(name).stem)), "")

    def model_names(self, task: str | None = None) -> list[str]:
        """Return the names of models for a task; None = of all that can be loaded."""
        models = read_catalogue(self.folder).models
        return [name for name, model in models.items() if task is None or task in model.tasks]

    def checkpoint_names(self) -> list[str]:
        """Return the names of all checkpoint files, including those that cannot be loaded."""
        return [name for name, path in list_checkpoints(self.folder).items() if path.is_file()]

    def find_loras(self, info: JsonMapping) -> list[tuple[str, float | str]]:
        """Return (name, weight) of each LoRA of an image; it may not be available here."""
        here = self.loras
        found = []
        for lora in info.get("loras") or ():
            recorded = Path(lora["path"])
            names = [
                name for name, (file, _) in here.items()
                if recorded.name in (Path(file).name, Path(file).stem)
            ]  # fmt: skip
            if len(names) > 1:
                names.sort(key=lambda name: short_hash(here[name][0]) != lora.get("hash"))
            found.append((next(iter(names), recorded.stem), lora.get("weight", 1.0)))
        return found

    def is_sdxl(self, name: str | None) -> bool:
        """Return whether a model is Stable Diffusion XL or its refiner."""
        entry = read_catalogue(self.folder).models.get(name or "")
        return entry is not None and entry.is_sdxl

    def defaults(
        self, task: Task, name: str | None, loras: Iterable[str] = (), prompt: str = ""
    ) -> dict[str, Value]:
        """Return the values of settings that suit a task, a model, and LoRAs.

        Args:
            loras: their names.
            prompt: may name others.
        """
        entry = read_catalogue(self.folder).models.get(name or "")
        height, width = (None, None) if entry is None else entry.size
        files = tuple(self.loras[lora] for lora in loras if lora in self.loras)
        with suppress(ArgumentError):  # Generate will say what is wrong with it
            files = find_loras(prompt, files, self._lora_files)
        found, unset = detect_few_steps(files), Defaults()
        defaults = unset if entry is None else entry.defaults
        if found is not None:
            defaults = found.defaults
        return {
            "scale": task.scale if defaults.scale == unset.scale else defaults.scale,
            "width": width,
            "height": height,
            "steps": STEPS if defaults.steps == unset.steps else defaults.steps,
            "sampler": defaults.sampler,
        }

    def explain_misfit(self, task: Task, name: str | None) -> str:
        """Return why a model does not support a task, and what to do; "" if it does."""
        entry = read_catalogue(self.folder).models.get(name or "")
        if entry is not None and task.name in entry.tasks:
            return ""
        kinds = " or ".join(FAMILIES[family].title for family in task.families)
        text = f"{task.title} needs {kinds}"
        if entry is not None and entry.family:
            text += f", `{name}` is {FAMILIES[entry.family].title}"
        elif name:
            text += f", there is no model `{name}`"
        if names := self.model_names(task.name):
            return f"{text}; available: {', '.join(names)}"
        return f"{text}; none is available: {_download_hint(task)}"

    def skipped_files(self) -> list[str]:
        """Return a line about each checkpoint in the folder that cannot be used."""
        return read_catalogue(self.folder).skipped

    def inspect(self, name: str | None) -> str:
        """Return the report about a checkpoint in the folder."""
        path = list_checkpoints(self.folder).get(name or "")
        if path is None or path.is_dir():
            return "choose a checkpoint"
        lines = "\n".join(inspect_checkpoint(path).lines())
        return _without_folders(lines, [str(path)])

    def make_request(self, task: Task, name: str | None, values: Mapping[str, object]) -> Request:
        """Build the request of a run.

        Args:
            name: name of the model.
            values: options by name; images are paths of uploads, LoRAs `NAME:WEIGHT`, and files of
                ADDONS names that the page lists.
        Raises:
            ArgumentError: the model does not exist or support the task, or a value is invalid.
        """
        entry = self._find_model(name, task)
        words = values.get("lora") or ()
        if not isinstance(words, Sequence):
            raise ArgumentError("lora is not a list", "lora")
        loras = self._find_loras(parse_weighted_file(str(word)) for word in words)
        addons = self._choose_addons(values)
        ignored = {"lora", "unsafe", *ADDONS}
        ignored |= options_of(UpscalerChoice if entry.is_sdxl else SDXL).keys()
        if "refiner" not in addons and entry.family != "refiner":
            ignored |= {"aesthetic_score", "negative_aesthetic_score"}
        unsafe = values.get("unsafe")
        values = {key: value for key, value in values.items() if key not in ignored}
        if "upscaler" in addons and not entry.is_sdxl:
            values["upscaler"] = addons["upscaler"]
        if values.get("scale") is None:
            values["scale"] = self.defaults(task, name)["scale"]
        request = self._with_model(task.request(values), entry, loras)
        if entry.is_sdxl:
            sdxl = replace(request.sdxl, refiner=addons.get("refiner"))
            request = replace(request, sdxl=sdxl)
        if COMPONENT in addons:
            request = request.with_values({COMPONENT: addons[COMPONENT], "unsafe": unsafe})
        if request.prompts.dynamic_prompts:
            prompts = replace(request.prompts, wildcards=self._wildcards())
            request = replace(request, prompts=prompts)
        return replace(request, model=replace(request.model, vae=addons.get("vae")))

    def generate(self, request: Request, progress: Progress) -> str:
        """Make and save images; return the final message for the user."""
        self.limits.check(request)
        progress.make_preview = self.make_preview
        start = time.monotonic()
        load = partial(self._load, progress=progress)
        run_request(request, progress, load=load, without_folders=True, list_loras=self._lora_files)
        count = len(progress.images)
        images = "1 image" if count == 1 else f"{count} images"
        return f"done: {images} in {time.monotonic() - start:.1f} s"

    def replay(self, path: str | Path, progress: Progress) -> str:
        """Make an image file again; return "identical", or how the result differs."""
        self.uploads.add(path)
        info = read_info(path)
        if info and "task" not in info:
            raise ArgumentError('made by another program: use "Send to" to copy its parameters')
        request = self._recorded_request(info, Path(path).name)
        self.limits.check(request)
        prepared = request.task.prepare(request)
        models = self._load(prepared, progress, threads=info["threads"])
        progress.make_preview = self.make_preview
        progress.begin(models.base, 1)
        image, depth = remake_image(prepared, models, info, progress.on_step)
        info.pop("image", None)
        new = OutputFolder(self.outdir / "replays").save_sample(image, info, depth)
        progress.add_image(info | {"path": str(new)})
        with open_image(path) as old:
            difference = compare_results(read_info(path), old, image, depth)
        if difference is None:
            return "identical"
        now = describe_run(request, models, prepared.output_size(models.base))
        return "; ".join([difference, *compare_infos(info, now)])

    def estimate_depth(self, request: Request, progress: Progress) -> str:
        """Estimate the depth of the input image; add it to the progress as a 16-bit PNG."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "depth.png")
            request = request.with_values({"save_depth": str(path)})
            prepared = request.task.prepare(request)
            prepared.begin(self._load(prepared, progress).base)
            progress.add_image({"task": "depth", "path": self.uploads.add(path)})
        return "depth estimated"

    def recent_images(self) -> list[Info]:
        """Return the infos of the newest images in the output folder, the newest run first."""
        files = (self.outdir / "samples").glob("[0-9]*.png")
        paths = sorted(path for path in files if path.stem.isdigit())[-GALLERY_LIMIT:]
        infos = [_read_own_info(path) for path in paths]
        runs = [list(run) for _, run in groupby(infos, key=lambda info: info.get("request"))]
        return [info for run in reversed(runs) for info in run if "seed" in info]

    def make_relief(self, info: JsonMapping) -> tuple[str, int] | None:
        """Save an image with depth as a 3D mesh; return its path and number of triangles.

        Returns:
            None for an image without depth, or if the package trimesh is not installed.
        """
        path, depth = Path(info["path"]), depth_path(info["path"])
        if info.get("image") == "depth" or not depth.is_file() or not can_save_meshes():
            return None
        folder = self.outdir / "served"
        folder.mkdir(exist_ok=True)
        target = folder / f"{path.stem}-{secrets.token_hex(4)}.glb"
        with open_image(path) as image, open_image(depth) as levels:
            return str(target), save_mesh(target, image, levels)

    def _find_model(self, name: str | None, task: Task) -> CatalogueEntry:
        if misfit := self.explain_misfit(task, name):
            raise ArgumentError(misfit, "ckpt")
        return read_catalogue(self.folder).models[name or ""]

    def _choose_addons(self, values: Mapping[str, object]) -> dict[str, str]:
        """Return the paths of the add-ons that are chosen by name, by option.

        A name comes from a browser: it is looked up in a list, never used as a path.

        Raises:
            UnknownName: no add-on has this name.
        """
        paths = {}
        for kind, title in ADDONS.items():
            if name := values.get(kind):
                files = self.addons(kind)
                if name not in files:
                    raise unknown_name(title, name, files, argument=kind)
                paths[kind] = str(files[str(name)])
        return paths

    def _find_recorded_addon(self, kind: str, info: JsonMapping, place: str) -> str | None:
        """Return the file, by its hash, of an add-on that made an image; None if it had none.

        Args:
            place: where the file is expected, for the message.
        """
        files = map(str, self.addons(kind).values())
        return next(iter(_find_files(recorded_files(info, kind), files, place)), None)

    def _find_recorded_model(self, info: JsonMapping, task: Task) -> CatalogueEntry:
        """Find the model of an image by file name; among several by hash."""
        models = read_catalogue(self.folder).models
        names = [name for name in models if Path(name).name == info["checkpoint"]]
        if len(names) > 1:
            names.sort(key=lambda name: short_hash(models[name].path) != info["checkpoint_hash"])
        return self._find_model(next(iter(names), info["checkpoint"]), task)

    def _with_model(
        self, request: Request, entry: CatalogueEntry, loras: Sequence[tuple[str, float | str]]
    ) -> Request:
        choice = replace(
            self.choice,
            ckpt=str(entry.path),
            config=str(entry.config) if entry.config else None,
            lora=tuple(loras),
            embedding=tuple(self._embedding_files()),
        )
        output = replace(request.output, outdir=str(self.outdir), skip_grid=True)
        return replace(request, model=choice, output=output)

    def _find_loras(
        self, choices: Iterable[tuple[str, float | str]]
    ) -> list[tuple[str, float | str]]:
        """Convert (name, weight) of LoRAs to (file, weight).

        Raises:
            ArgumentError: a LoRA is unknown or chosen twice, or its weight is too large.
        """
        files: dict[str, float | str] = {}
        for name, weight in choices:
            if name not in self.loras:
                names = ", ".join(self.loras) or f"none, put them into {self.folder}/loras"
                raise ArgumentError(f"no LoRA `{name}`; available: {names}", "lora")
            _check_weight(name, weight)
            file = self.loras[name][0]
            if file in files:
                raise ArgumentError(f"the LoRA `{name}` was chosen twice", "lora")
            files[file] = weight
        return list(files.items())

    def _load(
        self, prepared: PreparedTask, progress: Progress, threads: int | None = None
    ) -> Models:
        request = prepared.request
        if self._models is None:
            memory = self.memory or memory_of(pick_device(request.model.device)) / 2
            self._models = ModelCache(memory, _load_with_fitting_embeddings)
        progress.set_message(f"loading {Path(request.model.ckpt or '').name}")
        # As the image records, for the same rounding; but it may record any number.
        threads = threads and min(threads, os.cpu_count() or 1)
        try:
            for lora, _ in request.model.lora:
                check_lora(lora, Path(request.model.ckpt or ""))
            models = load_models(
                request, threads=threads, load=self._models, load_checker=_load_checker
            )
        except ValueError as error:
            files = [file for file, _ in request.model.lora]
            raise ValueError(_without_folders(str(error), files)) from error
        for key in FILE_KEYS:
            for file in recorded_files(models.base.provenance, key):
                file["path"] = Path(file["path"]).name  # as it is saved in images
        height, width = prepared.output_size(models.base)
        factor = 1 if models.upscaler is None else FACTOR
        is_upscaled = request.task.enlarges or factor > 1
        self.limits.check_output(factor * width, factor * height, is_upscaled)
        return models

    def _recorded_request(self, info: dict[str, Any], name: str) -> Request:
        """Return the request that made an image, with the server's own files."""
        recorded = read_request(info, name).with_values(line_values(info))
        if recorded.model.overrides or info["overrides"]:
            raise ArgumentError("it was made with overrides: use `ldm replay`")
        entry = self._find_recorded_model(info, recorded.task)
        inputs = options_of(recorded.task.inputs)
        allowed = {name for name, (option, _) in inputs.items() if not option.is_path}
        allowed |= options_of(Sampling).keys() | options_of(SDXL).keys() | {"no_watermark"}
        allowed |= options_of(UpscalerChoice).keys()
        allowed -= {"refiner", "upscaler"}
        values = {key: value for key, value in recorded.get_values().items() if key in allowed}
        for key, files in info.get("inputs", {}).items():
            paths = [str(self.uploads.find(file["sha256"])) for file in files]
            option, _ = inputs.get(key, (None, None))
            if paths and not (option and option.is_input_file and option.label):
                raise ArgumentError(f"it was made with a file as `{key}`: use `ldm replay`")
            if paths and option:
                values[key] = paths if option.is_list else paths[0]
        values |= {"prompt": info["prompt"], "negative_prompt": info["negative_prompt"]}
        earlier = info.get("earlier", ())
        values |= {"n_samples": max([info["rows"], *earlier]), "n_iter": 1 + len(earlier)}
        values |= recorded_defaults(info, recorded)
        if "upscaling" in recorded.task.groups():
            values["upscaler"] = self._find_recorded_addon("upscaler", info, "a file in its folder")
        request = recorded.task.request(values)
        names = {file: name for name, (file, _) in self.loras.items()}
        recorded_loras = info.get("loras", ())
        files = _find_files(recorded_loras, names, "--lora")
        weights = [lora.get("weight", 1.0) for lora in recorded_loras]
        loras = self._find_loras(zip((names[file] for file in files), weights, strict=True))
        embeddings = _find_files(info.get("embeddings", ()), self._embedding_files(), "--embedding")
        vae = self._find_recorded_addon("vae", info, "a file in the folder vae")
        refiner = self._find_recorded_addon("refiner", info, "a file in its folder")
        request = self._with_model(request, entry, loras)
        choice = replace(request.model, embedding=tuple(embeddings), vae=vae)
        sdxl = replace(request.sdxl, refiner=refiner)
        return replace(request, model=choice, sdxl=sdxl)

    def _embeddings(self) -> list[Mapping[str, list[Tensor]]]:
        return [_read_embeddings(file, file_stats(file)) for file in self._embedding_files()]

    def _embedding_files(self) -> list[str]:
        files = [str(file) for path in self.choice.embedding for file in embedding_files(path)]
        return files + [str(file) for file in list_addons(self.folder, "embedding").values()]


@lru_cache(maxsize=1)
def _load_checker(path: Path, *, device: torch.device) -> SafetyChecker:
    """Load a safety checker and keep it for the next run."""
    return load_safety_checker(path, device=device)


def _read_own_info(path: Path) -> Info:
    try:
        return read_info(path) | {"path": str(path)}
    except OSError:  # deleted in between
        return {}


@lru_cache(maxsize=1024)
def _read_embeddings(file: str, states: object) -> Mapping[str, list[Tensor]]:
    try:
        return read_embeddings(file)
    except (OSError, ValueError):
        return {}


def _download_hint(task: Task) -> str:
    name = task.example_flags.split()[1]
    return f"`ldm download {name}` gets one" if "." not in name else f"see {task.example_flags}"


def _load_with_fitting_embeddings(
    config: Any = None, ckpt: Any = None, *, embeddings: Iterable[str] = (), **options: Any
) -> LatentDiffusion:
    """Load a model with those embeddings that fit its text encoders."""
    model = load(config, ckpt, **options)
    load_embeddings(model, embeddings, strict=False)
    return model


def _loras_by_name(loras: Sequence[tuple[str, float | str]]) -> dict[str, tuple[str, float | str]]:
    """Return (file, weight) of each LoRA by its stem, the name on the page."""
    by_name = {Path(file).stem: (file, weight) for file, weight in loras}
    if len(by_name) < len(loras):
        raise ArgumentError("two LoRA files have the same name: rename one", "lora")
    for name, (file, weight) in by_name.items():
        if not Path(file).expanduser().is_file():
            raise MissingFile(f"no file `{file}`", "lora")
        _check_weight(name, weight)
    return by_name


def _existing_files(files: Iterable[str], option: str) -> list[Path]:
    paths = [Path(file).expanduser() for file in files]
    for path in paths:
        if not path.exists():
            raise MissingFile(f"no file `{path}`", option)
    return paths


def _check_weight(name: str, value: float | str) -> None:
    weight = LoRAWeight.parse(value)
    if not max(abs(weight.text), abs(weight.unet)) <= MAX_LORA_WEIGHT:  # False for NaN, too
        allowed = f"-{MAX_LORA_WEIGHT} to {MAX_LORA_WEIGHT}"
        raise ArgumentError(f"the weight of LoRA `{name}` must be {allowed}, got {value}", "lora")


def _find_files(recorded: Any, files: Iterable[str], flag: str) -> list[str]:
    """Return the files with the hashes recorded in an image.

    Args:
        recorded: entries with `path` and `hash`.
        flag: flag of the app for such files, for the message.
    Raises:
        ArgumentError: no file has a hash.
    """
    if not all(isinstance(file, dict) and {"hash", "path"} <= file.keys() for file in recorded):
        raise ArgumentError(f"its entry for {flag} is damaged")
    by_hash = {short_hash(file): file for file in files} if recorded else {}
    for file in recorded:
        if file["hash"] not in by_hash:
            name = Path(file["path"]).name
            raise ArgumentError(f"made with `{name}`, which is not here: start the app with {flag}")
    return [by_hash[file["hash"]] for file in recorded]


def _without_folders(message: str, files: Iterable[str]) -> str:
    for file in files:
        message = message.replace(file, Path(file).name)
    return message
