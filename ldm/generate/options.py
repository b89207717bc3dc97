"""Declare options: everything that a user can set, as fields of frozen dataclasses.

    steps: int = option(50, "--steps", "--ddim_steps", parse=parse_count, help="sampling steps")

An option converts a command-line argument to a value and back. Values from the web form and from
PNG metadata are converted and checked in the same way.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ldm.diffusion.names import APG, API_LEGACY, FREEU_PRESETS, LEGACY, SLD, FreeUFactors
from ldm.diffusion.scheduler_options import check_sigmas
from ldm.loading.addons.lora_weights import LoRAWeight, split_weight
from ldm.runtime.errors import ArgumentError, MissingFile, unknown_name
from ldm.runtime.files import read_text

__all__ = ["Option", "decode_option", "encode_option", "option", "options_of"]

Number = TypeVar("Number", int, float)
Value = Any  # of one option: str, int, float, bool, None, or a tuple of them

QUIRKS = tuple(sorted(LEGACY))
COMMON_QUIRKS = tuple(sorted(LEGACY.keys() - API_LEGACY))  # those of the scripts, which go together


@dataclass(frozen=True)
class Option:
    """How one option is parsed and shown.

    Args:
        flags: spellings on the command line, the preferred one first; () = not a flag.
        help: text for `--help`; `%(default)s` stands for the default.
        parse: converts an argument to the value; raises ArgumentError.
        separator: joins the items of a tuple in one argument.
        is_list: whether the flag may be given several times; the value is a tuple.
        is_switch: whether the flag takes no argument; it sets the opposite of the default.
        const: value of the flag without an argument; None = it needs one.
        choices: allowed arguments; () = any.
        shortcuts: flags for single values, such as "--plms" for sampler "plms".
        metavar: placeholder of the argument in `--help`.
        is_input_file: whether the value names input files; PNGs record their hashes.
        label: label of the field on the page; options without a label are not on it.
        maximum: maximum of the slider on the page.
        read: converts a command-line argument before `parse`; not applied to values from the page
            or PNG metadata.
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
    is_input_file: bool = False
    label: str = ""
    maximum: float | None = None
    read: Callable[[str], str] = str

    @property
    def is_path(self) -> bool:
        """Whether the value is a path to a file or folder (metavar FILE or DIR), or several."""
        return (self.metavar or "").startswith(("FILE", "DIR"))


def option(
    default: Value,
    *flags: str,
    help: str = "",
    parse: Callable[[str], Value] = str,
    **settings: Any,
) -> Any:
    """Declare a dataclass field that is an option; see `Option`."""
    settings["is_switch"] = isinstance(default, bool)
    if parse is str and settings.get("metavar") in ("FILE", "DIR"):
        parse = os.path.expanduser
    return field(default=default, metadata={"option": Option(flags, help, parse, **settings)})


def options_of(group: type) -> dict[str, tuple[Option, Value]]:
    """Return the options of a group with their defaults, by name."""
    return {field.name: (field.metadata["option"], field.default) for field in fields(group)}


def encode_option(option: Option, value: Value) -> list[str]:
    """Return a value as command-line arguments without the flag, one for each item of a list."""
    if value is None:
        return []
    return [_to_argument(option, item) for item in (value if option.is_list else [value])]


