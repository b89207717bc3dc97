"""Textual inversion: words of one's own, each some vectors that the text tower takes for tokens.

    A1111        {"string_to_param": {"*": (n, D)}, …} in a .pt, {"emb_params": (n, D)}: the word is
                 the name of the file
    diffusers    {"<word>": (D,) or (n, D)} in a .bin or .safetensors

In a prompt the word stands for all of its vectors. Gal et al. 2022 (arXiv:2208.01618).
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.encoders.text import TextEncoder
from ldm.loading.addons.lora import WIDTHS
from ldm.loading.files.checkpoint import file_hash, read_checkpoint, write_checkpoint
from ldm.model import LatentDiffusion

__all__ = ["embedding_files", "load_embeddings", "read_embeddings", "write_embeddings"]

log = logging.getLogger(__name__)

ENDINGS = (".pt", ".bin", ".safetensors")
MOST = 76  # words in a file: no prompt could use more
SDXL = ("clip_g", "clip_l")
PARAMETERS = "string_to_param."


def load_embeddings(
    model: LatentDiffusion, paths: Iterable[str | Path], strict: bool = True
) -> None:
    """Teaches the text tower the words of files; of folders, those that fit it.

    `provenance` remembers the files.
    Raises FileNotFoundError, or ValueError if a file is none or is made for another tower.
    """
    text = model.conditioner.find(TextEncoder)
    if text is None:
        raise ValueError("this model has no text tower that could learn words")
    noted = []
    for path in map(Path, paths):
        for file in embedding_files(path):
            try:
                words = {word.lower(): vectors for word, vectors in read_embeddings(file).items()}
                _check(words, text.width, file)
            except ValueError as error:
                if strict and not path.is_dir():
                    raise
                log.warning("skipped: %s", str(error).splitlines()[0])
                continue
            text.added_embeddings.update(words)
            log.info("`%s` means %s in prompts", file, ", ".join(f"`{word}`" for word in words))
            digest = file_hash(file)
            noted.append({"path": str(file.resolve()), "words": list(words), "hash": digest})
    model.provenance["embeddings"] = [*model.provenance.get("embeddings", []), *noted]


def embedding_files(path: str | Path) -> list[Path]:
    """The files that a path names: itself, or those of the folder that it is."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return [place]
    return sorted(file for file in place.iterdir() if file.suffix in ENDINGS)


def read_embeddings(path: str | Path) -> dict[str, Tensor]:
    """The words in a file and their vectors (n, D).

    Raises FileNotFoundError, or ValueError if it is no textual inversion.
    """
    path = Path(path)
    state = read_checkpoint(path).state
    if all(name in SDXL for name in state):
        raise ValueError(f"`{path}` has vectors for two text towers: it is made for SDXL")
    named = [value for name, value in state.items() if name.startswith(PARAMETERS)]
    if "emb_params" in state:
        named = [state["emb_params"]]
    words = {path.stem: named[0]} if named else state
    if len(words) > MOST or any(value.dim() not in (1, 2) for value in words.values()):
        raise ValueError(f"`{path}` is no textual inversion: it holds {len(state)} other tensors")
    return {word: value.reshape(-1, value.shape[-1]).clone() for word, value in words.items()}


def write_embeddings(
    path: str | Path, words: dict[str, Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Saves words as diffusers does; A1111 reads that too, and calls the word as the file.

    words: vectors (n, D) each.
    """
    state = {word: vectors.detach().cpu() for word, vectors in words.items()}
    write_checkpoint(path, state, metadata)


def _check(words: dict[str, Tensor], width: int, file: Path) -> None:
    for word, vectors in words.items():
        if vectors.shape[1] != width:
            theirs, ours = (WIDTHS.get(n, "another model") for n in (vectors.shape[1], width))
            raise ValueError(
                f"`{file}`: `{word}` has vectors of {vectors.shape[1]} numbers ({theirs}), the "
                f"text tower takes {width} ({ours})"
            )
