"""Which models a folder holds, and which tasks each serves; no weights are loaded.

The config is found as by `ldm.load`: a YAML beside the file or inside it, else from the shapes of
the weights. Its encoders determine the family, and that the tasks.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ldm.conditioning import Conditioner
from ldm.generate.tasks import TASKS
from ldm.loading import legacy
from ldm.loading.build import build_on_meta
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.load import read_config
from ldm.loading.weights import identify_weights
from ldm.pipelines.families import FAMILIES
from ldm.runtime.errors import MissingFile

__all__ = ["Catalogue", "CatalogueEntry", "list_checkpoints", "read_catalogue"]

SUFFIXES = (".ckpt", ".safetensors")


@dataclass(frozen=True)
class CatalogueEntry:
    """A checkpoint that can be loaded.

    Args:
        config: the YAML to load it with; None = its own.
        tasks: names of the tasks that it serves.
    """

    path: Path
    config: Path | None
    tasks: tuple[str, ...]


@dataclass
class Catalogue:
    """Models by file name, and a line about each checkpoint that was skipped."""

    models: dict[str, CatalogueEntry] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, sorted by name; they are not opened.

    Raises:
        MissingFile: there is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise MissingFile(f"no folder `{folder}`", "models")
    return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())


def read_catalogue(folder: str | Path) -> Catalogue:
    """The models of a folder. Files are read once, and again when they change."""
    catalogue = Catalogue()
    for path in list_checkpoints(folder):
        status = path.stat()
        entry = _read_entry(path, status.st_size, status.st_mtime_ns)
        if isinstance(entry, CatalogueEntry):
            catalogue.models[path.name] = entry
        else:
            catalogue.skipped.append(entry)
    return catalogue


@lru_cache(maxsize=256)
def _read_entry(path: Path, size: int, mtime: int) -> CatalogueEntry | str:
    """The entry of a file, or what is wrong with it in one line."""
    sidecar = path.with_suffix(".yaml")
    config = sidecar if sidecar.is_file() else None
    try:
        _, raw = read_config(identify_weights(read_checkpoint(path)), config)
        spec = legacy.translate_config(raw, where=path.name, skipped=[])
        if spec["target"] != legacy.MODEL:
            return f"`{path}` is not a complete model"
        conditioner = build_on_meta(spec["params"]["conditioner"], where=path.name)
    except (OSError, ValueError, KeyError) as error:
        return str(error).splitlines()[0]
    keys = conditioner.keys if isinstance(conditioner, Conditioner) else None
    families = {name for name, family in FAMILIES.items() if family.keys == keys}
    tasks = [name for name, task in TASKS.items() if families.intersection(task.families)]
    return CatalogueEntry(path, config, tuple(tasks))
