"""Convert configs of SDXL (base, inpainting and refiner) from and to diffusers folders.

Each text encoder has its own tokenizer; the refiner has only the second text encoder.
"""

import logging
from typing import Any

from ldm.diffusion.schedule import ContinuousSchedule
from ldm.encoders.sizes import SizeEmbedding
from ldm.encoders.text import TextEncoder
from ldm.loading.config import read_yaml
from ldm.loading.diffusers import encoders, layout, networks, schedulers
from ldm.loading.diffusers.locations import get_text_component
from ldm.loading.families import SDXL_CONFIG_DIR
from ldm.loading.legacy import AUTOENCODER_CONFIG
from ldm.loading.sgm import SDXL_IMAGE_SIZE
from ldm.model import LatentDiffusion
from ldm.nets.unet import UNet
from ldm.runtime.errors import ConfigError
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["is_sdxl_folder", "make_sdxl_folder_configs", "make_sdxl_original_config"]

log = logging.getLogger(__name__)

AESTHETIC_SCORE_KEY = "aesthetic_score"  # batch key
TARGET_PREFIX = "sgm.modules.diffusionmodules."
# sgm's class of the denoiser's scaling, by prediction type.
SCALING_CLASSES = {"eps": "EpsScaling", "v": "VScaling", "x0": "X0Scaling", "edm": "EDMScaling"}
DEFAULT_SCHEDULER_CLASS = "EulerDiscreteScheduler"
SCHEDULER_CLASSES = {
    "euler_a": "EulerAncestralDiscreteScheduler", "lcm": "LCMScheduler", "tcd": "TCDScheduler",
}  # fmt: skip


def is_sdxl_folder(files: JsonMapping) -> bool:
    """Return whether a folder contains SDXL, by its UNet."""
    return bool(files.get(layout.UNET_CONFIG, {}).get("addition_embed_type") == "text_time")


def make_sdxl_folder_configs(model: LatentDiffusion, spec: JsonMapping) -> JsonObject:
    """Return the configs and tokenizer files of a folder, for a model and its translated config."""
    params, conditioner = spec["params"], model.conditioner
    text_encoders = {get_text_component(e): e for e in conditioner.find_all(TextEncoder)}
    embed_dims = {encoder.outdim for encoder in conditioner.find_all(SizeEmbedding)}
    if len(embed_dims) != 1 or "text_encoder_2" not in text_encoders:
        raise ConfigError(
            "SDXL in diffusers needs a pooled text encoder, and size embeddings of one dimension"
        )
    assert isinstance(model.unet, UNet)
    is_refiner, is_inpainting = (
        AESTHETIC_SCORE_KEY in conditioner.keys,
        "masked" in conditioner.keys,
    )
    side = max(model.latent_size)
    unet = networks.make_unet_config(model.unet, side, size_embed_dim=embed_dims.pop())
    vae = networks.make_vae_config(
        params["autoencoder"]["params"], model.scale_factor, side * model.downscale_factor
    )
    vae["force_upcast"] = model.upcast_autoencoder
    for key, statistic in (("latents_mean", model.latent_mean), ("latents_std", model.latent_std)):
        if statistic is not None:
            vae[key] = [round(value, 6) for value in statistic.flatten().tolist()]
    files: JsonObject = {
        layout.UNET_CONFIG: unet,
        layout.VAE_CONFIG: vae,
        layout.SCHEDULER_CONFIG: _make_scheduler_config(model, params["schedule"]["params"]),
    }
    for component, encoder in text_encoders.items():
        files |= encoders.make_text_files(encoder, component)
    uses_zeros = any(encoder.null is None for encoder in text_encoders.values())
    extras: JsonObject = {"force_zeros_for_empty_prompt": uses_zeros, "add_watermarker": None}
    if "text_encoder" not in text_encoders:  # the refiner has only the second one
        extras |= {"text_encoder": layout.NO_COMPONENT, "tokenizer": layout.NO_COMPONENT}
    if is_refiner or is_inpainting:
        extras["requires_aesthetics_score"] = is_refiner
    class_name = "StableDiffusionXLImg2ImgPipeline" if is_refiner else "StableDiffusionXLPipeline"
    if is_inpainting:
        class_name = "StableDiffusionXLInpaintPipeline"
    return files | {layout.MODEL_INDEX: layout.make_index(class_name, files, extras)}


def make_sdxl_original_config(files: JsonMapping, folder: str) -> JsonObject:
    """Return a config of sgm (`generative-models`); `folder` is its path, for messages."""
    index = files[layout.MODEL_INDEX]
    paths = (layout.VAE_CONFIG, layout.SCHEDULER_CONFIG, layout.TEXT_2_CONFIG)
    layout.check_files(files, folder, *paths)
    unet_config, has_text_encoder = files[layout.UNET_CONFIG], layout.TEXT_CONFIG in files
    needs_score = bool(index.get("requires_aesthetics_score", False))
    is_inpainting = unet_config.get("in_channels") == layout.INPAINTING_CHANNELS
    if not needs_score:
        layout.check_files(files, folder, layout.TEXT_CONFIG)
    name = "sd_xl_inpaint" if is_inpainting else "sd_xl_base"
    if not has_text_encoder:
        name = "sd_xl_refiner"
    config_dict = read_yaml(f"{SDXL_CONFIG_DIR}/{name}.yaml")
    params = config_dict["model"]["params"]
    params["network_config"]["params"] = networks.parse_unet_config(unet_config)
    side = params["network_config"]["params"].pop("image_size", None)
    if side not in (None, SDXL_IMAGE_SIZE):
        params["image_size"] = side
    _set_autoencoder(params, files[layout.VAE_CONFIG])
    _set_schedule(params, files[layout.SCHEDULER_CONFIG])
    conditioner = params["conditioner_config"]["params"]
    for embedder in conditioner["emb_models"]:
        target = embedder["target"].rpartition(".")[2]
        if target == "FrozenCLIPEmbedder":
            config = files[layout.TEXT_CONFIG]
            embedder["params"] |= encoders.parse_sdxl_text_config(config, pooled=False)
        elif target == "FrozenOpenCLIPEmbedder2":
            config = files[layout.TEXT_2_CONFIG]
            embedder["params"] |= encoders.parse_sdxl_text_config(config, pooled=True)
        else:
            embedder["params"]["outdim"] = unet_config["addition_time_embed_dim"]
    if needs_score and has_text_encoder:
        conditioner["emb_models"][-1]["input_key"] = AESTHETIC_SCORE_KEY
    uses_zeros = index.get("force_zeros_for_empty_prompt", True)
    if uses_zeros != has_text_encoder:  # the default of `sgm.translate_engine`
        conditioner["force_uc_zero_embeddings"] = ["txt"] if uses_zeros else []
    return config_dict


