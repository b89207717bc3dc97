"""Find the config of the x2 latent upscaler, published as a pickle of k-diffusion and a JSON.

The section `model` of the JSON has the arguments of LatentUpscalerUNet; without a JSON they are
inferred from the shapes of the weights.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.loading.config import format_yaml, parse_yaml, read_yaml
from ldm.loading.families import CONFIG_DIR
from ldm.runtime.errors import ConfigError
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["build_upscaler_config", "find_config_json", "find_unet_params"]

CONFIG_TEMPLATE = f"{CONFIG_DIR}/x2-latent-upscaler.yaml"
MODEL_TYPE = "image_v1"
INNER_PREFIX = "unet.inner_model."
DOWN_LAYER = rf"{re.escape(INNER_PREFIX)}u_net\.d_blocks\.(?P<level>\d+)\.\d+\."
CONV_WEIGHT = re.compile(rf"{DOWN_LAYER}main\.2\.weight")
ATTENTION_WEIGHT = re.compile(rf"{DOWN_LAYER}(?P<projection>qkv|kv)_proj\.weight")


def find_config_json(path: Path) -> Path | None:
    """Return the JSON beside a file: NAME.json, or config_PREFIX.json with a prefix of its name.

    Of several, the one with the longest prefix is used, as names of versions have common prefixes.
    """
    same_name = path.with_suffix(".json")
    if same_name.is_file():
        return same_name
    files = path.parent.glob("config_*.json")
    matches = [f for f in files if path.stem.startswith(f.stem.removeprefix("config_"))]
    return max(matches, key=lambda file: len(file.stem), default=None)


def build_upscaler_config(unet_params: JsonMapping, overrides: Iterable[str] = ()) -> JsonObject:
    """Return our config of the upscaler for arguments of its UNet; see `find_unet_params`."""
    config_dict = read_yaml(CONFIG_TEMPLATE)
    config_dict["model"]["params"]["unet"]["params"] = dict(unet_params)
    return parse_yaml(format_yaml(config_dict), overrides, where=CONFIG_TEMPLATE)


def find_unet_params(config: str, state: Mapping[str, Tensor]) -> JsonObject | None:
    """Return the arguments of the UNet from a JSON of k-diffusion, else from shapes of weights.

    Returns None if the config, or the model, is not an x2 latent upscaler.

    Args:
        config: Path of the JSON, or of our YAML of the upscaler.
        state: Weights under our names.
    """
    if config.endswith(".json"):
        model: Any = read_yaml(config).get("model")
        model_type = model.get("type") if isinstance(model, dict) else None
        if model_type != MODEL_TYPE:
            raise ConfigError(
                f"{config}: `model` must be of type `{MODEL_TYPE}`, got `{model_type}`"
            )
        # k-diffusion's default; the published JSON sets it to false.
        return {"augment_wrapper": True, **model}
    has_weights = f"{INNER_PREFIX}proj_in.weight" in state
    return _infer_unet_params(state) if config == CONFIG_TEMPLATE and has_weights else None


def _infer_unet_params(state: Mapping[str, Tensor]) -> JsonObject:
    """Infer the arguments of the UNet from the shapes of weights under our names."""
    channels: dict[int, int] = {}  # by level
    depths: dict[int, int] = {}  # by level
    attention_levels: dict[str, set[int]] = {"qkv": set(), "kv": set()}  # self-, cross-attention
    context_dim = 0
    for name, value in state.items():
        if match := CONV_WEIGHT.fullmatch(name):
            level = int(match["level"])
            channels[level] = len(value)
            depths[level] = depths.get(level, 0) + 1
        elif match := ATTENTION_WEIGHT.fullmatch(name):
            attention_levels[match["projection"]].add(int(match["level"]))
            context_dim = value.shape[1] if match["projection"] == "kv" else context_dim
    levels = range(len(channels))
    in_channels = state[f"{INNER_PREFIX}proj_in.weight"].shape[1] // 2
    mapping_out, mapping_cond_dim = state[f"{INNER_PREFIX}mapping_cond.weight"].shape
    return {
        "input_channels": in_channels,
        "unet_cond_dim": in_channels,
        "mapping_out": mapping_out,
        "mapping_cond_dim": mapping_cond_dim,
        "cross_cond_dim": context_dim,
        "depths": [depths[level] for level in levels],
        "channels": [channels[level] for level in levels],
        "self_attn_depths": [level in attention_levels["qkv"] for level in levels],
        "cross_attn_depths": [level in attention_levels["kv"] for level in levels],
        "has_variance": len(state[f"{INNER_PREFIX}proj_out.weight"]) > in_channels,
    }
