"""A tiny model of every published family: its YAML with small sizes, weights by the recipe."""

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
TEXT = {"embed_dim": WIDTH, "text_cfg": {"width": WIDTH, "heads": 2, "layers": 3}}
CLIP = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2}  # fmt: skip
VISION = {"embed_dim": WIDTH, "text_cfg": {"width": WIDTH, "heads": 2, "layers": 1},
       "vision_cfg": {"width": 48, "layers": 2, "patch_size": 14, "image_size": 28,
                      "head_width": 16}}  # fmt: skip
BIG_G = {"embed_dim": 40, "text_cfg": {"width": 48, "heads": 4, "layers": 3}}
DPT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "hooks": [0, 1], "features": 16, "img_size": 64}

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
XL_CONFIGS = {
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
    """The published config with small sizes."""
    if family in XL_CONFIGS:
        return make_small_xl_config(family)
    raw = read_yaml(f"configs/stable-diffusion/{CONFIGS[family]}.yaml")
    params = raw["model"]["params"]
    params["image_size"] = 16
    unet, vae = params["unet_config"]["params"], params["first_stage_config"]["params"]
    unet |= {
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "context_dim": WIDTH,
    }
    unet["attention_resolutions"] = [2] if family == "x4" else [1]
    unet |= {"num_heads": 4} if "num_heads" in unet else {"num_head_channels": 16}
    if "disable_self_attentions" in unet:
        unet["disable_self_attentions"] = [True, False]
    vae["ddconfig"] |= {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    text = params["cond_stage_config"]
    if family == "variations":
        text["params"] = {"model": VISION}
    else:
        text.setdefault("params", {})["arch"] = (
            CLIP if family.startswith(("sd1", "ldm3d")) else TEXT
        )
    if family.startswith("unclip"):
        unet["adm_in_channels"] = 2 * WIDTH
        params["noise_aug_config"]["params"]["timestep_dim"] = WIDTH
        key = "model" if family == "unclip-l" else "arch"
        params["embedder_config"].setdefault("params", {})[key] = VISION
    if family == "depth":
        params["depth_stage_config"]["params"]["arch"] = DPT
    return raw


def make_small_xl_config(family: str) -> dict[str, Any]:
    raw = read_yaml(f"configs/stable-diffusion-xl/{XL_CONFIGS[family]}.yaml")
    params = raw["model"]["params"]
    unet, vae = params["network_config"]["params"], params["first_stage_config"]["params"]
    is_refiner = family == "xl-refiner"
    unet |= {"model_channels": 32, "num_head_channels": 16, "context_dim": 48 + 32}
    unet |= {"adm_in_channels": 40 + 6 * 16, "transformer_depth": [1, 1, 2], "num_res_blocks": 1}
    if is_refiner:
        unet |= {"context_dim": [48, 48], "transformer_depth": 2, "adm_in_channels": 40 + 5 * 16}
    if family == "ssd-1b":
        unet |= {
            "transformer_depth": [[0], [1], [2]],
            "transformer_depth_output": [2, 1, 2, 1, 0, 0],
        }
    vae["ddconfig"] |= {"ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1}
    for embedder in params["conditioner_config"]["params"]["emb_models"]:
        kind = embedder["target"].rpartition(".")[2]
        if kind == "ConcatTimestepEmbedderND":
            embedder["params"]["outdim"] = 16
        else:
            arch = BIG_G if kind == "FrozenOpenCLIPEmbedder2" else CLIP | {"num_hidden_layers": 12}
            embedder["params"]["arch"] = arch
    return raw


def write_family(family: str, path: Path) -> dict[str, torch.Tensor]:
    """Write a file in the original's layout, its YAML inside; return its weights."""
    state, text = make_content(family)
    write_checkpoint(path, state, {"ldm.config": text, "global_step": 7})
    return dict(state)


def make_weights(raw: dict[str, Any], salt: str) -> dict[str, torch.Tensor]:
    """Weights and buffers of the model of a config, under the original's names."""
    model: Any = build_on_meta(raw)
    empty = {k: torch.ones(v.shape) if v.is_meta else v for k, v in model.state_dict().items()}
    return fill(restore_names(empty), salt) | make_buffers(model)


def convert_to_pipeline_state(
    model: Any, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a diffusers pipeline in one file, under diffusers' names."""
    ours = rename_weights(state)
    return {
        f"{component}.{name}": value
        for component, locations in locate_weights(model).items()
        for name, value in convert_to_diffusers(locations, ours).items()
    }


@lru_cache(maxsize=8)
def make_content(family: str) -> tuple[dict[str, torch.Tensor], str]:
    """Weights under the original's names, and the YAML."""
    raw = make_small_config(family)
    state = make_weights(raw, "convert")
    if family == "unclip-l":
        state["noise_augmentor.data_mean"] = torch.linspace(-1, 1, WIDTH)
        state["noise_augmentor.data_std"] = torch.linspace(0.5, 2, WIDTH)
    return state, format_yaml(raw)


def change_json(path: Path, **values: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")
