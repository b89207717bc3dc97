"""Read and write textual inversions: tokens for prompts, with vectors for one or two text encoders.

The file is called a textual inversion; a token with its vectors is an embedding.

    A1111        {"string_to_param": {"*": (n, D)}, …} in a .pt, {"emb_params": (n, D)}: the token
                 is the name of the file, unless there are several. In a .png: JSON in base64, in a
                 text chunk
    diffusers    {"<token>": (D,) or (n, D)} in a .bin or .safetensors; SDXL: a file per encoder
    SDXL         {"clip_l": (n, 768), "clip_g": (n, 1280)}: kohya, A1111, ComfyUI
    in LoRAs     any of these with the prefix `bundle_emb.TOKEN.`

The width D determines the text encoder. In a prompt a token stands for all of its n vectors. Gal
et al. 2022 (arXiv:2208.01618).
"""

import base64
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.encoders.text import TextEncoder
from ldm.imaging.reading import open_image
from ldm.loading.files.checkpoint import compute_short_hash, read_checkpoint, write_checkpoint
from ldm.loading.modelspec import make_modelspec
from ldm.loading.weight_names import select_prefix
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError, FileFormatError, WeightsMismatch, WrongFamily
from ldm.runtime.files import list_files

__all__ = [
    "BUNDLE_PREFIX", "add_embeddings", "check_embeddings", "list_embedding_files",
    "load_embeddings", "read_bundle", "read_embeddings", "write_embeddings",
]  # fmt: skip

log = logging.getLogger(__name__)

SUFFIXES = (".pt", ".bin", ".safetensors")
PNG_SUFFIX = ".png"
PNG_TEXT_KEY = "sd-ti-embedding"  # text chunk of A1111's PNGs
TENSOR_KEY = "TORCHTENSOR"  # A1111's key of a tensor in JSON
MAX_TOKENS = 76  # a file with more tensors is not a textual inversion
STRING_TO_PARAM_PREFIX = "string_to_param."
SINGLE_TOKEN_KEY = "emb_params"  # vectors of a single token, which is named after the file
SDXL_KEYS = ("clip_l", "clip_g")  # the same, for each text encoder of SDXL
# Keys of diffusers' training script.
DIFFUSERS_SDXL_KEYS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
TOKEN_KEY = "ldm.token"  # metadata key of a single token, if it is not named after the file
BUNDLE_PREFIX = "bundle_emb."  # of embeddings in LoRA files
BUNDLE_KEY = re.compile(
    rf"{re.escape(BUNDLE_PREFIX)}(?:(?P<token>.+?)\.)?(?P<key>string_to_param\..*|[^.]+)"
)
# Title of a family by the width of its last text encoder.
FAMILY_BY_WIDTH = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}


def load_embeddings(
    model: LatentDiffusion, paths: Iterable[str | Path], strict: bool = True
) -> None:
    """Add the tokens of files, and of files in folders, to a model's text encoders.

    `model.provenance` records the files.

    Args:
        strict: Whether to raise an error for a file that does not fit; False = skip it with a
            warning, as is always done for the files in a folder.

    Raises:
        FileFormatError: A file is not a textual inversion.
        WeightsMismatch: A file is for another text encoder.
        WrongFamily: The model has no text encoder.
    """
    entries, added_tokens = [], []
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
            added_tokens += words
            short_hash = compute_short_hash(file)
            entries.append({"path": str(file.resolve()), "words": words, "hash": short_hash})
    if entries:
        model.provenance["embeddings"] = [*model.provenance.get("embeddings", []), *entries]
    _warn_about_missing_vectors(model, added_tokens)


def check_embeddings(model: LatentDiffusion, paths: Iterable[str | Path]) -> None:
    """Raise what `load_embeddings` would raise; the model may be on the meta device."""
    for path in map(Path, paths):
        if not path.expanduser().is_dir():
            _check_tokens(model, read_embeddings(path), path)


