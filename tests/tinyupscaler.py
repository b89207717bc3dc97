"""A tiny x2 latent upscaler with the weights of the golden files."""

from typing import Any

from torch import Tensor

import ldm
from goldfile import GoldenFile, load_golden
from ldm.loading.config import read_yaml
from ldm.model import LatentDiffusion
from nets.nethelp import make_noise
from recipe import make_weight

CONFIG = "configs/stable-diffusion/x2-latent-upscaler.yaml"
DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def make_tiny_config() -> dict[str, Any]:
    """Make the published config with the sizes of the golden files."""
    unet_config = load_golden("seed_x2_unet").meta["config"]["k_diffusion"]
    config = read_yaml(CONFIG)
    params = config["model"]["params"]
    params["unet"]["params"] = unet_config
    arch = load_golden("seed_x2_text").meta["config"]["tiny_hf_config"]
    params["conditioner"]["params"]["text"]["params"] |= {"arch": arch, "layer_idx": 4}
    params["autoencoder"]["params"]["ddconfig"] = DDCONFIG
    return config


def build_tiny_upscaler() -> LatentDiffusion:
    model = ldm.instantiate(make_tiny_config())
    salt = load_golden("seed_x2_unet").meta["salt"]
    model.load_state_dict({k: _make_weight(k, v, salt) for k, v in model.state_dict().items()})
    return model.eval()


def _make_weight(name: str, value: Tensor, salt: str) -> Tensor:
    if name.endswith(".kernel"):
        return value
    for prefix in ("unet.", "autoencoder.", "conditioner.text."):
        name = name.removeprefix(prefix)
    return make_weight(name, tuple(value.shape), salt)


def make_recorded_noise(golden: GoldenFile, case: str):
    """Return a function (like) -> noise that returns the recorded draws of a case in turn."""
    draws = iter(golden.draws(case))
    return lambda like: next(draws)


def make_random_latent(n: int = 1, height: int = 8, width: int = 8) -> Tensor:
    return make_noise(n, 4, height, width)
