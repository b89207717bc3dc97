"""Files <-> weights: `.ckpt` (zip and older pickles) and `.safetensors`, told apart by content.

Reading never runs what a file names: pickles go through `pickles`. Files are memory-mapped: a
tensor costs memory only when it is used.

    Lightning dict {"state_dict": {…}, "global_step": …, "callbacks": …}  |  bare {name: tensor}
        -> Checkpoint(state, step, has_ema, …), names as in the file
"""

import ctypes
import hashlib
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.loading.files.pickles import read_pickle

__all__ = ["Checkpoint", "file_hash", "read_checkpoint", "release_pages", "write_checkpoint"]

EMBEDDED = "ldm.config"  # metadata key under which a file carries its own YAML
MAX_TENSORS = 20_000
MAX_HEADER = 100_000_000  # bytes of names in a .safetensors
# The pickled number that torch.save put first, before it wrote zip files.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
WRAPPERS = ("state_dict", "model_state_dict")
# What a .safetensors calls kinds of numbers.
SPELLINGS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, names as in the file, `model_ema.*` put in place or left out.

    kind: "zip", "legacy" or "safetensors".
    mapped: tensors are pages of the file, not memory.
    extras: entries beside the weights (`global_step`, `callbacks` …), only their names.
    metadata: texts beside the weights.
    averages: everything named `model_ema.*`.
    """

    path: Path
    kind: str
    state: dict[str, Tensor]
    step: int | None = None
    has_ema: bool = False
    ema: bool = False
    mapped: bool = False
    extras: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)


def read_checkpoint(path: str | Path, ema: bool = False, names: Iterable[str] = ()) -> Checkpoint:
    """The weights of a file, without running anything in it.

        ema: take the averaged weights (`model_ema.*`) where the raw ones stand.
        names: the model's own names, for files that hold averaged weights only.
    Raises FileNotFoundError, or ValueError for a file that is no checkpoint, is not safe to read,
    or has no averaged weights when they are asked for.
    """
    path = Path(path).expanduser()
    kind = detect_format(path)
    metadata: dict[str, str] = {}
    mapped = True
    if kind == "safetensors":
        content, metadata = _read_safetensors(path)
    else:
        content, mapped = read_pickle(path, kind)
        metadata = {str(k): v for k, v in content.items() if isinstance(v, str)}
    state, extras = _unwrap(content, path)
    step = content.get("global_step", metadata.get("global_step"))
    if isinstance(step, str) and step.isdigit():
        step = int(step)
    averages = {k for k in state if k.startswith("model_ema.")}
    averages -= {"model_ema.decay", "model_ema.num_updates"}
    if ema:
        _choose_averages(state, averages, [*names, *state], path)
    kept = {key: state.pop(key) for key in list(state) if key.startswith("model_ema.")}
    return Checkpoint(
        path=path,
        kind=kind,
        state=state,
        step=step if isinstance(step, int) else None,
        has_ema=bool(averages),
        ema=ema,
        mapped=mapped,
        extras=extras,
        metadata=metadata,
        averages=kept,
    )


def write_checkpoint(
    path: str | Path,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str | int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    mapped: bool = False,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes weights, `.safetensors` or `.ckpt` by the name; whole or not at all.

        state: names as they shall be in the file; see `legacy.rename_back`.
        metadata: kept beside them (`global_step`, texts); read back as `Checkpoint.metadata`.
        dtype: of all floating-point tensors; None leaves them as they are.
        mapped: they are pages of files, given back once written, so that memory stays small.
        progress: told the bytes of each tensor that was written.
    Raises ValueError for another ending.
    """
    path, notes = Path(path), dict(metadata or {})
    if path.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"`{path}`: the name must end in `.safetensors` or `.ckpt`")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        ready = {name: _Ready(value, dtype, mapped) for name, value in state.items()}
        if path.suffix == ".safetensors":
            texts = {key: str(value) for key, value in notes.items()}
            _stream(temporary, ready, {"format": "pt"} | texts, progress)
        else:
            weights = {}
            for name, value in ready.items():
                weights[name] = value.separate()
                progress(weights[name].nbytes)
            torch.save({"state_dict": weights, **notes}, temporary)
        _to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        _to_disk(path.parent)


