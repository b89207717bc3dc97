"""Transformed weights, computed once for many calls: `cache_weights`, and what layers ask of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar, cast

from torch import Tensor

from ldm.runtime.device import free_memory

Form = TypeVar("Form", Tensor, list[Tensor])


class _Entry(NamedTuple):
    """The forms of one weight by name; holding the weight keeps its id from being used again."""

    weight: Tensor
    state: tuple[int, int]
    forms: dict[str, Tensor | list[Tensor]]


_cache: ContextVar[dict[int, _Entry] | None] = ContextVar("cache", default=None)


@contextmanager
def cache_weights() -> Iterator[None]:
    """Keep the transformed weights that layers without gradients compute, within this block.

    For loops that run a network many times: the first step of a UNet takes about one and a half
    times as long, and the forms take up to 1.8 times the memory of their weights. Weights that were
    replaced, moved or written to are transformed again; only writes that torch does not count,
    through `.data` or numpy, are seen when the block has ended: do not write so within.
    """
    if _cache.get() is not None:
        yield
        return
    token = _cache.set({})
    try:
        yield
    finally:
        _cache.reset(token)


def is_caching(weight: Tensor) -> bool:
    """Return whether `transform_weight` keeps its result: within `cache_weights`, if memory allows.

    The first use decides, not a second one: the last digits depend on it, and those of an image
    must not depend on what its model did before.
    """
    cache = _cache.get()
    if cache is None or weight.is_inference():  # torch does not count writes to those
        return False
    return id(weight) in cache or 4 * weight.nbytes <= free_memory()  # at most half of it is taken


def transform_weight(weight: Tensor, name: str, transform: Callable[[Tensor], Form]) -> Form:
    """Return the form of a weight that `transform` computes, called `name`."""
    cache = _cache.get()
    if cache is None or not is_caching(weight):
        return transform(weight)
    state = weight.data_ptr(), weight._version
    entry = cache.get(id(weight))
    if entry is None or entry.state != state:
        entry = cache[id(weight)] = _Entry(weight, state, {})
    if name not in entry.forms:
        entry.forms[name] = transform(weight)
    return cast(Form, entry.forms[name])
