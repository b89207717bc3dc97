"""Helpers for the tests of `ldm.compat`: networks built from configs, and comparison."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from encoders.encoderhelp import CLIP_ARCH
from ldm.compat.util import instantiate_from_config
from nets import nethelp

TINY = {"image_size": 8, **nethelp.TINY}
TINY_CLIP = CLIP_ARCH | {"num_hidden_layers": 2}
CONFIGS = Path(__file__).parents[2] / "configs" / "stable-diffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"


def randomize(network):
    """Give a new network an output that is not zero."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1 and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


def attend(self, x, context=None, mask=None):
    """Compute attention as programs do, with our layers."""
    context = x if context is None else context
    q, k, v = (
        y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for y in (self.to_q(x), self.to_k(context), self.to_v(context))
    )
    scores = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
    return self.to_out((scores @ v).transpose(1, 2).flatten(2))


def tiny_unet(**changes):
    torch.manual_seed(0)
    unet = instantiate_from_config({"target": UNET, "params": {**TINY, **changes}})
    return randomize(unet)


def compute_error(ours, theirs):
    """Compute the largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def make_tiny_config(name="v1-inference.yaml"):
    """Read a published config of SD 1 as programs do, and make its networks small."""
    config = OmegaConf.load(CONFIGS / name).model
    sizes = {"model_channels": 32, "num_heads": 4, "context_dim": 32, "num_res_blocks": 1}
    lists = {"channel_mult": [1, 2], "attention_resolutions": [2, 1]}
    config.params.unet_config.params.update(sizes | lists)
    autoencoder = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    config.params.first_stage_config.params.ddconfig.update(autoencoder)
    config.params.cond_stage_config.params = {"arch": TINY_CLIP}
    return config
