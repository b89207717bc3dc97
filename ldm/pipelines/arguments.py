"""Check the types of a task's arguments by their annotations, before any network runs."""

import math
import operator
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence, Set
from reprlib import repr as shorten
from types import NoneType, UnionType
from typing import SupportsFloat, SupportsIndex, Union, cast, get_args, get_origin

from torch import Tensor

from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError

__all__ = ["check_arguments"]

# Names of types in messages, and meanings of the two numbers of a pair by argument.
TYPE_NAMES = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text",
              Iterable[str]: "one text or a list of texts"}  # fmt: skip
PLURAL_NAMES = {int: "whole numbers", float: "finite numbers", Tensor: "tensors",
                Sequence[float]: "lists of numbers"}  # fmt: skip
PAIR_NAMES = {"guidance_interval": "low, high", "crop": "top, left", "negative_crop": "top, left"}
RANGE_TOLERANCE = 1  # resampling overshoots a range; pixels in 0 … 255 exceed it by more


def check_arguments(
    model: LatentDiffusion, arguments: Mapping[str, object], annotations: Mapping[str, object]
) -> None:
    """Raise ArgumentError for an argument of another type or shape than its annotation's.

    Args:
        arguments: The arguments of a task by name.
        annotations: The annotations of all its parameters by name.
    """
    prompts = arguments.get("prompts")
    num_images = len(prompts) if isinstance(prompts, Sequence) else 1
    for name, value in arguments.items():
        annotation = annotations[name]
        is_union = get_origin(annotation) in (Union, UnionType)
        types = list(get_args(annotation)) if is_union else [annotation]
        if value is None and NoneType in types:
            continue
        types = [item for item in types if item is not NoneType]
        if Sequence[float] in types and Tensor in types:
            types.remove(Tensor)  # a tensor of one dimension is checked as a sequence
        if Sequence[str] in types:
            _check_value(name, value, "one text or a list of texts", is_valid=_are_texts(value))
        elif name == "images":
            is_list = isinstance(value, list | tuple)
            is_list = is_list or (isinstance(value, Tensor) and value.dim() == 5)
            for image in cast(Sequence[object], value) if is_list else [value]:
                _check_image(model, name, image, (1,) if is_list else ())
        elif name == "image":
            _check_image(model, name, value, (1, num_images))
        elif name in ("mask", "depth"):
            is_valid = _is_batch(value, (1, num_images), (1,))
            _check_value(name, value, "a tensor (1, 1, H, W)", is_valid=is_valid)
            if name == "mask":  # the depth of depth models has any range
                _check_range(name, cast(Tensor, value), 0, 1)
        elif types == [Tensor]:
            _check_value(name, value, "a tensor of 4 dimensions", is_valid=_is_batch(value))
        else:
            allowed = " or ".join(_describe_type(item, name) for item in types)
            is_valid = any(_is_instance(value, item) for item in types)
            _check_value(name, value, allowed, is_valid=is_valid)


def _check_value(name: str, value: object, allowed: str, *, is_valid: bool) -> None:
    if not is_valid:
        text = " ".join(shorten(value).split())  # in one line
        if isinstance(value, Tensor):
            text = f"a tensor {tuple(value.shape)}"
        raise ArgumentError(f"{name} must be {allowed}, got {text}", name)


def _check_image(
    model: LatentDiffusion, name: str, image: object, batch_sizes: Container[int]
) -> None:
    channels = sorted({3, model.autoencoder.in_channels})
    container = "a list of tensors" if name == "images" else "a tensor"
    allowed = f"{container} (1, {' or '.join(map(str, channels))}, H, W) in [-1, 1]"
    _check_value(name, image, allowed, is_valid=_is_batch(image, batch_sizes, channels))
    _check_range(name, cast(Tensor, image), -1, 1)


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    lowest, highest = (float(value) for value in values.float().aminmax())
    if not (low - RANGE_TOLERANCE <= lowest and highest <= high + RANGE_TOLERANCE):  # also for NaN
        message = f"{name} must have values in {low} … {high}, got {lowest:g} … {highest:g}"
        raise ArgumentError(message, name)


def _describe_type(annotation: object, name: str) -> str:
    origin, items = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        return f"two {PLURAL_NAMES[items[0]]} ({PAIR_NAMES.get(name, 'height, width')})"
    if origin is Callable:
        return "a function"
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    if origin is Sequence:
        return f"a list of {PLURAL_NAMES.get(items[0], items[0].__name__)}"
    return f"of type {cast(type, annotation).__name__}"


def _is_instance(value: object, annotation: object) -> bool:
    """Return whether a value has the annotated type; an array or tensor counts as a list."""
    origin, items = get_origin(annotation), get_args(annotation)
    if origin is Callable:
        return callable(value)
    if annotation in (int, float):
        return _is_number(value, is_whole=annotation is int)
    if annotation is bool:
        return isinstance(value, bool) or _is_number(value)
    if origin is None:
        return isinstance(value, cast(type, annotation))
    if origin is Iterable and isinstance(value, str):
        return True
    is_list = isinstance(value, Collection) and not isinstance(value, str | bytes)
    if not is_list or (isinstance(value, Set | Mapping) and origin is not Iterable):
        return False
    try:
        values = list(cast(Iterable[object], value))
    except TypeError:  # an array or tensor without dimensions
        return False
    has_right_length = origin is not tuple or len(values) == len(items)
    return has_right_length and all(_is_instance(item, items[0]) for item in values)


def _are_texts(value: object) -> bool:
    if isinstance(value, str):
        return True
    is_list = isinstance(value, Sequence) and len(value) > 0
    return is_list and all(isinstance(text, str) for text in cast(Sequence[object], value))


def _is_batch(
    value: object, batch_sizes: Container[int] | None = None, channels: Container[int] | None = None
) -> bool:
    """Return whether a value is a non-empty tensor (B, C, H, W) of an allowed B and C."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and value.numel() > 0
        and (batch_sizes is None or len(value) in batch_sizes)
        and (channels is None or value.shape[1] in channels)
    )


def _is_number(value: object, *, is_whole: bool = False) -> bool:
    """Return whether a value is a finite (whole) number, possibly of NumPy or in a tensor."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dim() > 0):
        return False
    try:
        number = operator.index(cast(SupportsIndex, value)) if is_whole else value
        return math.isfinite(cast(SupportsFloat, number))
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return False
