"""Measure the memory of a computation on PyTorch's fake tensors, which have no data."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakMemoryMode", "make_fake"]


class PeakMemoryMode(TorchDispatchMode):
    """A mode that counts the bytes of all live tensor storages created in it.

    Attributes:
        current: Bytes of live storages.
        peak: The maximum of `current` so far.
        bytes_by_storage: Bytes of each live storage, by its address.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.current: int = 0
        self.peak: int = 0
        self.bytes_by_storage: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        # Views have the storages of inputs.
        inputs = {storage._cdata for storage in _list_storages((args, kwargs))}
        for storage in _list_storages(output):
            if storage._cdata not in inputs:
                self._track(storage)
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.bytes_by_storage:
            self.bytes_by_storage[key] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            # Later storages reuse addresses: forget a key as soon as its storage is freed.
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.current -= self.bytes_by_storage.pop(key)


def make_fake(module: nn.Module) -> None:
    """Replace a module's meta tensors by fake CPU tensors; to be called under FakeTensorMode.

    They are on the CPU because autocast is not applied to meta tensors.
    """
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None and parameter.is_meta:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                submodule._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in submodule._buffers.items():
            if buffer is not None and buffer.is_meta:
                submodule._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _list_storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
