"""Transformed weights and contexts, computed once for many calls within `cache_weights`."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ldm.runtime.device import get_free_memory

MAX_RESULT_SIZE = 1.8  # largest cached result (Winograd's 16 / 9), relative to its weight
MAX_INPUTS = 4  # number of contexts of which copies are kept, to recognize them
ResultT = TypeVar("ResultT", Tensor, list[Tensor])


class _Entry(NamedTuple):
    """The cached results of a weight."""

    weight: Tensor  # referenced so that its id is not reused
    version: tuple[int, int]  # address, and torch's version, which every write increments
    results: dict[str, Tensor | list[Tensor]]  # by name


class _Cache:
    """Entries by id of their weight, in at most half of the memory that is free at the start."""

    def __init__(self) -> None:
        self.entries: dict[int, _Entry] = {}
        self.inputs: deque[Tensor] = deque(maxlen=MAX_INPUTS)
        self.budget = get_free_memory() / 2  # remaining bytes

    def has_room(self, weight: Tensor) -> bool:
        return id(weight) in self.entries or MAX_RESULT_SIZE * weight.nbytes <= self.budget

    def get_entry(self, weight: Tensor) -> _Entry:
        """Return the entry of a weight; an empty one if the weight is new or was changed."""
        version, entry = (weight.data_ptr(), weight._version), self.entries.get(id(weight))
        if entry is None:
            self.budget -= MAX_RESULT_SIZE * weight.nbytes
        if entry is None or entry.version != version:
            entry = self.entries[id(weight)] = _Entry(weight, version, {})
        return entry

    def find_or_copy_input(self, x: Tensor) -> Tensor:
        """Return the copy of an input that equals x, or a new copy."""
        for copy in self.inputs:
            if copy.dtype == x.dtype and torch.equal(copy, x):
                return copy
        self.inputs.appendleft(x.clone())
        return self.inputs[0]


_cache: ContextVar[_Cache | None] = ContextVar("cache", default=None)


@contextmanager
def cache_weights() -> Iterator[None]:
    """Within the block, cache the transformed weights that layers without gradients compute.

    Projections of a UNet's context are also cached, as long as its values stay the same.

    This is for loops that run a network many times: the first step of a UNet takes about 1.5 times
    as long, and results take up to 1.8 times the memory of their weights. Weights that are moved,
    replaced or written to are transformed again, except after writes that torch does not count,
    through `.data` or numpy: avoid these within the block.
    """
    if _cache.get() is not None:
        yield
        return
    token = _cache.set(_Cache())
    try:
        yield
    finally:
        _cache.reset(token)


def is_caching(weight: Tensor) -> bool:
    """Return whether `transform_weight` caches: within `cache_weights`, if memory allows.

    It must not depend on how often a weight was used: algorithms round differently, and an image
    must not depend on earlier runs of its model.
    """
    cache = _cache.get()
    if cache is None or weight.is_inference():  # torch does not count writes to those
        return False
    return cache.has_room(weight)


def transform_weight(weight: Tensor, name: str, transform: Callable[[Tensor], ResultT]) -> ResultT:
    """Return `transform(weight)`, cached under `name` if `is_caching`."""
    cache = _cache.get()
    if cache is None or not is_caching(weight):
        return transform(weight)
    entry = cache.get_entry(weight)
    if name not in entry.results:
        entry.results[name] = transform(weight)
    return cast(ResultT, entry.results[name])


def get_cached_output(x: Tensor, weight: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `layer(x)`; with `is_caching`, the last output if x still has the same values.

    Args:
        layer: A layer whose only parameter is the weight; its output must not be written to.
    """
    cache = _cache.get()
    # Larger outputs would exceed the budget together with the packed weight.
    is_large = x.shape[:-1].numel() > (MAX_RESULT_SIZE - 1) * weight.shape[1]
    if cache is None or is_large or not is_caching(weight):
        return layer(x)
    results, x = cache.get_entry(weight).results, cache.find_or_copy_input(x)
    last = results.get("input and output")
    if last is None or last[0] is not x:
        last = results["input and output"] = [x, layer(x)]
    return last[1]
