"""`ldm.modules.ema` of the original: EMA weights as buffers of a module."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Exponential moving average (EMA) of the parameters of a model that require gradients.

    ema -= (1 - decay) (ema - weight). The name of an EMA buffer is its parameter's name without
    dots.

    Args:
        decay: Largest decay; after n updates it is limited to (1 + n) / (10 + n).
        use_num_upates: Whether to limit the decay, which warms it up.

    Attributes:
        m_name2s_name: Parameter name -> buffer name.
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
        num_updates = 0 if use_num_upates else -1
        self.register_buffer("num_updates", torch.tensor(num_updates, dtype=torch.int32))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.m_name2s_name[name] = name.replace(".", "")
                self.register_buffer(self.m_name2s_name[name], parameter.clone().detach())
        self.collected_params: list[Tensor] = []

    def reset_num_updates(self) -> None:
        """Restart the warm-up of the decay."""
        self.num_updates = torch.zeros_like(self.num_updates)

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the EMA with the weights of a model."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(decay, (1 + self.num_updates) / (10 + self.num_updates))
        for ema, weight in self._iter_pairs(model):
            ema.sub_((1 - decay) * (ema - weight.type_as(ema)))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of a model with their EMA."""
        for ema, weight in self._iter_pairs(model):
            weight.copy_(ema)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy parameters, for `restore`."""
        self.collected_params = [parameter.clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite parameters with the copy that `store` made."""
        for stored, parameter in zip(self.collected_params, parameters, strict=False):
            parameter.copy_(stored)

    def _iter_pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        parameters = dict(model.named_parameters())
        for name, ema_name in self.m_name2s_name.items():
            yield self.get_buffer(ema_name), parameters[name]