def add_embeddings(
    model: LatentDiffusion, tokens: Mapping[str, Sequence[Tensor]], file: Path
) -> None:
    """Add tokens to the text encoders that have the width of their vectors.

    Args:
        tokens: Vectors (n, D) for one or two text encoders, by token.
        file: File with the tokens, for messages.
    Raises:
        WeightsMismatch: The vectors are for another text encoder.
        WrongFamily: The model has no text encoder.
    """
    if not tokens:
        return
    _check_tokens(model, tokens, file)
    encoders = model.conditioner.find_all(TextEncoder)
    for token, vectors_by_encoder in tokens.items():
        by_width = {vectors.shape[1]: vectors for vectors in vectors_by_encoder}
        matching = [encoder for encoder in encoders if encoder.width in by_width]
        if any(token.lower() in encoder.added_embeddings for encoder in matching):
            log.warning("`%s` replaces `%s` of another file", file, token)
        for encoder in matching:
            encoder.added_embeddings[token.lower()] = by_width[encoder.width]
    log.info("`%s` adds %s", file, ", ".join(f"`{token}`" for token in tokens))


def _check_tokens(
    model: LatentDiffusion, tokens: Mapping[str, Sequence[Tensor]], file: Path
) -> None:
    """Raise WeightsMismatch or WrongFamily unless each token fits one of the text encoders."""
    encoders = model.conditioner.find_all(TextEncoder)
    if not encoders:
        raise WrongFamily("this model has no text encoder: embeddings cannot be added")
    widths = [encoder.width for encoder in encoders]
    for token, vectors_by_encoder in tokens.items():
        # The last vectors show the family: the first of SDXL, for CLIP-L, also fit SD 1.
        width = vectors_by_encoder[-1].shape[1]
        if width not in widths:
            expected = " or ".join(map(str, widths))
            raise WeightsMismatch(
                f"`{file}`: `{token}` has vectors of width {width} "
                f"({FAMILY_BY_WIDTH.get(width, 'another model')}); the text encoder takes "
                f"{expected} ({FAMILY_BY_WIDTH.get(widths[-1], 'another model')})"
            )


def _warn_about_missing_vectors(model: LatentDiffusion, tokens: Iterable[str]) -> None:
    """Warn about tokens with vectors for only one of two text encoders."""
    encoders = model.conditioner.find_all(TextEncoder)
    for token in dict.fromkeys(tokens):
        widths = [encoder.width for encoder in encoders if token in encoder.added_embeddings]
        missing = [encoder.width for encoder in encoders if token not in encoder.added_embeddings]
        if widths and missing:
            log.warning(
                "`%s` has vectors for the text encoder of width %d only (%s): that of width %d "
                "reads it as plain text",
                token, widths[0], FAMILY_BY_WIDTH.get(widths[0], "another model"), missing[0],
            )  # fmt: skip


def list_embedding_files(path: str | Path) -> list[Path]:
    """Return the file at a path; of a folder, the textual inversions in it and its subfolders."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return [path]
    files = filter(Path.is_file, list_files(path))
    return sorted(f for f in files if f.suffix.lower() in SUFFIXES or _read_png_text(f))


def read_embeddings(path: str | Path) -> dict[str, list[Tensor]]:
    """Read a file's tokens, each with vectors (n, D) for one or two text encoders."""
    path = Path(path).expanduser()
    if path.suffix.lower() == PNG_SUFFIX:
        return _read_png(path)
    checkpoint = read_checkpoint(path)
    return _parse_tokens(checkpoint.state_dict, checkpoint.metadata.get(TOKEN_KEY, path.stem), path)


def _read_png(path: Path) -> dict[str, list[Tensor]]:
    """Return the tokens that A1111 stores in a text chunk of a PNG."""
    text = _read_png_text(path)
    if not text:
        raise FileFormatError(f"`{path}` is an image without a textual inversion")
    try:
        content = json.loads(base64.b64decode(text))
        tensors = {
            f"{STRING_TO_PARAM_PREFIX}{name}": torch.tensor(value[TENSOR_KEY], dtype=torch.float32)
            for name, value in content[STRING_TO_PARAM_PREFIX.rstrip(".")].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"`{path}`: the textual inversion in it is damaged") from error
    return _parse_tokens(tensors, str(content.get("name") or path.stem), path)


def _read_png_text(path: Path) -> str:
    """Return A1111's text chunk of a PNG with a textual inversion; "" if it has none."""
    if path.suffix.lower() != PNG_SUFFIX:
        return ""
    try:
        with open_image(path) as image:
            return str(image.info.get(PNG_TEXT_KEY, ""))
    except FileFormatError:
        return ""


