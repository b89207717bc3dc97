"""A tiny model of every published family: its YAML with small networks, weights by the recipe."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ldm.loading.buffers import make_buffers
from ldm.loading.build import build_on_meta
from ldm.loading.config import format_yaml, read_yaml
from ldm.loading.diffusers.locations import convert_to_diffusers, locate_weights
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.loading.weight_names import rename_weights, restore_names
from recipe import fill

WIDTH = 32
TEXT_CONFIG = {"embed_dim": WIDTH, "text_cfg": {"width": WIDTH, "heads": 2, "layers": 3}}
CLIP_CONFIG = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2}  # fmt: skip
VISION_CONFIG = {"embed_dim": WIDTH, "text_cfg": {"width": WIDTH, "heads": 2, "layers": 1},
       "vision_cfg": {"width": 48, "layers": 2, "patch_size": 14, "image_size": 28,
                      "head_width": 16}}  # fmt: skip
BIG_G_CONFIG = {"embed_dim": 40, "text_cfg": {"width": 48, "heads": 4, "layers": 3}}
DPT_ARCH = {"embed_dim": 48, "depth": 2, "num_heads": 3, "hooks": [0, 1], "features": 16,
            "img_size": 64}  # fmt: skip

CONFIGS = {
    "sd1": "v1-inference",
    "sd1-inpainting": "v1-inpainting-inference",
    "variations": "v1-image-variation-inference",
    "ldm3d": "ldm3d",
    "ldm3d-4c": "ldm3d-4c",
    "ldm3d-sr": "ldm3d-sr",
    "sd2": "v2-inference",
    "sd2-v": "v2-inference-v",
    "inpainting": "v2-inpainting-inference",
    "depth": "v2-midas-inference",
    "x4": "x4-upscaling",
    "unclip-l": "v2-1-stable-unclip-l-inference",
    "unclip-h": "v2-1-stable-unclip-h-inference",
}
SDXL_CONFIGS = {
    "xl": "sd_xl_base",
    "xl-v": "sd_xl_v",
    "xl-inpainting": "sd_xl_inpaint",
    "xl-refiner": "sd_xl_refiner",
    "cosxl": "sd_xl_cosxl",
    "playground": "playground-v2.5",
    "ssd-1b": "ssd-1b",
}
PROMPT = "a red apple on a table"


def make_small_config(family: str) -> dict[str, Any]:
    """Make the published config with small networks."""
    if family in SDXL_CONFIGS:
        return make_small_sdxl_config(family)
    config = read_yaml(f"configs/stable-diffusion/{CONFIGS[family]}.yaml")
    params = config["model"]["params"]
    params["image_size"] = 16
    unet, vae = params["unet_config"]["params"], params["first_stage_config"]["params"]
    unet |= {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1}
    unet["context_dim"] = WIDTH
    unet["attention_resolutions"] = [2] if family == "x4" else [1]
    unet |= {"num_heads": 4} if "num_heads" in unet else {"num_head_channels": 16}
    if "disable_self_attentions" in unet:
        unet["disable_self_attentions"] = [True, False]
    vae["ddconfig"] |= {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    if family == "variations":
        params["cond_stage_config"]["params"] = {"model": VISION_CONFIG}
    else:
        arch = CLIP_CONFIG if family.startswith(("sd1", "ldm3d")) else TEXT_CONFIG
        params["cond_stage_config"].setdefault("params", {})["arch"] = arch
    if family.startswith("unclip"):
        unet["adm_in_channels"] = 2 * WIDTH
        params["noise_aug_config"]["params"]["timestep_dim"] = WIDTH
        key = "model" if family == "unclip-l" else "arch"
        params["embedder_config"].setdefault("params", {})[key] = VISION_CONFIG
    if family == "depth":
        params["depth_stage_config"]["params"]["arch"] = DPT_ARCH
    return config


def make_small_sdxl_config(family: str) -> dict[str, Any]:
    config = read_yaml(f"configs/stable-diffusion-xl/{SDXL_CONFIGS[family]}.yaml")
    params = config["model"]["params"]
    unet, vae = params["network_config"]["params"], params["first_stage_config"]["params"]
    unet |= {"model_channels": 32, "num_head_channels": 16, "context_dim": 48 + 32}
    unet |= {"adm_in_channels": 40 + 6 * 16, "transformer_depth": [1, 1, 2], "num_res_blocks": 1}
    if family == "xl-refiner":
        unet |= {"context_dim": [48, 48], "transformer_depth": 2, "adm_in_channels": 40 + 5 * 16}
    if family == "ssd-1b":
        unet["transformer_depth"] = [[0], [1], [2]]
        unet["transformer_depth_output"] = [2, 1, 2, 1, 0, 0]
    vae["ddconfig"] |= {"ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1}
    for embedder in params["conditioner_config"]["params"]["emb_models"]:
        class_name = embedder["target"].rpartition(".")[2]
        if class_name == "ConcatTimestepEmbedderND":
            embedder["params"]["outdim"] = 16
        else:
            is_big_g = class_name == "FrozenOpenCLIPEmbedder2"
            clip_config = CLIP_CONFIG | {"num_hidden_layers": 12}
            embedder["params"]["arch"] = BIG_G_CONFIG if is_big_g else clip_config
    return config


def write_family(family: str, path: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint with the original's names and the YAML in it; return its weights."""
    state, config_text = make_state_and_yaml(family)
    write_checkpoint(path, state, {"ldm.config": config_text, "global_step": 7})
    return dict(state)


def make_weights(config: dict[str, Any], salt: str) -> dict[str, torch.Tensor]:
    """Make weights and buffers for the model of a config, with the original's names."""
    model: Any = build_on_meta(config)
    empty = {k: torch.ones(v.shape) if v.is_meta else v for k, v in model.state_dict().items()}
    return fill(restore_names(empty), salt) | make_buffers(model)


def convert_to_pipeline_state(
    model: Any, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename weights as programs do that write a whole diffusers pipeline to one file."""
    ours = rename_weights(state)
    return {
        f"{component}.{name}": value
        for component, locations in locate_weights(model).items()
        for name, value in convert_to_diffusers(locations, ours).items()
    }


@lru_cache(maxsize=8)
def make_state_and_yaml(family: str) -> tuple[dict[str, torch.Tensor], str]:
    """Make weights with the original's names, and the YAML."""
    config = make_small_config(family)
    state = make_weights(config, "convert")
    if family == "unclip-l":
        state["noise_augmentor.data_mean"] = torch.linspace(-1, 1, WIDTH)
        state["noise_augmentor.data_std"] = torch.linspace(0.5, 2, WIDTH)
    return state, format_yaml(config)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def change_json(path: Path, **values: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(read_json(path) | values), "utf-8")
