"""Textual inversion files: tokens for prompts, each with vectors for one or two text towers.

    A1111        {"string_to_param": {"*": (n, D)}, …} in a .pt, {"emb_params": (n, D)}: the token
                 is the name of the file, unless the file has several. In a .png: JSON in a text
    diffusers    {"<token>": (D,) or (n, D)} in a .bin or .safetensors; SDXL: a file per tower
    SDXL         {"clip_l": (n, 768), "clip_g": (n, 1280)}: kohya, A1111, ComfyUI
    in LoRAs     the same behind `bundle_emb.TOKEN.`

The width tells the tower. In a prompt the token stands for all of its vectors. Gal et al. 2022
(arXiv:2208.01618).
"""

import base64
import glob
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.encoders.text import TextEncoder
from ldm.imaging.reading import open_image
from ldm.loading.families import TITLE_BY_WIDTH
from ldm.loading.files.checkpoint import file_hash, read_checkpoint, write_checkpoint
from ldm.loading.modelspec import describe_model
from ldm.model import LatentDiffusion
from ldm.runtime.errors import FileFormatError, WeightsMismatch, WrongFamily

__all__ = [
    "BUNDLE", "add_embeddings", "check_embeddings", "embedding_files", "load_embeddings",
    "read_bundle", "read_embeddings", "write_embeddings",
]  # fmt: skip

log = logging.getLogger(__name__)

ENDINGS = (".pt", ".bin", ".safetensors")
PNG, PNG_KEY, PNG_TENSOR = ".png", "sd-ti-embedding", "TORCHTENSOR"  # of A1111
MAX_TOKENS = 76  # in a file: no prompt could use more
PARAMETERS = "string_to_param."
ONLY_TOKEN_KEY = "emb_params"  # of the vectors of the only token, which the file's name tells
TOWER_KEYS = ("clip_l", "clip_g")  # the same, for each text tower of SDXL
FORMER_TOWER_KEYS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}  # of diffusers
TOKEN_KEY = "ldm.token"  # metadata: the only token, where it is not the file's name
BUNDLE = "bundle_emb."
TITLES = TITLE_BY_WIDTH | {1280: "SDXL"}


def load_embeddings(
    model: LatentDiffusion, paths: Iterable[str | Path], strict: bool = True
) -> None:
    """Add the tokens of files to the text towers; of folders, those that fit them.

    `provenance` records the files.

    Args:
        strict: raise for a file that does not fit; False skips it, as always in folders.

    Raises:
        ValueError: a file is not a textual inversion, or made for another text tower.
    """
    files = []
    for path in map(Path, paths):
        if not (found := embedding_files(path)):
            log.warning("`%s` has no textual inversions", path)
        for file in found:
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
    _warn_of_other_towers(model, [word for file in files for word in file["words"]])


def check_embeddings(model: LatentDiffusion, paths: Iterable[str | Path]) -> None:
    """Raise what `load_embeddings` would; of the model, only the shapes of weights are needed."""
    for path in map(Path, paths):
        if not path.expanduser().is_dir():
            _find_towers(model, read_embeddings(path), path)


def add_embeddings(
    model: LatentDiffusion, tokens: Mapping[str, Sequence[Tensor]], file: Path
) -> None:
    """Add tokens, vectors (n, D) for one or two text towers each, to the towers of that width.

    Raises:
        WeightsMismatch: they are made for another text tower.
    """
    if not tokens:
        return
    towers = _find_towers(model, tokens, file)
    for token, vectors in tokens.items():
        by_width = {value.shape[1]: value for value in vectors}
        fitting = [tower for tower in towers if tower.width in by_width]
        if any(token.lower() in tower.added_embeddings for tower in fitting):
            log.warning("`%s` replaces `%s`, which another file had added", file, token)
        for tower in fitting:
            tower.added_embeddings[token.lower()] = by_width[tower.width]
    log.info("`%s` adds %s", file, ", ".join(f"`{token}`" for token in tokens))


def _find_towers(
    model: LatentDiffusion, tokens: Mapping[str, Sequence[Tensor]], file: Path
) -> list[TextEncoder]:
    """Return the text towers; raise unless each token fits one."""
    towers = model.conditioner.find_all(TextEncoder)
    if not towers:
        raise WrongFamily("this model has no text tower that embeddings could be added to")
    widths = [tower.width for tower in towers]
    for token, vectors in tokens.items():
        width = vectors[-1].shape[1]  # of two, SDXL's second tower: CLIP-L is in SD 1, too
        if width not in widths:
            ours = f"{' or '.join(map(str, widths))} ({TITLES.get(widths[-1], 'another model')})"
            raise WeightsMismatch(
                f"`{file}`: `{token}` has vectors of width {width} "
                f"({TITLES.get(width, 'another model')}), the text tower takes {ours}"
            )
    return towers


def _warn_of_other_towers(model: LatentDiffusion, tokens: Iterable[str]) -> None:
    """Say which tokens only one of several text towers knows."""
    towers = model.conditioner.find_all(TextEncoder)
    for token in dict.fromkeys(tokens):
        widths = [tower.width for tower in towers if token in tower.added_embeddings]
        others = [tower.width for tower in towers if token not in tower.added_embeddings]
        if widths and others:
            log.warning(
                "`%s` has vectors for the text tower of width %d only (%s): that of width %d reads "
                "it as text", token, widths[0], TITLES.get(widths[0], "another model"), others[0],
            )  # fmt: skip


