"""Studio: what the runs of a program for many share, and what each may ask for.

    models      of one folder, in memory as long as there is room
    uploads     pictures that users brought, kept by content
    limits      on size, steps and number of pictures

What a request or a picture says about files is never followed: models are looked up by name,
uploads by hash, all else is refused.
"""

import hashlib
import io
import os
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ldm.app.progress import Live
from ldm.generate import inputs, load, provenance, run
from ldm.generate.flags import DEMO_SCALE, DEMO_SCALES, SCALE, weighted
from ldm.runtime.device import pick_device

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ldm.app.catalogue import Model
    from ldm.app.pool import Pool
    from ldm.model import LatentDiffusion

ENLARGED = 4096 * 3072  # pixels that a picture may have after upscaling
PROMPT = 2000  # characters
GIVEN = ("device", "precision", "attention", "embedding")
STRONGEST = 10  # weight of a LoRA


@dataclass(frozen=True)
class Limits:
    """What one run may ask for.

    side: of a picture, in pixels. batch: pictures made at once; batches: how often.
    """

    side: int = 1024
    steps: int = 150
    batch: int = 4
    batches: int = 8

    def check(self, args: Namespace) -> None:
        """Raises ValueError naming the first flag that asks for more."""
        bounds = {
            "steps": (1, self.steps),
            "n_samples": (1, self.batch),
            "n_iter": (1, self.batches),
            "H": (8, self.side),
            "W": (8, self.side),
            "tile": (64, 4 * self.side),
            "mask_grow": (0, 256),
            "mask_blur": (0, 256),
        }
        for flag, (low, high) in bounds.items():
            value = getattr(args, flag, None)
            if value is not None and not low <= value <= high:
                raise ValueError(f"`{flag}` is {value:g}, {low} to {high} are allowed")
        if any((getattr(args, flag) or 0) % 8 for flag in ("H", "W")):
            raise ValueError(f"width and height must be multiples of 8, got {args.W} x {args.H}")
        if len(args.prompt) + len(args.negative_prompt) > PROMPT:
            raise ValueError(f"prompts may have {PROMPT} characters together")

    def check_picture(self, width: int, height: int, task: str) -> None:
        """Raises ValueError if the picture that a task begins with is too large."""
        if task == "upscale" and 16 * width * height > ENLARGED:
            allowed = f"{ENLARGED // 16} pixels can be enlarged"
        elif task != "upscale" and max(width, height) > self.side:
            allowed = f"sides up to {self.side} are allowed"
        else:
            return
        raise ValueError(f"the picture is {width}x{height}, {allowed}: set width or height")


class Uploads:
    """Pictures that users brought, kept by content, so that what was made of them can be replayed.

    folder: created if absent; files are named by their SHA-256.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, path: str | Path) -> str:
        """The path of the kept copy.

        Raises ValueError saying what is wrong with a file that is no whole picture.
        """
        from ldm.imaging.reading import load_image

        try:
            load_image(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), Path(path).name)) from error
        return self._put(Path(path).read_bytes())

    def keep_drawn(self, picture: "Image.Image") -> str:
        """The same of a picture that is in no file yet."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return self._put(buffer.getvalue())

    def find(self, sha256: object) -> Path:
        """The kept file of this content.

        Raises FileNotFoundError if nobody brought it.
        """
        names = {path.stem: path for path in self.folder.glob("*.png")}
        if sha256 not in names:
            raise FileNotFoundError("made from a picture that was not uploaded here: upload it")
        return names[str(sha256)]

    def _put(self, content: bytes) -> str:
        # The ending is for programs that go by names; ours look into the file.
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.png"
        if not path.is_file():
            part = path.with_suffix(f".{time.monotonic_ns()}.part")
            part.write_bytes(content)
            part.replace(path)
        return str(path)


