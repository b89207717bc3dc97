"""Find models, LoRAs, embeddings, VAEs and other add-ons of the models folder by name."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ldm.app.catalog import (
    CatalogEntry,
    is_lora_compatible,
    list_addons,
    list_checkpoints,
    list_file_stats,
    read_catalog,
)
from ldm.app.form import DEFAULT_STEPS
from ldm.generate.lora_tags import add_tagged_loras, remove_tags
from ldm.generate.options import Value
from ldm.generate.tasks import Task
from ldm.loading.addons.embeddings import list_embedding_files, read_embeddings
from ldm.loading.addons.lora_weights import LoRAWeight
from ldm.loading.addons.safety import SAFETY_CHECKER
from ldm.loading.files.checkpoint import compute_short_hash
from ldm.loading.find_variant import detect_first_lora_variant
from ldm.loading.inspection import inspect_checkpoint
from ldm.loading.tiny_autoencoder import is_for_sdxl, load_preview
from ldm.model import Defaults, LatentDiffusion
from ldm.pipelines.families import FAMILIES, is_sdxl
from ldm.pipelines.preview import fit_preview
from ldm.prompts.syntax import PLAIN, parse_prompt
from ldm.runtime.errors import ArgumentError, MissingFile, make_unknown_name_error
from ldm.runtime.types import JsonMapping

__all__ = ["ADDONS", "Library", "remove_folders"]

log = logging.getLogger(__name__)

MAX_LORA_WEIGHT = 10
# Files that a run may add to a model: option -> title for messages
ADDONS = {
    "vae": "VAE", "refiner": "refiner", "upscaler": "upscaler", SAFETY_CHECKER: "safety checker"
}  # fmt: skip
ADDON_FAMILIES = {"refiner": "refiner", "upscaler": "latent-upscaling"}  # option -> family
WILDCARD_FOLDER = "wildcards"  # subfolder of the models folder, in lower case


class Library:
    """The files that runs may use, read again when they change.

    Args:
        models: Folder of checkpoints.
        embeddings: Files or folders of textual inversions, besides those in the models folder.
        loras: (file, default weight) of LoRAs, besides those in the folder.
        previews: Files of TAESD for previews, besides those in the folder.
    Raises:
        MissingFile: The folder or a LoRA is missing.
        ArgumentError: Two LoRAs have the same name, or a weight is too large.
    """

    def __init__(
        self,
        models: str | Path,
        embeddings: Sequence[str] = (),
        loras: Sequence[tuple[str, float | str]] = (),
        previews: Sequence[str] = (),
    ) -> None:
        list_checkpoints(models)  # raises for a missing folder
        self.folder = Path(models).expanduser()
        self._additional_embeddings = tuple(embeddings)
        self._additional_loras = _index_loras(loras)
        self._additional_previews = _expand_existing(previews, "preview")

    @property
    def loras(self) -> dict[str, tuple[str, float | str]]:
        """(file, default weight) by name of LoRA: those in the folder and the additional ones."""
        files = list_addons(self.folder, "lora")
        return {name: (str(file), 1.0) for name, file in files.items()} | self._additional_loras

    def list_lora_files(self) -> dict[str, str]:
        """Return the file of each LoRA by its name."""
        return {name: file for name, (file, _) in self.loras.items()}

    def find_wildcard_folder(self) -> str | None:
        """Return the folder of wildcards, if there is one."""
        folders = (path for path in self.folder.iterdir() if path.name.lower() == WILDCARD_FOLDER)
        return next((str(path) for path in folders if path.is_dir()), None)

    def list_compatible_loras(self, model: str | None) -> list[str]:
        """Return the names of the LoRAs that fit a model."""
        entry = self._get_entry(model)
        if entry is None:
            return []
        return [name for name, (file, _) in self.loras.items() if is_lora_compatible(file, entry)]

    def list_embedding_tokens(self) -> list[str]:
        """Return the tokens of all embeddings."""
        return sorted({token for tokens in self._read_all_embeddings() for token in tokens})

    def count_tokens(
        self, model: str | None, prompt: str, syntax: str = PLAIN, *, is_negative: bool = False
    ) -> tuple[int, int, str]:
        """Count the tokens of a prompt.

        Returns:
            (number of tokens, limit, truncated text); the limit is 0 if it is unknown.
        """
        entry = self._get_entry(model)
        if entry is None or entry.text_encoder is None:
            return 0, 0, ""
        encoder = entry.text_encoder
        encoder.added_embeddings = {
            token.lower(): vectors
            for embeddings in self._read_all_embeddings()
            for token, vectors_by_encoder in embeddings.items()
            for vectors in vectors_by_encoder
            if vectors.shape[1] == encoder.width
        }
        prompt = remove_tags(prompt)
        try:
            # An encoder of one pooled vector supports only `plain`.
            if syntax != PLAIN and encoder.context_length == encoder.length:
                parsed = parse_prompt(prompt, syntax, is_negative=is_negative)
                return *encoder.count_chunk_tokens(parsed), ""
        except ArgumentError:  # an invalid prompt; Generate reports the error
            return 0, 0, ""
        count, truncated = encoder.count_tokens(prompt), encoder.find_truncated_text(prompt)
        return count, encoder.length - 2, truncated

    def make_previewer(self, model: LatentDiffusion) -> Callable[[Tensor], Tensor]:
        """Return a function from latents to previews: TAESD if available, else a linear one."""
        files = list_addons(self.folder, "preview").values() if self.folder.is_dir() else ()
        for path in (*self._additional_previews, *files):
            if is_for_sdxl(path) == is_sdxl(model) and "encoder" not in path.stem:
                try:
                    return load_preview(path, model)
                except (ValueError, OSError) as error:
                    log.warning("no previews by `%s`: %s", path, error)
        return fit_preview(model)

    def list_addons(self, addon_type: str) -> dict[str, Path]:
        """Return files and folders that a run may add to a model, by name.

        Args:
            addon_type: A key of ADDONS.
        """
        if addon_type in ADDON_FAMILIES:
            models = read_catalog(self.folder).models.items()
            family = ADDON_FAMILIES[addon_type]
            return {name: entry.path for name, entry in models if entry.family == family}
        if addon_type != SAFETY_CHECKER:
            return list_addons(self.folder, addon_type)
        folders = {
            f"{name}/{SAFETY_CHECKER}": path / SAFETY_CHECKER
            for name, path in list_checkpoints(self.folder).items()
            if (path / SAFETY_CHECKER).is_dir()
        }
        return list_addons(self.folder, SAFETY_CHECKER) | folders

    def find_recorded_addon(self, addon_type: str, info: JsonMapping) -> str:
        """Return the name of an image's refiner or upscaler; "" = none, or not available here."""
        file_name = Path((info.get(addon_type) or {}).get("path", "")).name
        names = self.list_addons(addon_type)
        return next((name for name in names if file_name in (Path(name).name, Path(name).stem)), "")

    def list_models(self, task: str | None = None) -> list[str]:
        """Return the names of the models that support a task; None = of all that can be loaded."""
        models = read_catalog(self.folder).models
        return [name for name, model in models.items() if task is None or task in model.tasks]

    def list_checkpoint_names(self) -> list[str]:
        """Return the names of all checkpoint files, including those that cannot be loaded."""
        return [name for name, path in list_checkpoints(self.folder).items() if path.is_file()]

    def find_recorded_loras(self, info: JsonMapping) -> list[tuple[str, float | str]]:
        """Return (name, weight) of each LoRA of an image, also of those that are not available."""
        loras = []
        for lora in info.get("loras") or ():
            path = Path(lora["path"])
            files = {
                name: file for name, file in self.list_lora_files().items()
                if path.name in (Path(file).name, Path(file).stem)
            }  # fmt: skip
            name = _select_by_hash(files, lora.get("hash")) or path.stem
            loras.append((name, lora.get("weight", 1.0)))
        return loras

    def find_recorded_model(self, info: JsonMapping, task: Task) -> CatalogEntry:
        """Return the model that made an image, by file name; errors as `find_model`."""
        models = read_catalog(self.folder).models.items()
        checkpoint = info["checkpoint"]
        files = {name: entry.path for name, entry in models if Path(name).name == checkpoint}
        name = _select_by_hash(files, info["checkpoint_hash"]) or checkpoint
        return self.find_model(name, task)

    def is_sdxl(self, name: str | None) -> bool:
        """Return whether a model is Stable Diffusion XL or its refiner."""
        entry = self._get_entry(name)
        return entry is not None and entry.is_sdxl

    def find_defaults(
        self, task: Task, name: str | None, loras: Iterable[str] = (), prompt: str = ""
    ) -> dict[str, Value]:
        """Return the default settings for a task, a model and its LoRAs.

        Args:
            loras: Names of LoRAs.
            prompt: May contain tags of other LoRAs.
        """
        entry = self._get_entry(name)
        height, width = (None, None) if entry is None else entry.size
        files = tuple(self.loras[lora] for lora in loras if lora in self.loras)
        with suppress(ArgumentError):  # an invalid tag; Generate reports the error
            files = add_tagged_loras(prompt, files, self.list_lora_files)
        variant = detect_first_lora_variant(files)
        defaults = Defaults() if entry is None else entry.defaults
        if variant is not None:
            defaults = variant.defaults
        return {
            "scale": task.scale if defaults.scale is None else defaults.scale,
            "width": width,
            "height": height,
            "steps": DEFAULT_STEPS if defaults.steps == Defaults.steps else defaults.steps,
            "sampler": defaults.sampler,
        }

    def get_unsupported_reason(self, task: Task, name: str | None) -> str:
        """Return why a model does not support a task, and which ones do; "" if it does."""
        entry = self._get_entry(name)
        if entry is not None and task.name in entry.tasks:
            return ""
        titles = " or ".join(FAMILIES[family].title for family in task.families)
        reason = f"{task.title} needs {titles}"
        if entry is not None and entry.family:
            reason += f", `{name}` is {FAMILIES[entry.family].title}"
        elif name:
            reason += f", there is no model `{name}`"
        if names := self.list_models(task.name):
            return f"{reason}; available: {', '.join(names)}"
        return f"{reason}; none is available: {_describe_download(task)}"

    def list_skip_reasons(self) -> list[str]:
        """Return, in one line each, why checkpoints in the folder cannot be used."""
        return read_catalog(self.folder).skip_reasons

    def inspect(self, name: str | None) -> str:
        """Return the report about a checkpoint in the folder."""
        path = list_checkpoints(self.folder).get(name or "")
        if path is None or path.is_dir():
            return "select a checkpoint"
        report = "\n".join(inspect_checkpoint(path).format_lines())
        return remove_folders(report, [str(path)])

    def find_model(self, name: str | None, task: Task) -> CatalogEntry:
        """Return a model by its name.

        Raises:
            ArgumentError: There is none, or it does not support the task.
        """
        if reason := self.get_unsupported_reason(task, name):
            raise ArgumentError(reason, "ckpt")
        return read_catalog(self.folder).models[name or ""]

    def find_addon_files(self, values: Mapping[str, object]) -> dict[str, str]:
        """Return the path of each add-on that an option names.

        A name comes from a browser: it is looked up in a list, never used as a path.

        Raises:
            UnknownName: No add-on has this name.
        """
        paths = {}
        for addon_type, title in ADDONS.items():
            if name := values.get(addon_type):
                files = self.list_addons(addon_type)
                if name not in files:
                    raise make_unknown_name_error(title, name, files, argument=addon_type)
                paths[addon_type] = str(files[str(name)])
        return paths

    def find_lora_files(
        self, loras: Iterable[tuple[str, float | str]]
    ) -> list[tuple[str, float | str]]:
        """Convert (name, weight) of LoRAs to (file, weight).

        Raises:
            ArgumentError: A LoRA is unknown or selected twice, or its weight is too large.
        """
        files: dict[str, float | str] = {}
        for name, weight in loras:
            if name not in self.loras:
                names = ", ".join(self.loras) or "none, as the folder loras of the models is empty"
                raise ArgumentError(f"no LoRA `{name}`; available: {names}", "lora")
            _check_weight(name, weight)
            file, _ = self.loras[name]
            if file in files:
                raise ArgumentError(f"the LoRA `{name}` is selected twice", "lora")
            files[file] = weight
        return list(files.items())

    def _get_entry(self, model: str | None) -> CatalogEntry | None:
        return read_catalog(self.folder).models.get(model or "")

    def _read_all_embeddings(self) -> list[Mapping[str, list[Tensor]]]:
        return [
            _read_embeddings(file, list_file_stats(file)) for file in self.list_embedding_paths()
        ]

    def list_embedding_paths(self) -> list[str]:
        """Return the files of all embeddings."""
        files = [
            str(file) for path in self._additional_embeddings for file in list_embedding_files(path)
        ]
        return files + [str(file) for file in list_addons(self.folder, "embedding").values()]


