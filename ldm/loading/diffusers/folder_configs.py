"""Convert between a model's config and the JSON files of a diffusers folder.

`make_original_config` fills the published YAML of the family with the folder's parameters, so that
programs for the original's configs can read the result.
"""

import logging
from typing import NamedTuple

from torch import nn

from ldm.encoders.bert import BERTText
from ldm.encoders.concat_images import LowResImage, RGBDLatent
from ldm.encoders.depth import MiDaSDepth
from ldm.encoders.image import CLIPImage, ImageEmbedding
from ldm.encoders.text import TextEncoder
from ldm.loading.config import read_yaml
from ldm.loading.diffusers import encoders, layout, networks, schedulers
from ldm.loading.diffusers.latent_upscaler import (
    is_upscaler_folder,
    make_upscaler_folder_configs,
    make_upscaler_original_config,
)
from ldm.loading.diffusers.sdxl import (
    is_sdxl_folder,
    make_sdxl_folder_configs,
    make_sdxl_original_config,
)
from ldm.loading.families import CONFIG_DIR, detect_family
from ldm.loading.legacy import AUTOENCODER_CONFIG
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderVQ
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.pipelines.families import is_sdxl
from ldm.runtime.errors import FileFormatError, WrongFamily
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["FolderFiles", "make_folder_configs", "make_original_config"]

log = logging.getLogger(__name__)

FolderFiles = JsonObject  # path in the folder -> content: JSON, or text

IMAGE_ENCODER_CONFIG = "image_encoder/config.json"
DEPTH_CONFIG = "depth_estimator/config.json"
PROCESSOR_CONFIG = "feature_extractor/preprocessor_config.json"
NORMALIZER_CONFIG = "image_normalizer/config.json"
EMBEDDING_NOISE_CONFIG = "image_noising_scheduler/scheduler_config.json"
LOW_RES_NOISE_CONFIG = "low_res_scheduler/scheduler_config.json"

# Entries of the index for a pipeline without its safety checker.
NO_SAFETY_CHECKER = {
    "safety_checker": layout.NO_COMPONENT, "requires_safety_checker": False,
    "feature_extractor": layout.NO_COMPONENT,
}  # fmt: skip


class _Pipeline(NamedTuple):
    """A pipeline of diffusers, and the YAMLs of its families.

    Args:
        name: Class of diffusers.
        openai_config: Name of the YAML for OpenAI's CLIP as encoder; None = no such family.
        open_clip_config: Name of the YAML for OpenCLIP as encoder; None = no such family.
        has_safety_checker: Whether it has a safety checker, which our folders do not contain.
    """

    name: str
    openai_config: str | None
    open_clip_config: str | None
    has_safety_checker: bool = True


# By the encoder besides the text encoder, "text" if there is none. masked = inpainting, lowres = x4
# upscaler, image = unCLIP, rgbd = LDM3D (-SR), variations = an image instead of a prompt.
# fmt: off
PIPELINES = {
    "text": _Pipeline("StableDiffusionPipeline", "v1-inference", "v2-inference"),
    "masked": _Pipeline("StableDiffusionInpaintPipeline", "v1-inpainting-inference",
                        "v2-inpainting-inference"),
    "depth": _Pipeline("StableDiffusionDepth2ImgPipeline", None, "v2-midas-inference", False),
    "lowres": _Pipeline("StableDiffusionUpscalePipeline", None, "x4-upscaling", False),
    "image": _Pipeline("StableUnCLIPImg2ImgPipeline", "v2-1-stable-unclip-l-inference",
                       "v2-1-stable-unclip-h-inference", False),
    "text-rgbd": _Pipeline("StableDiffusionLDM3DPipeline", "v1-inference", "v2-inference"),
    "rgbd": _Pipeline("StableDiffusionUpscaleLDM3DPipeline", "ldm3d-sr", None),
    "variations": _Pipeline("StableDiffusionImageVariationPipeline",
                            "v1-image-variation-inference", None),
}
# fmt: on
# Components that only one pipeline has.
PIPELINE_BY_COMPONENT = {
    "depth_estimator": "depth",
    "low_res_scheduler": "lowres",
    "image_normalizer": "image",
}
# Side in latent pixels of SD 2's v-prediction models in training; their original YAML says 64.
V_PREDICTION_LATENT_SIZE = 96


