"""List the models, LoRAs, embeddings and VAEs in a folder, without loading weights.

The config of a model is the YAML beside its file, else it is found as by `ldm.load`: inside the
file, or by the shapes of the weights. Its encoders determine the family, the family the tasks.
LoRAs and other add-ons are in subfolders with the names in ADDON_FOLDERS.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import cast

from torch import nn

from ldm.conditioning import Conditioner
from ldm.encoders.text import TextEncoder
from ldm.generate.tasks import PAGE_TASKS
from ldm.loading import legacy
from ldm.loading.addons.lora import read_loras
from ldm.loading.build import build_on_meta
from ldm.loading.diffusers.layout import MODEL_INDEX
from ldm.loading.find_variant import detect_model_variant, supports_variants
from ldm.loading.model_config import has_defaults, read_config
from ldm.loading.published import find_on_disk, read_published_files
from ldm.loading.variants import VARIANTS
from ldm.loading.weights import identify_weights, open_checkpoint
from ldm.model import Defaults, LatentDiffusion
from ldm.nets.autoencoder import Autoencoder, PixelSpace
from ldm.pipelines.families import SIZE_KEYS, find_family
from ldm.runtime.errors import FileFormatError, MissingFile, WeightsMismatch, errors_as
from ldm.runtime.files import list_files
from ldm.runtime.types import JsonObject

__all__ = [
    "Catalog",
    "CatalogEntry",
    "check_lora",
    "is_lora_compatible",
    "list_addons",
    "list_checkpoints",
    "list_file_stats",
    "read_catalog",
]  # fmt: skip

CHECKPOINT_SUFFIXES = (".ckpt", ".safetensors")
MIDAS_TARGET = "ldm.encoders.depth.MiDaSDepth"
ADDON_FOLDERS = {  # names in lower case, by type of add-on
    "lora": ("lora", "loras"),
    "embedding": ("embedding", "embeddings"),
    "vae": ("vae", "vaes"),
    "preview": ("vae_approx", "vae-approx"),
    "safety_checker": ("safety_checker", "safety_checkers"),
}
ADDON_SUFFIXES = (*CHECKPOINT_SUFFIXES, ".pt", ".pth", ".bin")


@dataclass(frozen=True, eq=False)
class CatalogEntry:
    """A checkpoint that can be loaded.

    Args:
        config: The YAML beside it; None = inside the file, or found by the shapes of the weights.
        tasks: Names of the tasks that it supports.
        family: Name in `ldm.pipelines.families.FAMILIES`; None = unknown.
        size: (height, width) of its images, in pixels.
        defaults: Its default sampling options.
        is_sdxl: Whether it is Stable Diffusion XL or its refiner.
        spec: The config, translated to our class names.
        text_encoder: The first one, on the meta device; None = it has none.
    """

    path: Path
    config: Path | None
    tasks: tuple[str, ...]
    family: str | None
    size: tuple[int, int]
    defaults: Defaults
    is_sdxl: bool
    spec: JsonObject = field(repr=False)
    text_encoder: TextEncoder | None = field(repr=False)


@dataclass
class Catalog:
    """Models by their name in the folder, and the reason for each skipped checkpoint."""

    models: dict[str, CatalogEntry] = field(default_factory=dict)
    skip_reasons: list[str] = field(default_factory=list)


def list_checkpoints(folder: str | Path) -> dict[str, Path]:
    """List the checkpoints and diffusers folders in a folder and its subfolders, unopened.

    Returns:
        path by name, which is the POSIX path relative to the folder.
    Raises:
        MissingFile: There is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise MissingFile(f"no folder `{folder}`", "models")
    files = list(filter(Path.is_file, list_files(root)))
    folders = {file.parent for file in files if file.name == MODEL_INDEX}
    weights = (file for file in files if file.suffix.lower() in CHECKPOINT_SUFFIXES)
    paths = {file for file in weights if folders.isdisjoint(file.parents)} | folders - {root}
    addons = {name for names in ADDON_FOLDERS.values() for name in names}
    models = [p for p in paths if addons.isdisjoint(map(str.lower, p.relative_to(root).parts[:-1]))]
    return {path.relative_to(root).as_posix(): path for path in sorted(models)}


def list_addons(folder: str | Path, addon_type: str) -> dict[str, Path]:
    """Return the add-ons of a type in ADDON_FOLDERS: relative POSIX path without suffix -> file."""
    paths: dict[str, Path] = {}
    for root in Path(folder).expanduser().iterdir():
        if root.is_dir() and root.name.lower() in ADDON_FOLDERS[addon_type]:
            files = filter(Path.is_file, list_files(root))
            addons = sorted(file for file in files if file.suffix.lower() in ADDON_SUFFIXES)
            paths |= {file.relative_to(root).with_suffix("").as_posix(): file for file in addons}
    return paths


def is_lora_compatible(lora: str | Path, entry: CatalogEntry) -> bool:
    """Return whether a LoRA has the layers and shapes of a model."""
    return _is_lora_compatible(lora, list_file_stats(lora), entry)


