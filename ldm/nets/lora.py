"""LoRA: low-rank additions to layers that stay as they are.

    attached   y = layer(x) + strength * alpha / rank * up(down(x))     can be trained and detached
    merged     W <- W + strength * alpha / rank * up down               as fast as without

Hu et al. 2021 (arXiv:2106.09685); of convolutions: Yeh et al. 2023 (arXiv:2309.14859), LoCon. Other
changes of weights, which can only be merged, are in `lycoris`.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.nets.blocks import Conv2d, DoublingConv2d, Linear, upsample_nearest, zero
from ldm.runtime.errors import ArgumentError

__all__ = [
    "PROJECTION", "Addition", "LoRA", "LoRALayer", "MergedChanges", "Target", "WeightChange",
    "merge_changes", "sum_additions",
]  # fmt: skip

PROJECTION = "text_projection"


class Target(NamedTuple):
    """A weight that is changed, or one third of an attention's `in_proj_weight`."""

    # A linear layer, a convolution, a norm, an attention with `in_proj`, or a text tower.
    layer: nn.Module
    part: int | None = None  # 0 queries, 1 keys, 2 values; None for a weight as a whole
    name: str = "weight"  # or "bias"; PROJECTION of a tower, which is stored transposed

    @property
    def parameter(self) -> str:
        return self.name if self.part is None else f"in_proj_{self.name}"

    @property
    def weight(self) -> Tensor:
        """(C_out, C_in), (C_out, C_in, kh, kw), or (C,) of a norm or a bias."""
        weight = self.layer.get_parameter(self.parameter)
        if self.name == PROJECTION:
            return weight.T
        return weight if self.part is None else weight.chunk(3)[self.part]

    @torch.no_grad()
    def replace(self, value: Tensor) -> None:
        """Replace the weight by a new one, as the old one's memory may be pages of a file."""
        old = self.layer.get_parameter(self.parameter)
        new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        self.layer.register_parameter(self.parameter, new)
        self.weight.copy_(value)
        is_rounded = new.dtype != value.dtype
        if is_rounded and not self.weight.isfinite().all() and value.isfinite().all():
            raise ArgumentError(
                f"the sum of a layer's weight and its LoRAs is too large for {new.dtype}", "loras"
            )


class WeightChange(ABC):
    """What an adapter does to one weight."""

    target: Target
    strength: float  # the user's own factor, which files do not hold

    @abstractmethod
    def change_weight(self, weight: Tensor) -> Tensor:
        """Return the changed weight, float32, of the weight as it is, float32."""


class Addition(WeightChange):
    """A change that does not depend on the weight."""

    @abstractmethod
    def delta(self) -> Tensor:
        """Return what is added to the weight, float32, in its shape."""

    def change_weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta().to(weight.device)


class LoRALayer(nn.Module, Addition):
    """The addition of rank `rank` to one layer, zero until it is trained or filled.

    Attributes:
        alpha: Strength of the file, in units of the rank; by default the rank.
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


class MergedChanges:
    """Changes that are merged into weights, and the weights without them.

    Nothing is subtracted, so that no rounding remains: the unchanged weights stay in memory, where
    they are pages of a file if they were.

    Attributes:
        tokens: Of textual inversions that came with the changes.
        state: Of the files and strengths that are merged, to compare with others.
    """

    def __init__(self) -> None:
        self.originals: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self.tokens: list[str] = []
        self.state: object = None

    def merge(self, changes: Sequence[WeightChange]) -> None:
        """Merge changes in place of those that are merged now; see `merge_changes`."""
        self.restore()
        for target in dict.fromkeys(change.target for change in changes):
            place = (target.layer, target.parameter)
            self.originals[place] = target.layer.get_parameter(target.parameter)
        merge_changes(changes)

    def restore(self) -> None:
        """Put the unchanged weights back."""
        for (layer, name), weight in self.originals.items():
            now = layer.get_parameter(name)
            if (weight.dtype, weight.device) != (now.dtype, now.device):  # `model.to` was called
                weight = nn.Parameter(weight.detach().to(now), requires_grad=now.requires_grad)
            layer.register_parameter(name, weight)
        self.originals.clear()


@torch.no_grad()
def merge_changes(changes: Iterable[WeightChange]) -> None:
    """Change the weights, each of which is rounded once.

    What is added to one weight is summed first, and the order does not matter, bit by bit; then
    come the other changes, in their order.
    """
    by_target: dict[Target, list[WeightChange]] = {}
    for change in changes:
        by_target.setdefault(change.target, []).append(change)
    for target, group in by_target.items():
        weight = target.weight.float()
        additions = [change for change in group if isinstance(change, Addition)]
        if additions:
            weight = weight + sum_additions(additions).to(weight.device)
        for change in group:
            if not isinstance(change, Addition):
                weight = change.change_weight(weight)
        target.replace(weight)


def sum_additions(additions: Sequence[Addition]) -> Tensor:
    """Return what is added to one weight, float32; the order does not matter, bit by bit."""
    deltas = [addition.delta() for addition in additions]
    if len(deltas) > 2:
        # Floating-point sums of more than two depend on the order: here it is by size.
        return torch.stack(deltas).sort(0).values.sum(0)
    return functools.reduce(torch.add, deltas)