def make_folder_configs(model: nn.Module, spec: JsonMapping) -> FolderFiles:
    """Return the configs and tokenizer files of a folder, for a model and its translated config."""
    params = spec["params"]
    autoencoder = model.autoencoder if isinstance(model, LatentDiffusion) else model
    text = model.conditioner.text if isinstance(model, LatentDiffusion) else None
    if isinstance(autoencoder, AutoencoderVQ) or isinstance(text, BERTText):
        raise WrongFamily("models of latent-diffusion are converted to files only, not to folders")
    if not isinstance(model, LatentDiffusion):
        # diffusers takes sample_size for the size of tiles; 512 is Stable Diffusion's.
        return {"config.json": networks.make_vae_config(params, None, 512)}
    vae = params["autoencoder"]["params"]
    if "ddconfig" not in vae:
        raise WrongFamily("diffusers has no pipeline for models without an autoencoder")
    if is_sdxl(model):
        return make_sdxl_folder_configs(model, spec)
    if isinstance(model.unet, LatentUpscalerUNet):
        return make_upscaler_folder_configs(model, spec)
    side = _get_training_size(model)
    height, width = model.latent_size
    sample_size = side if height == width else [height, width]
    image_size = side * model.downscale_factor
    files: FolderFiles = {
        layout.UNET_CONFIG: networks.make_unet_config(model.unet, sample_size),
        layout.VAE_CONFIG: networks.make_vae_config(vae, model.scale_factor, image_size),
        layout.SCHEDULER_CONFIG: schedulers.make_ddim_config(
            params["schedule"]["params"]["betas"],
            model.parameterization,
            zero_snr=model.schedule.zero_snr,
        ),
    }
    pipeline_key = _find_model_pipeline(model)
    files |= _make_encoder_configs(model, params["conditioner"]["params"], pipeline_key)
    pipeline = PIPELINES[pipeline_key]
    extras = dict(NO_SAFETY_CHECKER if pipeline.has_safety_checker else {})
    if PROCESSOR_CONFIG in files:
        class_name = files[PROCESSOR_CONFIG]["image_processor_type"]
        extras["feature_extractor"] = ("transformers", class_name)
    if pipeline_key in ("lowres", "rgbd"):
        encoder = model.conditioner.get(LowResImage if pipeline_key == "lowres" else RGBDLatent)
        extras["max_noise_level"] = encoder.max_noise_level
    return files | {layout.MODEL_INDEX: layout.make_index(pipeline.name, files, extras)}


