"""Convert configs of the x2 latent upscaler from and to diffusers folders.

diffusers supports only the published layout of the network, and adds no noise to the latent that is
upscaled.
"""

import torch

from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders.text import TextEncoder
from ldm.loading.diffusers import encoders, networks, schedulers
from ldm.loading.diffusers.layout import (
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    TEXT_CONFIG,
    UNET_CONFIG,
    VAE_CONFIG,
    check_files,
    make_index,
)
from ldm.loading.latent_upscaler import build_upscaler_config
from ldm.model import LatentDiffusion
from ldm.nets.latent_upscaler import HEAD_DIM, LatentUpscalerUNet
from ldm.runtime.errors import ConfigError, check_name
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["is_upscaler_folder", "make_upscaler_folder_configs", "make_upscaler_original_config"]

UNET_REQUIRED_VALUES = {
    "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "mid_block_scale_factor": 1,
    "act_fn": "gelu", "norm_num_groups": None, "norm_eps": 1e-5, "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "scale_shift", "time_embedding_type": "fourier",
    "timestep_post_act": "gelu", "conv_in_kernel": 1, "conv_out_kernel": 1, "mid_block_type": None,
    "attention_head_dim": HEAD_DIM, "attention_type": "default",
    "transformer_layers_per_block": 1, "addition_embed_type_num_heads": 64,
}  # fmt: skip
UNET_KEYS = frozenset({
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "dropout",
    "block_out_channels", "layers_per_block", "cross_attention_dim", "time_cond_proj_dim",
})  # fmt: skip
# Class of a block by whether it has cross-attention.
DOWN_BLOCKS = {False: "KDownBlock2D", True: "KCrossAttnDownBlock2D"}
UP_BLOCKS = {False: "KUpBlock2D", True: "KCrossAttnUpBlock2D"}
X0_PREDICTION_TYPES = ("sample", "original_sample")  # diffusers' names of x0
INTERPOLATIONS = ("log_linear", "linear")
# Stable Diffusion's betas, whose sigmas have the range of the published continuous schedule.
SD_BETAS: JsonObject = {"name": "linear", "linear_start": 0.00085, "linear_end": 0.012}
PIPELINE_CLASS = "StableDiffusionLatentUpscalePipeline"


def is_upscaler_folder(files: JsonMapping) -> bool:
    """Return whether a folder contains the x2 latent upscaler, by its UNet."""
    return bool(files.get(UNET_CONFIG, {}).get("time_embedding_type") == "fourier")


def make_upscaler_folder_configs(model: LatentDiffusion, spec: JsonMapping) -> JsonObject:
    """Return the configs and tokenizer files of a folder, for a model and its translated config."""
    params = spec["params"]
    side = max(model.latent_size)
    files: JsonObject = {
        UNET_CONFIG: _make_unet_config(model),
        VAE_CONFIG: networks.make_vae_config(
            params["autoencoder"]["params"], model.scale_factor, side * model.downscale_factor
        ),
        SCHEDULER_CONFIG: _make_scheduler_config(model, params["schedule"]["params"]),
        **encoders.make_text_files(model.conditioner.get(TextEncoder)),
    }
    return files | {MODEL_INDEX: make_index(PIPELINE_CLASS, files, {})}


def make_upscaler_original_config(files: JsonMapping, folder: str) -> JsonObject:
    """Return the config of a folder, with our keys; `folder` is its path for messages."""
    check_files(files, folder, VAE_CONFIG, SCHEDULER_CONFIG, TEXT_CONFIG)
    config_dict = build_upscaler_config(_parse_unet_config(files[UNET_CONFIG]))
    params = config_dict["model"]["params"]
    params["autoencoder"]["params"] = networks.parse_vae_config(files[VAE_CONFIG])
    params["scale_factor"] = files[VAE_CONFIG].get("scaling_factor", params["scale_factor"])
    text = params["conditioner"]["params"]["text"]["params"]
    text |= encoders.parse_text_config(files[TEXT_CONFIG])
    text["layer_idx"] = files[TEXT_CONFIG]["num_hidden_layers"]
    _set_schedule(params, files[SCHEDULER_CONFIG])
    return config_dict


