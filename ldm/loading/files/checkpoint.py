"""Read and write weights: `.ckpt` (zip, or older pickles) and `.safetensors`, detected by content.

Pickled code is never executed, see `pickles`. Files are memory-mapped: a tensor takes memory only
when it is used.

    Lightning dict {"state_dict": {…}, "global_step": …, "callbacks": …}  |  bare {name: tensor}
        -> Checkpoint(state_dict, step, ema_state_dict, …), names as in the file, without wrappers
"""

import ctypes
import hashlib
import itertools
import json
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.loading.files.pickles import load_pickle
from ldm.loading.weight_names import remove_wrappers
from ldm.runtime.errors import ArgumentError, FileFormatError, MissingFile
from ldm.runtime.files import write_atomically
from ldm.runtime.hashes import get_sha256
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "CONFIG_KEY", "TENSOR_HASH_KEY", "Checkpoint", "LazyTensor", "cast_weight",
    "compute_short_hash", "detect_format", "loads_lazily", "read_checkpoint", "release_pages",
    "to_ema_name", "use_ema_weights", "would_overflow", "write_checkpoint",
]  # fmt: skip

CONFIG_KEY = "ldm.config"  # metadata key of the text of the model's YAML
# Metadata key of the SHA-256 of all tensors' bytes, computed while a .safetensors is written.
TENSOR_HASH_KEY = "modelspec.hash_sha256"
MAX_TENSORS = 20_000
MAX_DEPTH = 8  # of mappings within mappings
MAX_NODES = 1_000_000  # values in an entry of a pickle, which may contain itself many times
MAX_HEADER_BYTES = 100_000_000  # of a .safetensors
# Pickled magic number of torch.save's format before version 1.6.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
UNSUPPORTED_FORMATS = {  # description -> first bytes of the file, in lower case
    "a Git LFS pointer, not the file itself": (b"version https://git-lfs",),
    "a pickle not written by `torch.save`, which is refused": (b"\x80",),
    "a GGUF file, whose quantized weights are not supported": (b"gguf",),
    "an HDF5 file, perhaps of Keras, which is not supported": (b"\x89hdf",),
    "an image, not weights": (b"\x89png", b"\xff\xd8\xff", b"riff"),
    "an archive, which must be unpacked first": (b"7z\xbc\xaf", b"rar!", b"\x1f\x8b"),
    "a JSON text, not weights: an index of shards, or a failed download": (b"{", b"[", b'"'),
}
# Keys of the weights of a model in a file, possibly nested.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module", "weights")
EMA_KEYS = ("ema_state_dict", "state_dict_ema", "ema", "model_ema")
# Of k-diffusion's upscaler: the key of its weights, which are EMA weights, and one of them.
K_DIFFUSION_KEY, K_DIFFUSION_WEIGHT = "model_ema", "inner_model.mapping_cond.weight"
EMA_COUNTERS = frozenset({"model_ema.decay", "model_ema.num_updates"})
# Patterns of weights files in a folder (pipeline or component); the first with a match is used.
FOLDER_PATTERNS = ("*/*.safetensors", "*.safetensors", "*/*.bin", "*.bin")
SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file or diffusers folder.

    Args:
        format: "zip", "legacy" or "safetensors"; "diffusers" for a folder.
        state_dict: Weights by name in the file, without EMA weights.
        step: Training step; None = unknown.
        memory_mapped: Whether tensors are memory-mapped from the file.
        other_keys: Keys beside those of the weights (`global_step` …).
        ema_state_dict: EMA weights, `model_ema.*`.
        added_tokens: Tokens added to the tokenizers of a folder, with vectors (n, D) for each text
            encoder.
    """

    path: Path
    format: str
    state_dict: dict[str, Tensor]
    step: int | None = None
    memory_mapped: bool = False
    other_keys: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    ema_state_dict: dict[str, Tensor] = field(default_factory=dict)
    added_tokens: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def has_ema(self) -> bool:
        """Whether the file has EMA weights, not just their counters."""
        return not self.ema_state_dict.keys() <= EMA_COUNTERS

    @property
    def has_litema_weights(self) -> bool:
        """Whether EMA weights are in the state dict, where the original's LitEma writes them."""
        return self.has_ema and not {*EMA_KEYS}.intersection(self.other_keys)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written, so that only one at a time is in memory.

    Args:
        compute: Returns the tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    compute: Callable[[], Tensor]

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Return whether its dtype is a floating-point one."""
        return self.dtype.is_floating_point


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights of a file, without executing pickled code.

    Raises:
        MissingFile: There is no such file.
        FileFormatError: The file is not a checkpoint, or its pickle has more than plain data.
    """
    path = Path(path).expanduser()
    file_format = detect_format(path)
    if file_format == "safetensors":
        memory_mapped, (content, metadata) = True, _read_safetensors(path)
    else:
        content, memory_mapped = load_pickle(path, file_format)
        if not isinstance(content, dict):
            content_type = type(content).__name__
            raise FileFormatError(f"`{path}` contains a {content_type}, not weights by name")
        metadata = {}
    weights, entries = _unwrap(content, path)
    state_dict = _check_tensors(weights, path)
    metadata |= {key: value for key, value in entries.items() if isinstance(value, str)}
    step = entries.get("global_step", metadata.get("global_step"))
    if isinstance(step, str) and step.isdigit():
        step = int(step)
    # torch.compile's wrapper `_orig_mod.` has lost its dot, as LitEma removes all dots.
    ema_names = [name for name in state_dict if name.startswith("model_ema.")]
    ema_state_dict = {name.replace("_orig_mod", ""): state_dict.pop(name) for name in ema_names}
    for key in EMA_KEYS:
        ema_weights = remove_wrappers(dict(_flatten(entries.get(key), path)))
        ema_state_dict |= {to_ema_name(name): value for name, value in ema_weights.items()}
    step = step if isinstance(step, int) else None
    return Checkpoint(
        path, file_format, state_dict, step, memory_mapped, tuple(entries), metadata, ema_state_dict
    )


