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
from ldm.loading.diffusers.files import INDEX
from ldm.loading.load import read_config
from ldm.loading.published import find_on_disk, published_files
from ldm.loading.weights import identify_weights, read_weights
from ldm.pipelines.families import family_of
from ldm.runtime.errors import MissingFile

__all__ = ["Catalogue", "CatalogueEntry", "file_states", "list_checkpoints", "read_catalogue"]

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
    """Models by path in the folder, and a line about each checkpoint that was skipped."""

    models: dict[str, CatalogueEntry] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def list_checkpoints(folder: str | Path) -> dict[str, Path]:
    """Return the checkpoints and diffusers folders in a folder and its subfolders.

    They are not opened.

    Returns:
        path by name, which is the path in the folder, with slashes.
    Raises:
        MissingFile: there is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise MissingFile(f"no folder `{folder}`", "models")
    folders = {index.parent for index in root.rglob(INDEX)}
    files = (f for f in root.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    paths = {f for f in files if folders.isdisjoint(f.parents)} | folders - {root}
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def read_catalogue(folder: str | Path) -> Catalogue:
    """Return the models of a folder, and published ones elsewhere on this machine.

    Files are read once, and again when they change.
    """
    catalogue, inside = Catalogue(), list_checkpoints(folder)
    published = filter(None, map(find_on_disk, published_files().values()))
    for name, path in ({path.name: path for path in published} | inside).items():
        entry = _read_entry(path, file_states(path))
        if isinstance(entry, CatalogueEntry):
            catalogue.models[name] = entry
        elif name in inside:
            catalogue.skipped.append(entry)
    return catalogue


def file_states(path: str | Path | None) -> tuple[tuple[str, int, int], ...]:
    """Return path, size in bytes and time of change of a file, or of all files of a folder."""
    if path is None:
        return ()
    root = Path(path).expanduser()
    files = (
        [file for file in sorted(root.rglob("*")) if file.is_file()] if root.is_dir() else [root]
    )
    stats = [(file, file.stat()) for file in files]
    return tuple((str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in stats)


@lru_cache(maxsize=256)
def _read_entry(path: Path, states: object) -> CatalogueEntry | str:
    """Return the entry of a checkpoint, or what is wrong with it in one line."""
    sidecar = path.with_suffix(".yaml")
    config = sidecar if sidecar.is_file() and path.is_file() else None
    try:
        _, raw = read_config(identify_weights(read_weights(path)), config)
        spec = legacy.translate_config(raw, where=path.name, skipped=[])
        if spec["target"] != legacy.MODEL:
            return f"`{path}` is not a complete model"
        conditioner = build_on_meta(spec["params"]["conditioner"], where=path.name)
    except (OSError, ValueError, KeyError) as error:
        return str(error).splitlines()[0]
    family = family_of(conditioner) if isinstance(conditioner, Conditioner) else None
    tasks = tuple(name for name, task in TASKS.items() if family in task.families)
    return CatalogueEntry(path, config, tasks)
