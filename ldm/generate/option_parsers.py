"""Parse the arguments of options: numbers, sizes, presets, LoRAs, names of quirks."""

import math
import os
from collections.abc import Callable
from typing import TypeVar

from ldm.diffusion.names import APG, API_LEGACY, FREEU_PRESETS, LEGACY, SLD, FreeUFactors
from ldm.diffusion.scheduler_options import check_sigmas
from ldm.loading.addons.lora_weights import LoRAWeight, split_weight
from ldm.runtime.errors import ArgumentError, make_unknown_name_error
from ldm.runtime.files import read_text

__all__ = [
    "QUIRKS", "SCRIPT_QUIRKS", "expand_file", "parse_apg", "parse_box", "parse_count",
    "parse_fraction", "parse_freeu", "parse_integer", "parse_legacy", "parse_lora", "parse_natural",
    "parse_nonnegative", "parse_number", "parse_positive", "parse_sigma_interval", "parse_sigmas",
    "parse_size", "parse_sld", "parse_top_left",
]  # fmt: skip

Number = TypeVar("Number", int, float)

QUIRKS = tuple(sorted(LEGACY))
# Quirks of the original scripts; they cannot be combined with those of sgm's SamplingPipeline.
SCRIPT_QUIRKS = tuple(sorted(LEGACY.keys() - API_LEGACY))


def _make_number_parser(
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


parse_count = _make_number_parser(_parse_unsigned, lambda n: n >= 1, "a positive whole number")
parse_natural = _make_number_parser(_parse_unsigned, lambda n: n >= 0, "a whole number >= 0")
parse_integer = _make_number_parser(int, lambda n: True, "a whole number")
parse_number = _make_number_parser(float, math.isfinite, "a number")
parse_fraction = _make_number_parser(float, lambda x: 0 <= x <= 1, "a number in 0 … 1")
parse_nonnegative = _make_number_parser(float, lambda x: 0 <= x < math.inf, "a number >= 0")
parse_positive = _make_number_parser(float, lambda x: 0 < x < math.inf, "a number above 0")


def _parse_finite(argument: str) -> float:
    """Parse a finite number; raise ValueError for anything else."""
    number = float(argument)
    if not math.isfinite(number):
        raise ValueError
    return number


def _parse_numbers(argument: str, convert: Callable[[str], Number]) -> tuple[Number, ...]:
    """Parse numbers separated by commas; return () for anything else."""
    try:
        return tuple(convert(item) for item in argument.split(","))
    except ValueError:
        return ()


def _make_tuple_parser(
    count: int, convert: Callable[[str], Number], is_allowed: Callable[..., bool], description: str
) -> Callable[[str], tuple[Number, ...]]:
    """Return a parser of `count` numbers; it raises ArgumentError unless `is_allowed(*numbers)`."""

    def parse(argument: str) -> tuple[Number, ...]:
        numbers = _parse_numbers(argument, convert)
        if len(numbers) != count or not is_allowed(*numbers):
            raise ArgumentError(f"`{argument}` is not {description}")
        return numbers

    return parse


parse_sigma_interval = _make_tuple_parser(
    2, _parse_finite, lambda low, high: 0 <= low < high, "LOW,HIGH: two sigmas, 0 <= LOW < HIGH"
)
parse_box = _make_tuple_parser(
    4,
    _parse_unsigned,
    lambda left, top, right, bottom: 0 <= left < right and 0 <= top < bottom,
    "LEFT,TOP,RIGHT,BOTTOM in pixels",
)
parse_size = _make_tuple_parser(
    2, _parse_unsigned, lambda *size: min(size) >= 1, "HEIGHT,WIDTH in pixels"
)
parse_top_left = _make_tuple_parser(
    2, _parse_unsigned, lambda *edges: min(edges) >= 0, "TOP,LEFT in pixels"
)


def parse_sigmas(argument: str) -> tuple[float, ...]:
    """Parse descending noise levels, separated by commas or spaces."""
    sigmas = _parse_numbers(",".join(argument.replace(",", " ").split()), _parse_finite)
    if not sigmas:
        raise ArgumentError(f"`{argument}` is not a list of numbers")
    check_sigmas(sigmas)
    return sigmas


def parse_lora(argument: str) -> tuple[str, float | str]:
    """Parse FILE or FILE:WEIGHT, see `LoRAWeight`; a colon may also be part of the file's name."""
    name, weight = split_weight(argument)
    return os.path.expanduser(name), LoRAWeight.parse(weight or 1.0).to_json()


def parse_apg(argument: str) -> tuple[float, ...]:
    """Parse ETA,NORM,MOMENTUM."""
    numbers = _parse_numbers(argument, _parse_finite)
    if not numbers:
        raise ArgumentError(f"`{argument}` is not ETA,NORM,MOMENTUM: three numbers")
    APG.parse(numbers)  # raises ArgumentError
    return numbers


def _make_preset_parser(
    check: Callable[[str | tuple[float, ...]], object], description: str
) -> Callable[[str], str | tuple[float, ...]]:
    """Return a parser of the name of a preset, or of numbers; `check` raises ArgumentError."""

    def parse(argument: str) -> str | tuple[float, ...]:
        numbers = _parse_numbers(argument, _parse_finite)
        if not numbers and "," in argument:
            raise ArgumentError(f"`{argument}` is not {description}")
        value = numbers or argument
        check(value)
        return value

    return parse


parse_sld = _make_preset_parser(SLD.parse, "five numbers")
parse_freeu = _make_preset_parser(
    lambda value: FreeUFactors.parse(value, auto_preset=next(iter(FREEU_PRESETS))),
    "B1,B2,S1,S2: four numbers",
)


def expand_file(argument: str) -> str:
    """Return the text of the file for `@FILE`, on one line; other arguments unchanged."""
    if not argument.startswith("@"):
        return argument
    return " ".join(read_text(argument[1:]).split())


def parse_legacy(argument: str) -> tuple[str, ...]:
    """Parse names of quirks, separated by commas."""
    names = sorted({name.strip() for name in argument.replace("_", "-").split(",")} - {""})
    unknown = [name for name in names if name not in QUIRKS]
    if unknown:
        raise make_unknown_name_error("quirk", unknown[0], QUIRKS)
    return tuple(names)