def to_ema_name(name: str) -> str:
    """Convert the original's name of a weight to that of its EMA in LitEma, which has no dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def use_ema_weights(
    state_dict: dict[str, Tensor],
    ema_state_dict: Mapping[str, Tensor],
    names: Mapping[str, str],
    path: Path,
) -> None:
    """Replace weights of `state_dict`, in place, by EMA weights; add EMA weights of missing ones.

    Args:
        names: Original name of a weight -> its name in `state_dict`.
    """
    unused = ema_state_dict.keys() - EMA_COUNTERS
    if not unused:
        message = f"`{path}` has no EMA weights\nhint: load it without `ema`"
        raise ArgumentError(message, "ema")
    for original_name, name in names.items():
        key = to_ema_name(original_name)
        if key in ema_state_dict:
            state_dict[name] = ema_state_dict[key]
            unused.discard(key)
    if unused:
        examples = ", ".join(f"`{key}`" for key in sorted(unused)[:10])
        message = f"`{path}`: {len(unused)} EMA weights do not belong to the model: {examples}"
        raise FileFormatError(f"{message}\nhint: load it with `ema=False`", "ema")


def write_checkpoint(
    path: str | Path,
    state_dict: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str | int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    memory_mapped: bool = False,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Write weights atomically, as `.safetensors`, `.ckpt` or `.pth` by the suffix of the path.

    A `.pth` has them in the entry `model_ema`, as the file of k-diffusion's upscaler.

    Args:
        state_dict: Tensors by name in the file; see `weight_names.restore_names`.
        metadata: Read back as `Checkpoint.metadata`. If it has TENSOR_HASH_KEY, with any value, the
            hash of the tensors is written there, in a `.safetensors`. None = no metadata.
        dtype: Dtype of floating-point tensors in the file; None = unchanged.
        memory_mapped: Whether tensors are memory-mapped; their pages are released after writing.
        progress: Called with the size in bytes of each tensor after it is written.
    """
    path, metadata = Path(path), dict(metadata or {})
    suffix = path.suffix.lower()
    write_hash = metadata.pop(TENSOR_HASH_KEY, None) is not None
    if suffix not in (".safetensors", ".ckpt", ".pth"):
        raise ArgumentError(f"`{path}`: the name must end in `.safetensors`, `.ckpt` or `.pth`")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: _TensorToWrite(value, dtype, memory_mapped and isinstance(value, Tensor))
        for name, value in state_dict.items()
    }
    with write_atomically(path, sync=True) as temporary:
        try:
            if suffix == ".safetensors":
                string_metadata = {"format": "pt"} | {k: str(v) for k, v in metadata.items()}
                _write_safetensors(temporary, tensors, string_metadata, progress, write_hash)
            else:
                weights = {}
                for name, tensor in tensors.items():
                    weights[name] = tensor.materialize()
                    progress(weights[name].nbytes)
                key = K_DIFFUSION_KEY if suffix == ".pth" else "state_dict"
                # Not the path: errors would not tell a full disk.
                with temporary.open("wb") as file:
                    torch.save({key: weights, **metadata}, file)
        except OverflowError as error:
            names = [name for name, tensor in tensors.items() if tensor.would_overflow]
            raise _make_overflow_error(names, dtype) from error


