"""`ldm.modules.ema` of the original: the average of weights as a module."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Exponential moving average of the parameters of a model that require gradients.

    shadow -= (1 - decay) (shadow - weight), and `decay` warms up as (1 + n) / (10 + n) over the
    first updates n. The average of a parameter is a buffer of its name without dots.

    Args:
        decay: Its final value.
        use_num_upates: Whether it warms up.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True
    ) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError("Decay must be between 0 and 1")
        self.m_name2s_name: dict[str, str] = {}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        start = 0 if use_num_upates else -1
        self.register_buffer("num_updates", torch.tensor(start, dtype=torch.int32))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.m_name2s_name[name] = name.replace(".", "")
                self.register_buffer(self.m_name2s_name[name], parameter.clone().detach())
        self.collected_params: list[Tensor] = []

    def reset_num_updates(self) -> None:
        """Let the decay warm up again."""
        self.num_updates = torch.zeros_like(self.num_updates)

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the average towards the weights of a model."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters, shadows = dict(model.named_parameters()), dict(self.named_buffers())
        for name, shadow_name in self.m_name2s_name.items():
            shadow = shadows[shadow_name]
            shadow.sub_((1 - decay) * (shadow - parameters[name].type_as(shadow)))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of a model with the average."""
        parameters, shadows = dict(model.named_parameters()), dict(self.named_buffers())
        for name, shadow_name in self.m_name2s_name.items():
            parameters[name].copy_(shadows[shadow_name])

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of parameters, for `restore`."""
        self.collected_params = [parameter.clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite parameters with what `store` has kept."""
        for stored, parameter in zip(self.collected_params, parameters, strict=False):
            parameter.copy_(stored)
