"""Exponential moving average (EMA) of the weights, used for sampling and export."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.train.distributed.parallel import reshard

__all__ = ["EMA"]


class EMA:
    """shadow = decay shadow + (1 - decay) weights, over the trainable parameters of a module.

    Args:
        module: Its trainable parameters, which may be sharded, are averaged.
        decay: After n updates, the smaller one of this and (1 + n) / (10 + n) is used.
        device: Device of the EMA; None = that of the weights.
    """

    def __init__(
        self, module: nn.Module, decay: float = 0.9999, device: torch.device | None = None
    ) -> None:
        self.decay = decay
        self.num_updates = 0
        parameters = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
        self.shadow = {name: p.detach().clone().to(device or p.device) for name, p in parameters}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Update the EMA with the weights of `module`."""
        self.num_updates += 1
        # The original's warmup: without it, the initial weights would dominate for 1e4 steps.
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = dict(module.named_parameters())
        shadow = list(self.shadow.values())
        weights = [parameters[name].detach().to(x.device) for name, x in self.shadow.items()]
        torch._foreach_lerp_(shadow, weights, 1 - decay)  # no public torch function takes a list

    @contextmanager
    def apply_to(self, module: nn.Module, *, enabled: bool = True) -> Iterator[None]:
        """Replace the weights of `module` by the EMA within the context, if `enabled`."""
        if not enabled:
            yield
            return
        reshard(module)  # FSDP may hold gathered weights after a forward pass
        parameters = dict(module.named_parameters())
        # Values are copied in place, as the optimizer refers to these tensors.
        backup = {name: parameters[name].detach().clone() for name in self.shadow}
        _copy_values(self.shadow, parameters)
        try:
            yield
        finally:
            reshard(module)
            _copy_values(backup, parameters)


@torch.no_grad()
def _copy_values(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