def decode_option(name: str, option: Option, default: Value, value: object) -> Value:
    """Convert a value from a form or JSON, checked as on the command line.

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
    argument = _to_argument(option, value)
    if option.choices and argument not in option.choices:
        raise unknown_name(name, argument, option.choices, argument=name)
    try:
        return option.parse(argument)
    except ValueError as error:
        raise ArgumentError(f"{name}: {error}", name) from error


def _to_argument(option: Option, value: object) -> str:
    if isinstance(value, list | tuple):
        return option.separator.join(_to_argument(option, part) for part in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _number_parser(
    convert: Callable[[str], Number], is_allowed: Callable[[Number], bool], kind: str
) -> Callable[[str], Number]:
    """Return a parser of numbers, which raises ArgumentError for all but those of a kind."""

    def parse(argument: str) -> Number:
        number: Number | None
        try:
            number = convert(argument)
        except ValueError:
            number = None
        if number is None or not is_allowed(number):
            raise ArgumentError(f"`{argument}` is not {kind}")
        return number

    return parse


def _digits(argument: str) -> int:
    return int(argument) if argument.isdigit() else -1


parse_count = _number_parser(_digits, lambda n: n >= 1, "a positive whole number")
parse_natural = _number_parser(_digits, lambda n: n >= 0, "a whole number >= 0")
parse_integer = _number_parser(int, lambda n: True, "a whole number")
parse_number = _number_parser(float, math.isfinite, "a number")
parse_fraction = _number_parser(float, lambda x: 0 <= x <= 1, "a number in 0 … 1")
parse_positive = _number_parser(float, lambda x: 0 < x < math.inf, "a number above 0")


def parse_sigmas(argument: str) -> tuple[float, ...]:
    """Parse descending noise levels, separated by commas or spaces."""
    numbers = [_number(part) for part in argument.replace(",", " ").split()]
    if None in numbers:
        raise ArgumentError(f"`{argument}` is not a list of numbers")
    sigmas = tuple(number for number in numbers if number is not None)
    check_sigmas(sigmas)
    return sigmas


def parse_interval(argument: str) -> tuple[float, float]:
    """Parse LOW,HIGH: two sigmas."""
    low, _, high = (_number(part) for part in argument.partition(","))
    if low is None or high is None or not 0 <= low < high:
        raise ArgumentError(f"`{argument}` is not LOW,HIGH: two sigmas, 0 <= LOW < HIGH")
    return low, high


def parse_box(argument: str) -> tuple[int, int, int, int]:
    """Parse LEFT,TOP,RIGHT,BOTTOM in pixels."""
    sides = [int(side) if side.isdigit() else -1 for side in argument.split(",")]
    if len(sides) == 4 and min(sides) >= 0:
        left, top, right, bottom = sides
        if left < right and top < bottom:
            return left, top, right, bottom
    raise ArgumentError(f"`{argument}` is not LEFT,TOP,RIGHT,BOTTOM in pixels")


def parse_size(argument: str) -> tuple[int, int]:
    """Parse HEIGHT,WIDTH in pixels."""
    height, width = _parse_pair(argument)
    if min(height, width) < 1:
        raise ArgumentError(f"`{argument}` is not HEIGHT,WIDTH in pixels")
    return height, width


def parse_corner(argument: str) -> tuple[int, int]:
    """Parse TOP,LEFT in pixels."""
    top, left = _parse_pair(argument)
    if min(top, left) < 0:
        raise ArgumentError(f"`{argument}` is not TOP,LEFT in pixels")
    return top, left


def parse_weighted_file(argument: str) -> tuple[str, float | str]:
    """Parse FILE or FILE:WEIGHT, see `LoRAWeight`; a colon may also be part of the file's name."""
    name, weight = split_weight(argument)
    return os.path.expanduser(name), LoRAWeight.parse(weight or 1.0).to_json()


def parse_sld(argument: str) -> str | tuple[float, ...]:
    """Parse the name of a preset, or WARMUP,SCALE,THRESHOLD,MOMENTUM,BETA."""
    numbers = _numbers(argument)
    if not numbers and "," in argument:
        raise ArgumentError(f"`{argument}` is not five numbers")
    value = numbers or argument
    SLD.parse(value)
    return value


def parse_apg(argument: str) -> tuple[float, ...]:
    """Parse ETA,NORM,MOMENTUM."""
    numbers = _numbers(argument)
    if not numbers:
        raise ArgumentError(f"`{argument}` is not ETA,NORM,MOMENTUM: three numbers")
    APG.parse(numbers)
    return numbers


def parse_freeu(argument: str) -> str | tuple[float, ...]:
    """Parse the name of a preset, or B1,B2,S1,S2."""
    numbers = _numbers(argument)
    if not numbers and "," in argument:
        raise ArgumentError(f"`{argument}` is not B1,B2,S1,S2: four numbers")
    value = numbers or argument
    FreeUFactors.parse(value, next(iter(FREEU_PRESETS)))
    return value


def read_argument(argument: str) -> str:
    """Return an argument, or the text of the file in `@FILE`."""
    if not argument.startswith("@"):
        return argument
    path = Path(argument[1:]).expanduser()
    if not path.is_file():
        raise MissingFile(f"no file `{path}`")
    return " ".join(read_text(path).split())


def parse_legacy(argument: str) -> tuple[str, ...]:
    """Parse names of quirks, separated by commas."""
    names = sorted({name.strip() for name in argument.replace("_", "-").split(",")} - {""})
    unknown = [name for name in names if name not in QUIRKS]
    if unknown:
        raise unknown_name("quirk", unknown[0], QUIRKS)
    return tuple(names)


def _parse_pair(argument: str) -> tuple[int, int]:
    """Parse two whole numbers; return (-1, -1) for anything else."""
    first, _, second = (part.strip() for part in argument.partition(","))
    return (int(first), int(second)) if first.isdigit() and second.isdigit() else (-1, -1)


def _numbers(argument: str) -> tuple[float, ...]:
    """Parse numbers separated by commas; return () for anything else."""
    numbers = [_number(part) for part in argument.split(",")]
    return () if None in numbers else tuple(n for n in numbers if n is not None)


def _number(argument: str) -> float | None:
    try:
        number = float(argument)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
