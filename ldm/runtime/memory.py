"""Measure the memory of a computation on PyTorch's fake tensors, which have shapes only."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakMemoryMode", "make_fake"]


class PeakMemoryMode(TorchDispatchMode):
    """A mode that counts the bytes of all living tensor storages created in it.

    Attributes:
        now: bytes of living storages.
        peak: the maximum of `now`.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.now: int = 0
        self.peak: int = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = {storage._cdata for storage in _storages((args, kwargs))}  # views create nothing
        for storage in _storages(output):
            if storage._cdata not in inputs:
                self._track(storage)
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            # By address, which a later storage may have again: so it must be forgotten at once.
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def make_fake(module: nn.Module) -> None:
    """Replace a module's meta tensors by fake CPU tensors, with which autocast works."""
    for submodule in module.modules():
        for name, p in submodule._parameters.items():
            if p is not None and p.is_meta:
                fake = torch.empty(p.shape, dtype=p.dtype)
                submodule._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, value in submodule._buffers.items():
            if value is not None and value.is_meta:
                submodule._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
