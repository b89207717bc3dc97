"""Tiny x2 latent upscalers with the weights of the recordings, and their files."""

from typing import Any

import torch
from torch import Tensor

import ldm
from goldfile import Gold, gold
from ldm.loading.config import read_yaml
from ldm.model import LatentDiffusion
from recipe import weight

CONFIG = "configs/stable-diffusion/x2-latent-upscaler.yaml"
DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def tiny_config() -> dict[str, Any]:
    """The published config with the sizes of the recordings."""
    file = gold("seed_x2_unet")
    raw = read_yaml(CONFIG)
    params = raw["model"]["params"]
    params["unet"]["params"] = file.meta["config"]["k_diffusion"]
    arch = gold("seed_x2_text").meta["config"]["tiny_hf_config"]
    params["conditioner"]["params"]["text"]["params"] |= {"arch": arch, "layer_idx": 4}
    params["autoencoder"]["params"]["ddconfig"] = DDCONFIG
    return raw


def tiny_upscaler() -> LatentDiffusion:
    model = ldm.instantiate(tiny_config())
    salt = gold("seed_x2_unet").meta["salt"]
    model.load_state_dict({k: _weight(k, v, salt) for k, v in model.state_dict().items()})
    return model.eval()


def _weight(name: str, value: Tensor, salt: str) -> Tensor:
    if name.endswith(".kernel"):
        return value
    for prefix in ("unet.", "autoencoder.", "conditioner.text."):
        name = name.removeprefix(prefix)
    return weight(name, tuple(value.shape), salt)


def draws_of(file: Gold, case: str):
    """The recorded random numbers of a case, as a source of noise."""
    draws = iter(file.rng(case))
    return lambda like: next(draws)


def random_latent(n: int = 1, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(n, 4, height, width, generator=torch.Generator().manual_seed(0))
