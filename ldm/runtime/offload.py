"""Offload modules: keep weights on the CPU, with a copy on a device only while they are in use."""

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
        """Copy the weights to the device; the module that was in use there leaves it."""
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
        """Restore the CPU weights; changes of the copy on the device are lost."""
        for tensor, data in self.weights:
            # `model.float()` may have converted them.
            tensor.data = data if data.dtype == tensor.dtype else tensor.data.to(data.device)
        self.weights.clear()
        _in_use.pop(self.device, None)


# For all models of this process, so that base and refiner are not on the device together.
_in_use: weakref.WeakValueDictionary[torch.device, _Offloaded] = weakref.WeakValueDictionary()


def recall() -> None:
    """Move all modules in use back to the CPU, so that their weights can be replaced."""
    for offloaded in list(_in_use.values()):
        offloaded.leave()


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep a module on the CPU; move it to the device from when it runs until another one runs.

    Calling the module, or one of its children, counts as running.
    """
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", to be one key
    offloaded = _Offloaded(module, device)
    for part in (module, *module.children()):
        part.register_forward_pre_hook(offloaded.bring)
