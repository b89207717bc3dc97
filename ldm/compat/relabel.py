"""Turns networks of `ldm.nets` into those of the original, with the same parameters.

Programs look for torch's own layers (`type(layer) is torch.nn.Linear`) and for the original's
classes, so each layer is given the class that they expect. That is done only to networks that are
built under old names: the others keep their faster layers.
"""

from typing import TypeVar

from torch import nn

from ldm.compat.diffusion_util import GroupNorm32
from ldm.nets import blocks

Network = TypeVar("Network", bound=nn.Module)

# The original's class by that of `ldm.nets`; other modules of this package add theirs.
OLD_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    blocks.Linear: nn.Linear,
    blocks.Conv2d: nn.Conv2d,
    blocks.UpsampleConv2d: nn.Conv2d,
    blocks.LayerNorm: nn.LayerNorm,
    blocks.GroupNorm: nn.GroupNorm,
}


class OldModule(nn.Module):
    """Base class of the original's classes in `OLD_CLASSES`."""

    def add_attributes(self) -> None:
        """Set the original's attributes that the class of `ldm.nets` does not have."""


def relabel(network: Network) -> Network:
    """Turn a network, in place, into one of the original's classes; return it."""
    # Inner layers first: `add_attributes` of the outer ones looks at their classes.
    for layer in reversed(list(network.modules())):
        old_class = OLD_CLASSES.get(type(layer))
        if old_class is not None:
            layer.__class__ = old_class
            # This eps tells the norms of ResBlock, AttentionBlock and the UNet's output from the
            # others, which are plain `torch.nn.GroupNorm`s.
            if isinstance(layer, nn.GroupNorm) and layer.eps == 1e-5:
                layer.__class__ = GroupNorm32
        # `network` itself has its old class already if that class's constructor called this.
        if isinstance(layer, OldModule) and (old_class is not None or layer is network):
            layer.add_attributes()
    return network