def read_bundle(path: Path) -> dict[str, list[Tensor]]:
    """Return the tokens in a LoRA file with their vectors, as `read_embeddings` does."""
    bundles: dict[str, dict[str, Tensor]] = {}
    for name, value in read_checkpoint(path).state_dict.items():
        if match := BUNDLE_KEY.fullmatch(name):
            bundles.setdefault(match["token"] or match["key"], {})[match["key"]] = value
    return {
        token: vectors_by_encoder
        for bundle, tensors in bundles.items()
        for token, vectors_by_encoder in _parse_tokens(tensors, bundle, path).items()
    }


def write_embeddings(
    path: str | Path,
    tokens: Mapping[str, Tensor | Sequence[Tensor]],
    metadata: Mapping[str, str | int] | None = None,
    model: LatentDiffusion | None = None,
) -> None:
    """Write tokens in the format of diffusers, or one token of SDXL in that of kohya.

    A1111 reads files of one token in either format, and names the token after the file.

    Args:
        tokens: Vectors (n, D) by token; for SDXL (n, 768) of CLIP-L and (n, 1280) of bigG.
        metadata: Additional metadata of the file; None = no additions.
        model: Model that the tokens were trained for, for the metadata; None = unknown.
    Raises:
        ArgumentError: There are several tokens for SDXL: a file can contain only one.
    """
    state: dict[str, Tensor] = {}
    metadata = {"modelspec.trigger_phrase": ", ".join(tokens), **(metadata or {})}
    entries = make_modelspec(model, Path(path).stem, "textual-inversion", metadata)
    for token, value in tokens.items():
        vectors_by_encoder = [value] if isinstance(value, Tensor) else value
        keys = [token] if len(vectors_by_encoder) == 1 else SDXL_KEYS
        for key, vectors in zip(keys, vectors_by_encoder, strict=True):
            state[key] = vectors.detach().cpu()
        if len(vectors_by_encoder) > 1:
            if len(tokens) > 1:
                listed = ", ".join(f"`{name}`" for name in tokens)
                message = f"a file can contain only one token of SDXL, got {listed}"
                raise ArgumentError(f"{message}: write one file for each", "tokens")
            entries[TOKEN_KEY] = token
    write_checkpoint(path, state, entries)


def _parse_tokens(state: Mapping[str, Tensor], name: str, path: Path) -> dict[str, list[Tensor]]:
    """Return a file's vectors (n, D) by token; `name` is the token if the file has none."""
    state = {DIFFUSERS_SDXL_KEYS.get(key, key): value for key, value in state.items()}
    sdxl_vectors = [state[key] for key in SDXL_KEYS if key in state]
    params = select_prefix(state, STRING_TO_PARAM_PREFIX)
    if sdxl_vectors:
        tokens = {name: sdxl_vectors}
    elif SINGLE_TOKEN_KEY in state:
        tokens = {name: [state[SINGLE_TOKEN_KEY]]}
    elif len(params) == 1:
        tokens = {name: list(params.values())}
    else:
        tokens = {token: [value] for token, value in (params or state).items()}
    all_vectors = [vectors for by_encoder in tokens.values() for vectors in by_encoder]
    if len(tokens) > MAX_TOKENS or any(vectors.dim() not in (1, 2) for vectors in all_vectors):
        raise FileFormatError(
            f"`{path}` is not a textual inversion: its tensors are not vectors of tokens"
        )
    for token, vectors_by_encoder in tokens.items():
        if not token.strip():
            raise FileFormatError(f"`{path}`: one of its tokens has no name")
        if not all(vectors.numel() for vectors in vectors_by_encoder):
            raise FileFormatError(f"`{path}`: `{token}` has no vectors")
        if not all(vectors.float().isfinite().all() for vectors in vectors_by_encoder):
            raise FileFormatError(f"`{path}`: the vectors of `{token}` are not finite")
        counts = [vectors.numel() // vectors.shape[-1] for vectors in vectors_by_encoder]
        if len(set(counts)) > 1:
            raise FileFormatError(
                f"`{path}`: `{token}` has {counts[0]} vectors for CLIP-L and {counts[1]} for bigG"
            )
    return {
        token: [vectors.reshape(-1, vectors.shape[-1]).clone() for vectors in vectors_by_encoder]
        for token, vectors_by_encoder in tokens.items()
    }