def make_original_config(files: FolderFiles, folder: str = "the folder") -> JsonObject:
    """Return the config with the original's keys; `folder` is its path for messages."""
    if layout.MODEL_INDEX not in files:
        config_dict = read_yaml(f"{CONFIG_DIR}/v1-inference.yaml")
        autoencoder = config_dict["model"]["params"][AUTOENCODER_CONFIG]
        autoencoder["params"] = networks.parse_vae_config(files["config.json"])
        return {"model": autoencoder}
    if is_sdxl_folder(files):
        return make_sdxl_original_config(files, folder)
    if is_upscaler_folder(files):
        return make_upscaler_original_config(files, folder)
    pipeline_key = _find_folder_pipeline(files)
    has_image_encoder = pipeline_key in ("image", "variations")
    encoder = IMAGE_ENCODER_CONFIG if has_image_encoder else layout.TEXT_CONFIG
    paths = (layout.UNET_CONFIG, layout.VAE_CONFIG, layout.SCHEDULER_CONFIG)
    layout.check_files(files, folder, *paths, encoder)
    unet_config, vae_config, scheduler_config = (files[path] for path in paths)
    if pipeline_key == "image":
        layout.check_files(files, folder, EMBEDDING_NOISE_CONFIG)
    is_openai = encoders.is_openai_clip(files[encoder], encoder)
    pipeline = PIPELINES[pipeline_key]
    template = pipeline.openai_config if is_openai else pipeline.open_clip_config
    if template is None:
        name = files[layout.MODEL_INDEX]["_class_name"]
        raise WrongFamily(f"no original config matches `{name}` with the encoder in {encoder}")
    config_dict = read_yaml(f"{CONFIG_DIR}/{template}.yaml")
    params = config_dict["model"]["params"]
    unet = networks.parse_unet_config(unet_config)
    params["unet_config"]["params"] = unet
    params[AUTOENCODER_CONFIG]["params"] |= networks.parse_vae_config(vae_config)
    params |= schedulers.parse_noise_schedule(scheduler_config, layout.SCHEDULER_CONFIG)
    params["parameterization"] = schedulers.parse_prediction_type(scheduler_config)
    scheduler = schedulers.parse_scheduler(scheduler_config, "leading")
    if scheduler == "trailing":  # of few-step models
        params["defaults"] = {"scheduler": scheduler}
    elif scheduler != "leading":
        message = "%s: its timestep spacing is ignored, select it by the scheduler `%s`"
        log.warning(message, layout.SCHEDULER_CONFIG, scheduler)
    params["scale_factor"] = vae_config.get("scaling_factor", networks.DEFAULT_SCALE_FACTOR)
    params["image_size"] = unet["image_size"] or params["image_size"]
    params["channels"] = unet["out_channels"]
    if layout.TEXT_CONFIG in files:
        text_encoder = encoders.parse_text_config(files[layout.TEXT_CONFIG])
        params["cond_stage_config"]["params"] = text_encoder
    _set_encoder_params(files, params, pipeline_key)
    return config_dict


def _make_encoder_configs(
    model: LatentDiffusion, specs: JsonMapping, pipeline_key: str
) -> FolderFiles:
    files: FolderFiles = {}
    conditioner = model.conditioner
    image = conditioner.find(ImageEmbedding)
    tower = None if image is None else image.clip.model.visual
    if pipeline_key == "variations":
        tower = conditioner.get(CLIPImage).model.visual
    else:
        files |= encoders.make_text_files(conditioner.get(TextEncoder))
    if tower is not None:
        files[IMAGE_ENCODER_CONFIG] = encoders.make_vision_config(tower)
        size = tower.image_size
        files[PROCESSOR_CONFIG] = encoders.make_processor_config("CLIPImageProcessor", size)
    if image is not None:
        name = layout.COMPONENT_CLASSES["image_normalizer"][1]
        files[NORMALIZER_CONFIG] = {"_class_name": name, "embedding_dim": image.noise.embed_dim}
        files[EMBEDDING_NOISE_CONFIG] = _make_noise_config(specs["image"]["params"]["noise"])
    if pipeline_key in ("lowres", "rgbd"):  # unused by rgbd, but required by its pipeline
        files[LOW_RES_NOISE_CONFIG] = _make_noise_config(specs[pipeline_key])
    if pipeline_key == "depth":
        files[DEPTH_CONFIG] = encoders.make_depth_config(conditioner.get(MiDaSDepth))
        size = files[DEPTH_CONFIG]["image_size"]
        files[PROCESSOR_CONFIG] = encoders.make_processor_config("DPTImageProcessor", size)
    return files


