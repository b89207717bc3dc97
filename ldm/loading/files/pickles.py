"""Read pickled checkpoints without executing code in them.

A pickle may import and call anything. torch's restricted unpickler allows only the few functions
that rebuild tensors. For other names in published files, of training frameworks, this module adds
stand-ins: empty classes, so that neither Lightning nor numpy must be installed or trusted. There is
no unsafe fallback.

A TorchScript archive contains code and a pickle of modules. Its weights are copied to a temporary
archive without the code, and read in the same way, with stand-ins for the modules.
"""

import contextlib
import pickletools
import re
import shutil
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from ldm.runtime.errors import FileFormatError

__all__ = ["list_foreign_imports", "list_pickle_imports", "load_pickle"]

MAX_PICKLE_BYTES = 100_000_000
MAX_MEMBERS = 100_000
TORCH_SAVE_MEMBER = re.compile(  # files in an archive of torch.save
    r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id)"
)
MIN_TORCH_VERSION = (2, 10)  # the restricted unpickler of older versions was not safe
NUM_LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of storages
TORCHSCRIPT_MEMBER = "/constants.pkl"  # only TorchScript archives have it
TORCHSCRIPT_MODULE = re.compile(r"__torch__\.[\w.]+")
TORCHSCRIPT_FUNCTION = re.compile(r"torch\.jit\._pickle\.\w+")  # for attributes other than weights
# Around the cause in the messages of torch's restricted unpickler.
TORCH_ADVICE = re.compile(
    r"^Weights only load failed\.(.* WeightsUnpickler error:)? *| Check the documentation of .*"
)
# Names that error messages do not list; this does not allow to import them.
HARMLESS_IMPORT = re.compile(
    r"collections\.OrderedDict|torch\.(_utils\._rebuild_\w+|\w+Storage|\w+\d+|Size)"
    r"|__builtin__\.(dict|list|long)"
    rf"|{TORCHSCRIPT_MODULE.pattern}|{TORCHSCRIPT_FUNCTION.pattern}"
)