def _select_by_hash(files: Mapping[str, str | Path], short_hash: object) -> str | None:
    """Return the name of the file with this hash, else of the first one; None if there is none."""
    names = list(files)
    if len(names) > 1:
        names.sort(key=lambda name: compute_short_hash(files[name]) != short_hash)
    return next(iter(names), None)


def remove_folders(message: str, files: Iterable[str]) -> str:
    """Shorten paths in a message to file names, as visitors must not learn the server's folders."""
    for file in files:
        message = message.replace(file, Path(file).name)
    return message


@lru_cache(maxsize=1024)
def _read_embeddings(file: str, stats: object) -> Mapping[str, list[Tensor]]:
    try:
        return read_embeddings(file)
    except (OSError, ValueError):
        return {}


def _describe_download(task: Task) -> str:
    name = task.example_flags.split()[1]
    return f"`ldm download {name}` gets one" if "." not in name else f"see {task.example_flags}"


def _index_loras(loras: Sequence[tuple[str, float | str]]) -> dict[str, tuple[str, float | str]]:
    """Return (file, weight) of each LoRA by its stem, the name on the page."""
    by_name = {Path(file).stem: (file, weight) for file, weight in loras}
    if len(by_name) < len(loras):
        raise ArgumentError("two LoRA files have the same name: rename one", "lora")
    for name, (file, weight) in by_name.items():
        if not Path(file).expanduser().is_file():
            raise MissingFile(f"no file `{file}`", "lora")
        _check_weight(name, weight)
    return by_name


def _expand_existing(files: Iterable[str], option: str) -> list[Path]:
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
