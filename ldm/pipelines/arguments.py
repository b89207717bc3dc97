"""Check the types of a task's arguments by their annotations, before any network runs."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as shorten
from types import NoneType, UnionType
from typing import SupportsFloat, SupportsIndex, Union, cast, get_args, get_origin

from torch import Tensor

from ldm.diffusion.guidance import Scale
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError

__all__ = ["check_arguments"]

SCALE_TYPES = set(get_args(Scale))  # a number, and a function of sigma
TEXT_TYPES = {str, Iterable[str]}


def check_arguments(
    model: LatentDiffusion, arguments: Mapping[str, object], annotations: Mapping[str, object]
) -> None:
    """Raise ArgumentError for an argument of another type or shape than its annotation's.

    Args:
        arguments: Those of a task, by name.
        annotations: Of all its parameters, by name.
    """
    for name, value in arguments.items():
        annotation = annotations[name]
        is_union = get_origin(annotation) in (Union, UnionType)
        types = set(get_args(annotation)) if is_union else {annotation}
        if value is None and NoneType in types:
            continue
        types.discard(NoneType)
        if Sequence[str] in types:
            _check(name, value, "one text or a list of texts", is_valid=_are_texts(value))
        elif name in ("image", "images"):
            channels = sorted({3, model.autoencoder.in_channels})
            allowed = f"(1, {' or '.join(map(str, channels))}, H, W) in [-1, 1]"
            is_list = name == "images" and isinstance(value, list | tuple | Tensor)
            for image in cast(Sequence[object], value) if is_list else [value]:
                is_valid = _is_batch(image) and cast(Tensor, image).shape[1] in channels
                _check(name, image, f"a tensor {allowed}", is_valid=is_valid)
        elif types == {Tensor}:
            _check(name, value, "a tensor of 4 dimensions", is_valid=_is_batch(value))
        elif types == {int}:
            _check(name, value, "a whole number", is_valid=_is_number(value, is_whole=True))
        elif types <= SCALE_TYPES:
            is_function = types == SCALE_TYPES and callable(value)
            _check(name, value, "a finite number", is_valid=is_function or _is_number(value))
        elif bool not in types and all(map(_is_class, types)):
            classes = cast(set[type], types)
            allowed = " or ".join(sorted(cls.__name__ for cls in classes))
            is_valid = isinstance(value, tuple(classes))
            _check(name, value, f"of type {allowed}", is_valid=is_valid)
        elif isinstance(value, str) and types.isdisjoint(TEXT_TYPES):
            # It would be read letter by letter, or count as true.
            raise ArgumentError(f"{name} must not be a text, got {value!r}", name)


def _check(name: str, value: object, allowed: str, *, is_valid: bool) -> None:
    if not is_valid:
        text = " ".join(shorten(value).split())  # in one line
        if isinstance(value, Tensor):
            text = f"a tensor {tuple(value.shape)}"
        raise ArgumentError(f"{name} must be {allowed}, got {text}", name)


def _is_class(annotation: object) -> bool:
    return isinstance(annotation, type) and get_origin(annotation) is None


def _are_texts(value: object) -> bool:
    if isinstance(value, str):
        return True
    is_list = isinstance(value, Sequence) and len(value) > 0
    return is_list and all(isinstance(text, str) for text in cast(Sequence[object], value))


def _is_batch(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _is_number(value: object, *, is_whole: bool = False) -> bool:
    """Return whether a value, possibly of NumPy or a tensor, is a finite (whole) number."""
    try:
        number = operator.index(cast(SupportsIndex, value)) if is_whole else value
        return math.isfinite(cast(SupportsFloat, number))
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return False
