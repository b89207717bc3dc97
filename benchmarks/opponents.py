"""diffusers' and transformers' modules of Stable Diffusion 2, holding the very tensors of ours."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, device, nn

from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.diffusers import networks
from ldm.loading.diffusers.files import write_texts
from ldm.loading.diffusers.index import folder_configs
from ldm.loading.diffusers.keys import (
    scatter_weights,
    text_keys,
    unet_keys,
    used_text_blocks,
    vae_keys,
)
from ldm.loading.legacy import translate_config
from ldm.nets.unet import UNet

CONFIG = "configs/stable-diffusion/v2-inference.yaml"


def unet(ours: nn.Module) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with device("meta"):
        made = UNet2DConditionModel.from_config(_config("unet"))
    return _fill(made, scatter_weights(unet_keys(ours.state_dict()), ours.state_dict()))


def unet_like(ours: UNet) -> nn.Module:
    """Of any size, in float32, with the weights of ours."""
    from diffusers import UNet2DConditionModel

    described = networks.unet_config(ours, 64)
    with device("meta"):
        made = UNet2DConditionModel.from_config(described)
    state = {name: value.detach() for name, value in ours.state_dict().items()}
    made.load_state_dict(scatter_weights(unet_keys(state), state), assign=True)
    return made.requires_grad_(True)


def vae(ours: nn.Module) -> nn.Module:
    from diffusers import AutoencoderKL

    with device("meta"):
        made = AutoencoderKL.from_config(_config("vae"))
    return _fill(made, scatter_weights(vae_keys(ours.state_dict()), ours.state_dict()))


def text(ours: nn.Module) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    with device("meta"):
        made = CLIPTextModel(CLIPTextConfig(**_config("text_encoder")))
    names = made.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    table = text_keys(ours.state_dict(), used_text_blocks(ours))
    state = scatter_weights(table, ours.state_dict())
    made = _fill(made, {prefix + k.removeprefix("text_model."): v for k, v in state.items()})
    embeddings: Any = made.get_submodule(prefix + "embeddings")
    embeddings.position_ids = torch.arange(77)[None]  # a buffer that is in no file
    return made


def write_folder(folder: Path) -> None:
    """A folder without weights: the configs that diffusers otherwise downloads."""
    write_texts(folder, _described())


def _fill(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, assign=True)
    return module.eval()


@cache
def _described() -> dict[str, Any]:
    spec = translate_config(read_yaml(CONFIG), where=CONFIG)
    return folder_configs(build_on_meta(spec, where=CONFIG), spec)


def _config(part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(_described()[f"{part}/config.json"]))
    return {key: value for key, value in config.items() if key != "architectures"}
