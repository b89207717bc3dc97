"""LoRA: low-rank additions to the weights of frozen layers.

    attached   y = layer(x) + strength * alpha / rank * up(down(x))     trainable, removable
    merged     W <- W + strength * alpha / rank * up down               no cost at run time

Hu et al. 2021 (arXiv:2106.09685), section 4.1; for convolutions, LoCon: Yeh et al. 2023
(arXiv:2309.14859). Other adapters, which can only be merged, are in `lycoris`.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.nets.blocks import Conv2d, Linear, UpsampleConv2d, upsample_nearest, zero_module
from ldm.runtime.errors import ArgumentError

__all__ = [
    "TEXT_PROJECTION", "LoRA", "LoRALayer", "MergedChanges", "Target", "WeightChange",
    "WeightDelta", "merge_changes", "sum_deltas",
]  # fmt: skip

TEXT_PROJECTION = "text_projection"  # parameter of an OpenCLIP text tower, (C_in, C_out)


class Target(NamedTuple):
    """A parameter to change, or the q, k or v third of a fused `in_proj_weight`.

    Args:
        layer: A linear layer, a convolution, a norm, an attention with `in_proj`, or a text tower.
        qkv_index: 0 for queries, 1 for keys, 2 for values; None = the whole parameter.
        name: "weight", "bias", or TEXT_PROJECTION, which is stored transposed.
    """

    layer: nn.Module
    qkv_index: int | None = None
    name: str = "weight"

    @property
    def parameter_name(self) -> str:
        """Name of the parameter in the layer."""
        return self.name if self.qkv_index is None else f"in_proj_{self.name}"

    @property
    def weight(self) -> Tensor:
        """(C_out, C_in), (C_out, C_in, kh, kw), or (C,) of a norm or a bias."""
        weight = self.layer.get_parameter(self.parameter_name)
        if self.name == TEXT_PROJECTION:
            return weight.T
        return weight if self.qkv_index is None else weight.chunk(3)[self.qkv_index]

    @torch.no_grad()
    def set_weight(self, value: Tensor) -> None:
        """Replace the weight, in a new parameter, as the old one may be memory-mapped."""
        old = self.layer.get_parameter(self.parameter_name)
        new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        self.layer.register_parameter(self.parameter_name, new)
        self.weight.copy_(value)
        is_rounded = new.dtype != value.dtype
        if is_rounded and not self.weight.isfinite().all() and value.isfinite().all():
            raise ArgumentError(
                f"the sum of a layer's weight and its LoRAs is too large for {new.dtype}", "loras"
            )


class WeightChange(ABC):
    """A change of one weight by a LoRA or a LyCORIS adapter.

    Attributes:
        strength: Factor of the whole change, set by the user; 1 = as trained.
    """

    target: Target
    strength: float

    @abstractmethod
    def change_weight(self, weight: Tensor) -> Tensor:
        """Return the changed weight, (C_out, C_in, …); both are float32."""


class WeightDelta(WeightChange):
    """A change that adds a delta, which does not depend on the weight."""

    @abstractmethod
    def compute_delta(self) -> Tensor:
        """Compute the delta, in the shape of the weight, float32."""

    def change_weight(self, weight: Tensor) -> Tensor:
        return weight + self.compute_delta().to(weight.device)


class LoRALayer(nn.Module, WeightDelta):
    """A low-rank addition to one layer, initially zero.

    Args:
        alpha: Numerator of the factor alpha / rank of the addition; None = `rank`.
    """

    alpha: Tensor

    def __init__(self, target: Target, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        out_channels, in_channels, *kernel_size = target.weight.shape
        self.lora_down: Conv2d | Linear
        self.lora_up: Conv2d | Linear
        if kernel_size:
            conv = cast(Conv2d, target.layer)
            self.lora_down = Conv2d(
                in_channels,
                rank,
                (kernel_size[0], kernel_size[1]),
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                bias=False,
            )
            self.lora_up = Conv2d(rank, out_channels, 1, bias=False)
        else:
            self.lora_down = Linear(in_channels, rank, bias=False)
            self.lora_up = Linear(rank, out_channels, bias=False)
        zero_module(self.lora_up)
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None else alpha)))
        self.target = target
        self.rank = rank
        self.strength = 1.0

    @property
    def scale(self) -> Tensor:
        """The factor strength * alpha / rank."""
        return self.alpha * (self.strength / self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """Return the addition to the layer's output for input x."""
        return self.lora_up(self.lora_down(x)) * self.scale  # (B, N, C_out) or (B, C_out, h, w)

    @torch.no_grad()
    def compute_delta(self) -> Tensor:
        """Compute the addition to the layer's weight, in its shape, float32."""
        down, up = self.lora_down.weight.float(), self.lora_up.weight.float()
        return (up.flatten(1) @ down.flatten(1) * self.scale).view(len(up), *down.shape[1:])

    def add_to_output(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the layer's output plus the addition, as a forward hook of the layer."""
        x = upsample_nearest(*args) if isinstance(layer, UpsampleConv2d) else args[0]
        y: Tensor = self(x.to(self.lora_down.weight.dtype)).to(output.dtype)
        index, channels = self.target.qkv_index, y.shape[-1]
        if index is not None:
            y = F.pad(y, (index * channels, (2 - index) * channels))  # (B, N, 3 C_out)
        return output + y


class LoRA(nn.ModuleDict):
    """The layers of one LoRA by name; its state dict has the keys of kohya's files.

    Attributes:
        hooks: Handles of the forward hooks of the target layers, while attached.
    """

    def __init__(self, layers: Mapping[str, LoRALayer]) -> None:
        super().__init__(layers)
        self.hooks: list[RemovableHandle] = []

    @property
    def layers(self) -> dict[str, LoRALayer]:
        """Layers by name."""
        return {name: cast(LoRALayer, layer) for name, layer in self.items()}

    def attach(self) -> None:
        """Add every layer to the output of its target, until `detach`."""
        for lora in self.layers.values():
            target = lora.target
            lora.to(target.weight.device)
            layer = target.layer
            if target.qkv_index is not None:
                layer = layer.get_submodule("in_proj")
            self.hooks.append(layer.register_forward_hook(lora.add_to_output))

    def detach(self) -> None:
        """Undo `attach`."""
        while self.hooks:
            self.hooks.pop().remove()


class MergedChanges:
    """Changes merged into weights, and the original weights.

    Original weights are kept, not recomputed by subtraction, so that no rounding error remains.
    Memory-mapped ones stay memory-mapped.

    Attributes:
        original_weights: By (layer, parameter name).
        tokens: Tokens of textual inversions in the LoRA files.
        loras: The merged files and strengths, to compare with those of a later call.
        restore_defaults: Restores the model's `defaults`; None if no few-step LoRA replaced them.
    """

    def __init__(self) -> None:
        self.original_weights: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self.tokens: list[str] = []
        self.loras: object = None
        self.restore_defaults: Callable[[], None] | None = None

    def merge(self, changes: Sequence[WeightChange]) -> None:
        """Merge changes in place of the present ones; if that fails, none are merged."""
        self.restore()
        for target in dict.fromkeys(change.target for change in changes):
            key = (target.layer, target.parameter_name)
            self.original_weights[key] = target.layer.get_parameter(target.parameter_name)
        try:
            merge_changes(changes)
        except ArgumentError:
            self.restore()
            raise

    def restore(self) -> None:
        """Restore the original weights."""
        for (layer, name), weight in self.original_weights.items():
            merged = layer.get_parameter(name)
            if (weight.dtype, weight.device) != (merged.dtype, merged.device):
                # `model.to` was called, which converts the merged weights only.
                requires_grad = merged.requires_grad
                weight = nn.Parameter(weight.detach().to(merged), requires_grad=requires_grad)
            layer.register_parameter(name, weight)
        self.original_weights.clear()


@torch.no_grad()
def merge_changes(changes: Iterable[WeightChange]) -> None:
    """Apply changes to their weights, in float32; a weight is rounded to its dtype once.

    Deltas of a weight are summed first, so that their order has no effect, not even on rounding;
    other changes follow in the given order.
    """
    by_target: dict[Target, list[WeightChange]] = {}
    for change in changes:
        by_target.setdefault(change.target, []).append(change)
    for target, group in by_target.items():
        weight = target.weight.float()
        deltas = [change for change in group if isinstance(change, WeightDelta)]
        if deltas:
            weight = weight + sum_deltas(deltas).to(weight.device)
        for change in group:
            if not isinstance(change, WeightDelta):
                weight = change.change_weight(weight)
        target.set_weight(weight)


def sum_deltas(changes: Sequence[WeightDelta]) -> Tensor:
    """Return the sum of deltas of one weight, float32, bitwise equal for any order of them."""
    deltas = [change.compute_delta() for change in changes]
    if len(deltas) > 2:
        # Rounding of a sum of more than two numbers depends on their order: sort them by value.
        return torch.stack(deltas).sort(0).values.sum(0)
    return functools.reduce(torch.add, deltas)
