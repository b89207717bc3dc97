"""Find and read the config of weights, and resolve their prediction type."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import cast

from ldm.diffusion.schedule import NoiseSchedule
from ldm.loading.build import build_on_meta, fill_weights
from ldm.loading.config import check_overrides, instantiate, parse_yaml, read_yaml
from ldm.loading.diffusers.files import is_diffusers_folder
from ldm.loading.families import (
    LATENT_UPSCALER,
    SDXL_CONFIG_DIR,
    DetectedPredictionType,
    probe_prediction_type,
)
from ldm.loading.files.checkpoint import CONFIG_KEY, loads_lazily
from ldm.loading.latent_upscaler import build_upscaler_config, find_config_json, find_unet_params
from ldm.loading.legacy import LATENT_DIFFUSION, MODEL_CLASSES, translate_config
from ldm.loading.matching import guess_file_type, match_weights
from ldm.loading.sgm import DIFFUSION_ENGINE
from ldm.loading.variants import GUIDANCE_EMBED_KEY
from ldm.loading.weights import Weights, identify_weights, open_checkpoint
from ldm.model import Defaults
from ldm.runtime.errors import (
    ConfigError,
    MissingArgument,
    WeightsMismatch,
    errors_about,
    errors_as,
)
from ldm.runtime.types import JsonObject

__all__ = [
    "asks_for_ema", "choose_config", "find_schedule_without_weights", "has_defaults",
    "is_prediction_type_uncertain", "make_missing_config_error", "probe_weights", "read_config",
]  # fmt: skip

# In the names of LDM3D's files for panoramas, whose latents are twice as wide as high.
PANORAMA_PATTERN = re.compile(r"ldm3d[-_. ]?pano")
# Marker tensor of SDXL models with another denoiser and noise levels -> name of their YAML.
DENOISER_CONFIGS = {"edm_mean": "playground-v2.5", "edm_vpred.sigma_max": "sd_xl_cosxl"}


def choose_config(weights: Weights) -> str:
    """Return the path of the YAML of the weights' family; CONFIG_KEY if the file contains a YAML.

    Raises:
        MissingArgument: The family is unknown or not supported.
    """
    if CONFIG_KEY in weights.metadata:
        return CONFIG_KEY
    family = weights.family
    if family is None or not family.config:
        raise make_missing_config_error(weights)
    path = family.get_config_path(weights.prediction_type.value)
    if family is LATENT_UPSCALER:
        path = str(find_config_json(weights.path) or path)
    return path


def make_missing_config_error(weights: Weights) -> MissingArgument:
    """Make the error for weights of no supported family; it names what they are, if known."""
    family = weights.family
    if family is None and (file_type := guess_file_type(weights.checkpoint.state_dict)):
        return MissingArgument(f"`{weights.path}` is {file_type}")
    message = f"the family of `{weights.path}` is unknown"
    if family is not None:
        message = f"`{weights.path}` looks like {family.title}, which is not supported"
    return MissingArgument(f"{message}\nhint: pass its config", "config")


def read_config(
    weights: Weights, config: str | Path | None = None, overrides: Collection[str] = ()
) -> tuple[str, JsonObject]:
    """Return (path or CONFIG_KEY, content) of a config.

    Args:
        config: A YAML, or a JSON of the x2 latent upscaler; None = that of `choose_config`, adapted
            to buffers and shapes of the weights.
        overrides: See `read_yaml`.
    """
    path = choose_config(weights) if config is None else str(config)
    unet_params = None
    if config is None or path.endswith(".json"):
        with errors_as(WeightsMismatch, f"`{weights.path}` is not a complete x2 latent upscaler"):
            unet_params = find_unet_params(path, weights.state_dict)
    if unet_params is not None:
        config_dict = build_upscaler_config(unet_params, overrides)
    elif config is None and path == CONFIG_KEY:
        where = f"`{weights.path}`: {CONFIG_KEY}"
        config_dict = parse_yaml(weights.metadata[CONFIG_KEY], overrides, where=where)
    else:
        with errors_about("config"):
            config_dict = read_yaml(path, overrides)
        if config is None:
            _set_denoiser(config_dict["model"]["params"], weights)
    check_overrides(config_dict, overrides, path)
    if config is None:
        with errors_as(ConfigError, f"{path}: invalid parameters"):
            _adapt_config(config_dict, weights)
    return path, config_dict


def find_schedule_without_weights(
    path: Path, config: str | Path | None = None, overrides: Collection[str] = ()
) -> tuple[NoiseSchedule, Defaults] | None:
    """Return noise schedule and defaults of the model that `load` will build, by its config.

    Weights are not read. Returns None for a single component, and for a file that is slow to open.

    Args:
        path: Path of the checkpoint.
        config: See `read_config`.
    """
    if not is_diffusers_folder(path) and not loads_lazily(path):
        return None
    config_path, config_dict = read_config(
        identify_weights(open_checkpoint(path)), config, overrides
    )
    where = Path(config_path).name
    spec = translate_config(config_dict, where=where)
    if spec["target"] != LATENT_DIFFUSION:
        return None
    params = {"defaults": {"target": "ldm.model.Defaults"}} | spec["params"]
    schedule, defaults = (instantiate(params[key], where=where) for key in ("schedule", "defaults"))
    return cast(NoiseSchedule, schedule), cast(Defaults, defaults)


def probe_weights(weights: Weights) -> DetectedPredictionType:
    """Return the prediction type of weights; if it is uncertain, run the UNet once.

    A UNet that does not fit its family is not run. See `probe_prediction_type`.
    """
    family = weights.family
    if family is None or not is_prediction_type_uncertain(weights):
        return weights.prediction_type
    spec = translate_config(read_yaml(family.get_config_path(None)))
    unet = build_on_meta(spec["params"]["unet"])
    try:
        fill_weights(unet, match_weights(unet, weights.state_dict, weights.path))
    except WeightsMismatch:
        return weights.prediction_type
    return probe_prediction_type(unet.eval(), weights.prediction_type, family.context_dim or 0)


def is_prediction_type_uncertain(weights: Weights) -> bool:
    """Return whether fewer than two methods found the type, in a family with models of both."""
    is_mixed = weights.family is not None and weights.family.prediction_type is None
    return is_mixed and weights.prediction_type.num_results < 2


def asks_for_ema(config_dict: JsonObject) -> bool:
    """Return whether a config selects EMA weights for sampling, by `use_ema`.

    Its default is true for the original's model classes, and false for sgm's.
    """
    spec = config_dict.get("model", config_dict)
    params = spec.get("params") or {}
    return bool(params.get("use_ema", spec["target"] in MODEL_CLASSES))


def has_defaults(config_dict: JsonObject) -> bool:
    """Return whether a config has default sampling options, as that of a diffusers folder may."""
    return bool((config_dict.get("model", config_dict).get("params") or {}).get("defaults"))


def _set_denoiser(params: JsonObject, weights: Weights) -> None:
    """Set the denoiser that marker tensors indicate, if the YAML of the family has another one."""
    family, prediction_type = weights.family, weights.prediction_type.value
    if family is not None and family.is_sdxl:
        names = [name for marker, name in DENOISER_CONFIGS.items() if marker in weights.metadata]
        if prediction_type == "v":
            names.append("sd_xl_v")
        if names and Path(family.get_config_path(prediction_type)).stem != names[0]:
            template = read_yaml(f"{SDXL_CONFIG_DIR}/{names[0]}.yaml")["model"]["params"]
            keys = ("denoiser_config", "sampler_config", "scale_factor")
            params |= {key: template[key] for key in keys if key in template}
    if "ztsnr" in weights.metadata and prediction_type != "eps":
        params.setdefault("rescale_betas_zero_snr", True)


def _adapt_config(config_dict: JsonObject, weights: Weights) -> None:
    """Set parameters of a config by file name, buffers and shapes of the weights."""
    spec = config_dict.get("model", config_dict)
    params = spec.get("params") if isinstance(spec, dict) else None
    if not isinstance(params, dict):
        return  # `translate_config` raises an error
    is_engine = spec.get("target") == DIFFUSION_ENGINE
    if _is_panorama(weights) and isinstance(params.get("image_size"), int):
        params["image_size"] = [params["image_size"], 2 * params["image_size"]]
    if is_engine:
        _apply_buffers(params, weights)
    if GUIDANCE_EMBED_KEY in weights.state_dict:
        key = "network_config" if is_engine else "unet_config"
        embed_dim = weights.state_dict[GUIDANCE_EMBED_KEY].shape[1]
        params[key]["params"]["time_cond_proj_dim"] = embed_dim


def _is_panorama(weights: Weights) -> bool:
    """Return whether weights are LDM3D for panoramas, by the name of the file or of a folder."""
    is_ldm3d = weights.family is not None and weights.family.name.startswith("ldm3d")
    names = (*weights.path.parts, weights.metadata.get("ldm.source", ""))
    return is_ldm3d and any(PANORAMA_PATTERN.search(name.lower()) for name in names)


def _apply_buffers(params: JsonObject, weights: Weights) -> None:
    """Set parameters of sgm's `DiffusionEngine` from the buffers of the file."""
    buffers = weights.buffers
    for key, name in (("latent_mean", "edm_mean"), ("latent_std", "edm_std")):
        if name in buffers and buffers[name].numel():  # an empty one only marks the denoiser
            params[key] = buffers[name].flatten().tolist()
    if "edm_vpred.sigma_max" in buffers and "sampler_config" in params:
        sigma_range = {
            key: float(buffers[f"edm_vpred.{key}"])
            for key in ("sigma_min", "sigma_max")
            if f"edm_vpred.{key}" in buffers
        }
        params["sampler_config"]["params"]["discretization_config"]["params"] |= sigma_range