def _make_unet_config(model: LatentDiffusion) -> JsonObject:
    unet = model.unet
    assert isinstance(unet, LatentUpscalerUNet)
    channels, has_cross_attention = unet.channels[0], list(map(bool, unet.cross_attn_depths))
    is_published_layout = (
        list(unet.channels) == [channels, channels, 2 * channels, 2 * channels]
        and len(set(unet.depths)) == 1
        and list(map(bool, unet.self_attn_depths)) == [False, False, False, True]
        and unet.mapping_out == 2 * channels
        and channels % HEAD_DIM == 0
        and unet.has_variance
        and unet.input_channels == unet.unet_cond_dim
    )
    if not is_published_layout:
        raise ConfigError("diffusers supports only the layout of the published upscaler")
    return {
        "_class_name": "UNet2DConditionModel",
        **UNET_REQUIRED_VALUES,
        "sample_size": None,
        "in_channels": unet.input_channels + unet.unet_cond_dim,
        "out_channels": unet.input_channels + 1,
        "block_out_channels": list(unet.channels),
        "layers_per_block": unet.depths[0],
        "down_block_types": [DOWN_BLOCKS[is_cross] for is_cross in has_cross_attention],
        "up_block_types": [UP_BLOCKS[is_cross] for is_cross in reversed(has_cross_attention)],
        "cross_attention_dim": unet.cross_cond_dim,
        "time_cond_proj_dim": unet.mapping_cond_dim,
        "dropout": unet.dropout_rate,
    }


def _parse_unet_config(config: JsonMapping) -> JsonObject:
    """Return the arguments of LatentUpscalerUNet."""
    networks.validate_config(config, UNET_CONFIG, UNET_REQUIRED_VALUES, UNET_KEYS)
    channels, down_blocks = config["block_out_channels"], config["down_block_types"]
    networks.check_blocks(UNET_CONFIG, down_blocks, DOWN_BLOCKS.values())
    latent_channels, levels = config["in_channels"] // 2, len(channels)
    return {
        "input_channels": latent_channels,
        "unet_cond_dim": latent_channels,
        "mapping_out": 2 * channels[0],
        "mapping_cond_dim": config["time_cond_proj_dim"],
        "cross_cond_dim": config["cross_attention_dim"],
        "depths": [networks.read_uniform(config, "layers_per_block", UNET_CONFIG, 2)] * levels,
        "channels": channels,
        "self_attn_depths": [level == levels - 1 for level in range(levels)],
        "cross_attn_depths": [block == DOWN_BLOCKS[True] for block in down_blocks],
        "has_variance": config["out_channels"] > latent_channels,
        "dropout_rate": config.get("dropout", 0.0),
    }


def _make_scheduler_config(model: LatentDiffusion, schedule: JsonMapping) -> JsonObject:
    is_discrete = isinstance(model.schedule, Schedule)
    if not is_discrete:
        supported = Schedule(make_betas(**SD_BETAS)).sigmas[[0, -1]]
        if not torch.allclose(model.schedule.sigmas[[0, -1]], supported, rtol=1e-4):
            low, high = supported.tolist()
            raise ConfigError(f"diffusers' upscaler supports only sigmas {low:.4g} … {high:.4g}")
    betas = schedule.get("betas", {"params": SD_BETAS})
    return {
        "_class_name": "EulerDiscreteScheduler",
        **schedulers.make_noise_schedule_config(betas),
        "prediction_type": X0_PREDICTION_TYPES[0],
        "interpolation_type": "linear" if is_discrete else "log_linear",
        "timestep_spacing": "linspace",
        "use_karras_sigmas": False,
    }


def _set_schedule(params: JsonObject, config: JsonMapping) -> None:
    """Set the noise schedule in our config from that of a scheduler."""
    prediction_type = config.get("prediction_type")
    check_name("prediction_type", prediction_type, X0_PREDICTION_TYPES, SCHEDULER_CONFIG)
    interpolation = config.get("interpolation_type", "linear")
    check_name("interpolation_type", interpolation, INTERPOLATIONS, SCHEDULER_CONFIG)
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(key):
            raise ConfigError(f"{SCHEDULER_CONFIG}: `{key}` is not supported here")
    betas = schedulers.parse_noise_schedule(config, SCHEDULER_CONFIG)
    betas["name"] = betas.pop("beta_schedule")
    if interpolation == "linear":
        module = Schedule.__module__
        params["schedule"] = {
            "target": f"{module}.Schedule",
            "params": {
                "betas": {"target": f"{module}.make_betas", "params": betas},
                "uses_log_sigma": True,
                "quantize_c_noise": False,
            },
        }
        params["defaults"]["params"]["scheduler"] = "normal"
        return
    sigmas = Schedule(make_betas(**betas)).sigmas
    params["schedule"]["params"] = {"sigma_min": float(sigmas[0]), "sigma_max": float(sigmas[-1])}
