"""Load the mean and standard deviation of CLIP's embeddings, which stable unCLIP-L needs.

Some checkpoints contain them. For others they are read from a given file, else from
`ViT-L-14_stats.th` of the Karlo project, at its path in the config or in the checkpoint's folder.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.conditioning import Conditioner
from ldm.encoders.image import ImageEmbedding
from ldm.loading.files.checkpoint import detect_format
from ldm.loading.files.pickles import load_pickle
from ldm.runtime.errors import FileFormatError
from ldm.runtime.files import find_file

__all__ = [
    "find_near_checkpoint", "get_clip_statistics", "load_clip_statistics", "read_clip_statistics",
]  # fmt: skip


def load_clip_statistics(
    conditioner: Conditioner,
    ckpt: Path,
    clip_stats: str | Path | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> None:
    """Set the statistics of an unCLIP model; do nothing for other models.

    If no statistics are found, the model raises an error when it is used.

    Args:
        clip_stats: File of statistics; None = from `buffers`, else from a file near the checkpoint.
        buffers: Buffers of the checkpoint: statistics are `noise_augmentor.data_mean` and
            `noise_augmentor.data_std`. None = no buffers.
    """
    image = conditioner.find(ImageEmbedding)
    if image is None:
        return
    noise = image.noise
    if clip_stats is not None:
        noise.set_statistics(*read_clip_statistics(find_file(clip_stats)))
    elif buffers and "noise_augmentor.data_mean" in buffers:
        mean, std = (buffers[f"noise_augmentor.data_{name}"] for name in ("mean", "std"))
        noise.set_statistics(mean, std)
    elif path := find_near_checkpoint(ckpt, noise.clip_stats_path):
        noise.set_statistics(*read_clip_statistics(path))


def get_clip_statistics(conditioner: Conditioner) -> dict[str, Tensor]:
    """Return the statistics of an unCLIP model under their names in files; {} if it has none."""
    image = conditioner.find(ImageEmbedding)
    if image is None or image.noise.clip_stats_path is None or image.noise.statistics is None:
        return {}
    mean, std = image.noise.statistics
    return {"noise_augmentor.data_mean": mean, "noise_augmentor.data_std": std}


def read_clip_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of CLIP's embeddings, (D,) each."""
    path = Path(path)
    content, _ = load_pickle(path, detect_format(path))
    tensors = list(content.values()) if isinstance(content, Mapping) else content
    has_two = isinstance(tensors, list | tuple) and len(tensors) == 2
    if not has_two or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise FileFormatError(f"`{path}` does not contain a mean and a standard deviation")
    mean, std = tensors
    return mean.float().flatten(), std.float().flatten()


def find_near_checkpoint(ckpt: Path, path: str | None) -> Path | None:
    """Return the file at a path, or the file of its name in the checkpoint's folder, or None."""
    if path is None:
        return None
    try:
        return find_file(path)
    except FileNotFoundError:
        sibling = ckpt.parent / Path(path).name
        return sibling if sibling.is_file() else None
