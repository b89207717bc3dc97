"""Estimate the GPU memory that generating images takes.

Networks run on PyTorch's fake tensors, which have shapes but no memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.encoders.text import TextEncoder
from ldm.model import LatentDiffusion
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.nets.unet import UNet
from ldm.runtime.memory import PeakMemoryMode, make_fake

__all__ = ["MemoryEstimate", "estimate_memory", "run_on_zeros"]

CONTEXT_LENGTH = 77  # of CLIP, in tokens


@dataclass(frozen=True)
class MemoryEstimate:
    """GPU memory in bytes, without the about 0.5 GiB that PyTorch itself takes.

    Args:
        weights: By network: "unet", "autoencoder" and the names of text encoders.
        activations: Their peak while each network runs, under the same names.
    """

    weights: dict[str, int]
    activations: dict[str, int]

    @property
    def without_offload(self) -> int:
        """Bytes with the whole model on the GPU."""
        return sum(self.weights.values()) + max(self.activations.values())

    @property
    def with_offload(self) -> int:
        """Bytes with one network at a time on the GPU, see `LatentDiffusion.offload`."""
        return max(weights + self.activations[name] for name, weights in self.weights.items())


@torch.no_grad()
def estimate_memory(model: LatentDiffusion, size: tuple[int, int]) -> MemoryEstimate:
    """Estimate the memory for one image from text, with guidance.

    Args:
        model: Loaded, or on the meta device; meta tensors are replaced by fake ones.
        size: (height, width) in pixels.
    """
    text_encoders = {  # their activations are small compared to their weights, and count as 0
        name: encoder
        for name, encoder in model.conditioner.encoders.items()
        if isinstance(encoder, TextEncoder)
    }
    networks: dict[str, nn.Module] = {
        "unet": model.unet,
        "autoencoder": model.autoencoder,
        **text_encoders,
    }
    height, width = (pixels // model.downscale_factor for pixels in size)
    activations = dict.fromkeys(networks, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in networks.values():
            make_fake(network)
        with PeakMemoryMode() as mode:
            run_on_zeros(model.unet, 2, (height, width))  # 2: with guidance
        activations["unet"] = mode.peak
        with PeakMemoryMode() as mode:
            model.decode(torch.zeros(1, model.channels, height, width))
        activations["autoencoder"] = mode.peak
    weights = {name: sum(p.nbytes for p in net.parameters()) for name, net in networks.items()}
    return MemoryEstimate(weights, activations)


def run_on_zeros(
    unet: UNet | LatentUpscalerUNet,
    batch_size: int,
    size: tuple[int, int],
    *,
    is_context_trained: bool = False,
) -> Tensor:
    """Run a forward pass of a UNet on latents of a size (h, w) and conditions, all zeros.

    Args:
        is_context_trained: Whether the text context requires gradients.
    """
    if isinstance(unet, LatentUpscalerUNet):
        z = torch.zeros(batch_size, unet.input_channels + unet.unet_cond_dim, *size)
        vector = torch.zeros(batch_size, unet.context_dim + 1)
        tokens = torch.zeros(batch_size, CONTEXT_LENGTH, unet.context_dim)
        return unet(z, vector[:, 0], tokens, vector)
    label_shapes: dict[object, tuple[int, ...]] = {
        "sequential": (unet.adm_in_channels or 0,),
        "continuous": (1,),
    }
    y = context = None
    if unet.num_classes is not None:
        dtype = torch.long if isinstance(unet.num_classes, int) else None
        y = torch.zeros(batch_size, *label_shapes.get(unet.num_classes, ()), dtype=dtype)
    if isinstance(unet.context_dim, int):
        context = torch.zeros(batch_size, CONTEXT_LENGTH, unet.context_dim)
        context.requires_grad_(is_context_trained)
    x = torch.zeros(batch_size, unet.in_channels, *size)
    output: Tensor = unet(x, torch.zeros(batch_size), context, y)
    return output
