"""Textual inversion files: tokens for prompts, each with vectors for the text tower.

    A1111        {"string_to_param": {"*": (n, D)}, …} in a .pt, {"emb_params": (n, D)}: the token
                 is the name of the file, unless the file has several
    diffusers    {"<token>": (D,) or (n, D)} in a .bin or .safetensors
    in LoRAs     the same behind `bundle_emb.TOKEN.`

In a prompt the token stands for all of its vectors. Gal et al. 2022 (arXiv:2208.01618).
"""

import glob
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ldm.encoders.text import TextEncoder
from ldm.loading.families import TITLE_BY_WIDTH
from ldm.loading.files.checkpoint import file_hash, read_checkpoint, write_checkpoint
from ldm.model import LatentDiffusion
from ldm.runtime.errors import FileFormatError, WeightsMismatch, WrongFamily

__all__ = [
    "BUNDLE", "add_embeddings", "embedding_files", "load_embeddings", "read_bundle",
    "read_embeddings", "write_embeddings",
]  # fmt: skip

log = logging.getLogger(__name__)

ENDINGS = (".pt", ".bin", ".safetensors")
MAX_TOKENS = 76  # in a file: no prompt could use more
PARAMETERS = "string_to_param."
# Names for the vectors of the only token, which the file's name tells; the last is of SDXL's.
ONLY_TOKEN_KEYS = ("emb_params", "clip_l")
SDXL = "clip_g"
BUNDLE = "bundle_emb."


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
    files = []
    for path in map(Path, paths):
        for file in embedding_files(path):
            try:
                tokens = read_embeddings(file)
                add_embeddings(model, tokens, file)
            except (FileFormatError, WeightsMismatch) as error:
                if strict and not path.expanduser().is_dir():
                    raise
                log.warning("skipped: %s", str(error).splitlines()[0])
                continue
            words = [token.lower() for token in tokens]
            files.append({"path": str(file.resolve()), "words": words, "hash": file_hash(file)})
    if files:
        model.provenance["embeddings"] = [*model.provenance.get("embeddings", []), *files]


def add_embeddings(model: LatentDiffusion, tokens: Mapping[str, Tensor], file: Path) -> None:
    """Add tokens, vectors (n, D) each, to the text tower.

    Raises:
        WeightsMismatch: they are made for another text tower.
    """
    if not tokens:
        return
    text = model.conditioner.find(TextEncoder)
    if text is None:
        raise WrongFamily("this model has no text tower that embeddings could be added to")
    for token, vectors in tokens.items():
        if vectors.shape[1] != text.width:
            theirs, ours = (
                TITLE_BY_WIDTH.get(width, "another model")
                for width in (vectors.shape[1], text.width)
            )
            raise WeightsMismatch(
                f"`{file}`: `{token}` has vectors of width {vectors.shape[1]} ({theirs}), the "
                f"text tower takes {text.width} ({ours})"
            )
    for token, vectors in tokens.items():
        if token.lower() in text.added_embeddings:
            log.warning("`%s` replaces `%s`, which another file had added", file, token)
        text.added_embeddings[token.lower()] = vectors
    log.info("`%s` adds %s", file, ", ".join(f"`{token}`" for token in tokens))


def embedding_files(path: str | Path) -> list[Path]:
    """Return the file at a path, or those in the folder there and its subfolders."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return [path]
    # Unlike Path.rglob, this leaves hidden files out and follows links.
    files = map(Path, glob.iglob(f"{glob.escape(str(path))}/**/*", recursive=True))
    return sorted(file for file in files if file.suffix.lower() in ENDINGS and file.is_file())


def read_embeddings(path: str | Path) -> dict[str, Tensor]:
    """Return the tokens in a file and their vectors (n, D)."""
    path = Path(path).expanduser()
    return _parse(read_checkpoint(path).state, path.stem, path)


def read_bundle(path: Path) -> dict[str, Tensor]:
    """Return the tokens in a LoRA file, and their vectors (n, D)."""
    bundles: dict[str, dict[str, Tensor]] = {}
    for name, value in read_checkpoint(path).state.items():
        if not name.startswith(BUNDLE):
            continue
        token, dot, param = name.removeprefix(BUNDLE).rpartition(f".{PARAMETERS}")
        if dot:
            param = PARAMETERS + param
        else:
            token, _, param = name.removeprefix(BUNDLE).rpartition(".")
        bundles.setdefault(token or param, {})[param] = value
    return {
        token: vectors
        for bundle, tensors in bundles.items()
        for token, vectors in _parse(tensors, bundle, path).items()
    }


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


def _parse(state: Mapping[str, Tensor], stem: str, path: Path) -> dict[str, Tensor]:
    if SDXL in state:
        raise FileFormatError(f"`{path}` has vectors for two text towers: it is made for SDXL")
    if ONLY_TOKEN_KEYS[0] in state:
        state = {ONLY_TOKEN_KEYS[0]: state[ONLY_TOKEN_KEYS[0]]}
    params = {n.removeprefix(PARAMETERS): v for n, v in state.items() if n.startswith(PARAMETERS)}
    tokens = params or dict(state)
    if len(tokens) == 1 and (params or tokens.keys() <= set(ONLY_TOKEN_KEYS)):
        tokens = {stem: next(iter(tokens.values()))}
    if len(tokens) > MAX_TOKENS or any(value.dim() not in (1, 2) for value in tokens.values()):
        message = f"`{path}` is not a textual inversion: it holds {len(state)} other tensors"
        raise FileFormatError(message)
    for token, value in tokens.items():
        if not value.numel():
            raise FileFormatError(f"`{path}`: `{token}` has no vectors")
        if not value.isfinite().all():
            raise FileFormatError(f"`{path}`: the vectors of `{token}` are not finite")
    return {token: value.reshape(-1, value.shape[-1]).clone() for token, value in tokens.items()}