def check_lora(lora: str | Path, checkpoint: Path) -> None:
    """Raise the error that loading reports for a LoRA that does not fit a model."""
    entry = _read_entry(checkpoint, list_file_stats(checkpoint))
    if isinstance(entry, CatalogEntry) and not is_lora_compatible(lora, entry):
        _read_lora(lora, entry)


def read_catalog(folder: str | Path) -> Catalog:
    """Return the models in a folder, and published ones elsewhere on this machine.

    Files are read again only when they change.
    """
    catalog, in_folder = Catalog(), list_checkpoints(folder)
    published = filter(None, map(find_on_disk, read_published_files().values()))
    for name, path in ({path.name: path for path in published} | in_folder).items():
        entry = _read_entry(path, list_file_stats(path))
        if isinstance(entry, CatalogEntry):
            catalog.models[name] = entry
        elif name in in_folder:
            reason = entry.replace(str(path), name)
            catalog.skip_reasons.append(reason if f"`{name}" in reason else f"`{name}`: {reason}")
    return catalog


def list_file_stats(path: str | Path | None) -> tuple[tuple[str, int, int], ...]:
    """Return (path, bytes, mtime in ns) of a file, or of all files in a folder; () if missing."""
    if path is None:
        return ()
    root = Path(path).expanduser()
    files = sorted(list_files(root)) if root.is_dir() else [root]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return tuple((str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in stats)


@lru_cache(maxsize=256)
def _read_entry(path: Path, stats: object) -> CatalogEntry | str:
    """Return the entry of a checkpoint, or one line that says why it cannot be used.

    Args:
        stats: Stats of its files, a part of the cache key: changed files are read again.
    """
    try:
        with errors_as(FileFormatError, f"`{path}` cannot be used"):
            return _build_entry(path)
    except (OSError, ValueError) as error:
        return str(error).splitlines()[0]


def _build_entry(path: Path) -> CatalogEntry:
    sidecar = path.with_suffix(".yaml")
    config = sidecar if sidecar.is_file() and path.is_file() else None
    weights = identify_weights(open_checkpoint(path))
    _, model_config = read_config(weights, config)
    spec = legacy.translate_config(model_config, where=path.name, skipped=[])
    if spec["target"] != legacy.LATENT_DIFFUSION:
        raise FileFormatError(f"`{path}` is not a complete model")
    params = spec["params"]
    conditioner = build_on_meta(_remove_midas(params["conditioner"]), where=path.name)
    factor = _get_downscale_factor(build_on_meta(params["autoencoder"], where=path.name))
    family = find_family(conditioner) if isinstance(conditioner, Conditioner) else None
    tasks = tuple(name for name, task in PAGE_TASKS.items() if family in task.families)
    defaults, image_size = Defaults(), params.get("image_size", 64)  # latent pixels
    if "defaults" in params:
        defaults = cast(Defaults, build_on_meta(params["defaults"], where=path.name))
    keys = conditioner.keys if isinstance(conditioner, Conditioner) else frozenset()
    text_encoder = conditioner.find(TextEncoder) if isinstance(conditioner, Conditioner) else None
    is_sdxl = not SIZE_KEYS.isdisjoint(keys)
    if supports_variants(family) and (variant := detect_model_variant(weights)):
        has_scheduler = is_sdxl and path.is_dir() and has_defaults(model_config)
        defaults = variant.resolve_defaults(defaults, has_scheduler=has_scheduler)
        image_size = VARIANTS[variant.name].sdxl_latent_size if is_sdxl else image_size
    height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
    return CatalogEntry(
        path=path,
        config=config,
        tasks=tasks,
        family=family,
        size=(height * factor, width * factor),
        defaults=defaults,
        is_sdxl=is_sdxl,
        spec=spec,
        text_encoder=text_encoder,
    )


def _remove_midas(spec: JsonObject) -> JsonObject:
    """Return a conditioner's spec without MiDaS, as importing timm takes seconds."""
    depth = spec.get("params", {}).get("depth")
    if depth is None or depth["target"] != MIDAS_TARGET:
        return spec
    depth = {**depth, "params": {**depth.get("params", {}), "model_type": None}}
    return {**spec, "params": {**spec["params"], "depth": depth}}


def _get_downscale_factor(vae: nn.Module) -> int:
    """Return pixels per latent pixel; 8, as in all published ones, for unknown autoencoders."""
    return vae.downscale_factor if isinstance(vae, Autoencoder | PixelSpace) else 8


@lru_cache(maxsize=1024)
def _is_lora_compatible(lora: str | Path, stats: object, entry: CatalogEntry) -> bool:
    try:
        _read_lora(lora, entry)
    except WeightsMismatch:
        return False
    except (OSError, ValueError):  # a damaged LoRA is listed, as its use reports the error
        return True
    return True


def _read_lora(lora: str | Path, entry: CatalogEntry) -> None:
    model = cast(LatentDiffusion, build_on_meta(entry.spec, where=entry.path.name))
    read_loras(model, [(lora, 1.0)])
