"""Server side of the app: which models and LoRAs there are, and runs for many users.

What a request or an image says about files is never followed: models are looked up by name,
uploads by hash, everything else is refused.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ldm.app.limits import Limits
from ldm.app.progress import Progress
from ldm.app.uploads import Uploads
from ldm.generate.load import SMALL_MODEL, load_model
from ldm.generate.options import options_of, parse_weighted_file
from ldm.generate.plan import plan_batches
from ldm.generate.provenance import FILES, compare_images, compare_infos, describe_run, read_request
from ldm.generate.request import ModelChoice, Request, Sampling
from ldm.generate.run import generate_batches, remake_image
from ldm.generate.tasks import Prepared, Task
from ldm.runtime.errors import ArgumentError, MissingFile

if TYPE_CHECKING:
    from ldm.app.catalogue import CatalogueEntry
    from ldm.app.pool import Pool
    from ldm.model import LatentDiffusion

__all__ = ["Studio"]

LARGEST_WEIGHT = 10  # of a LoRA


class Studio:
    """Runs of all users, one at a time.

    Args:
        models: folder of checkpoints.
        outdir: for images (`samples`), `uploads` and `replays`.
        choice: device, precision, attention and embeddings of all runs.
        limits: of each run.
        memory: bytes that models may take together; None = half of what the device has.
        loras: files that a run may add, and their usual weights.
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
        self._pool: Pool | None = None

    @property
    def offered_loras(self) -> list[str]:
        """The LoRAs that a run may choose from, `NAME:WEIGHT`."""
        return [f"{name}:{weight:g}" for name, (_, weight) in self.loras.items()]

    def model_names(self, task: str | None = None) -> list[str]:
        """The models of the folder that serve a task; None = all checkpoints, models or not."""
        from ldm.app.catalogue import list_checkpoints, read_catalogue

        if task is None:
            return [path.name for path in list_checkpoints(self.folder)]
        models = read_catalogue(self.folder).models
        return [name for name, model in models.items() if task in model.tasks]

    def skipped_files(self) -> list[str]:
        """Why other checkpoints of the folder are not models, a line for each."""
        from ldm.app.catalogue import read_catalogue

        return read_catalogue(self.folder).skipped

    def inspect(self, name: str | None) -> str:
        """What is in a checkpoint of the folder."""
        from ldm.app.catalogue import list_checkpoints
        from ldm.loading.report import inspect_checkpoint

        path = {path.name: path for path in list_checkpoints(self.folder)}.get(name or "")
        return (
            "choose a checkpoint" if path is None else "\n".join(inspect_checkpoint(path).lines())
        )

    def make_request(self, task: Task, name: str | None, values: Mapping[str, object]) -> Request:
        """The request of a run: defaults of the task, what is the same for all runs, its own.

        Args:
            name: of the model.
            values: of options; files among them are paths of uploads.
        Raises:
            ArgumentError: no such model serves the task, or a value is not allowed.
        """
        entry = self._model(name, task.name)
        chosen = values.get("lora") or ()
        if not isinstance(chosen, Sequence):
            raise ArgumentError("lora is not a list", "lora")
        loras = self._chosen_loras(parse_weighted_file(str(choice)) for choice in chosen)
        request = task.request({key: value for key, value in values.items() if key != "lora"})
        if request.sampling.scale is None:
            is_small = entry.path.stat().st_size < SMALL_MODEL
            scale = task.demo_scale if is_small else task.scale
            request = request.with_values({"scale": scale})
        return self._with_model(request, entry, loras)

    def generate(self, request: Request, progress: Progress) -> str:
        """Make images as the command of the task does; returns what to say in the end."""
        self.limits.check(request)
        start, batches = time.monotonic(), plan_batches(request)
        progress.total = sum(map(len, batches))
        prepared = request.task.prepare(request)
        model = self._load(request, prepared, progress)
        progress.begin_sampling(model)
        generate_batches(
            request, prepared, batches, model, callback=progress.on_step, report=progress.add_image
        )
        return f"finished in {time.monotonic() - start:.1f} s"

    def replay(self, path: str | Path, progress: Progress) -> str:
        """Make an image again, report it and return how it compares."""
        from PIL import Image

        from ldm.imaging.metadata import read_info
        from ldm.imaging.output import OutputFolder

        self.uploads.add(path)
        info = read_info(path)
        request = self._recorded_request(info, Path(path).name)
        self.limits.check(request)
        prepared = request.task.prepare(request)
        model = self._load(request, prepared, progress, threads=info["threads"])
        progress.begin_sampling(model)
        image = remake_image(request, prepared, model, info, progress.on_step)
        new = OutputFolder(self.outdir / "replays").save_sample(image, info)
        progress.add_image(info | {"path": str(new)})
        with Image.open(path) as old:
            difference = compare_images(old, image)
        if difference is None:
            return "identical"
        now = describe_run(request, model, prepared.output_size(model))
        return "; ".join([difference, *compare_infos(info, now)])

    def estimate_depth(self, request: Request, progress: Progress) -> str:
        """Report the path of the depth that a model sees in an image, a PNG of 16 bits."""
        prepared = request.task.prepare(request)
        model = self._load(request, prepared, progress)
        with TemporaryDirectory() as folder:
            path = Path(folder, "depth.png")
            request = request.with_values({"save_depth": str(path)})
            request.task.prepare(request).begin(model)
            progress.add_image({"task": "depth", "path": self.uploads.add(path)})
        return "depth estimated"

    def _model(self, name: str | None, task: str) -> "CatalogueEntry":
        from ldm.app.catalogue import read_catalogue

        models = read_catalogue(self.folder).models
        if name not in models or task not in models[name].tasks:
            names = ", ".join(self.model_names(task)) or f"none, put one into {self.folder}"
            raise ArgumentError(f"no model `{name or ''}` for {task}; there is: {names}", "ckpt")
        return models[name]

    def _with_model(
        self, request: Request, entry: "CatalogueEntry", loras: Sequence[tuple[str, float]]
    ) -> Request:
        choice = replace(
            self.choice,
            ckpt=str(entry.path),
            config=str(entry.config) if entry.config else None,
            lora=tuple(loras),
        )
        output = replace(request.output, outdir=str(self.outdir), skip_grid=True)
        return replace(request, model=choice, output=output)

    def _chosen_loras(self, chosen: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
        """Files of ours, by their names, with the weights that a run wants for them."""
        weights: dict[str, float] = {}
        for name, weight in chosen:
            if name in weights:
                raise ArgumentError(f"the LoRA `{name}` was chosen twice", "lora")
            if name not in self.loras:
                names = ", ".join(self.loras) or "none, start the app with --lora"
                raise ArgumentError(f"no LoRA `{name}`; there is: {names}", "lora")
            _check_weight(name, weight)
            weights[name] = weight
        return [(self.loras[name][0], weight) for name, weight in weights.items()]

    def _load(
        self,
        request: Request,
        prepared: Prepared,
        progress: Progress,
        threads: int | None = None,
    ) -> "LatentDiffusion":
        from ldm.app.pool import Pool
        from ldm.runtime.device import memory_of, pick_device

        if self._pool is None:
            memory = self.memory or memory_of(pick_device(request.model.device)) / 2
            self._pool = Pool(memory, _load_with_fitting_embeddings)
        progress.set_message(f"loading {Path(request.model.ckpt or '').name}")
        threads = threads and min(threads, os.cpu_count() or 1)
        try:
            model = load_model(request, threads=threads, load=self._pool)
        except ValueError as error:
            files = [file for file, _ in request.model.lora]
            raise ValueError(_without_folders(str(error), files)) from error
        for key in FILES:
            for file in model.provenance.get(key, ()):  # images say it, so users see it
                file["path"] = Path(file["path"]).name
        height, width = prepared.output_size(model)
        self.limits.check_output(width, height, enlarges=request.task.name == "upscale")
        return model

    def _recorded_request(self, info: dict[str, Any], name: str) -> Request:
        """The request that made an image; what it says of files is replaced by what is here."""
        recorded = read_request(info, name)
        if recorded.model.overrides or info["overrides"]:  # of any key
            raise ArgumentError("it was made with overrides: use `ldm replay`")
        entry = self._model(info["checkpoint"], recorded.task.name)
        inputs = options_of(recorded.task.inputs)
        allowed = {name for name, (row, _) in inputs.items() if not row.is_path}
        allowed |= options_of(Sampling).keys() | {"no_watermark"}
        values = {key: value for key, value in recorded.values().items() if key in allowed}
        for option, files in info.get("inputs", {}).items():
            paths = [str(self.uploads.find(file["sha256"])) for file in files]
            is_list = option in inputs and inputs[option][0].is_list
            values[option] = paths if is_list else next(iter(paths), None)
        values |= {"prompt": info["prompt"], "negative_prompt": info["negative_prompt"]}
        values |= {"n_samples": info["rows"], "n_iter": 1 + len(info.get("earlier", ()))}
        values["scale"] = info["scale"]
        request = recorded.task.request(values)
        names = {file: name for name, (file, _) in self.loras.items()}
        then = info.get("loras", ())
        weights = (float(lora.get("weight", 1.0)) for lora in then)
        loras = zip((names[f] for f in _own_files(then, names, "--lora")), weights, strict=True)
        embeddings = _own_files(info.get("embeddings", ()), self._embedding_files(), "--embedding")
        request = self._with_model(request, entry, self._chosen_loras(loras))
        return replace(request, model=replace(request.model, embedding=tuple(embeddings)))

    def _embedding_files(self) -> list[str]:
        from ldm.loading.addons.embeddings import embedding_files

        return [str(file) for path in self.choice.embedding for file in embedding_files(path)]


def _load_with_fitting_embeddings(
    config: Any = None, ckpt: Any = None, *, embeddings: Iterable[str] = (), **options: Any
) -> "LatentDiffusion":
    """`ldm.load`; embeddings of models of another width are left out, as those of a folder are."""
    from ldm.loading.addons.embeddings import load_embeddings
    from ldm.loading.load import load

    model = load(config, ckpt, **options)
    for path in embeddings:
        load_embeddings(model, [path], strict=False)
    return model


def _loras_by_name(loras: Sequence[tuple[str, float]]) -> dict[str, tuple[str, float]]:
    """LoRAs by the names that they are chosen by."""
    by_name = {Path(file).stem: (file, weight) for file, weight in loras}
    if len(by_name) < len(loras):
        raise ArgumentError("two LoRA files have the same name, by which they are chosen", "lora")
    for name, (file, weight) in by_name.items():
        if not Path(file).expanduser().is_file():
            raise MissingFile(f"no file `{file}`", "lora")
        _check_weight(name, weight)
    return by_name


def _check_weight(name: str, weight: float) -> None:
    if not abs(weight) <= LARGEST_WEIGHT:  # False for NaN, too
        allowed = f"-{LARGEST_WEIGHT} to {LARGEST_WEIGHT}"
        raise ArgumentError(f"the LoRA `{name}` of weight {weight:g}: {allowed}", "lora")


def _own_files(recorded: Any, files: Iterable[str], flag: str) -> list[str]:
    """The files of ours that an image was made with, found by their content.

    Raises:
        ArgumentError: one is not here.
    """
    from ldm.loading.files.checkpoint import file_hash

    if not all(isinstance(file, dict) and {"hash", "path"} <= file.keys() for file in recorded):
        raise ArgumentError(f"what it says of {flag} is damaged")
    by_hash = {file_hash(file): file for file in files} if recorded else {}
    for file in recorded:
        if file["hash"] not in by_hash:
            name = Path(file["path"]).name
            raise ArgumentError(f"made with `{name}`, which is not here: start the app with {flag}")
    return [by_hash[file["hash"]] for file in recorded]


def _without_folders(message: str, files: Iterable[str]) -> str:
    """A message about files, without where they are on the server."""
    for file in files:
        message = message.replace(file, Path(file).name)
    return message
