"""Whatever weights are in -> Checkpoint: a file, a diffusers folder, a training run's folder."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ldm.loading.diffusers.files import is_diffusers_folder, read_folder
from ldm.loading.files.checkpoint import EMBEDDED, Checkpoint, read_checkpoint

__all__ = ["read_weights"]

# In the folder of a run: what to take, the first that is there; of several the newest.
WEIGHTS = ("checkpoints/last.safetensors", "checkpoints/last.ckpt", "checkpoints/*.safetensors",
           "checkpoints/*.ckpt")  # fmt: skip
CONFIGS = ("config.yaml", "configs/*-project.yaml")


def read_weights(
    path: str | Path, ema: bool = False, names: Iterable[str] = (), variant: str | None = None
) -> Checkpoint:
    """The weights, under the original's names; of folders with their config in the metadata.

        ema, names: as for `checkpoint.read`. variant: as for `files.read`.
    Raises FileNotFoundError, or ValueError for what holds no weights.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        return read_checkpoint(place, ema, names)
    if is_diffusers_folder(place):
        if ema:
            raise ValueError(f"`{path}` has no averaged (EMA) weights: diffusers folders have none")
        return read_folder(place, variant)
    weights, config = _newest(place, WEIGHTS), _newest(place, CONFIGS)
    if weights is None:
        raise FileNotFoundError(
            f"`{path}` is no folder of diffusers (`model_index.json`), nor of a training run "
            "(`checkpoints/last.ckpt`)"
        )
    file = read_checkpoint(weights, ema, names)
    if config is None or EMBEDDED in file.metadata:
        return file
    return replace(file, metadata=file.metadata | {EMBEDDED: config.read_text("utf-8")})


def _newest(folder: Path, patterns: Iterable[str]) -> Path | None:
    for pattern in patterns:
        if found := list(folder.glob(pattern)):
            return max(found, key=lambda file: file.stat().st_mtime)
    return None
