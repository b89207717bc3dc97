"""One option: everything that a user can set is one row, a field of a frozen dataclass.

    steps: int = option(50, "--steps", "--ddim_steps", parse=parse_count, help="sampling steps")

The row says how a word of the command line becomes a value and back; the same rule reads values of
forms and of PNG texts, so that nothing unchecked comes through any door.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ldm.diffusion.names import LEGACY
from ldm.runtime.errors import ArgumentError, unknown_name

__all__ = ["Option", "decode_option", "encode_option", "option", "options_of"]

Value = Any  # of one option: str, int, float, bool, None, or a tuple of them


@dataclass(frozen=True)
class Option:
    """A row.

    Args:
        flags: spellings on the command line, the usual one first; none = not a flag.
        help: what it does, for `--help`; `%(default)s` stands for the default.
        parse: a word -> value; raises ArgumentError.
        separator: between the parts of a value that is a tuple, in a word.
        is_list: the flag may be given several times; the value is a tuple.
        is_switch: the flag takes no word; it sets the opposite of the default.
        const: value of the flag without a word; None = it needs one.
        choices: words that are allowed.
        shortcuts: flags that stand for one value, "--plms" for sampler "plms".
        metavar: what `--help` calls the word.
        is_file: the value names a file (or several), whose content a PNG vouches for.
        label: what the page calls it; options without a label are not on the page.
        maximum: end of its slider on the page.
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
    """A dataclass field that is an option; see `Option`."""
    row["is_switch"] = isinstance(default, bool)
    return field(default=default, metadata={"option": Option(flags, help, parse, **row)})


def options_of(group: type) -> dict[str, tuple[Option, Value]]:
    """The rows of a dataclass of options, with their defaults, by name."""
    return {row.name: (row.metadata["option"], row.default) for row in fields(group)}


def encode_option(row: Option, value: Value) -> list[str]:
    """The words for the values of one option, without flags: none, one, or one for each item."""
    if value is None:
        return []
    return [_join(row, item) for item in (value if row.is_list else [value])]


def decode_option(name: str, row: Option, value: object) -> Value:
    """The value of an option out of a form or a JSON text, checked as on the command line.

    Raises:
        ArgumentError: naming the option and what is wrong with its value.
    """
    if value is None:
        return () if row.is_list else None
    if row.is_switch:
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}: `{value}` is neither true nor false", name)
        return value
    if row.is_list:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ArgumentError(f"{name}: `{value}` is not a list", name)
        return tuple(_parse(name, row, item) for item in value)
    return _parse(name, row, value)


def _parse(name: str, row: Option, value: object) -> Value:
    word = _join(row, value)
    if row.choices and word not in row.choices:
        raise unknown_name(name, word, row.choices, argument=name)
    try:
        return row.parse(word)
    except ValueError as error:
        raise ArgumentError(f"{name}: {error}", name) from error


def _join(row: Option, value: object) -> str:
    if isinstance(value, list | tuple):
        return row.separator.join(_join(row, part) for part in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def parse_count(word: str) -> int:
    """A whole number from 1 up."""
    if not word.isdigit() or int(word) < 1:
        raise ArgumentError(f"`{word}` is not a whole number from 1 up")
    return int(word)


def parse_level(word: str) -> int:
    """A whole number from 0 up."""
    if not word.isdigit():
        raise ArgumentError(f"`{word}` is not a whole number from 0 up")
    return int(word)


def parse_fraction(word: str) -> float:
    """A number in 0 … 1."""
    number = _number(word)
    if number is None or not 0 <= number <= 1:
        raise ArgumentError(f"`{word}` is not a number in 0 … 1")
    return number


def parse_number(word: str) -> float:
    """A finite number."""
    number = _number(word)
    if number is None:
        raise ArgumentError(f"`{word}` is not a number")
    return number


def parse_integer(word: str) -> int:
    """A whole number."""
    try:
        return int(word)
    except ValueError as error:
        raise ArgumentError(f"`{word}` is not a whole number") from error


def parse_interval(word: str) -> tuple[float, float]:
    """LOW,HIGH: two sigmas."""
    parts = [_number(part) for part in word.split(",")]
    if len(parts) == 2 and parts[0] is not None and parts[1] is not None:
        low, high = parts[0], parts[1]
        if 0 <= low < high:
            return low, high
    raise ArgumentError(f"`{word}` is not LOW,HIGH: two sigmas, 0 <= LOW < HIGH")


def parse_box(word: str) -> tuple[int, int, int, int]:
    """LEFT,TOP,RIGHT,BOTTOM in pixels."""
    sides = [int(side) if side.isdigit() else -1 for side in word.split(",")]
    if len(sides) == 4 and min(sides) >= 0:
        left, top, right, bottom = sides
        if left < right and top < bottom:
            return left, top, right, bottom
    raise ArgumentError(f"`{word}` is not LEFT,TOP,RIGHT,BOTTOM in pixels")


def parse_weighted_file(word: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; a colon may also be part of the file's name."""
    name, _, weight = word.rpartition(":")
    number = _number(weight)
    return (word, 1.0) if not name or number is None else (name, number)


def parse_legacy(word: str) -> tuple[str, ...]:
    """Names of quirks, separated by commas."""
    names = {name.strip() for name in word.replace("_", "-").split(",")} - {""}
    for name in sorted(names - set(LEGACY_FLAGS)):
        raise unknown_name("quirk", name, LEGACY_FLAGS)
    return tuple(sorted(names))


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


# DDIM inversion as the original had it is for programs, not for the scripts.
LEGACY_FLAGS = tuple(sorted(LEGACY.keys() - {"encode"}))
