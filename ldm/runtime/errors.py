"""The errors that this package raises on purpose, and how any error reads in one line.

    LdmError
    ├── ArgumentError (ValueError)            a value that an argument does not allow
    │   ├── UnknownName                       not one of a closed list, with the nearest one
    │   ├── MissingArgument                   an argument that this call needs
    │   └── WrongFamily                       a model that is made for another task
    ├── MissingFile (FileNotFoundError)       a file that an argument names
    ├── DownloadError (OSError)               a file that a server does not give
    ├── ExistingFile (FileExistsError)        a file that is not replaced unasked
    ├── FileFormatError (ValueError)          a file that is damaged, refused or of another kind
    ├── ConfigError (ValueError)              a config that describes no model
    ├── WeightsMismatch (ValueError)          weights whose names or shapes do not fit a model
    └── NonFinite (ArithmeticError)           NaN or infinity from a stage of a model
    Stop                                      raised by a callback to end a run; not an error

Messages speak of arguments and files. Command lines know which flag sets an argument, and add it.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ArgumentError",
    "ConfigError",
    "DownloadError",
    "ExistingFile",
    "FileFormatError",
    "LdmError",
    "MissingArgument",
    "MissingFile",
    "NonFinite",
    "Stop",
    "UnknownName",
    "WeightsMismatch",
    "WrongFamily",
    "check_name",
    "check_names",
    "errors_about",
    "explain",
    "is_out_of_memory",
    "nearest_name",
    "unknown_name",
]

MAX_LISTED = 32
OUT_OF_MEMORY = ("out of memory", "not enough memory", "alloc_cpu")


class LdmError(Exception):
    """Base of all errors below.

    Args:
        message: what is wrong, and what is allowed.
        argument: name of the argument that causes it, so that callers can name their flag or field.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class ArgumentError(LdmError, ValueError):
    """A value that an argument does not allow."""


class UnknownName(ArgumentError):
    """A name outside a closed list; see `unknown_name`."""


class MissingArgument(ArgumentError):
    """An argument that this call needs, although it is optional in others."""


class WrongFamily(ArgumentError):
    """A model that is made for another task.

    Args:
        message: what kind of model it is.
        task: the task that it is for; None = no task here.
    """

    def __init__(self, message: str, task: str | None = None) -> None:
        super().__init__(message, "model")
        self.task = task


class MissingFile(LdmError, FileNotFoundError):
    """A file that does not exist."""


class DownloadError(LdmError, OSError):
    """A file that could not be downloaded from one place.

    Args:
        is_local: the cause is this machine or its connection, so that no other place helps.
    """

    def __init__(self, message: str, *, is_local: bool = False) -> None:
        super().__init__(message)
        self.is_local = is_local


class ExistingFile(LdmError, FileExistsError):
    """A file that exists and is not replaced unasked."""


class FileFormatError(LdmError, ValueError):
    """A file that is damaged, refused or of another kind."""


class ConfigError(LdmError, ValueError):
    """A config that is not one, or describes nothing that can be built."""


class WeightsMismatch(LdmError, ValueError):
    """Weights whose names or shapes do not fit a model."""


class NonFinite(LdmError, ArithmeticError):
    """NaN or infinity came out of a stage of the model.

    Args:
        stage: the part of the model, as in messages ("the VAE").
        cause: weights that are not finite themselves, so that no other dtype helps.
    """

    def __init__(self, stage: str, cause: str | None = None) -> None:
        reason = f": {cause}" if cause else ""
        super().__init__(f"{stage} gave values that are not finite{reason}")
        self.stage = stage
        self.cause = cause


class Stop(Exception):
    """Raised by a callback to end a run.

    Args:
        latent: of the unfinished images, (B, C, h, w), to decode all the same; None = give up.
    """

    def __init__(self, latent: "Tensor | None" = None) -> None:
        super().__init__()
        self.latent = latent


@contextmanager
def errors_about(argument: str) -> Iterator[None]:
    """Let errors that are raised inside, and name no argument, name this one."""
    try:
        yield
    except LdmError as error:
        error.argument = error.argument or argument
        raise


def nearest_name(name: str, allowed: Iterable[str]) -> str | None:
    """Find the allowed name most like `name` (`-` and `_` are equal), if one is close."""
    by_key = {other.replace("-", "_"): other for other in allowed}
    matches = difflib.get_close_matches(name.replace("-", "_"), by_key, n=1, cutoff=0.5)
    return by_key[matches[0]] if matches else None


def unknown_name(
    kind: str, name: object, allowed: Iterable[str], where: str = "", argument: str | None = None
) -> UnknownName:
    """Build the error for a name outside a closed list.

    Args:
        kind: what the name stands for: "sampler".
        where: the place that the name was read from, put first.
    Returns:
        UnknownName, whose message has the nearest allowed name, and all of them if they are few.
    """
    names = list(allowed)
    near = nearest_name(str(name), names)
    message = f"unknown {kind} `{name}`"
    if near:
        message += f", did you mean `{near}`?"
    if 0 < len(names) <= MAX_LISTED:
        message += f"{'' if near else ','} choose one of {', '.join(names)}"
    return UnknownName(f"{where}: {message}" if where else message, argument)


def check_name(
    kind: str,
    name: object,
    allowed: Collection[object],
    where: str = "",
    argument: str | None = None,
) -> None:
    """Raise UnknownName for a name outside a closed list; arguments as those of `unknown_name`."""
    if name not in allowed:
        raise unknown_name(kind, name, map(str, allowed), where, argument)


def check_names(
    kind: str, names: Iterable[object], allowed: Collection[object], where: str = ""
) -> None:
    """Raise UnknownName for the first name outside a closed list."""
    for name in names:
        check_name(kind, name, allowed, where)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
    )


def explain(error: BaseException) -> str:
    """Say what went wrong, in one line (or the two of a message with a hint)."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    expected = (LdmError, ValueError, KeyError, OSError, ImportError, ArithmeticError)
    if isinstance(error, expected) and text:
        return text
    first = text.strip().splitlines()[0] if text.strip() else "no message"
    return f"{type(error).__name__}: {first}"
