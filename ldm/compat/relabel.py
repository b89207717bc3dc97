"""Turns networks of `ldm.nets` into those of the original, with the same parameters.

Programs look for torch's own layers (`type(layer) is torch.nn.Linear`) and for the original's
classes. So the class of each layer is set to the one that they expect. Only networks that were
built by old names are changed: the others keep their faster layers.
"""

from typing import TypeVar

from torch import nn

from ldm.compat.diffusion_util import GroupNorm32
from ldm.nets import blocks

Network = TypeVar("Network", bound=nn.Module)

# The class of `ldm.nets`: that of the original. The files of this package add theirs.
OLD_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    blocks.Linear: nn.Linear,
    blocks.Conv2d: nn.Conv2d,
    blocks.DoublingConv2d: nn.Conv2d,
    blocks.LayerNorm: nn.LayerNorm,
    blocks.GroupNorm: nn.GroupNorm,
}


class Relabelled(nn.Module):
    """A class of the original that networks of ours can be turned into."""

    def add_attributes(self) -> None:
        """Set the attributes of the original that our class does not have."""


def relabel(network: Network) -> Network:
    """Turn a network, in place, into one of the original's classes; return it."""
    # The inner ones first: `add_attributes` of the others looks at their classes.
    for layer in reversed(list(network.modules())):
        old_class = OLD_CLASSES.get(type(layer))
        if old_class is not None:
            layer.__class__ = old_class
            # Those of residual blocks, of AttentionBlock and of the UNet's output have this eps.
            if isinstance(layer, nn.GroupNorm) and layer.eps == 1e-5:
                layer.__class__ = GroupNorm32
        # A network that was built by its old name has that class already.
        if isinstance(layer, Relabelled) and (old_class is not None or layer is network):
            layer.add_attributes()
    return network
