"""Helpers for the tests of `ldm.compat`: networks and models built from configs, comparison."""

import copy
import functools
from pathlib import Path

import torch
from omegaconf import OmegaConf

from encoders.encoderhelp import CLIP_ARCH
from goldfile import GoldenFile, load_golden
from ldm.compat.util import instantiate_from_config
from nets import nethelp
from recipe import fill

TINY = {"image_size": 8, **nethelp.TINY_UNET}
TINY_CLIP = CLIP_ARCH | {"num_hidden_layers": 2}
CONFIGS = Path(__file__).parents[2] / "configs" / "stable-diffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
DDCONFIG = {
    "ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16],
    "in_channels": 3, "resolution": 32, "z_channels": 4, "double_z": True,
}  # fmt: skip
SCHEDULER = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {
        "warm_up_steps": [2], "f_min": [1.0], "f_max": [1.0], "f_start": [0.5],
        "cycle_lengths": [100],
    },
}  # fmt: skip


def randomize_zeros(network):
    """Initialize the parameters that are zero, so that a new network has an output."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1 and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


def attend(self, x, context=None, mask=None):
    """Replaces `CrossAttention.forward`, as third-party code does, with its own attention."""
    context = x if context is None else context
    q, k, v = (
        projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
    )
    weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
    return self.to_out((weights @ v).transpose(1, 2).flatten(2))


def build_tiny_unet(**changes):
    torch.manual_seed(0)
    unet = instantiate_from_config({"target": UNET, "params": {**TINY, **changes}})
    return randomize_zeros(unet)


def compute_error(actual, expected):
    """Compute the largest difference, relative to the largest value."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def make_tiny_config():
    """Read the published config of SD 1, and make its networks small."""
    config = OmegaConf.load(CONFIGS / "v1-inference.yaml").model
    unet = {"model_channels": 32, "num_heads": 4, "context_dim": 32, "num_res_blocks": 1}
    unet |= {"channel_mult": [1, 2], "attention_resolutions": [2, 1]}
    config.params.unet_config.params.update(unet)
    autoencoder = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    config.params.first_stage_config.params.ddconfig.update(autoencoder)
    config.params.cond_stage_config.params = {"arch": TINY_CLIP}
    return config


def build_model(config, salt="sd-gold-public", arch=None, **changes):
    """Build a model from a config of the original, with weights by `recipe`.

    arch: Config of the tiny text tower, in place of the published one.
    """
    config = copy.deepcopy(config)
    config["params"] |= changes
    for key in ("cond_stage_config", "embedder_config"):
        spec = config["params"].get(key)
        if isinstance(spec, dict) and "arch" in spec.get("params", {}):
            spec["params"]["arch"] = arch
    if "depth_stage_config" in config["params"]:
        config["params"]["depth_stage_config"] = {"target": "pipelines.goldmodels.FakeDepthNetwork"}
    model = instantiate_from_config(config)
    model.load_state_dict(fill(model.state_dict(), salt))
    return model.eval()


@functools.cache
def build_recorded_model(name, config_key="config"):
    golden = load_golden(name)
    arch = load_golden("unclip_condition").meta["tiny_arch"]
    return build_model(golden.meta[config_key], golden.meta["salt"], arch)


def get_kwargs(golden: GoldenFile, case: str):
    """Return the keyword arguments of a recorded call of `sample`, tensors included."""
    shared = golden.select("shared/")
    kwargs = dict(golden.info(case)["kwargs"])
    names = {"conditioning": "c", "unconditional_conditioning": "uc"}
    for key, value in kwargs.items():
        if value == "tensor/struct":
            kwargs[key] = shared[names.get(key, key)]
    for key in names.keys() & kwargs.keys():
        if case.startswith("dict"):
            kwargs[key] = {"c_crossattn": [kwargs[key]]}
        elif case.startswith("list"):
            kwargs[key] = [kwargs[key], kwargs[key].flip(1)]
    return kwargs