# Names in the training states of published files that are replaced by stand-ins.
DICT_NAMES = (
    "collections.defaultdict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
STAND_IN_NAMES = (
    *DICT_NAMES,
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.dict",
    "builtins.int",
    "builtins.list",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "typing.Any",
)


class StandIn:
    """Stand-in for a foreign class or function: accepts any arguments and state, ignores them."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class DictStandIn(StandIn):
    """Stand-in for a subclass of dict: makes a plain dict, as torch fills no other."""

    def __new__(cls, *args: object) -> Any:
        return {}


class ParameterDict(dict[str, torch.Tensor]):
    """Stand-in for `torch.nn.ParameterDict`, used in old textual inversions."""

    def __setstate__(self, state: Any) -> None:
        tensors = state.get("_parameters") if isinstance(state, dict) else None
        self.update(tensors if isinstance(tensors, dict) else {})


class ScriptModule(dict[str, Any]):
    """Stand-in for a TorchScript module: its weights and submodules by name, without code."""

    def __setstate__(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {})


# A class for each name, as files use these classes as dictionary keys.
STAND_INS: list[tuple[type, str]] = [
    (type(name.rpartition(".")[2], (DictStandIn if name in DICT_NAMES else StandIn,), {}), name)
    for name in STAND_IN_NAMES
]
STAND_INS.append((ParameterDict, "torch.nn.modules.container.ParameterDict"))
# One thread reads at a time, as torch has only one list of allowed names for the whole process.
_LOCK = threading.Lock()


def load_pickle(path: Path, file_format: str) -> tuple[Any, bool]:
    """Read a pickled file, of format "zip" or "legacy", with the restricted unpickler.

    Returns:
        (content, whether its tensors are memory-mapped).

    Raises:
        FileFormatError: The file is damaged, or contains more than plain data.
    """
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < MIN_TORCH_VERSION:
        raise FileFormatError(
            f"`{path}`: reading pickles safely needs torch 2.10 or newer, this is "
            f"{torch.__version__}\nhint: any version reads .safetensors files"
        )
    is_torchscript = file_format == "zip" and _check_members(path)
    torchscript_stand_ins = _make_torchscript_stand_ins(path) if is_torchscript else []
    try:
        with (
            _LOCK,
            torch.serialization.safe_globals([*STAND_INS, *torchscript_stand_ins]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            # torch.load detects .safetensors by the suffix only, and memory-maps only paths.
            memory_mapped = (
                file_format == "zip" and path.suffix != ".safetensors" and not is_torchscript
            )
            with _copy_without_code(path) if is_torchscript else path.open("rb") as file:
                source: Any = str(path) if memory_mapped else file
                content = torch.load(
                    source, map_location="cpu", weights_only=True, mmap=memory_mapped
                )
    except Exception as error:  # a malicious file may cause any error in the parser
        foreign = list_foreign_imports(path, file_format)
        # torch's own words advise to load the file without its restricted unpickler.
        words = TORCH_ADVICE.sub("", " ".join(str(error).split()))
        reason = words[:200] or type(error).__name__
        if foreign:
            names = ", ".join(f"`{name}`" for name in foreign[:10])
            reason = f"its pickle imports {names}, which weights do not need"
        elif file_format == "legacy" and ("unexpected EOF" in reason or _ends_in_pickle(path)):
            message = f"`{path}` is damaged, perhaps an incomplete download: {reason}"
            raise FileFormatError(message) from error
        raise FileFormatError(f"`{path}` is refused: {reason}") from error
    return content, memory_mapped


def list_pickle_imports(path: Path, file_format: str) -> list[str]:
    """Return the names that the pickles in a file would import, without executing them."""
    names: set[str] = set()
    if file_format == "zip":
        with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".pkl") and member.file_size <= MAX_PICKLE_BYTES:
                    with archive.open(member) as file:
                        names.update(_list_imports(file))
    else:
        with path.open("rb") as file:
            for _ in range(NUM_LEGACY_PICKLES):
                names.update(_list_imports(file))
    return sorted(names)


def list_foreign_imports(path: Path, file_format: str) -> list[str]:
    """Return the names in `list_pickle_imports` that weights do not need."""
    names = list_pickle_imports(path, file_format)
    return [n for n in names if n not in STAND_IN_NAMES and not HARMLESS_IMPORT.fullmatch(n)]


def _make_torchscript_stand_ins(path: Path) -> list[tuple[type, str]]:
    """Return a stand-in for each class and function in a TorchScript archive."""
    stand_ins: list[tuple[type, str]] = []
    for name in list_pickle_imports(path, "zip"):
        for pattern, base in ((TORCHSCRIPT_MODULE, ScriptModule), (TORCHSCRIPT_FUNCTION, StandIn)):
            if pattern.fullmatch(name):
                stand_ins.append((type(name.rpartition(".")[2], (base,), {}), name))
    return stand_ins


@contextlib.contextmanager
def _copy_without_code(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary copy of a TorchScript archive with its weights only."""
    with tempfile.TemporaryFile() as copy:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as weights:
            for member in archive.infolist():
                if TORCH_SAVE_MEMBER.fullmatch(member.filename):
                    target = weights.open(member.filename, "w", force_zip64=True)
                    with archive.open(member) as source, target:
                        shutil.copyfileobj(source, target)
        copy.seek(0)
        yield copy


def _check_members(path: Path) -> bool:
    """Check the members of a zip file; return whether it is a TorchScript archive.

    Raises:
        FileFormatError: The file was not written by torch.save.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        message = f"`{path}` is damaged, perhaps an incomplete download: {error}"
        raise FileFormatError(message) from error
    is_torchscript = any(member.filename.endswith(TORCHSCRIPT_MEMBER) for member in members)
    problem = None
    if is_torchscript:
        members = [member for member in members if TORCH_SAVE_MEMBER.fullmatch(member.filename)]
    for member in members:
        if not TORCH_SAVE_MEMBER.fullmatch(member.filename):
            problem = f"`{member.filename}` does not belong in a checkpoint"
        elif member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            problem = f"`{member.filename}` is compressed"
        elif member.filename.endswith("data.pkl") and member.file_size > MAX_PICKLE_BYTES:
            problem = f"a pickle of {member.file_size} bytes"
    names = [member.filename for member in members]
    if len(set(names)) < len(names) or sum(name.endswith("/data.pkl") for name in names) != 1:
        problem = problem or "exactly one `data.pkl` is expected"
    if len(names) > MAX_MEMBERS:
        problem = f"{len(names)} members"
    if problem:
        raise FileFormatError(f"`{path}` is refused: {problem}")
    return is_torchscript


def _ends_in_pickle(path: Path) -> bool:
    """Return whether a file of the older format ends within one of its pickles."""
    with path.open("rb") as file:
        try:
            for _ in range(NUM_LEGACY_PICKLES):
                for _ in pickletools.genops(file):
                    pass
        except (ValueError, EOFError, IndexError):
            return not file.read(1)
    return False


def _list_imports(file: IO[bytes]) -> Iterator[str]:
    """Yield the names that a pickle imports, until it ends or is malformed."""
    strings: list[str] = []
    memo: dict[Any, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".", 1)
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            elif opcode.name.startswith("EXT"):
                yield f"copyreg extension {argument}"
            elif isinstance(argument, str):
                strings.append(argument)
            elif opcode.name == "MEMOIZE":  # numbers all values, also those before any string
                memo[len(memo)] = strings[-1] if strings else ""
            elif opcode.name in ("BINPUT", "LONG_BINPUT") and strings:
                memo[argument] = strings[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET") and argument in memo:
                strings.append(memo[argument])
    except (ValueError, EOFError, IndexError):
        return
