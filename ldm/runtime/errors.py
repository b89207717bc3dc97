"""Errors of this package, and the description of any error in one line.

    LdmError
    ├── ArgumentError (ValueError)            an argument has an invalid value
    │   ├── UnknownName                       a name is not allowed; its message suggests one
    │   ├── MissingArgument                   an argument is required for this call
    │   └── WrongFamily                       a model is for another task
    ├── MissingFile (FileNotFoundError)       a file does not exist
    ├── DownloadError (OSError)               a file cannot be downloaded
    ├── ExistingFile (FileExistsError)        a file exists and must not be replaced
    ├── FileFormatError (ValueError)          a file is damaged, unsafe or in another format
    ├── ConfigError (ValueError)              a config is invalid
    ├── WeightsMismatch (ValueError)          names or shapes of weights do not fit a model
    └── NonFinite (ArithmeticError)           a component of a model returned NaN or infinity
    Stop                                      raised by a callback to end a run; not an error

Messages name arguments and files. The command line adds the flag of the argument.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MALFORMED_DATA_ERRORS", "ArgumentError", "ConfigError", "DownloadError", "ExistingFile",
    "FileFormatError", "LdmError", "MissingArgument", "MissingFile", "NonFinite", "Stop",
    "UnknownName", "WeightsMismatch", "WrongFamily", "check_name", "check_names", "describe_error",
    "errors_about", "errors_as", "find_nearest_name", "is_out_of_memory", "make_unknown_name_error",
]  # fmt: skip

MAX_LISTED_NAMES = 32  # longest list of allowed names in a message
# In the messages of torch for CUDA, MPS, and the CPU.
OUT_OF_MEMORY_PHRASES = ("out of memory", "not enough memory", "alloc_cpu")
MALFORMED_DATA_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class LdmError(Exception):
    """Base of all errors below.

    Args:
        message: What is wrong, and what is allowed.
        argument: Name of the invalid argument, so that callers can add their flag or field; None
            if it is not known.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class ArgumentError(LdmError, ValueError):
    """An argument has an invalid value."""


class UnknownName(ArgumentError):
    """A name is not among the allowed ones; see `make_unknown_name_error`."""


class MissingArgument(ArgumentError):
    """An optional argument is missing that this call requires."""


class WrongFamily(ArgumentError):
    """A model is for another task.

    Args:
        message: What the model is for.
        task: The task that it is for; None = no task of this package.
    """

    def __init__(self, message: str, task: str | None = None) -> None:
        super().__init__(message, "model")
        self.task = task


class MissingFile(LdmError, FileNotFoundError):
    """A file does not exist."""


class DownloadError(LdmError, OSError):
    """A file cannot be downloaded.

    Args:
        is_local: Whether the cause is this machine or its connection, not the server.
    """

    def __init__(self, message: str, *, is_local: bool = False) -> None:
        super().__init__(message)
        self.is_local = is_local


class ExistingFile(LdmError, FileExistsError):
    """A file exists and must not be replaced."""


class FileFormatError(LdmError, ValueError):
    """A file is damaged, unsafe or in another format."""


class ConfigError(LdmError, ValueError):
    """A config is invalid."""


class WeightsMismatch(LdmError, ValueError):
    """Names or shapes of weights do not fit a model."""


class NonFinite(LdmError, ArithmeticError):
    """A component of the model returned NaN or infinity.

    Args:
        stage: Name of the component, such as "the VAE".
        cause: Description of non-finite weights, with which another dtype would not help; None if
            all weights are finite.
    """

    def __init__(self, stage: str, cause: str | None = None) -> None:
        reason = f": {cause}" if cause else ""
        super().__init__(f"{stage} returned values that are not finite{reason}")
        self.stage = stage
        self.cause = cause


class Stop(Exception):
    """Raised by a callback to end a run.

    Args:
        latent: Latents (B, C, h, w) of unfinished images to decode; None = no images.
    """

    def __init__(self, latent: "Tensor | None" = None) -> None:
        super().__init__()
        self.latent = latent


@contextmanager
def errors_about(argument: str) -> Iterator[None]:
    """Context manager that adds the name of an argument to errors without one."""
    try:
        yield
    except LdmError as error:
        error.argument = error.argument or argument
        raise


@contextmanager
def errors_as(error_type: type[LdmError], summary: str) -> Iterator[None]:
    """Context manager that converts errors caused by malformed data to one of this package.

    Args:
        summary: Start of the message: what is malformed.
    """
    try:
        yield
    except LdmError:
        raise
    except MALFORMED_DATA_ERRORS as error:
        raise error_type(f"{summary}: {type(error).__name__}: {error}") from error


def find_nearest_name(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name most similar to `name` (`-` equals `_`); None if none is close."""
    by_key = {candidate.replace("-", "_"): candidate for candidate in allowed}
    matches = difflib.get_close_matches(name.replace("-", "_"), by_key, n=1, cutoff=0.5)
    return by_key[matches[0]] if matches else None


def make_unknown_name_error(
    kind: str, name: object, allowed: Iterable[str], where: str = "", argument: str | None = None
) -> UnknownName:
    """Build the error for a name that is not in a list.

    Its message has the nearest allowed name, and all allowed names if they are few.

    Args:
        kind: What the name stands for, such as "sampler".
        where: File, or file and key, that the name was read from, put before the message; "" if
            it is not from a file.
        argument: Name of the invalid argument, see `LdmError`; None if it is not known.
    """
    names = list(allowed)
    nearest = find_nearest_name(str(name), names)
    message = f"unknown {kind} `{name}`"
    if nearest:
        message += f", did you mean `{nearest}`?"
    if 0 < len(names) <= MAX_LISTED_NAMES:
        message += f"{'' if nearest else ','} choose one of {', '.join(names)}"
    return UnknownName(f"{where}: {message}" if where else message, argument)


def check_name(
    kind: str,
    name: object,
    allowed: Collection[object],
    where: str = "",
    argument: str | None = None,
) -> None:
    """Raise UnknownName unless a name is allowed; arguments: `make_unknown_name_error`."""
    if name not in allowed:
        names = [str(allowed_name) for allowed_name in allowed]
        if isinstance(allowed, set | frozenset):
            names.sort()  # sets have another order in each process
        raise make_unknown_name_error(kind, name, names, where, argument)


def check_names(
    kind: str, names: Iterable[object], allowed: Collection[object], where: str = ""
) -> None:
    """Raise UnknownName for the first name that is not allowed."""
    for name in names:
        check_name(kind, name, allowed, where)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in text for phrase in OUT_OF_MEMORY_PHRASES)
    )


def describe_error(error: BaseException) -> str:
    """Describe an error in one line, or two if its message has a hint."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    expected = (LdmError, ValueError, KeyError, OSError, ImportError, ArithmeticError)
    if isinstance(error, expected) and text:
        return text
    first_line = text.strip().splitlines()[0] if text.strip() else "no message"
    return f"{type(error).__name__}: {first_line}"