def embedding_files(path: str | Path) -> list[Path]:
    """Return the file at a path, or those in the folder there and its subfolders."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return [path]
    # Unlike Path.rglob, this leaves hidden files out and follows links.
    paths = map(Path, glob.iglob(f"{glob.escape(str(path))}/**/*", recursive=True))
    files = [file for file in paths if file.is_file()]
    return sorted(f for f in files if f.suffix.lower() in ENDINGS or _read_png_text(f))


def read_embeddings(path: str | Path) -> dict[str, list[Tensor]]:
    """Return the tokens in a file, and their vectors (n, D) for one text tower, or for two."""
    path = Path(path).expanduser()
    if path.suffix.lower() == PNG:
        return _read_png(path)
    file = read_checkpoint(path)
    return _parse(file.state, file.metadata.get(TOKEN_KEY, path.stem), path)


def _read_png(path: Path) -> dict[str, list[Tensor]]:
    """Return the tokens that A1111 has put into an image."""
    text = _read_png_text(path)
    if not text:
        raise FileFormatError(f"`{path}` is an image without a textual inversion in its text")
    try:
        content = json.loads(base64.b64decode(text))
        tensors = {
            f"{PARAMETERS}{name}": torch.tensor(value[PNG_TENSOR], dtype=torch.float32)
            for name, value in content[PARAMETERS.rstrip(".")].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"`{path}`: the textual inversion in it is damaged") from error
    return _parse(tensors, str(content.get("name") or path.stem), path)


def _read_png_text(path: Path) -> str:
    """Return the text of an image that holds a textual inversion; "" if there is none."""
    if path.suffix.lower() != PNG:
        return ""
    try:
        with open_image(path) as image:
            return str(image.info.get(PNG_KEY, ""))
    except FileFormatError:
        return ""


def read_bundle(path: Path) -> dict[str, list[Tensor]]:
    """Return the tokens in a LoRA file, and their vectors as `read_embeddings` does."""
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
    tokens: Mapping[str, Tensor | Sequence[Tensor]],
    metadata: Mapping[str, str | int] | None = None,
    model: LatentDiffusion | None = None,
) -> None:
    """Write tokens, vectors (n, D) each, as diffusers does, or one token of SDXL as kohya does.

    A1111 reads both, and names the token after the file.

    Args:
        tokens: for SDXL the vectors (n, 768) of CLIP-L and (n, 1280) of bigG.
        model: the metadata name its base model.
    """
    state: dict[str, Tensor] = {}
    about: dict[str, str | int] = {
        "modelspec.trigger_phrase": ", ".join(tokens),
        **(metadata or {}),
    }
    metadata = describe_model(model, Path(path).stem, "textual-inversion", about)
    for token, value in tokens.items():
        vectors = [value] if isinstance(value, Tensor) else value
        names = [token] if len(vectors) == 1 else TOWER_KEYS
        state |= {name: v.detach().cpu() for name, v in zip(names, vectors, strict=True)}
        if len(vectors) > 1:
            metadata[TOKEN_KEY] = token
    write_checkpoint(path, state, metadata)


def _parse(state: Mapping[str, Tensor], name: str, path: Path) -> dict[str, list[Tensor]]:
    """Return vectors by token; `name` is the only one where `state` does not tell it."""
    state = {FORMER_TOWER_KEYS.get(key, key): value for key, value in state.items()}
    towers = [state[key] for key in TOWER_KEYS if key in state]
    params = {n.removeprefix(PARAMETERS): v for n, v in state.items() if n.startswith(PARAMETERS)}
    if towers:
        tokens = {name: towers}
    elif ONLY_TOKEN_KEY in state:
        tokens = {name: [state[ONLY_TOKEN_KEY]]}
    elif len(params) == 1:
        tokens = {name: list(params.values())}
    else:
        tokens = {token: [value] for token, value in (params or state).items()}
    values = [value for vectors in tokens.values() for value in vectors]
    if len(tokens) > MAX_TOKENS or any(value.dim() not in (1, 2) for value in values):
        message = f"`{path}` is not a textual inversion: it holds {len(state)} other tensors"
        raise FileFormatError(message)
    for token, vectors in tokens.items():
        if not all(value.numel() for value in vectors):
            raise FileFormatError(f"`{path}`: `{token}` has no vectors")
        if not all(value.isfinite().all() for value in vectors):
            raise FileFormatError(f"`{path}`: the vectors of `{token}` are not finite")
        counts = [value.numel() // value.shape[-1] for value in vectors]
        if len(set(counts)) > 1:
            raise FileFormatError(
                f"`{path}`: `{token}` has {counts[0]} vectors for CLIP-L and {counts[1]} for bigG"
            )
    return {
        token: [value.reshape(-1, value.shape[-1]).clone() for value in vectors]
        for token, vectors in tokens.items()
    }
