"""Arguments that take one value or several."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar, cast

__all__ = ["as_list"]

T = TypeVar("T")


def as_list(values: T | Iterable[T]) -> list[T]:
    """Return values as a list; a single string or path becomes a list of one."""
    if isinstance(values, str | Path):
        return [cast(T, values)]
    return list(cast(Iterable[T], values))
