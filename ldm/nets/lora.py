"""Low-rank adaptation: a small change beside a layer that stays as it is.

    attached   y = layer(x) + weight * alpha / rank * up(down(x))     can be trained and taken away
    merged     W <- W + weight * alpha / rank * up down               as fast as without

Linear layers, convolutions, and the thirds (queries, keys, values) of a fused projection. What the
changes of a file are called is the business of `loading/adapters.py`.

Hu et al. 2021 (arXiv:2106.09685); of convolutions: Yeh et al. 2023 (arXiv:2309.14859), LoCon.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.blocks import Conv2d, DoublingConv2d, Linear, doubled, zero

__all__ = ["Adapter", "LowRank", "Place", "merge"]


class Place(NamedTuple):
    """What a change is added to: a layer, or one third of an attention's `in_proj_weight`.

    part: 0 queries, 1 keys, 2 values; None for a layer of its own.
    """

    layer: Any
    part: int | None = None

    @property
    def weight(self) -> Tensor:
        """(C_out, C_in), or (C_out, C_in, kh, kw)."""
        weight: Tensor = self.layer.weight if self.part is None else self.layer.in_proj_weight
        return weight if self.part is None else weight.chunk(3)[self.part]

    @torch.no_grad()
    def add(self, change: Tensor) -> None:
        """A new weight in place of the old one, whose memory may be pages of a file."""
        name = "weight" if self.part is None else "in_proj_weight"
        old = getattr(self.layer, name)
        new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        setattr(self.layer, name, new)
        self.weight.copy_(self.weight.float() + change.to(new.device))


class LowRank(nn.Module):
    """A change of rank `rank` at a place, zero until it is trained or filled.

    alpha: strength in units of the rank; the rank itself if None.
    `weight` is the user's own factor; it is not kept in files.
    """

    alpha: Tensor

    def __init__(self, place: Place, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        features, channels, *kernel = place.weight.shape
        if kernel:
            layer = place.layer
            geometry = {key: getattr(layer, key) for key in ("stride", "padding", "dilation")}
            self.lora_down: Any = Conv2d(channels, rank, kernel, bias=False, **geometry)
            self.lora_up: Any = Conv2d(rank, features, 1, bias=False)
        else:
            self.lora_down = Linear(channels, rank, bias=False)
            self.lora_up = Linear(rank, features, bias=False)
        zero(self.lora_up)
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None else alpha)))
        self.place, self.rank, self.weight = place, rank, 1.0

    @property
    def factor(self) -> Tensor:
        return self.alpha * (self.weight / self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output for the input x."""
        return self.lora_up(self.lora_down(x)) * self.factor  # (B, N, C_out) or (B, C_out, h, w)

    @torch.no_grad()
    def change(self) -> Tensor:
        """The same as a matrix or kernel, in the shape of the weight, float32."""
        down, up = (layer.weight.float() for layer in (self.lora_down, self.lora_up))
        return (up.flatten(1) @ down.flatten(1) * self.factor).view(len(up), *down.shape[1:])

    def beside(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """As a forward hook of the layer."""
        x = doubled(*args) if isinstance(layer, DoublingConv2d) else args[0]
        change = self(x.to(self.lora_down.weight.dtype)).to(output.dtype)
        if self.place.part is not None:
            before, width = self.place.part, change.shape[-1]
            change = F.pad(change, (before * width, (2 - before) * width))  # (B, N, 3 C_out)
        return output + change


class Adapter(nn.ModuleDict):
    """The changes of one LoRA by name; its state dict is what a file of kohya's holds."""

    def __init__(self, changes: Mapping[str, LowRank]) -> None:
        super().__init__(changes)
        self.hooks: list[Any] = []

    def attach(self) -> None:
        """Adds every change to the output of its layer, until `detach`."""
        low: Any
        for low in self.values():
            place = low.to(low.place.weight.device).place
            layer = place.layer if place.part is None else place.layer.in_proj
            self.hooks.append(layer.register_forward_hook(low.beside))

    def detach(self) -> None:
        """The layers are as they were."""
        while self.hooks:
            self.hooks.pop().remove()

    def scale(self, weight: float) -> "Adapter":
        """Sets the weight of all changes: 1 as trained, 0 none."""
        low: Any
        for low in self.values():
            low.weight = weight
        return self


def merge(*adapters: Adapter) -> None:
    """Adds the changes to the weights for good; where several meet, their sum is rounded once."""
    changes: dict[Place, list[Any]] = {}
    low: Any
    for adapter in adapters:
        for low in adapter.values():
            changes.setdefault(low.place, []).append(low)
    for place, lows in changes.items():
        place.add(reduce(torch.add, (low.change() for low in lows)))
