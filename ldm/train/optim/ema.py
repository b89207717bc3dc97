"""The running average of the weights, which is what gets sampled from and shipped."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.train.distributed.parallel import reshard

__all__ = ["EMA"]


class EMA:
    """shadow = decay shadow + (1 - decay) weights, over the trainable parameters of a module.

    decay: its final value; it warms up as (1 + n) / (10 + n) over the first updates n.
    device: where the average is kept; None = with the weights. Split weights have a split average.
    """

    def __init__(
        self, module: nn.Module, decay: float = 0.9999, device: torch.device | None = None
    ) -> None:
        self.decay, self.updates = decay, 0
        trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
        self.shadow = {name: p.detach().clone().to(device or p.device) for name, p in trained}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average a step towards the weights of `module`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        shadow = list(self.shadow.values())
        weights = [parameters[name].detach().to(kept.device) for name, kept in self.shadow.items()]
        torch._foreach_lerp_(shadow, weights, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module` has the averaged weights; afterwards its own again."""
        reshard(module)
        parameters = dict(module.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.shadow}
        _put(parameters, self.shadow)
        try:
            yield
        finally:
            reshard(module)
            _put(parameters, kept)


@torch.no_grad()
def _put(into: dict[str, Any], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)
