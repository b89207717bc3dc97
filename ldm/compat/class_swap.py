"""Changes the classes of a network of `ldm.nets` to those of the original, without rebuilding it.

Third-party code looks for torch's own layers (`type(layer) is torch.nn.Linear`) and for the
original's classes, so the `__class__` of each layer is set to what it expects. This is done only
for networks of the original's classes: all others keep their faster layers.
"""

from typing import TypeVar

from torch import nn

from ldm.compat.diffusion_util import GroupNorm32
from ldm.nets import blocks

Network = TypeVar("Network", bound=nn.Module)

# Class of `ldm.nets` -> the class that replaces it; other modules of this package add theirs.
COMPAT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    blocks.Linear: nn.Linear,
    blocks.Conv2d: nn.Conv2d,
    blocks.UpsampleConv2d: nn.Conv2d,
    blocks.LayerNorm: nn.LayerNorm,
    blocks.GroupNorm: nn.GroupNorm,
}


class CompatModule(nn.Module):
    """Base class of the classes that this package adds to `COMPAT_CLASSES`."""

    def set_original_attributes(self) -> None:
        """Set the original's attributes, after the class of `ldm.nets` has been replaced."""


def swap_classes(network: Network) -> Network:
    """Replace the classes of a network and its layers by COMPAT_CLASSES, in place; return it."""
    # Inner layers first: `set_original_attributes` of outer layers checks their classes.
    for layer in reversed(list(network.modules())):
        new_class = COMPAT_CLASSES.get(type(layer))
        if new_class is not None:
            layer.__class__ = new_class
            # Norms with this eps (in ResBlock, AttentionBlock and the UNet's output) are
            # `GroupNorm32`s in the original, all others are plain `torch.nn.GroupNorm`s.
            if isinstance(layer, nn.GroupNorm) and layer.eps == 1e-5:
                layer.__class__ = GroupNorm32
        # If the constructor of a compat class calls this, `network` already has that class.
        if isinstance(layer, CompatModule) and (new_class is not None or layer is network):
            layer.set_original_attributes()
    return network
