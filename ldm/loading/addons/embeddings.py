"""Read and write textual inversions: tokens for prompts, with vectors for one or two text encoders.

    A1111        {"string_to_param": {"*": (n, D)}, …} in a .pt, {"emb_params": (n, D)}: the token
                 is the name of the file, unless the file has several. In a .png: JSON in a text
    diffusers    {"<token>": (D,) or (n, D)} in a .bin or .safetensors; SDXL: a file per encoder
    SDXL         {"clip_l": (n, 768), "clip_g": (n, 1280)}: kohya, A1111, ComfyUI
    in LoRAs     the same with the prefix `bundle_emb.TOKEN.`

The width D determines the text encoder. In a prompt a token stands for all of its n vectors. Gal
et al. 2022 (arXiv:2208.01618).
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
from ldm.loading.files.checkpoint import compute_short_hash, read_checkpoint, write_checkpoint
from ldm.loading.modelspec import describe_model
from ldm.model import LatentDiffusion
from ldm.runtime.errors import FileFormatError, WeightsMismatch, WrongFamily

__all__ = [
    "BUNDLE", "add_embeddings", "check_embeddings", "list_embedding_files", "load_embeddings",
    "read_bundle", "read_embeddings", "write_embeddings",
]  # fmt: skip

log = logging.getLogger(__name__)

SUFFIXES = (".pt", ".bin", ".safetensors")
# Of A1111: key of the text in a PNG, and of tensors in its JSON.
PNG, PNG_KEY, PNG_TENSOR = ".png", "sd-ti-embedding", "TORCHTENSOR"
MAX_TOKENS = 76  # in a file: no prompt could use more
PARAMETERS = "string_to_param."
ONLY_TOKEN_KEY = "emb_params"  # vectors of the only token, which is named after the file
XL_KEYS = ("clip_l", "clip_g")  # the same, for each text encoder of SDXL
# Keys of diffusers' training script.
DIFFUSERS_XL_KEYS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
TOKEN_KEY = "ldm.token"  # metadata: the only token, if it is not named after the file
BUNDLE = "bundle_emb."  # prefix of embeddings in LoRA files
TITLES = TITLE_BY_WIDTH | {1280: "SDXL"}  # of models, by the width of their last text encoder


def load_embeddings(
    model: LatentDiffusion, paths: Iterable[str | Path], strict: bool = True
) -> None:
    """Add the tokens of files, and of files in folders, to a model's text encoders.

    `provenance` records the files.

    Args:
        strict: whether to raise for a file that does not fit, else it is skipped; files in folders
            are always skipped.

    Raises:
        ValueError: a file is not a textual inversion, or for another text encoder.
    """
    files = []
    for path in map(Path, paths):
        if not (candidates := list_embedding_files(path)):
            log.warning("`%s` has no textual inversions", path)
        for file in candidates:
            try:
                tokens = read_embeddings(file)
                add_embeddings(model, tokens, file)
            except (FileFormatError, WeightsMismatch) as error:
                if strict and not path.expanduser().is_dir():
                    raise
                log.warning("skipped: %s", str(error).splitlines()[0])
                continue
            words = [token.lower() for token in tokens]
            files.append(
                {"path": str(file.resolve()), "words": words, "hash": compute_short_hash(file)}
            )
    if files:
        model.provenance["embeddings"] = [*model.provenance.get("embeddings", []), *files]
    _warn_of_missing_vectors(model, [word for file in files for word in file["words"]])


def check_embeddings(model: LatentDiffusion, paths: Iterable[str | Path]) -> None:
    """Raise what `load_embeddings` would raise; the model may be on the meta device."""
    for path in map(Path, paths):
        if not path.expanduser().is_dir():
            _find_encoders(model, read_embeddings(path), path)


def add_embeddings(
    model: LatentDiffusion, tokens: Mapping[str, Sequence[Tensor]], file: Path
) -> None:
    """Add tokens to the text encoders of the width of their vectors.

    Args:
        tokens: vectors (n, D) for one or two text encoders, by token.
        file: the file that they are from, for messages.
    Raises:
        WeightsMismatch: they are for another text encoder.
    """
    if not tokens:
        return
    encoders = _find_encoders(model, tokens, file)
    for token, vectors in tokens.items():
        by_width = {value.shape[1]: value for value in vectors}
        fitting = [encoder for encoder in encoders if encoder.width in by_width]
        if any(token.lower() in encoder.added_embeddings for encoder in fitting):
            log.warning("`%s` replaces `%s`, which another file had added", file, token)
        for encoder in fitting:
            encoder.added_embeddings[token.lower()] = by_width[encoder.width]
    log.info("`%s` adds %s", file, ", ".join(f"`{token}`" for token in tokens))


def _find_encoders(
    model: LatentDiffusion, tokens: Mapping[str, Sequence[Tensor]], file: Path
) -> list[TextEncoder]:
    """Return the text encoders; raise WeightsMismatch unless each token fits one of them."""
    encoders = model.conditioner.find_all(TextEncoder)
    if not encoders:
        raise WrongFamily("this model has no text encoder, embeddings cannot be added")
    widths = [encoder.width for encoder in encoders]
    for token, vectors in tokens.items():
        # The last is for SDXL's second text encoder; the first, CLIP-L, is also that of SD 1.
        width = vectors[-1].shape[1]
        if width not in widths:
            expected = " or ".join(map(str, widths))
            raise WeightsMismatch(
                f"`{file}`: `{token}` has vectors of width {width} "
                f"({TITLES.get(width, 'another model')}), the text encoder takes {expected} "
                f"({TITLES.get(widths[-1], 'another model')})"
            )
    return encoders


def _warn_of_missing_vectors(model: LatentDiffusion, tokens: Iterable[str]) -> None:
    """Warn about tokens with vectors for only one of two text encoders."""
    encoders = model.conditioner.find_all(TextEncoder)
    for token in dict.fromkeys(tokens):
        widths = [encoder.width for encoder in encoders if token in encoder.added_embeddings]
        missing = [encoder.width for encoder in encoders if token not in encoder.added_embeddings]
        if widths and missing:
            log.warning(
                "`%s` has vectors for the text encoder of width %d only (%s): that of width %d "
                "reads it as plain text",
                token, widths[0], TITLES.get(widths[0], "another model"), missing[0],
            )  # fmt: skip


def list_embedding_files(path: str | Path) -> list[Path]:
    """Return the file at a path; of a folder, the textual inversions in it and its subfolders."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return [path]
    # Unlike Path.rglob, this leaves hidden files out and follows links.
    paths = map(Path, glob.iglob(f"{glob.escape(str(path))}/**/*", recursive=True))
    files = [file for file in paths if file.is_file()]
    return sorted(f for f in files if f.suffix.lower() in SUFFIXES or _read_png_text(f))


