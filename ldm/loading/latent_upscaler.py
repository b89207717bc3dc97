"""Find the config of the x2 latent upscaler as published: a pickle of k-diffusion, and a JSON.

The section `model` of the JSON has the arguments of our network; without a JSON they are inferred
from the shapes of the weights.
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

__all__ = ["build_upscaler_config", "find_json", "find_unet_params"]

TEMPLATE = f"{CONFIG_DIR}/x2-latent-upscaler.yaml"
MODEL_TYPE = "image_v1"
PREFIX = "unet.inner_model."
CONVOLUTION = re.compile(rf"{re.escape(PREFIX)}u_net\.d_blocks\.(\d+)\.(\d+)\.main\.2\.weight")
ATTENTION = re.compile(rf"{re.escape(PREFIX)}u_net\.d_blocks\.(\d+)\.\d+\.(qkv|kv)_proj\.weight")


def find_json(path: Path) -> Path | None:
    """Return the JSON beside a file: NAME.json, or config_PREFIX.json with a prefix of its name.

    Of several, that with the longest prefix is used: the names of versions have common prefixes.
    """
    same_name = path.with_suffix(".json")
    if same_name.is_file():
        return same_name
    files = path.parent.glob("config_*.json")
    matches = [f for f in files if path.stem.startswith(f.stem.removeprefix("config_"))]
    return max(matches, key=lambda file: len(file.stem), default=None)


def build_upscaler_config(unet_params: JsonMapping, overrides: Iterable[str] = ()) -> JsonObject:
    """Return our config of the upscaler with arguments of the network, see `find_unet_params`."""
    raw = read_yaml(TEMPLATE)
    raw["model"]["params"]["unet"]["params"] = dict(unet_params)
    return parse_yaml(format_yaml(raw), overrides, where=TEMPLATE)


def find_unet_params(config: str, state: Mapping[str, Tensor]) -> JsonObject | None:
    """Return the network's arguments from a JSON of k-diffusion, else from the shapes of weights.

    Returns None if the config, or the model, is not an x2 latent upscaler.

    Args:
        config: Path of the JSON, or of our YAML of the upscaler.
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
    has_weights = f"{PREFIX}proj_in.weight" in state
    return _infer_unet_params(state) if config == TEMPLATE and has_weights else None


def _infer_unet_params(state: Mapping[str, Tensor]) -> JsonObject:
    """Infer the network's arguments from the shapes of weights under our names."""
    channels: dict[int, int] = {}
    depths: dict[int, int] = {}
    attentions: dict[str, set[int]] = {"qkv": set(), "kv": set()}
    context_dim = 0
    for name, value in state.items():
        if match := CONVOLUTION.fullmatch(name):
            level = int(match[1])
            channels[level] = len(value)
            depths[level] = depths.get(level, 0) + 1
        elif match := ATTENTION.fullmatch(name):
            attentions[match[2]].add(int(match[1]))
            context_dim = value.shape[1] if match[2] == "kv" else context_dim
    levels = range(len(channels))
    in_channels = state[f"{PREFIX}proj_in.weight"].shape[1] // 2
    mapping_out, mapping_cond_dim = state[f"{PREFIX}mapping_cond.weight"].shape
    return {
        "input_channels": in_channels,
        "unet_cond_dim": in_channels,
        "mapping_out": mapping_out,
        "mapping_cond_dim": mapping_cond_dim,
        "cross_cond_dim": context_dim,
        "depths": [depths[level] for level in levels],
        "channels": [channels[level] for level in levels],
        "self_attn_depths": [level in attentions["qkv"] for level in levels],
        "cross_attn_depths": [level in attentions["kv"] for level in levels],
        "has_variance": len(state[f"{PREFIX}proj_out.weight"]) > in_channels,
    }
