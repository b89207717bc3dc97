"""Declare options: everything that a user can set for a run, as fields of frozen dataclasses.

    steps: int = option(50, "--steps", "--ddim_steps", parse=parse_count, help="sampling steps")

`decode_option` converts values from the page or PNG metadata to command-line arguments first, and
parses those, so that the same checks apply to all of them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ldm.runtime.errors import ArgumentError, make_unknown_name_error

__all__ = ["Option", "Value", "decode_option", "encode_option", "get_options", "option"]

Value = Any  # of one option: str, int, float, bool, None, or a tuple of them


@dataclass(frozen=True)
class Option:
    """How one option is parsed and shown.

    Args:
        flags: Spellings on the command line, the preferred one first; () = not a flag.
        default: Value if the option is not set.
        help: Text for `--help`; `%(default)s` stands for the default.
        parse: Converts an argument to the value; raises ArgumentError.
        separator: Joins the items of a tuple in one argument.
        is_list: Whether the flag may be given several times; the value is a tuple.
        is_switch: Whether the flag takes no argument; it sets the opposite of the default.
        is_negatable: Whether a switch, whose default is None, also has a flag `--no-…`.
        const: Value of the flag without an argument; None = it needs one.
        choices: Allowed arguments; () = any.
        shortcuts: Flags for single values, such as "--plms" for sampler "plms".
        metavar: Placeholder of the argument in `--help`.
        is_input_file: Whether the value names input files; PNGs record their hashes.
        label: Label of the field on the page; options without a label are not on it.
        slider_max: Largest value of the slider on the page; flags and PNGs may exceed it.
        expand: Converts a command-line argument before `parse`, such as @FILE to its text. Not
            called for values from the page or a PNG, which must not read the server's files.
    """

    flags: tuple[str, ...]
    default: Value
    help: str
    parse: Callable[[str], Value]
    separator: str = ","
    is_list: bool = False
    is_switch: bool = False
    is_negatable: bool = False
    const: Value = None
    choices: tuple[str, ...] = ()
    shortcuts: Mapping[str, str] = field(default_factory=dict)
    metavar: str | None = None
    is_input_file: bool = False
    label: str = ""
    slider_max: float | None = None
    expand: Callable[[str], str] = str

    @property
    def is_path(self) -> bool:
        """Whether the value is a path to a file or folder (metavar FILE or DIR), or several."""
        return (self.metavar or "").startswith(("FILE", "DIR"))


def option(
    default: Value, *flags: str, help: str = "", parse: Callable[[str], Value] = str, **kwargs: Any
) -> Any:
    """Declare a dataclass field that is an option; see `Option`."""
    kwargs["is_switch"] = isinstance(default, bool) or kwargs.get("is_negatable", False)
    if parse is str and kwargs.get("metavar") in ("FILE", "DIR"):
        parse = os.path.expanduser
    declared = Option(flags, default, help, parse, **kwargs)
    return field(default=default, metadata={"option": declared})


def get_options(group: type) -> dict[str, Option]:
    """Return the options of a group by name."""
    return {field.name: field.metadata["option"] for field in fields(group)}


def encode_option(option: Option, value: Value) -> list[str]:
    """Convert a value to command-line arguments without the flag, one for each item of a list."""
    if value is None:
        return []
    return [_to_argument(option, item) for item in (value if option.is_list else [value])]


def decode_option(name: str, option: Option, value: object) -> Value:
    """Convert a value from a form or JSON, checked as on the command line.

    Raises:
        ArgumentError: The option does not allow the value.
    """
    if value is None and option.is_list:
        return ()
    if value is None and option.default is not None:
        raise ArgumentError(f"{name}: a value is missing", name)
    if value is None:
        return None
    if option.is_switch:
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}: `{value}` is neither true nor false", name)
        return value
    if option.is_list:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ArgumentError(f"{name}: `{value}` is not a list", name)
        return tuple(_parse(name, option, item) for item in value)
    return _parse(name, option, value)


def _parse(name: str, option: Option, value: object) -> Value:
    argument = _to_argument(option, value)
    if option.choices and argument not in option.choices:
        raise make_unknown_name_error(name, argument, option.choices, argument=name)
    try:
        return option.parse(argument)
    except ValueError as error:
        raise ArgumentError(f"{name}: {error}", name) from error


def _to_argument(option: Option, value: object) -> str:
    if isinstance(value, list | tuple):
        return option.separator.join(_to_argument(option, item) for item in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