def _set_autoencoder(params: JsonObject, config: JsonMapping) -> None:
    params[AUTOENCODER_CONFIG]["params"] |= networks.parse_vae_config(config)
    params["scale_factor"] = config.get("scaling_factor", networks.DEFAULT_SCALE_FACTOR)
    params["disable_first_stage_autocast"] = bool(config.get("force_upcast", True))
    for parameter, key in (("latent_mean", "latents_mean"), ("latent_std", "latents_std")):
        if config.get(key) is not None:
            params[parameter] = config[key]


def _set_schedule(params: JsonObject, config: JsonMapping) -> None:
    """Set the noise schedule, prediction type, and default sampler and scheduler of a config."""
    class_name = config.get("_class_name", "")
    prediction_type = schedulers.parse_prediction_type(config)
    defaults: dict[str, Any] = {}
    if class_name.startswith("EDM"):  # its "epsilon" means EDM's preconditioning
        scaling = "VScalingWithEDMcNoise" if prediction_type == "v" else "EDMScaling"
        template = read_yaml(f"{SDXL_CONFIG_DIR}/playground-v2.5.yaml")["model"]["params"]
        params["denoiser_config"] = template["denoiser_config"]
        params["sampler_config"] = template["sampler_config"]
        discretization = params["sampler_config"]["params"]["discretization_config"]["params"]
        discretization |= {k: config[k] for k in ("sigma_min", "sigma_max") if k in config}
    else:
        scaling = SCALING_CLASSES[prediction_type]
        betas = schedulers.parse_noise_schedule(config, layout.SCHEDULER_CONFIG)
        if betas.pop("rescale_betas_zero_snr", False):
            params["rescale_betas_zero_snr"] = True
        if "given_betas" not in betas and betas.pop("beta_schedule") != "linear":
            where = layout.SCHEDULER_CONFIG
            raise ConfigError(f"{where}: `beta_schedule` of SDXL must be scaled_linear")
        betas["num_timesteps"] = betas.pop("timesteps")
        denoiser = params["denoiser_config"]["params"]
        denoiser["num_idx"] = betas["num_timesteps"]
        denoiser["discretization_config"]["params"] = betas
        defaults["scheduler"] = schedulers.parse_scheduler(config, "leading")
        if defaults["scheduler"] == "leading" and config.get("steps_offset", 1) != 1:
            log.warning("%s: `steps_offset` is ignored, it is always 1", layout.SCHEDULER_CONFIG)
    spec: JsonObject = {"target": f"{TARGET_PREFIX}denoiser_scaling.{scaling}"}
    if scaling == "EDMScaling" and "sigma_data" in config:
        spec["params"] = {"sigma_data": config["sigma_data"]}
    params["denoiser_config"]["params"]["scaling_config"] = spec
    if "Ancestral" in class_name:
        defaults["sampler"] = "euler_a"
    if defaults:
        params["defaults"] = defaults


def _make_scheduler_config(model: LatentDiffusion, schedule: JsonMapping) -> JsonObject:
    """Return the config of a scheduler for the model's default sampler, with its spacing."""
    prediction_type = "epsilon"  # of EDM, too
    if model.parameterization != "edm":
        prediction_type = schedulers.to_diffusers_prediction_type(model.parameterization)
    if isinstance(model.schedule, ContinuousSchedule):
        return {
            "_class_name": "EDMEulerScheduler",
            "num_train_timesteps": 1000,
            "sigma_min": model.schedule.sigma_min,
            "sigma_max": model.schedule.sigma_max,
            "sigma_data": 1.0 if model.parameterization == "v" else model.sigma_data,
            "prediction_type": prediction_type,
        }
    if not model.schedule.uses_plain_timesteps or model.parameterization == "edm":
        raise ConfigError("no scheduler of diffusers has the timesteps of this model's denoiser")
    class_name = SCHEDULER_CLASSES.get(model.defaults.sampler, DEFAULT_SCHEDULER_CLASS)
    config = {
        "_class_name": class_name,
        **schedulers.make_noise_schedule_config(schedule["betas"]),
        "prediction_type": prediction_type,
        "timestep_spacing": schedulers.get_timestep_spacing(model.defaults.scheduler),
        "steps_offset": 1,
    }
    if class_name == DEFAULT_SCHEDULER_CLASS:
        config |= {"interpolation_type": "linear", "use_karras_sigmas": False}
    return config | ({"rescale_betas_zero_snr": True} if model.schedule.zero_snr else {})