def cast_weight(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight cast to a dtype; raise ArgumentError if it overflows."""
    if would_overflow(value, dtype):
        raise _make_overflow_error([name], dtype)
    return value.to(dtype)


def detect_format(path: Path) -> str:
    """Return the format of a file by its first bytes: "zip", "legacy" or "safetensors".

    "legacy" is the format of torch.save before version 1.6.

    Raises:
        MissingFile: There is no such file.
        FileFormatError: The file is not a checkpoint; the message says what it is.
    """
    if not path.is_file():
        raise MissingFile(f"no checkpoint `{path}`")
    with path.open("rb") as file:
        first_bytes = file.read(512)
    size = path.stat().st_size
    if first_bytes.startswith(b"PK\x03\x04"):
        return "zip"
    if first_bytes.startswith(LEGACY_MAGIC):
        return "legacy"
    header_size = (
        int.from_bytes(first_bytes[:8], "little") if first_bytes[8:9] == b"{" else math.inf
    )
    if header_size <= size - 8:
        return "safetensors"
    first_bytes = first_bytes.lower()
    formats = UNSUPPORTED_FORMATS.items()
    problem = next((title for title, prefixes in formats if first_bytes.startswith(prefixes)), None)
    if header_size <= MAX_HEADER_BYTES:
        problem = "damaged, perhaps an incomplete download"
    if b"<html" in first_bytes or b"<!doctype" in first_bytes:
        problem = "a web page, probably a failed download"
    problem = problem or ("not a checkpoint" if first_bytes else "an empty file")
    raise FileFormatError(f"`{path}` is {problem}")


def loads_lazily(path: Path) -> bool:
    """Return whether opening a file reads no weights, unlike pickles written before torch 1.6."""
    return path.is_file() and detect_format(path) != "legacy"


def compute_short_hash(path: str | Path) -> str:
    """Return the first ten hex digits of the SHA-256 of a file, or of all weights in a folder."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return get_sha256(path)[:10]
    matches = (sorted(path.glob(pattern)) for pattern in FOLDER_PATTERNS)
    return get_sha256(*next(filter(None, matches), []))[:10]


def release_pages(tensor: Tensor) -> None:
    """Release the pages of a memory-mapped tensor; they are read again if it is used.

    Only for tensors of a `memory_mapped` checkpoint: others could lose their values. Nothing is
    done for tensors computed from mapped ones, as in diffusers folders, which torch has allocated.
    """
    if tensor.untyped_storage().resizable():  # allocated by torch
        return
    # madvise takes whole pages: those with bytes of other tensors are not released.
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0 and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _read_safetensors(path: Path) -> tuple[JsonObject, dict[str, str]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            message = f"header too large: {length} bytes, at most {MAX_HEADER_BYTES} are allowed"
            raise FileFormatError(f"`{path}`: {message}")
        # One for each tensor; counted before safetensors builds objects for all of them.
        count = file.read(length).count(b'"data_offsets"')
    _check_count(count, path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {name: file.get_tensor(name) for name in keys}, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        message = f"`{path}` is damaged, perhaps an incomplete download: {error}"
        raise FileFormatError(message) from error


def _unwrap(content: JsonMapping, path: Path) -> tuple[JsonMapping, JsonObject]:
    """Return (mapping with the weights of a file, entries beside the weights)."""
    entries: JsonObject = {}
    ema = content.get(K_DIFFUSION_KEY)
    if isinstance(ema, Mapping) and K_DIFFUSION_WEIGHT in ema:
        weights_keys = (*STATE_DICT_KEYS, *EMA_KEYS)
        return ema, {str(k): v for k, v in content.items() if k not in weights_keys}
    for _ in range(MAX_DEPTH):  # a malicious mapping may contain itself
        weights_key = next((key for key in STATE_DICT_KEYS if _has_weights(content.get(key))), None)
        if weights_key is None:
            break
        entries |= {str(key): value for key, value in content.items() if key != weights_key}
        content = content[weights_key]
    # Beside weights without a wrapper: entries without a tensor. `_flatten` needs any prefix.
    entries |= {str(k): v for k, v in content.items() if not any(_flatten(v, path, "."))}
    return content, entries


def _has_weights(node: Any, depth: int = 0, seen: frozenset[int] = frozenset()) -> bool:
    """Return whether a node is a mapping of tensors by name, or a wrapper of one.

    Args:
        seen: The ids of mappings that contain the node.
    """
    if not isinstance(node, Mapping) or depth == MAX_DEPTH or id(node) in seen:
        return False
    is_flat = any(isinstance(value, Tensor) for value in node.values())
    seen |= {id(node)}
    return is_flat or any(_has_weights(node.get(key), depth + 1, seen) for key in STATE_DICT_KEYS)


def _check_tensors(content: JsonMapping, path: Path) -> dict[str, Tensor]:
    """Return weights by name; raise FileFormatError unless they are dense and real."""
    tensors = dict(_flatten(content, path))
    for name, value in tensors.items():
        is_sparse = value.layout is not torch.strided
        if is_sparse or value.is_quantized or value.is_nested or value.is_complex():
            message = "is quantized, nested, sparse or complex, which is not supported"
            raise FileFormatError(f"`{path}`: `{name}` {message}")
    if not tensors:
        raise FileFormatError(f"`{path}` contains no weights")
    _check_count(len(tensors), path)
    return remove_wrappers(tensors)


def _check_count(count: int, path: Path) -> None:
    if count > MAX_TENSORS:
        message = f"too many tensors: {count}, at most {MAX_TENSORS} are allowed"
        raise FileFormatError(f"`{path}`: {message}")


def _flatten(
    node: Any, path: Path, prefix: str = "", depth: int = 0, counter: Iterator[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of nested mappings and lists; names are joined by dots.

    Args:
        counter: Counts values, at most MAX_NODES; None = a new counter.
    """
    counter = itertools.count() if counter is None else counter
    if next(counter) > MAX_NODES:
        raise FileFormatError(
            f"`{path}` is refused: its pickle contains itself, or too many values"
        )
    if isinstance(node, Tensor):
        yield prefix[:-1], node.detach()
    elif isinstance(node, int | float) and prefix.endswith(".alpha."):  # of a LoRA
        yield prefix[:-1], torch.tensor(float(node))
    elif isinstance(node, Mapping | list | tuple) and depth < MAX_DEPTH:
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        for key, value in items:
            yield from _flatten(value, path, f"{prefix}{key}.", depth + 1, counter)


def would_overflow(value: Tensor, dtype: torch.dtype) -> bool:
    """Return whether any finite value of a tensor is too large for another dtype."""
    return bool((_is_finite(value) & ~_is_finite(value.to(dtype))).any())


def _is_finite(value: Tensor) -> Tensor:
    return (value.float() if value.dtype.itemsize == 1 else value).isfinite()


def _make_overflow_error(names: Sequence[str], dtype: torch.dtype | None) -> ArgumentError:
    listed = ", ".join(f"`{name}`" for name in names[:10])
    message = f"{len(names)} tensors have values too large for {dtype}: {listed}"
    return ArgumentError(f"{message}\nhint: use bfloat16 or float32", "dtype")


@dataclass(frozen=True)
class _TensorToWrite:
    """A tensor that is computed, cast and copied when it is written."""

    source: Tensor | LazyTensor
    target_dtype: torch.dtype | None  # None = the dtype of the source
    memory_mapped: bool

    @property
    def value(self) -> Tensor:
        return self.source.compute() if isinstance(self.source, LazyTensor) else self.source

    @property
    def dtype(self) -> torch.dtype:
        if self.target_dtype is not None and self.source.is_floating_point():
            return self.target_dtype
        return self.source.dtype

    @property
    def would_overflow(self) -> bool:
        return would_overflow(self.value, self.dtype)

    def materialize(self) -> Tensor:
        """Compute the tensor, cast to its dtype on the CPU, contiguous and alone in its storage.

        torch.save would write the whole storage of a view. Pages of a source that is copied are
        released.

        Raises:
            OverflowError: The cast overflows.
        """
        old = self.value.detach()
        new = old.to("cpu", self.dtype).contiguous()
        if new.dtype != old.dtype and not _is_finite(new).all() and self.would_overflow:
            raise OverflowError
        if new.untyped_storage().nbytes() != new.nbytes:
            new = new.clone()
        if self.memory_mapped and new.data_ptr() != old.data_ptr():
            release_pages(old)
        return new


def _write_safetensors(
    path: Path,
    tensors: Mapping[str, _TensorToWrite],
    metadata: Mapping[str, str],
    progress: Callable[[int], object],
    write_hash: bool,
) -> None:
    """Write length of the header, header, and one tensor after the other."""
    # The widest dtypes first, so that each tensor is aligned to its element size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    placeholder = {TENSOR_HASH_KEY: _format_hash(b"")} if write_hash else {}
    header: JsonObject = {"__metadata__": placeholder | dict(metadata)}
    end = 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].source.shape)
        if dtype not in SAFETENSORS_DTYPES:
            raise FileFormatError(f"`{name}`: a .safetensors does not support {dtype}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]
        }  # fmt: skip
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # so that the tensors are aligned to 8 bytes
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for name in names:
            value = tensors[name].materialize()
            data = value.reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            if write_hash:
                digest.update(data)
            progress(value.nbytes)
            if tensors[name].memory_mapped:
                release_pages(value)
        if write_hash:  # replaces the placeholder of the same length
            file.seek(8 + header_bytes.index(_format_hash(b"").encode()))
            file.write(_format_hash(digest.digest()).encode())


def _format_hash(digest: bytes) -> str:
    """Return a digest in ModelSpec's format; if it is empty, zeros of the same length."""
    return f"0x{digest.hex():0<64}"
