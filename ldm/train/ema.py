"""The running average of the weights, which is what gets sampled from and shipped."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    """shadow = decay shadow + (1 - decay) weights, over the trainable parameters of a module.

    decay: its final value; it warms up as (1 + n) / (10 + n) over the first updates n.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999) -> None:
        self.decay, self.updates = decay, 0
        trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
        self.shadow = {name: p.detach().clone() for name, p in trained}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average a step towards the weights of `module`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        weights = [parameters[name].detach() for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module` has the averaged weights; afterwards its own again."""
        parameters = dict(module.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.shadow}
        self._put(parameters, self.shadow)
        try:
            yield
        finally:
            self._put(parameters, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._put(self.shadow, state["shadow"])
        self.updates = state["updates"]

    @staticmethod
    @torch.no_grad()
    def _put(into: dict[str, Any], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            into[name].copy_(value)
