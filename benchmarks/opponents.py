"""diffusers' and transformers' modules of Stable Diffusion 2, holding the very tensors of ours."""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, device, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[0] / "tests/nets")]

from diffusers_keys import to_diffusers_unet, to_diffusers_vae  # noqa: E402
from load_checkpoint import diffusers_folder  # noqa: E402

TEXT = {
    "model.token_embedding": "embeddings.token_embedding",
    "model.positional_embedding": "embeddings.position_embedding.weight",
    "model.transformer.resblocks": "encoder.layers",
    "model.ln_final": "final_layer_norm",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def unet(ours: nn.Module) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with device("meta"):
        made = UNet2DConditionModel.from_config(_config("unet"))
    return _fill(made, to_diffusers_unet(ours.state_dict(), res_blocks=2))


def vae(ours: nn.Module) -> nn.Module:
    from diffusers import AutoencoderKL

    with device("meta"):
        made = AutoencoderKL.from_config(_config("vae"))
    return _fill(made, to_diffusers_vae(ours.state_dict(), levels=4))


def text(ours: nn.Module) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    with device("meta"):
        made = CLIPTextModel(CLIPTextConfig(**_config("text_encoder")))
    names = made.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    state = {prefix + key: value for key, value in _text_words(ours.state_dict()).items()}
    made = _fill(made, {key: value for key, value in state.items() if key in names})
    embeddings: Any = made.get_submodule(prefix + "embeddings")
    embeddings.position_ids = torch.arange(77)[None]  # a buffer that is in no file
    return made


def _text_words(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for ours, theirs in TEXT.items():
            key = key.replace(ours, theirs)
        if match := re.match(r"(.*)\.in_proj_(weight|bias)", key):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{match[1]}.{letter}_proj.{match[2]}"] = part
        else:
            renamed[key] = value
    return renamed


def _fill(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state, assign=True)
    return module.eval()


def _config(part: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        diffusers_folder(Path(folder))
        config: dict[str, Any] = json.loads((Path(folder) / part / "config.json").read_text())
    return {key: value for key, value in config.items() if key != "architectures"}
