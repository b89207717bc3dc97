"""Offload modules: keep weights on the CPU, and copy them to a device only while they are used."""

import itertools
import weakref

import torch
from torch import Tensor, nn

__all__ = ["offload", "unload_all"]


class _OffloadedModule:
    """A module and, while it is on the device, the CPU copies of its parameters and buffers."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.cpu_data: list[tuple[Tensor, Tensor]] = []  # (parameter or buffer, its data)

    def load(self, *hook_args: object) -> None:
        """Copy the weights to the device, and unload the module that is on it."""
        current = _loaded.get(self.device)
        if current is self:
            return
        if current is not None:
            current.unload()
        try:
            for tensor in itertools.chain(self.module.parameters(), self.module.buffers()):
                # Copied even on the same device, as `unload` discards writes to the copy.
                self.cpu_data.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self.device, copy=True)
        except RuntimeError:  # out of memory
            self.unload()
            raise
        _loaded[self.device] = self

    def unload(self) -> None:
        """Restore the CPU weights; changes of the copy on the device are lost."""
        for tensor, data in self.cpu_data:
            # If `model.float()` has converted the copy, it replaces the CPU data.
            tensor.data = data if data.dtype == tensor.dtype else tensor.data.to(data.device)
        self.cpu_data.clear()
        _loaded.pop(self.device, None)


# The loaded module of each device; one dict for all models, so that base and refiner are not on the
# device at once.
_loaded: weakref.WeakValueDictionary[torch.device, _OffloadedModule] = weakref.WeakValueDictionary()


def unload_all() -> None:
    """Move all offloaded modules back to the CPU, so that their weights can be replaced."""
    for offloaded in list(_loaded.values()):
        offloaded.unload()


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep a module on the CPU; when it runs, load it to the device until another module runs.

    Calling the module, or one of its children, counts as running.
    """
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", the same key
    offloaded = _OffloadedModule(module, device)
    for submodule in (module, *module.children()):
        submodule.register_forward_pre_hook(offloaded.load)