def read_embeddings(path: str | Path) -> dict[str, list[Tensor]]:
    """Return the vectors (n, D), for one or two text encoders, by token of a file."""
    path = Path(path).expanduser()
    if path.suffix.lower() == PNG:
        return _read_png(path)
    file = read_checkpoint(path)
    return _parse_tokens(file.state, file.metadata.get(TOKEN_KEY, path.stem), path)


def _read_png(path: Path) -> dict[str, list[Tensor]]:
    """Return the tokens that A1111 stores in the text of a PNG."""
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
    return _parse_tokens(tensors, str(content.get("name") or path.stem), path)


def _read_png_text(path: Path) -> str:
    """Return the text chunk of a PNG with A1111's textual inversion; "" if there is none."""
    if path.suffix.lower() != PNG:
        return ""
    try:
        with open_image(path) as image:
            return str(image.info.get(PNG_KEY, ""))
    except FileFormatError:
        return ""


def read_bundle(path: Path) -> dict[str, list[Tensor]]:
    """Return the tokens in a LoRA file with their vectors, as `read_embeddings` does."""
    bundles: dict[str, dict[str, Tensor]] = {}
    for name, value in read_checkpoint(path).state.items():
        if not name.startswith(BUNDLE):
            continue
        token, dot, key = name.removeprefix(BUNDLE).rpartition(f".{PARAMETERS}")
        if dot:
            key = PARAMETERS + key
        else:
            token, _, key = name.removeprefix(BUNDLE).rpartition(".")
        bundles.setdefault(token or key, {})[key] = value
    return {
        token: vectors
        for bundle, tensors in bundles.items()
        for token, vectors in _parse_tokens(tensors, bundle, path).items()
    }


def write_embeddings(
    path: str | Path,
    tokens: Mapping[str, Tensor | Sequence[Tensor]],
    metadata: Mapping[str, str | int] | None = None,
    model: LatentDiffusion | None = None,
) -> None:
    """Write tokens in the format of diffusers, or one token of SDXL in that of kohya.

    A1111 reads both, and names the token after the file.

    Args:
        tokens: vectors (n, D) by token; for SDXL those for CLIP-L (n, 768) and bigG (n, 1280).
        metadata: entries of the file; None = none besides those that are computed.
        model: model that they were trained for, whose base model goes into the metadata; None =
            unknown.
    """
    state: dict[str, Tensor] = {}
    entries: dict[str, str | int] = {
        "modelspec.trigger_phrase": ", ".join(tokens),
        **(metadata or {}),
    }
    entries = describe_model(model, Path(path).stem, "textual-inversion", entries)
    for token, value in tokens.items():
        vectors = [value] if isinstance(value, Tensor) else value
        names = [token] if len(vectors) == 1 else XL_KEYS
        state |= {name: v.detach().cpu() for name, v in zip(names, vectors, strict=True)}
        if len(vectors) > 1:
            entries[TOKEN_KEY] = token
    write_checkpoint(path, state, entries)


def _parse_tokens(state: Mapping[str, Tensor], name: str, path: Path) -> dict[str, list[Tensor]]:
    """Return the vectors (n, D) by token, for one or two text encoders.

    Args:
        state: tensors of a file.
        name: the token, if the file does not name its only one.
        path: the file, for messages.
    """
    state = {DIFFUSERS_XL_KEYS.get(key, key): value for key, value in state.items()}
    xl_vectors = [state[key] for key in XL_KEYS if key in state]
    params = {n.removeprefix(PARAMETERS): v for n, v in state.items() if n.startswith(PARAMETERS)}
    if xl_vectors:
        tokens = {name: xl_vectors}
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
