"""Server side of the app: available models and LoRAs, and runs of all users.

Paths in requests and in images are never used: models are looked up by name, uploads by hash, and
everything else is refused.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ldm.app.catalogue import CatalogueEntry, list_checkpoints, read_catalogue
from ldm.app.limits import Limits
from ldm.app.model_cache import ModelCache
from ldm.app.progress import Progress
from ldm.app.uploads import Uploads
from ldm.generate.load import is_small_model, load_model
from ldm.generate.options import options_of, parse_weighted_file
from ldm.generate.provenance import (
    FILE_KEYS,
    compare_images,
    compare_infos,
    describe_run,
    files_of_model,
    read_request,
)
from ldm.generate.request import ModelChoice, Request, Sampling
from ldm.generate.run import remake_image, run_request
from ldm.generate.tasks import PreparedTask, Task
from ldm.imaging.metadata import read_info
from ldm.imaging.output import OutputFolder
from ldm.imaging.reading import open_image
from ldm.loading.addons.embeddings import embedding_files, load_embeddings
from ldm.loading.files.checkpoint import file_hash
from ldm.loading.load import load
from ldm.loading.report import inspect_checkpoint
from ldm.model import LatentDiffusion
from ldm.runtime.device import memory_of, pick_device
from ldm.runtime.errors import ArgumentError, MissingFile
from ldm.runtime.types import JsonMapping

__all__ = ["Backend"]

MAX_LORA_WEIGHT = 10


class Backend:
    """Runs of all users, one at a time.

    Args:
        models: folder of checkpoints.
        outdir: folder for `samples`, `uploads` and `replays`.
        choice: device, precision, attention and embeddings of all runs.
        limits: limits of each run.
        memory: bytes for loaded models; None = half of the device's memory.
        loras: files that a run may add, and their default weights.
    Raises:
        MissingFile: a LoRA is missing.
        ArgumentError: two LoRAs have the same name, or a weight is too large.
    """

    def __init__(
        self,
        models: str | Path,
        outdir: str | Path,
        choice: ModelChoice,
        limits: Limits,
        memory: float | None = None,
        loras: Sequence[tuple[str, float]] = (),
    ) -> None:
        self.folder = Path(models)
        self.outdir = Path(outdir).resolve()
        self.choice = choice
        self.limits = limits
        self.memory = memory
        self.loras = _loras_by_name(loras)
        self.uploads = Uploads(self.outdir / "uploads")
        self._models: ModelCache | None = None

    @property
    def offered_loras(self) -> list[str]:
        """The LoRAs that a run may choose from, `NAME:WEIGHT`."""
        return [f"{name}:{weight:g}" for name, (_, weight) in self.loras.items()]

    def model_names(self, task: str | None = None) -> list[str]:
        """Return the models for a task; None = all checkpoint files of the folder."""
        if task is None:
            return [name for name, path in list_checkpoints(self.folder).items() if path.is_file()]
        models = read_catalogue(self.folder).models
        return [name for name, model in models.items() if task in model.tasks]

    def skipped_files(self) -> list[str]:
        """Return a line about each checkpoint of the folder that cannot be used."""
        return read_catalogue(self.folder).skipped

    def inspect(self, name: str | None) -> str:
        """Describe a checkpoint of the folder."""
        path = list_checkpoints(self.folder).get(name or "")
        if path is None or path.is_dir():
            return "choose a checkpoint"
        return "\n".join(inspect_checkpoint(path).lines())

    def make_request(self, task: Task, name: str | None, values: Mapping[str, object]) -> Request:
        """Build the request of a run.

        Args:
            name: name of the model.
            values: options by name; files are paths of uploads, LoRAs `NAME:WEIGHT`.
        Raises:
            ArgumentError: the model does not exist or cannot do the task, or a value is wrong.
        """
        entry = self._find_model(name, task.name)
        words = values.get("lora") or ()
        if not isinstance(words, Sequence):
            raise ArgumentError("lora is not a list", "lora")
        loras = self._find_loras(parse_weighted_file(str(word)) for word in words)
        request = task.request({key: value for key, value in values.items() if key != "lora"})
        if request.sampling.scale is None:
            scale = task.demo_scale if is_small_model(entry.path) else task.scale
            request = request.with_values({"scale": scale})
        return self._with_model(request, entry, loras)

    def generate(self, request: Request, progress: Progress) -> str:
        """Make and save images; return the final message."""
        self.limits.check(request)
        start = time.monotonic()
        load = partial(self._load, progress=progress)
        run_request(request, progress, load=load, without_folders=True)
        return f"finished in {time.monotonic() - start:.1f} s"

    def replay(self, path: str | Path, progress: Progress) -> str:
        """Make an image again; return how it differs from the file."""
        self.uploads.add(path)
        info = read_info(path)
        request = self._recorded_request(info, Path(path).name)
        self.limits.check(request)
        prepared = request.task.prepare(request)
        model = self._load(prepared, progress, threads=info["threads"])
        progress.begin(model, 1)
        image = remake_image(prepared, model, info, progress.on_step)
        new = OutputFolder(self.outdir / "replays").save_sample(image, info)
        progress.add_image(info | {"path": str(new)})
        with open_image(path) as old:
            difference = compare_images(old, image)
        if difference is None:
            return "identical"
        now = describe_run(request, model, prepared.output_size(model))
        return "; ".join([difference, *compare_infos(info, now)])

    def estimate_depth(self, request: Request, progress: Progress) -> str:
        """Estimate the depth of the input image; add it to the progress as a 16-bit PNG."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "depth.png")
            request = request.with_values({"save_depth": str(path)})
            prepared = request.task.prepare(request)
            prepared.begin(self._load(prepared, progress))
            progress.add_image({"task": "depth", "path": self.uploads.add(path)})
        return "depth estimated"

    def _find_model(self, name: str | None, task: str) -> CatalogueEntry:
        models = read_catalogue(self.folder).models
        if name not in models or task not in models[name].tasks:
            names = ", ".join(self.model_names(task)) or f"none, put one into {self.folder}"
            raise ArgumentError(f"no model `{name or ''}` for {task}; available: {names}", "ckpt")
        return models[name]

    def _find_recorded_model(self, info: JsonMapping, task: str) -> CatalogueEntry:
        """Find the model of an image by its file name; of several, the one with the same hash."""
        models = read_catalogue(self.folder).models
        names = [name for name in models if Path(name).name == info["checkpoint"]]
        if len(names) > 1:
            names.sort(key=lambda name: file_hash(models[name].path) != info["checkpoint_hash"])
        return self._find_model(next(iter(names), info["checkpoint"]), task)

    def _with_model(
        self, request: Request, entry: CatalogueEntry, loras: Sequence[tuple[str, float]]
    ) -> Request:
        choice = replace(
            self.choice,
            ckpt=str(entry.path),
            config=str(entry.config) if entry.config else None,
            lora=tuple(loras),
        )
        output = replace(request.output, outdir=str(self.outdir), skip_grid=True)
        return replace(request, model=choice, output=output)

    def _find_loras(self, choices: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
        """Turn LoRAs by name and weight into those by file and weight."""
        files: dict[str, float] = {}
        for name, weight in choices:
            if name not in self.loras:
                names = ", ".join(self.loras) or "none, start the app with --lora"
                raise ArgumentError(f"no LoRA `{name}`; available: {names}", "lora")
            _check_weight(name, weight)
            file = self.loras[name][0]
            if file in files:
                raise ArgumentError(f"the LoRA `{name}` was chosen twice", "lora")
            files[file] = weight
        return list(files.items())

    def _load(
        self, prepared: PreparedTask, progress: Progress, threads: int | None = None
    ) -> LatentDiffusion:
        request = prepared.request
        if self._models is None:
            memory = self.memory or memory_of(pick_device(request.model.device)) / 2
            self._models = ModelCache(memory, _load_with_fitting_embeddings)
        progress.set_message(f"loading {Path(request.model.ckpt or '').name}")
        threads = threads and min(threads, os.cpu_count() or 1)
        try:
            model = load_model(request, threads=threads, load=self._models)
        except ValueError as error:
            files = [file for file, _ in request.model.lora]
            raise ValueError(_without_folders(str(error), files)) from error
        for key in FILE_KEYS:
            for file in files_of_model(model.provenance, key):  # goes into images, which users see
                file["path"] = Path(file["path"]).name
        height, width = prepared.output_size(model)
        self.limits.check_output(width, height, request.task.enlarges)
        return model

    def _recorded_request(self, info: dict[str, Any], name: str) -> Request:
        """Return the request that made an image, with the server's own files."""
        recorded = read_request(info, name)
        if recorded.model.overrides or info["overrides"]:  # of any key
            raise ArgumentError("it was made with overrides: use `ldm replay`")
        entry = self._find_recorded_model(info, recorded.task.name)
        inputs = options_of(recorded.task.inputs)
        allowed = {name for name, (option, _) in inputs.items() if not option.is_path}
        allowed |= options_of(Sampling).keys() | {"no_watermark"}
        values = {key: value for key, value in recorded.values().items() if key in allowed}
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
        values["scale"] = info["scale"]
        request = recorded.task.request(values)
        names = {file: name for name, (file, _) in self.loras.items()}
        recorded_loras = info.get("loras", ())
        files = _find_files(recorded_loras, names, "--lora")
        weights = [float(lora.get("weight", 1.0)) for lora in recorded_loras]
        loras = self._find_loras(zip((names[file] for file in files), weights, strict=True))
        embeddings = _find_files(info.get("embeddings", ()), self._embedding_files(), "--embedding")
        request = self._with_model(request, entry, loras)
        return replace(request, model=replace(request.model, embedding=tuple(embeddings)))

    def _embedding_files(self) -> list[str]:
        return [str(file) for path in self.choice.embedding for file in embedding_files(path)]


def _load_with_fitting_embeddings(
    config: Any = None, ckpt: Any = None, *, embeddings: Iterable[str] = (), **options: Any
) -> LatentDiffusion:
    """Load a model, without the embeddings that are for models of another width."""
    model = load(config, ckpt, **options)
    for path in embeddings:
        load_embeddings(model, [path], strict=False)
    return model


def _loras_by_name(loras: Sequence[tuple[str, float]]) -> dict[str, tuple[str, float]]:
    """Return (file, weight) of each LoRA, by the name that users choose."""
    by_name = {Path(file).stem: (file, weight) for file, weight in loras}
    if len(by_name) < len(loras):
        raise ArgumentError("two LoRA files have the same name, by which they are chosen", "lora")
    for name, (file, weight) in by_name.items():
        if not Path(file).expanduser().is_file():
            raise MissingFile(f"no file `{file}`", "lora")
        _check_weight(name, weight)
    return by_name


def _check_weight(name: str, weight: float) -> None:
    if not abs(weight) <= MAX_LORA_WEIGHT:  # False for NaN, too
        allowed = f"-{MAX_LORA_WEIGHT} to {MAX_LORA_WEIGHT}"
        raise ArgumentError(
            f"the weight of LoRA `{name}` must be {allowed}, got {weight:g}", "lora"
        )


def _find_files(recorded: Any, files: Iterable[str], flag: str) -> list[str]:
    """Find those of `files` that have the hashes recorded in an image.

    Raises:
        ArgumentError: none has the hash.
    """
    if not all(isinstance(file, dict) and {"hash", "path"} <= file.keys() for file in recorded):
        raise ArgumentError(f"its entry for {flag} is damaged")
    by_hash = {file_hash(file): file for file in files} if recorded else {}
    for file in recorded:
        if file["hash"] not in by_hash:
            name = Path(file["path"]).name
            raise ArgumentError(f"made with `{name}`, which is not here: start the app with {flag}")
    return [by_hash[file["hash"]] for file in recorded]


def _without_folders(message: str, files: Iterable[str]) -> str:
    for file in files:
        message = message.replace(file, Path(file).name)
    return message
