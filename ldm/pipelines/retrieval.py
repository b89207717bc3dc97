"""Retrieve neighbors of a prompt from a database of image embeddings.

Blattmann et al. 2022 (arXiv:2204.11824).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.runtime.errors import ArgumentError, FileFormatError, MissingFile

__all__ = ["find_neighbors", "load_database"]

EMBEDDINGS = "embedding"  # name of the array in a file of a database


def load_database(path: str | Path) -> Tensor:
    """Load the embeddings (N, D) of a database: an `.npz` of the original, or a folder of them.

    Raises:
        MissingFile: There is no such file, or none in the folder.
        FileFormatError: A file has no embeddings, or of another dimension.
    """
    path = Path(path).expanduser()
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise MissingFile(f"no database `{path}`: it is an .npz, or a folder of them")
    parts: list[Tensor] = []
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                embeddings = torch.from_numpy(arrays[EMBEDDINGS]).float()
        except (KeyError, OSError, ValueError, TypeError) as error:
            raise FileFormatError(f"`{file}` has no array `{EMBEDDINGS}` of numbers") from error
        if embeddings.dim() != 2 or (parts and embeddings.shape[1] != parts[0].shape[1]):
            raise FileFormatError(f"`{file}` has embeddings of the shape {tuple(embeddings.shape)}")
        parts.append(embeddings)
    return torch.cat(parts)


def find_neighbors(embeddings: Tensor, database: Tensor, k: int) -> Tensor:
    """Return the rows of a database nearest to each embedding, the nearest first.

    Args:
        embeddings: (B, D).
        database: (N, D).
    Returns:
        (B, k, D), normalized to length 1; nearness is the cosine similarity.
    """
    if embeddings.shape[1] != database.shape[1]:
        message = f"embeddings have {embeddings.shape[1]} features, the database's"
        raise ArgumentError(f"{message} {database.shape[1]}", "database")
    if k > len(database):
        raise ArgumentError(f"the database has {len(database)} images, not {k}", "knn")
    normalized = F.normalize(database, dim=1)
    similarities = F.normalize(embeddings, dim=1) @ normalized.T  # (B, N)
    return normalized[similarities.topk(k, dim=1).indices]