def detect_format(path: Path) -> str:
    """What a file is by its first bytes: "zip", "legacy" or "safetensors".

    Raises FileNotFoundError, or ValueError saying what it looks like instead.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint `{path}`")
    with path.open("rb") as file:
        start = file.read(512)
    size = path.stat().st_size
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start.startswith(LEGACY_MAGIC):
        return "legacy"
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    looks = "not a checkpoint"
    if not start:
        looks = "an empty file"
    elif b"<html" in start.lower() or b"<!doctype" in start.lower():
        looks = "a web page, probably a failed download"
    elif start.startswith(b"version https://git-lfs"):
        looks = "a Git LFS pointer, not the file itself"
    elif start[:1] == b"\x80":
        looks = "a pickle that `torch.save` did not write, refused"
    raise ValueError(f"`{path}` is {looks}")


def file_hash(path: str | Path) -> str:
    """First ten hex digits of the SHA-256 of a file: the usual name of a model.

    Of a folder: that of all weights in it, one after the other.
    """
    path = Path(path).resolve()
    files = sorted(path.glob("*/*.safetensors")) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    return _hash(tuple(files), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


def release_pages(tensor: Tensor) -> None:
    """Gives the pages of a mapped tensor back to the system once it was copied elsewhere.

    Only for tensors of a `mapped` checkpoint: their pages come back from the file when touched.
    """
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0 and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


@lru_cache(maxsize=64)
def _hash(files: tuple[Path, ...], changed: tuple[tuple[int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:10]


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"`{path}`: a header of {length} bytes is refused")
        count = file.read(length).count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise ValueError(f"`{path}`: {count} tensors are refused, at most {MAX_TENSORS}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {name: file.get_tensor(name) for name in keys}, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"`{path}` is damaged: {error}") from error


def _unwrap(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights in what a file holds, and the names of what else is there."""
    inner = next((k for k in WRAPPERS if isinstance(content.get(k), Mapping)), None)
    found = dict(_flatten(content[inner] if inner else content, ""))
    for name, value in found.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise ValueError(f"`{path}`: `{name}` is not a plain tensor")
    if not found:
        raise ValueError(f"`{path}` holds no weights")
    if len(found) > MAX_TENSORS:
        raise ValueError(f"`{path}`: {len(found)} tensors are refused, at most {MAX_TENSORS}")
    if all(name.startswith("module.") for name in found):  # saved from inside DataParallel
        found = {name.removeprefix("module."): value for name, value in found.items()}
    extras = tuple(str(key) for key in content if key != inner and f"{key}" not in found)
    return found, extras


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield prefix[:-1], node.detach()
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}{key}.")
    elif isinstance(node, list | tuple):
        for key, value in enumerate(node):
            yield from _flatten(value, f"{prefix}{key}.")


def _choose_averages(
    state: dict[str, Tensor], averages: set[str], names: Iterable[str], path: Path
) -> None:
    """Puts each `model_ema.` tensor where the raw one stands; its name lost its dots."""
    if not averages:
        raise ValueError(f"`{path}` has no averaged (EMA) weights\nhint: load it without `ema`")
    left = set(averages)
    for name in names:
        key = "model_ema." + name.removeprefix("model.").replace(".", "")
        if key in averages:
            state[name] = state[key]
            left.discard(key)
    if left:
        some = ", ".join(f"`{key}`" for key in sorted(left)[:10])
        raise ValueError(f"`{path}`: {len(left)} averaged weights fit no name: {some}")


@dataclass(frozen=True)
class _Ready:
    """A tensor to be written, cast and copied only when its turn comes."""

    value: Tensor
    dtype: torch.dtype | None
    mapped: bool

    @property
    def kind(self) -> torch.dtype:
        is_cast = self.dtype is not None and self.value.is_floating_point()
        return self.dtype if is_cast else self.value.dtype  # type: ignore[return-value]

    def separate(self) -> Tensor:
        """Contiguous, in memory of its own: a .ckpt holds whole storages."""
        old = self.value.detach()
        new = old.to("cpu", self.kind).contiguous()
        if new.untyped_storage().nbytes() != new.nbytes:
            new = new.clone()
        if self.mapped and new.data_ptr() != old.data_ptr():
            release_pages(old)
        return new


def _stream(
    path: Path,
    state: Mapping[str, _Ready],
    notes: Mapping[str, str],
    progress: Callable[[int], object],
) -> None:
    """A .safetensors, one tensor after the other: length of the header, header, numbers."""
    # Wide numbers first, as readers may expect them to be aligned.
    order = sorted(state, key=lambda name: -state[name].kind.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    end = 0
    for name in order:
        kind, shape = state[name].kind, list(state[name].value.shape)
        if kind not in SPELLINGS:
            raise ValueError(f"`{name}`: a .safetensors cannot hold {kind}")
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": SPELLINGS[kind], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = state[name].separate()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            progress(value.nbytes)
            if state[name].mapped:
                release_pages(value)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
