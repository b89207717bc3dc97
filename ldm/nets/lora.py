"""LoRA: low-rank additions to layers that stay as they are.

    attached   y = layer(x) + strength * alpha / rank * up(down(x))     can be trained and detached
    merged     W <- W + strength * alpha / rank * up down               as fast as without

Hu et al. 2021 (arXiv:2106.09685); of convolutions: Yeh et al. 2023 (arXiv:2309.14859), LoCon.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.nets.blocks import Conv2d, DoublingConv2d, Linear, upsample_nearest, zero
from ldm.runtime.errors import ArgumentError

__all__ = ["LoRA", "LoRALayer", "Target", "merge_loras"]


class Target(NamedTuple):
    """A layer that a LoRA changes, or one third of an attention's `in_proj_weight`.

    Args:
        layer: A linear layer, a convolution, or an attention with a fused projection `in_proj`.
        part: 0 queries, 1 keys, 2 values; None for a layer that is changed as a whole.
    """

    layer: nn.Module
    part: int | None = None

    @property
    def parameter(self) -> str:
        return "weight" if self.part is None else "in_proj_weight"

    @property
    def weight(self) -> Tensor:
        """(C_out, C_in), or (C_out, C_in, kh, kw)."""
        weight = self.layer.get_parameter(self.parameter)
        return weight if self.part is None else weight.chunk(3)[self.part]

    @torch.no_grad()
    def add(self, delta: Tensor) -> None:
        """Replace the weight by a new one, as the old one's memory may be pages of a file."""
        old = self.layer.get_parameter(self.parameter)
        new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        self.layer.register_parameter(self.parameter, new)
        total = self.weight.float() + delta.to(new.device)
        self.weight.copy_(total)
        if not self.weight.isfinite().all() and total.isfinite().all():
            raise ArgumentError(
                f"the sum of a layer's weight and its LoRAs is too large for {new.dtype}", "loras"
            )


class LoRALayer(nn.Module):
    """The addition of rank `rank` to one layer, zero until it is trained or filled.

    Attributes:
        alpha: Strength of the file, in units of the rank; by default the rank.
        strength: The user's own factor, which files do not hold.
    """

    alpha: Tensor

    def __init__(self, target: Target, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        features, channels, *kernel = target.weight.shape
        self.lora_down: Conv2d | Linear
        self.lora_up: Conv2d | Linear
        if kernel:
            conv = cast(Conv2d, target.layer)
            self.lora_down = Conv2d(
                channels,
                rank,
                (kernel[0], kernel[1]),
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                bias=False,
            )
            self.lora_up = Conv2d(rank, features, 1, bias=False)
        else:
            self.lora_down = Linear(channels, rank, bias=False)
            self.lora_up = Linear(rank, features, bias=False)
        zero(self.lora_up)
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None else alpha)))
        self.target = target
        self.rank = rank
        self.strength = 1.0

    @property
    def scale(self) -> Tensor:
        """The factor strength * alpha / rank."""
        return self.alpha * (self.strength / self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output for the input x."""
        return self.lora_up(self.lora_down(x)) * self.scale  # (B, N, C_out) or (B, C_out, h, w)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return what is added to the layer's weight, in its shape, float32."""
        down, up = self.lora_down.weight.float(), self.lora_up.weight.float()
        return (up.flatten(1) @ down.flatten(1) * self.scale).view(len(up), *down.shape[1:])

    def add_to_output(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the layer's output with the addition; a forward hook of the layer."""
        x = upsample_nearest(*args) if isinstance(layer, DoublingConv2d) else args[0]
        y: Tensor = self(x.to(self.lora_down.weight.dtype)).to(output.dtype)
        if self.target.part is not None:
            before, width = self.target.part, y.shape[-1]
            y = F.pad(y, (before * width, (2 - before) * width))  # (B, N, 3 C_out)
        return output + y


class LoRA(nn.ModuleDict):
    """The layers of one LoRA by name; its state dict is what a file of kohya's holds."""

    def __init__(self, layers: Mapping[str, LoRALayer]) -> None:
        super().__init__(layers)
        self.hooks: list[RemovableHandle] = []

    @property
    def layers(self) -> dict[str, LoRALayer]:
        return {name: cast(LoRALayer, layer) for name, layer in self.items()}

    def attach(self) -> None:
        """Add every layer to the output of its target, until `detach`."""
        for lora in self.layers.values():
            target = lora.target
            lora.to(target.weight.device)
            layer = target.layer if target.part is None else target.layer.get_submodule("in_proj")
            self.hooks.append(layer.register_forward_hook(lora.add_to_output))

    def detach(self) -> None:
        """Remove what `attach` added."""
        while self.hooks:
            self.hooks.pop().remove()

    def scale(self, strength: float) -> "LoRA":
        """Set the strength of all layers: 1 as trained, 0 none."""
        for lora in self.layers.values():
            lora.strength = strength
        return self


def merge_loras(*loras: LoRA) -> None:
    """Add LoRAs to the weights; deltas of one target are summed before they are rounded."""
    layers_by_target: dict[Target, list[LoRALayer]] = {}
    for lora in loras:
        for layer in lora.layers.values():
            layers_by_target.setdefault(layer.target, []).append(layer)
    for target, layers in layers_by_target.items():
        target.add(reduce(torch.add, (layer.delta() for layer in layers)))
