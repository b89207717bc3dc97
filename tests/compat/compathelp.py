"""What the tests of the old names share: building from configs as programs do, and comparing."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from ldm.compat.util import instantiate_from_config

TINY = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [1, 2],
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 24,
    "legacy": False,
}
TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = Path(__file__).parents[2] / "configs" / "stable-diffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"


def randomize(network):
    """Give a fresh network an output that is not zero."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1 and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


def tiny_unet(**changes):
    torch.manual_seed(0)
    unet = instantiate_from_config({"target": UNET, "params": {**TINY, **changes}})
    return randomize(unet)


def tiny_inputs(batch=2, side=8, context=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, side, side, generator=generator)
    return x, torch.arange(batch) * 400, torch.randn(batch, 5, context, generator=generator)


def relative_error(ours, theirs):
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def tiny_config(name="v1-inference.yaml"):
    """A published config of SD 1, as programs read it, with small networks."""
    config = OmegaConf.load(CONFIGS / name).model
    sizes = {"model_channels": 32, "num_heads": 4, "context_dim": 32, "num_res_blocks": 1}
    lists = {"channel_mult": [1, 2], "attention_resolutions": [2, 1]}
    config.params.unet_config.params.update(sizes | lists)
    autoencoder = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    config.params.first_stage_config.params.ddconfig.update(autoencoder)
    config.params.cond_stage_config.params = {"arch": TINY_CLIP}
    return config