class Studio:
    """Runs of all users; for one at a time.

    models: folder of checkpoints. outdir: for pictures (`samples`), `uploads` and `replays`.
    given: flags, of which GIVEN are the same for all runs.
    memory: bytes that models may take together; None for half of what the device has.
    loras: files that a run may add, and their usual weights.
    Raises FileNotFoundError if one of them is not there, ValueError if two have the same name or
    a weight is too large.
    """

    def __init__(
        self,
        models: str | Path,
        outdir: str | Path,
        given: Namespace,
        limits: Limits,
        memory: float | None = None,
        loras: Sequence[tuple[str, float]] = (),
    ) -> None:
        self.folder, self.outdir = Path(models), Path(outdir).resolve()
        self.given = Namespace(**{flag: getattr(given, flag) for flag in GIVEN})
        self.limits, self.memory = limits, memory
        self.loras = _by_name(loras)
        self.uploads = Uploads(self.outdir / "uploads")
        self._pool: Pool | None = None

    @property
    def offered(self) -> list[str]:
        """The LoRAs that a run may choose from, `NAME:WEIGHT`."""
        return [f"{name}:{weight:g}" for name, (_, weight) in self.loras.items()]

    def names(self, task: str | None = None) -> list[str]:
        """The models of the folder that serve a task; None: all checkpoints, models or not."""
        from ldm.app.catalogue import catalogue, files

        if task is None:
            return [path.name for path in files(self.folder)]
        return [name for name, model in catalogue(self.folder)[0].items() if task in model.tasks]

    def skipped(self) -> list[str]:
        """Why other checkpoints of the folder are no models, a line for each."""
        from ldm.app.catalogue import catalogue

        return catalogue(self.folder)[1]

    def inspect(self, name: str | None) -> str:
        """What is in a checkpoint of the folder."""
        from ldm.app.catalogue import files
        from ldm.loading.report import inspect_checkpoint

        path = {path.name: path for path in files(self.folder)}.get(name or "")
        return (
            "choose a checkpoint" if path is None else "\n".join(inspect_checkpoint(path).lines())
        )

    def flags(self, parsed: Namespace, name: str | None, values: Mapping[str, Any]) -> Namespace:
        """The flags of a run: defaults of its script, what is the same for all runs, its own.

        name: of the model. values: of flags; those of files are paths of uploads.
        Raises ValueError if no such model serves the task.
        """
        model = self._model(name, parsed.task)
        fixed = {"outdir": str(self.outdir), "skip_grid": True, "ckpt": str(model.path)}
        fixed["config"] = model.config and str(model.config)
        made = Namespace(**vars(parsed) | vars(self.given) | fixed | dict(values))
        made.lora = self._loras(weighted(str(choice)) for choice in made.lora or ())
        if made.scale is None:
            is_small = model.path.stat().st_size < load.SMALL
            suits_small = DEMO_SCALES.get(made.task, DEMO_SCALE)
            made.scale = suits_small if is_small else getattr(made, "usual_scale", SCALE)
        return made

    def generate(self, args: Namespace, live: Live) -> str:
        """Makes pictures as the script of the task does; returns what to say in the end."""
        self.limits.check(args)
        start, batches = time.monotonic(), run.plan(args)
        live.total = sum(map(len, batches))
        model, make, kept = self._prepared(args, live)
        run.run(make, batches, model, args, kept, watch=live.watch, report=live.report)
        return f"finished in {time.monotonic() - start:.1f} s"

    def replay(self, parsed: Namespace, live: Live) -> str:
        """Makes a picture again, reports it and returns how it compares.

        parsed: flags of the script, with the path of the picture.
        """
        from PIL import Image

        from ldm.imaging.metadata import read_info
        from ldm.imaging.output import OutputFolder

        self.uploads.keep(parsed.picture)
        info = read_info(parsed.picture)
        args = self._recorded(info, parsed)
        self.limits.check(args)
        model, make, kept = self._prepared(args, live, info["threads"])
        new = run.again(info, args, model, make, kept, live.watch)
        path = OutputFolder(self.outdir / "replays").save_sample(new, info)
        live.report(info | {"path": str(path)})
        with Image.open(parsed.picture) as old:
            difference = provenance.compare(old, new)
        if difference is None:
            return "identical"
        return "; ".join([difference, *provenance.changes(info, provenance.describe(args, model))])

    def depth(self, args: Namespace, live: Live) -> str:
        """Reports the path of the depth that a model sees in a picture, a PNG of 16 bits."""
        from ldm.imaging.reading import save_depth
        from ldm.pipelines import depth_of

        told = self._told(args)
        model = self._loaded(args, live)
        with TemporaryDirectory() as place:
            path = Path(place, "depth.png")
            save_depth(path, depth_of(model, told["image"]))
            live.report({"task": "depth", "path": self.uploads.keep(path)})
        return "this is the depth that the model sees"

    def _model(self, name: str | None, task: str) -> "Model":
        from ldm.app.catalogue import catalogue

        models = catalogue(self.folder)[0]
        if name not in models or task not in models[name].tasks:
            known = ", ".join(self.names(task)) or f"none, put one into {self.folder}"
            raise ValueError(f"no model `{name or ''}` for {task}; there is: {known}")
        return models[name]

    def _loras(self, chosen: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
        """Files of ours, by their names, with the weights that a run wants for them."""
        found: dict[str, float] = {}
        for name, weight in chosen:
            if name in found:
                raise ValueError(f"the LoRA `{name}` was chosen twice")
            if name not in self.loras:
                known = ", ".join(self.loras) or "none, start the app with --lora"
                raise ValueError(f"no LoRA `{name}`; there is: {known}")
            _check_weight(name, weight)
            found[name] = weight
        return [(self.loras[name][0], weight) for name, weight in found.items()]

    def _words(self) -> list[str]:
        """All files of --embedding."""
        from ldm.loading.addons.embeddings import embedding_files

        return [str(file) for path in self.given.embedding for file in embedding_files(path)]

    def _prepared(self, args: Namespace, live: Live, threads: int | None = None) -> Any:
        """(model, make, kept) of a run, as `jobs` takes them."""
        told = self._told(args)
        model = self._loaded(args, live, threads)
        make = run.maker(inputs.pipeline(args, model, told), model, args, told)
        live.sampling(model)
        return model, make, inputs.kept(told)

    def _told(self, args: Namespace) -> dict[str, Any]:
        told = inputs.read(args)
        if "image" in told:
            height, width = told["image"].shape[-2:]
            self.limits.check_picture(width, height, args.task)
        return told

    def _loaded(self, args: Namespace, live: Live, threads: int | None = None) -> "LatentDiffusion":
        from ldm.app.pool import Pool

        if self._pool is None:
            self._pool = Pool(self.memory or _memory(pick_device(args.device)) / 2)
        live.say(f"loading {Path(args.ckpt).name}")
        try:
            model = load.load(args, threads and min(threads, os.cpu_count() or 1), self._pool)
        except ValueError as error:
            files = [file for file, _ in args.lora]
            raise ValueError(_without_folders(str(error), files)) from error
        for kind in provenance.FILES:
            for file in model.provenance.get(kind, ()):  # pictures say it, so users see it
                file["path"] = Path(file["path"]).name
        return model

    def _recorded(self, info: dict[str, Any], parsed: Namespace) -> Namespace:
        """The flags that made a picture; what it says of files is replaced by what is here."""
        own = {"picture": Path(parsed.picture).name, "device": self.given.device}
        given = Namespace(**vars(parsed) | own)
        if info.get("overrides"):  # any key
            raise ValueError("it was made with overrides: use scripts/replay.py")
        names = {file: name for name, (file, _) in self.loras.items()}
        then = info.get("loras", ())
        files = _ours(then, names, "--lora")
        weights = (float(lora.get("weight", 1.0)) for lora in then)
        given.lora = self._loras(zip((names[file] for file in files), weights, strict=True))
        given.embedding = _ours(info.get("embeddings", ()), self._words(), "--embedding")
        for files in info.get("inputs", {}).values():
            for file in files:
                file["path"] = str(self.uploads.find(file["sha256"]))
        if "checkpoint" in info:
            model = self._model(info["checkpoint"], info["task"])
            given.ckpt, info["config"] = str(model.path), model.config and str(model.config)
        args = provenance.flags(info, given)
        for flag in ("prompt", "negative_prompt"):
            setattr(args, flag, info[flag])
        args.n_samples, args.n_iter = info["rows"], 1 + len(info.get("earlier", ()))
        return args


def _by_name(loras: Sequence[tuple[str, float]]) -> dict[str, tuple[str, float]]:
    """LoRAs by the names that they are chosen by."""
    found = {Path(file).stem: (file, weight) for file, weight in loras}
    if len(found) < len(loras):
        raise ValueError("two files of --lora have the same name, by which they are chosen")
    for name, (file, weight) in found.items():
        if not Path(file).expanduser().is_file():
            raise FileNotFoundError(f"no file `{file}` (--lora)")
        _check_weight(name, weight)
    return found


def _check_weight(name: str, weight: float) -> None:
    if not abs(weight) <= STRONGEST:  # nor is it not a number
        raise ValueError(f"the LoRA `{name}` of weight {weight:g}: -{STRONGEST} to {STRONGEST}")


def _ours(recorded: Any, files: Iterable[str], flag: str) -> list[str]:
    """The files of ours that are those which a picture was made with, by their content.

    Raises ValueError if one is not here.
    """
    from ldm.loading.files.checkpoint import file_hash

    if not all(isinstance(one, dict) and {"hash", "path"} <= one.keys() for one in recorded):
        raise ValueError(f"what it says of {flag} is damaged")
    known = {file_hash(file): file for file in files} if recorded else {}
    for one in recorded:
        if one["hash"] not in known:
            name = Path(one["path"]).name
            raise ValueError(f"made with `{name}`, which is not here: start the app with {flag}")
    return [known[one["hash"]] for one in recorded]


def _without_folders(message: str, files: Iterable[str]) -> str:
    """What is wrong with files, without where they are on the server."""
    for file in files:
        message = message.replace(file, Path(file).name)
    return message


def _memory(device: "torch.device") -> int:
    """Bytes of memory that a device has."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