def _set_encoder_params(files: FolderFiles, params: JsonObject, pipeline_key: str) -> None:
    """Set parameters of a config from the encoders' files."""
    if pipeline_key == "depth":
        params["depth_stage_config"]["params"] = encoders.parse_depth_config(files[DEPTH_CONFIG])
    if pipeline_key in ("lowres", "rgbd"):
        low_res = params["low_scale_config"].setdefault("params", {})
        low_res["max_noise_level"] = files[layout.MODEL_INDEX].get("max_noise_level", 350)
    if pipeline_key == "lowres":
        config = files[LOW_RES_NOISE_CONFIG]
        noise_schedule = schedulers.parse_noise_schedule(config, LOW_RES_NOISE_CONFIG)
        low_res["noise_schedule_config"] = noise_schedule
    if pipeline_key in ("image", "variations"):
        key = "embedder_config" if pipeline_key == "image" else "cond_stage_config"
        params[key]["params"] = encoders.parse_vision_config(files[IMAGE_ENCODER_CONFIG])
    if pipeline_key == "image":
        config = files[EMBEDDING_NOISE_CONFIG]
        noise_schedule = schedulers.parse_noise_schedule(config, EMBEDDING_NOISE_CONFIG)
        params["noise_aug_config"]["params"] |= {
            "timestep_dim": files[IMAGE_ENCODER_CONFIG]["projection_dim"],
            "noise_schedule_config": noise_schedule,
        }


def _find_model_pipeline(model: LatentDiffusion) -> str:
    """Return the key in PIPELINES for the encoders of a model."""
    if isinstance(model.conditioner.text, CLIPImage):
        return "variations"
    names = list(model.conditioner.encoders)
    keys = set(names) - {"text", "level"}  # the level is an addition to lowres or rgbd
    has_text = isinstance(model.conditioner.text, TextEncoder)
    if len(keys) > 1 or not keys <= PIPELINES.keys() or not has_text:
        raise WrongFamily(f"diffusers has no pipeline for {', '.join(names) or 'no condition'}")
    if keys:
        return keys.pop()
    return "text" if model.autoencoder.in_channels == 3 else "text-rgbd"


def _find_folder_pipeline(files: FolderFiles) -> str:
    """Return the key in PIPELINES for the components of a folder."""
    components = {path.split("/")[0] for path in files}
    is_rgbd = files.get(layout.VAE_CONFIG, {}).get("in_channels", 3) != 3
    channels = files.get(layout.UNET_CONFIG, {}).get("in_channels", 4)
    # LDM3D-SR has a low-resolution scheduler, which may be missing as it is unused; its UNet has
    # the channels of a second latent.
    if is_rgbd and ("low_res_scheduler" in components or channels == 8):
        return "rgbd"
    for component, pipeline_key in PIPELINE_BY_COMPONENT.items():
        if component in components:
            return pipeline_key
    if "image_encoder" in components and "text_encoder" not in components:
        return "variations"
    missing = {"unet", "vae", "text_encoder", "scheduler"} - components
    if missing or "text_encoder_2" in components:
        reason = f"no {', '.join(sorted(missing))}" if missing else "`text_encoder_2`"
        name = files[layout.MODEL_INDEX].get("_class_name")
        raise FileFormatError(f"`{name}` is not a supported pipeline (it has {reason})")
    if files[layout.UNET_CONFIG].get("in_channels") == layout.INPAINTING_CHANNELS:
        return "masked"
    return "text-rgbd" if is_rgbd else "text"


def _get_training_size(model: LatentDiffusion) -> int:
    """Return the side in latent pixels at which a model was trained."""
    family = detect_family(model.state_dict())
    if family is not None and family.name == "sd2" and model.parameterization == "v":
        return max(model.image_size, V_PREDICTION_LATENT_SIZE)
    return model.image_size


def _make_noise_config(spec: JsonMapping) -> JsonObject:
    """Return the scheduler config for the noise that is added to a condition."""
    params = dict((spec.get("params") or {}).get("noise_schedule_config") or {})
    params["name"] = params.pop("beta_schedule", "linear")
    config = schedulers.make_noise_schedule_config({"params": params})
    return {"_class_name": "DDPMScheduler", "clip_sample": False, **config}
