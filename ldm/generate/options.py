"""Options: everything that a user can set is declared once, as a field of a frozen dataclass.

    steps: int = option(50, "--steps", "--ddim_steps", parse=parse_count, help="sampling steps")

An option converts a word of the command line to a value and back. Values of forms and of PNG texts
are converted and checked by the same rule.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ldm.diffusion.names import LEGACY
from ldm.runtime.errors import ArgumentError, unknown_name

__all__ = ["Option", "decode_option", "encode_option", "option", "options_of"]

Value = Any  # of one option: str, int, float, bool, None, or a tuple of them

LEGACY_FLAGS = tuple(sorted(LEGACY))


@dataclass(frozen=True)
class Option:
    """How one option is parsed and shown.

    Args:
        flags: spellings on the command line, the usual one first; none = not a flag.
        help: what it does, for `--help`; `%(default)s` stands for the default.
        parse: converts a word to the value; raises ArgumentError.
        separator: joins the items of a tuple in one word.
        is_list: the flag may be given several times; the value is a tuple.
        is_switch: the flag takes no word; it sets the opposite of the default.
        const: value of the flag without a word; None = it needs one.
        choices: allowed words.
        shortcuts: flags for single values, such as "--plms" for sampler "plms".
        metavar: name of the word in `--help`.
        is_file: the value is a path (or several); PNGs record the hash of the file.
        label: of the field on the page; options without a label are not on the page.
        maximum: of the slider on the page.
    """

    flags: tuple[str, ...]
    help: str
    parse: Callable[[str], Value]
    separator: str = ","
    is_list: bool = False
    is_switch: bool = False
    const: Value = None
    choices: tuple[str, ...] = ()
    shortcuts: Mapping[str, str] = field(default_factory=dict)
    metavar: str | None = None
    is_file: bool = False
    label: str = ""
    maximum: float | None = None

    @property
    def is_path(self) -> bool:
        """Whether the value is a path, or several."""
        return (self.metavar or "").startswith(("FILE", "DIR"))


def option(
    default: Value, *flags: str, help: str = "", parse: Callable[[str], Value] = str, **row: Any
) -> Any:
    """Declare a dataclass field that is an option; see `Option`."""
    row["is_switch"] = isinstance(default, bool)
    if parse is str and row.get("metavar") in ("FILE", "DIR"):
        parse = os.path.expanduser
    return field(default=default, metadata={"option": Option(flags, help, parse, **row)})


def options_of(group: type) -> dict[str, tuple[Option, Value]]:
    """Return the options of a group with their defaults, by name."""
    return {field.name: (field.metadata["option"], field.default) for field in fields(group)}


def encode_option(option: Option, value: Value) -> list[str]:
    """Return a value as words of the command line, without the flag: one per item of a list."""
    if value is None:
        return []
    return [_to_word(option, item) for item in (value if option.is_list else [value])]


def decode_option(name: str, option: Option, default: Value, value: object) -> Value:
    """Convert a value of a form or a JSON text, checked as on the command line.

    Raises:
        ArgumentError: the option does not allow the value.
    """
    if value is None and option.is_list:
        return ()
    if value is None and default is not None:
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
    word = _to_word(option, value)
    if option.choices and word not in option.choices:
        raise unknown_name(name, word, option.choices, argument=name)
    try:
        return option.parse(word)
    except ValueError as error:
        raise ArgumentError(f"{name}: {error}", name) from error


def _to_word(option: Option, value: object) -> str:
    if isinstance(value, list | tuple):
        return option.separator.join(_to_word(option, part) for part in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def parse_count(word: str) -> int:
    """Parse a positive whole number."""
    if not word.isdigit() or int(word) < 1:
        raise ArgumentError(f"`{word}` is not a positive whole number")
    return int(word)


def parse_natural(word: str) -> int:
    """Parse a whole number, 0 or more."""
    if not word.isdigit():
        raise ArgumentError(f"`{word}` is not a whole number >= 0")
    return int(word)


def parse_fraction(word: str) -> float:
    """Parse a number in 0 … 1."""
    number = _number(word)
    if number is None or not 0 <= number <= 1:
        raise ArgumentError(f"`{word}` is not a number in 0 … 1")
    return number


def parse_number(word: str) -> float:
    """Parse a finite number."""
    number = _number(word)
    if number is None:
        raise ArgumentError(f"`{word}` is not a number")
    return number


def parse_integer(word: str) -> int:
    """Parse a whole number."""
    try:
        return int(word)
    except ValueError as error:
        raise ArgumentError(f"`{word}` is not a whole number") from error


def parse_interval(word: str) -> tuple[float, float]:
    """Parse LOW,HIGH: two sigmas."""
    low, _, high = (_number(part) for part in word.partition(","))
    if low is None or high is None or not 0 <= low < high:
        raise ArgumentError(f"`{word}` is not LOW,HIGH: two sigmas, 0 <= LOW < HIGH")
    return low, high


def parse_box(word: str) -> tuple[int, int, int, int]:
    """Parse LEFT,TOP,RIGHT,BOTTOM in pixels."""
    sides = [int(side) if side.isdigit() else -1 for side in word.split(",")]
    if len(sides) == 4 and min(sides) >= 0:
        left, top, right, bottom = sides
        if left < right and top < bottom:
            return left, top, right, bottom
    raise ArgumentError(f"`{word}` is not LEFT,TOP,RIGHT,BOTTOM in pixels")


def parse_weighted_file(word: str) -> tuple[str, float]:
    """Parse FILE or FILE:WEIGHT; a colon may also be part of the file's name."""
    name, _, weight = word.rpartition(":")
    number = _number(weight)
    if not name or number is None:
        name, number = word, 1.0
    return os.path.expanduser(name), number


def parse_legacy(word: str) -> tuple[str, ...]:
    """Parse names of quirks, separated by commas."""
    names = sorted({name.strip() for name in word.replace("_", "-").split(",")} - {""})
    unknown = [name for name in names if name not in LEGACY_FLAGS]
    if unknown:
        raise unknown_name("quirk", unknown[0], LEGACY_FLAGS)
    return tuple(names)


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
