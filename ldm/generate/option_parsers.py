"""Parse command-line arguments of options: numbers, sizes, presets, names of quirks."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ldm.diffusion.names import APG, API_LEGACY, FREEU_PRESETS, LEGACY, SLD, FreeUFactors
from ldm.diffusion.scheduler_options import check_sigmas
from ldm.loading.addons.lora_weights import LoRAWeight, split_weight
from ldm.runtime.errors import ArgumentError, MissingFile, unknown_name
from ldm.runtime.files import read_text

__all__ = [
    "QUIRKS", "SCRIPT_QUIRKS", "expand_file", "parse_apg", "parse_box", "parse_corner",
    "parse_count", "parse_fraction", "parse_freeu", "parse_integer", "parse_interval",
    "parse_legacy", "parse_lora", "parse_natural", "parse_nonnegative", "parse_number",
    "parse_positive", "parse_sigmas", "parse_size", "parse_sld",
]  # fmt: skip

Number = TypeVar("Number", int, float)

QUIRKS = tuple(sorted(LEGACY))
# Quirks of the original scripts; those of sgm's sampling pipeline exclude them.
SCRIPT_QUIRKS = tuple(sorted(LEGACY.keys() - API_LEGACY))


def _number_parser(
    convert: Callable[[str], Number], is_allowed: Callable[[Number], bool], description: str
) -> Callable[[str], Number]:
    """Return a parser of numbers that raises ArgumentError unless `is_allowed`."""

    def parse(argument: str) -> Number:
        number: Number | None
        try:
            number = convert(argument)
        except ValueError:
            number = None
        if number is None or not is_allowed(number):
            raise ArgumentError(f"`{argument}` is not {description}")
        return number

    return parse


def _parse_unsigned(argument: str) -> int:
    """Parse decimal digits; return -1 for anything else."""
    return int(argument) if argument.strip().isdecimal() else -1


parse_count = _number_parser(_parse_unsigned, lambda n: n >= 1, "a positive whole number")
parse_natural = _number_parser(_parse_unsigned, lambda n: n >= 0, "a whole number >= 0")
parse_integer = _number_parser(int, lambda n: True, "a whole number")
parse_number = _number_parser(float, math.isfinite, "a number")
parse_fraction = _number_parser(float, lambda x: 0 <= x <= 1, "a number in 0 … 1")
parse_nonnegative = _number_parser(float, lambda x: 0 <= x < math.inf, "a number >= 0")
parse_positive = _number_parser(float, lambda x: 0 < x < math.inf, "a number above 0")


def parse_sigmas(argument: str) -> tuple[float, ...]:
    """Parse descending noise levels, separated by commas or spaces."""
    sigmas = _parse_numbers(",".join(argument.replace(",", " ").split()))
    if not sigmas:
        raise ArgumentError(f"`{argument}` is not a list of numbers")
    check_sigmas(sigmas)
    return sigmas


def parse_interval(argument: str) -> tuple[float, float]:
    """Parse LOW,HIGH: two sigmas."""
    low, _, high = (_parse_finite(part) for part in argument.partition(","))
    if low is None or high is None or not 0 <= low < high:
        raise ArgumentError(f"`{argument}` is not LOW,HIGH: two sigmas, 0 <= LOW < HIGH")
    return low, high


def parse_box(argument: str) -> tuple[int, int, int, int]:
    """Parse LEFT,TOP,RIGHT,BOTTOM in pixels."""
    edges = [_parse_unsigned(edge) for edge in argument.split(",")]
    if len(edges) == 4 and min(edges) >= 0:
        left, top, right, bottom = edges
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


def parse_lora(argument: str) -> tuple[str, float | str]:
    """Parse FILE or FILE:WEIGHT, see `LoRAWeight`; a colon may also be part of the file's name."""
    name, weight = split_weight(argument)
    return os.path.expanduser(name), LoRAWeight.parse(weight or 1.0).to_json()


def parse_sld(argument: str) -> str | tuple[float, ...]:
    """Parse the name of a preset, or WARMUP,SCALE,THRESHOLD,MOMENTUM,BETA."""
    numbers = _parse_numbers(argument)
    if not numbers and "," in argument:
        raise ArgumentError(f"`{argument}` is not five numbers")
    value = numbers or argument
    SLD.parse(value)  # raises ArgumentError
    return value


def parse_apg(argument: str) -> tuple[float, ...]:
    """Parse ETA,NORM,MOMENTUM."""
    numbers = _parse_numbers(argument)
    if not numbers:
        raise ArgumentError(f"`{argument}` is not ETA,NORM,MOMENTUM: three numbers")
    APG.parse(numbers)  # raises ArgumentError
    return numbers


def parse_freeu(argument: str) -> str | tuple[float, ...]:
    """Parse the name of a preset, or B1,B2,S1,S2."""
    numbers = _parse_numbers(argument)
    if not numbers and "," in argument:
        raise ArgumentError(f"`{argument}` is not B1,B2,S1,S2: four numbers")
    value = numbers or argument
    FreeUFactors.parse(value, next(iter(FREEU_PRESETS)))  # raises ArgumentError
    return value


def expand_file(argument: str) -> str:
    """Return an argument, or for `@FILE` the words of the file, joined by spaces."""
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
    """Parse two whole numbers; one is -1 if it is anything else."""
    first, _, second = argument.partition(",")
    return _parse_unsigned(first), _parse_unsigned(second)


def _parse_numbers(argument: str) -> tuple[float, ...]:
    """Parse numbers separated by commas; return () for anything else."""
    numbers = [_parse_finite(part) for part in argument.split(",")]
    return () if None in numbers else tuple(n for n in numbers if n is not None)


def _parse_finite(argument: str) -> float | None:
    try:
        number = float(argument)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
