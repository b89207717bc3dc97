"""Modules whose weights stay on the CPU, with a copy on a device while they are in use."""

import itertools
import weakref

import torch
from torch import Tensor, nn

__all__ = ["offload", "recall"]


class _Offloaded:
    """A module and, while it is in use, the CPU data of its parameters and buffers."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.weights: list[tuple[Tensor, Tensor]] = []

    def bring(self, *hook_args: object) -> None:
        """Copy the weights to the device; those of the module that was in use there leave it."""
        current = _in_use.get(self.device)
        if current is self:
            return
        if current is not None:
            current.leave()
        try:
            for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
                # A copy even to the same device: what is written to it is forgotten in `leave`.
                self.weights.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self.device, copy=True)
        except RuntimeError:  # out of memory
            self.leave()
            raise
        _in_use[self.device] = self

    def leave(self) -> None:
        """Take the weights from the device, and forget what was written to them there."""
        for tensor, data in self.weights:
            # `model.float()` may have converted them.
            tensor.data = data if data.dtype == tensor.dtype else tensor.data.to(data.device)
        self.weights.clear()
        _in_use.pop(self.device, None)


# Of all models of this process: a refiner must not wait beside its base.
_in_use: weakref.WeakValueDictionary[torch.device, _Offloaded] = weakref.WeakValueDictionary()


def recall() -> None:
    """Take modules that are in use from their devices, so that their weights can be replaced."""
    for offloaded in list(_in_use.values()):
        offloaded.leave()


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep a module on the CPU, and on a device only from when it runs until another one does.

    It runs when it, or one of its children, is called.
    """
    device = torch.empty(0, device=device).device  # "cuda" is "cuda:0", one key for both
    offloaded = _Offloaded(module, device)
    for part in (module, *module.children()):
        part.register_forward_pre_hook(offloaded.bring)
