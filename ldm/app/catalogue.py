"""Catalogue: which models a folder holds, and which tasks each serves; nothing is loaded.

    folder -> {name: Model}, and a line about every file that is none

Families are recognised as by `load`: by a YAML beside the file or inside it, else by the shapes of
the weights. What a config makes the network listen to says which tasks it can do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.loading import legacy
from ldm.loading.config import parse_yaml, read_yaml
from ldm.loading.files.checkpoint import EMBEDDED, read_checkpoint
from ldm.loading.legacy import translate_config
from ldm.loading.load import choose_config

__all__ = ["Model", "catalogue", "files"]

SUFFIXES = (".ckpt", ".safetensors")
TEXT = ("txt2img", "img2img", "inpaint")
# The encoder that decides; a model with none of them listens to text alone.
SERVES = {
    legacy.MASKED_IMAGE: ("inpaint",),
    legacy.DEPTH: ("depth2img",),
    legacy.LOW_RES: ("upscale",),
    legacy.IMAGE_EMBEDDING: ("unclip",),
    legacy.CLIP_IMAGE: ("unclip",),
    legacy.OPEN_CLIP_IMAGE: ("unclip",),
}


@dataclass(frozen=True)
class Model:
    """A file that can be loaded: with which config (None: its own), and for which tasks."""

    path: Path
    config: Path | None
    tasks: tuple[str, ...]


def files(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder by name, whatever is in them.

    Raises FileNotFoundError if there is no such folder.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"no folder `{folder}`")
    return sorted(path for path in place.iterdir() if path.suffix in SUFFIXES and path.is_file())


def catalogue(folder: str | Path) -> tuple[dict[str, Model], list[str]]:
    """The models of a folder by file name, and why its other checkpoints are skipped.

    Files are looked at once, and again when they change.
    """
    models, skipped = dict[str, Model](), list[str]()
    for path in files(folder):
        status = path.stat()
        found = _looked_at(path, status.st_size, status.st_mtime_ns)
        if isinstance(found, Model):
            models[path.name] = found
        else:
            skipped.append(found)
    return models, skipped


@lru_cache(maxsize=256)
def _looked_at(path: Path, size: int, changed: int) -> Model | str:
    """The model in a file, or what is wrong with it in one line."""
    beside = path.with_suffix(".yaml")
    config = beside if beside.is_file() else None
    try:
        file = read_checkpoint(path)
        source = str(config or choose_config(file))
        if source == EMBEDDED:
            raw = parse_yaml(file.metadata[EMBEDDED], where=path.name)
        else:
            raw = read_yaml(source)
        spec = translate_config(raw, where=path.name, skipped=[])
    except (OSError, ValueError, KeyError) as error:
        return str(error).splitlines()[0]
    if spec["target"] != legacy.MODEL:
        return f"`{path}` is a part of a model only"
    return Model(path, config, _tasks(spec["params"]["conditioner"]))


def _tasks(conditioner: Mapping[str, Any]) -> tuple[str, ...]:
    targets = [encoder["target"] for encoder in conditioner["params"].values()]
    return next((SERVES[target] for target in targets if target in SERVES), TEXT)
