"""Switches that change what a step costs in time and memory, but no number and no weight's name."""

from typing import Any

import torch
from torch import nn

__all__ = ["apply", "checkpoint_gradients"]


def apply(
    model: nn.Module,
    *,
    checkpoint: bool | None = None,
    channels_last: bool = False,
    compiled: bool = False,
) -> None:
    """Sets up a model for training; before it is split among processes.

    checkpoint: see `checkpoint_gradients`; None leaves it to the config.
    channels_last: convolutions hold weights, and so activations, pixel by pixel, which tensor
        cores prefer; on CPUs it costs a little.
    compiled: the UNet, or else the whole model, goes through torch.compile; the first step of
        every picture size then takes a minute.
    """
    if checkpoint is not None:
        checkpoint_gradients(model, checkpoint)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compiled:
        network: Any = getattr(model, "unet", model)
        network.compile()


def checkpoint_gradients(module: nn.Module, on: bool = True) -> int:
    """Whether blocks forget their activations and make them again in the backward pass.

    Chen et al. 2016 (arXiv:1604.06174): the same gradients, dropout included. Returns how many
    blocks there are that can.
    """
    blocks: list[Any] = [part for part in module.modules() if hasattr(part, "use_checkpoint")]
    for block in blocks:
        block.use_checkpoint = on
    return len(blocks)
