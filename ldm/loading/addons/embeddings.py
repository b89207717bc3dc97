"""Textual inversion files: tokens for prompts, each with vectors for the text tower.

    A1111        {"string_to_param": {"*": (n, D)}, …} in a .pt, {"emb_params": (n, D)}: the token
                 is the name of the file
    diffusers    {"<token>": (D,) or (n, D)} in a .bin or .safetensors

In a prompt the token stands for all of its vectors. Gal et al. 2022 (arXiv:2208.01618).
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ldm.encoders.text import TextEncoder
from ldm.loading.addons.lora import FAMILY_BY_WIDTH
from ldm.loading.files.checkpoint import file_hash, read_checkpoint, write_checkpoint
from ldm.model import LatentDiffusion
from ldm.runtime.errors import FileFormatError, WeightsMismatch, WrongFamily

__all__ = ["embedding_files", "load_embeddings", "read_embeddings", "write_embeddings"]

log = logging.getLogger(__name__)

ENDINGS = (".pt", ".bin", ".safetensors")
MAX_TOKENS = 76  # in a file: no prompt could use more
SDXL = ("clip_g", "clip_l")
PARAMETERS = "string_to_param."


def load_embeddings(
    model: LatentDiffusion, paths: Iterable[str | Path], strict: bool = True
) -> None:
    """Add the tokens of files to the text tower; of folders, those that fit it.

    `provenance` records the files.

    Args:
        strict: raise for a file that does not fit; False skips it, as always in folders.

    Raises:
        ValueError: a file is not a textual inversion, or made for another text tower.
    """
    text, sources = model.conditioner.find(TextEncoder), [Path(path) for path in paths]
    if not sources:
        return
    if text is None:
        raise WrongFamily("this model has no text tower that embeddings could be added to")
    files = []
    for path in sources:
        for file in embedding_files(path):
            try:
                tokens = {token.lower(): v for token, v in read_embeddings(file).items()}
                _check_width(tokens, text.width, file)
            except ValueError as error:
                if strict and not path.is_dir():
                    raise
                log.warning("skipped: %s", str(error).splitlines()[0])
                continue
            text.added_embeddings.update(tokens)
            log.info("`%s` adds %s", file, ", ".join(f"`{token}`" for token in tokens))
            about = {"path": str(file.resolve()), "words": list(tokens), "hash": file_hash(file)}
            files.append(about)
    model.provenance["embeddings"] = [*model.provenance.get("embeddings", []), *files]


def embedding_files(path: str | Path) -> list[Path]:
    """The file at a path, or those in the folder there."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in ENDINGS)


def read_embeddings(path: str | Path) -> dict[str, Tensor]:
    """The tokens in a file and their vectors (n, D)."""
    path = Path(path)
    state = read_checkpoint(path).state
    if all(name in SDXL for name in state):
        raise FileFormatError(f"`{path}` has vectors for two text towers: it is made for SDXL")
    a1111 = [v for name, v in state.items() if name == "emb_params" or name.startswith(PARAMETERS)]
    tokens = {path.stem: a1111[0]} if a1111 else state
    if len(tokens) > MAX_TOKENS or any(value.dim() not in (1, 2) for value in tokens.values()):
        message = f"`{path}` is not a textual inversion: it holds {len(state)} other tensors"
        raise FileFormatError(message)
    return {token: value.reshape(-1, value.shape[-1]).clone() for token, value in tokens.items()}


def write_embeddings(
    path: str | Path,
    tokens: Mapping[str, Tensor],
    metadata: Mapping[str, str | int] | None = None,
) -> None:
    """Write tokens, vectors (n, D) each, as diffusers does.

    A1111 reads that too, and names the token after the file.
    """
    state = {token: vectors.detach().cpu() for token, vectors in tokens.items()}
    write_checkpoint(path, state, metadata)


def _check_width(tokens: Mapping[str, Tensor], width: int, file: Path) -> None:
    ours = FAMILY_BY_WIDTH.get(width, "another model")
    for token, vectors in tokens.items():
        if vectors.shape[1] != width:
            theirs = FAMILY_BY_WIDTH.get(vectors.shape[1], "another model")
            raise WeightsMismatch(
                f"`{file}`: `{token}` has vectors of width {vectors.shape[1]} ({theirs}), the "
                f"text tower takes {width} ({ours})"
            )
