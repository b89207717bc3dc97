"""Convert between a model's config and the JSONs of a diffusers folder, `model_index.json` …

`make_original_config` fills the published YAML of the family with the folder's parameters, so that
programs for the original's configs can read it.
"""

import logging
from typing import NamedTuple

from torch import nn

from ldm.encoders.depth import MiDaSDepth
from ldm.encoders.image import CLIPImage, ImageEmbedding
from ldm.encoders.lowres import LowRes, RGBDLatent
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
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.pipelines.families import is_sdxl
from ldm.runtime.errors import FileFormatError, WrongFamily
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["Files", "make_folder_configs", "make_original_config"]

log = logging.getLogger(__name__)

Files = JsonObject  # path in the folder -> JSON, or text

IMAGE = "image_encoder/config.json"
DEPTH = "depth_estimator/config.json"
PROCESSOR = "feature_extractor/preprocessor_config.json"
NORMALIZER = "image_normalizer/config.json"
EMBEDDING_NOISE = "image_noising_scheduler/scheduler_config.json"
LOW_RES_NOISE = "low_res_scheduler/scheduler_config.json"

# Entries of the index for a pipeline without its safety checker.
NO_SAFETY_CHECKER = {
    "safety_checker": layout.NO_COMPONENT, "requires_safety_checker": False,
    "feature_extractor": layout.NO_COMPONENT,
}  # fmt: skip


class _Pipeline(NamedTuple):
    """A pipeline of diffusers, and the YAMLs of its families.

    Args:
        name: Class of diffusers.
        openai_config: Name of the YAML with OpenAI's CLIP as encoder; None = no such family.
        open_clip_config: Name of the YAML with OpenCLIP; None = no such family.
        has_safety_checker: Whether it has a safety checker, which our folders do not contain.
    """

    name: str
    openai_config: str | None
    open_clip_config: str | None
    has_safety_checker: bool = True


# By the encoder that identifies the pipeline, "text" if there is no other. masked = inpainting,
# lowres = x4 upscaler, image = unCLIP, rgbd = LDM3D (-SR), variations = image instead of a prompt.
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
PIPELINE_OF_COMPONENT = {
    "depth_estimator": "depth",
    "low_res_scheduler": "lowres",
    "image_normalizer": "image",
}
# Side in latent pixels at which SD 2's v models were trained; their original YAML says 64.
V_MODEL_SIZE = 96


def make_folder_configs(model: nn.Module, spec: JsonMapping) -> Files:
    """Return all files of a folder except weights, for a model and its translated config."""
    params = spec["params"]
    if not isinstance(model, LatentDiffusion):
        # The image size, for diffusers the size of tiles, is unknown: Stable Diffusion's.
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
    files: Files = {
        layout.UNET: networks.make_unet_config(
            model.unet, side if height == width else [height, width]
        ),
        layout.VAE: networks.make_vae_config(vae, model.scale_factor, side * model.downscale),
        layout.SCHEDULER: schedulers.make_ddim_config(
            params["schedule"]["params"]["betas"],
            model.parameterization,
            zero_snr=model.schedule.zero_snr,
        ),
    }
    pipeline_key = _find_model_pipeline(model)
    files |= _make_encoder_configs(model, params["conditioner"]["params"], pipeline_key)
    pipeline = PIPELINES[pipeline_key]
    extras = dict(NO_SAFETY_CHECKER if pipeline.has_safety_checker else {})
    if PROCESSOR in files:
        extras["feature_extractor"] = ("transformers", files[PROCESSOR]["image_processor_type"])
    if pipeline_key in ("lowres", "rgbd"):
        encoder = model.conditioner.get(LowRes if pipeline_key == "lowres" else RGBDLatent)
        extras["max_noise_level"] = encoder.max_noise_level
    return files | {layout.INDEX: layout.make_index(pipeline.name, files, extras)}


def make_original_config(files: Files, folder: str = "the folder") -> JsonObject:
    """Return the config with the original's keys; `folder` is its path for messages."""
    if layout.INDEX not in files:
        raw = read_yaml(f"{CONFIG_DIR}/v1-inference.yaml")
        autoencoder = raw["model"]["params"][AUTOENCODER_CONFIG]
        autoencoder["params"] = networks.parse_vae_config(files["config.json"])
        return {"model": autoencoder}
    if is_sdxl_folder(files):
        return make_sdxl_original_config(files, folder)
    if is_upscaler_folder(files):
        return make_upscaler_original_config(files, folder)
    pipeline_key = _find_folder_pipeline(files)
    encoder = IMAGE if pipeline_key in ("image", "variations") else layout.TEXT
    layout.check_files(files, folder, layout.UNET, layout.VAE, layout.SCHEDULER, encoder)
    if pipeline_key == "image":
        layout.check_files(files, folder, EMBEDDING_NOISE)
    is_openai = encoders.is_openai_clip(files[encoder], encoder)
    pipeline = PIPELINES[pipeline_key]
    template = pipeline.openai_config if is_openai else pipeline.open_clip_config
    if template is None:
        name = files[layout.INDEX]["_class_name"]
        raise WrongFamily(f"no original config matches `{name}` with the encoder in {encoder}")
    raw = read_yaml(f"{CONFIG_DIR}/{template}.yaml")
    params = raw["model"]["params"]
    unet = networks.parse_unet_config(files[layout.UNET])
    params["unet_config"]["params"] = unet
    params[AUTOENCODER_CONFIG]["params"] |= networks.parse_vae_config(files[layout.VAE])
    params |= schedulers.parse_noise_schedule(files[layout.SCHEDULER], layout.SCHEDULER)
    params["parameterization"] = schedulers.parse_prediction_type(files[layout.SCHEDULER])
    scheduler = schedulers.parse_scheduler(files[layout.SCHEDULER], "leading")
    if scheduler == "trailing":  # of few-step models
        params["defaults"] = {"scheduler": scheduler}
    elif scheduler != "leading":
        message = "%s: its timestep spacing is ignored, select it by the scheduler `%s`"
        log.warning(message, layout.SCHEDULER, scheduler)
    params["scale_factor"] = files[layout.VAE].get("scaling_factor", networks.DEFAULT_SCALE_FACTOR)
    params["image_size"] = unet["image_size"] or params["image_size"]
    params["channels"] = unet["out_channels"]
    if layout.TEXT in files:
        params["cond_stage_config"]["params"] = encoders.parse_text_config(files[layout.TEXT])
    _set_encoder_params(files, params, pipeline_key)
    return raw


def _make_encoder_configs(model: LatentDiffusion, specs: JsonMapping, pipeline_key: str) -> Files:
    conditioner, files = model.conditioner, Files()
    image = conditioner.find(ImageEmbedding)
    tower = None if image is None else image.clip.model.visual
    if pipeline_key == "variations":
        tower = conditioner.get(CLIPImage).model.visual
    else:
        files |= encoders.make_text_files(conditioner.get(TextEncoder))
    if tower is not None:
        files[IMAGE] = encoders.make_vision_config(tower)
        files[PROCESSOR] = encoders.make_processor_config("CLIPImageProcessor", tower.image_size)
    if image is not None:
        name = layout.CLASSES["image_normalizer"][1]
        files[NORMALIZER] = {"_class_name": name, "embedding_dim": image.noise.width}
        files[EMBEDDING_NOISE] = _make_noise_config(specs["image"]["params"]["noise"])
    if pipeline_key in ("lowres", "rgbd"):  # diffusers' pipeline of rgbd requires it, but unused
        files[LOW_RES_NOISE] = _make_noise_config(specs[pipeline_key])
    if pipeline_key == "depth":
        files[DEPTH] = encoders.make_depth_config(conditioner.get(MiDaSDepth))
        size = files[DEPTH]["image_size"]
        files[PROCESSOR] = encoders.make_processor_config("DPTImageProcessor", size)
    return files


def _set_encoder_params(files: Files, params: JsonObject, pipeline_key: str) -> None:
    """Set parameters of a config from the encoders' files."""
    if pipeline_key == "depth":
        params["depth_stage_config"]["params"] = encoders.parse_depth_config(files[DEPTH])
    if pipeline_key in ("lowres", "rgbd"):
        low_res = params["low_scale_config"].setdefault("params", {})
        low_res["max_noise_level"] = files[layout.INDEX].get("max_noise_level", 350)
    if pipeline_key == "lowres":
        noise = schedulers.parse_noise_schedule(files[LOW_RES_NOISE], LOW_RES_NOISE)
        low_res["noise_schedule_config"] = noise
    if pipeline_key == "variations":
        params["cond_stage_config"]["params"] = encoders.parse_vision_config(files[IMAGE])
    if pipeline_key == "image":
        params["embedder_config"]["params"] = encoders.parse_vision_config(files[IMAGE])
        betas = schedulers.parse_noise_schedule(files[EMBEDDING_NOISE], EMBEDDING_NOISE)
        params["noise_aug_config"]["params"] |= {
            "timestep_dim": files[IMAGE]["projection_dim"],
            "noise_schedule_config": betas,
        }


def _find_model_pipeline(model: LatentDiffusion) -> str:
    """Return the key in PIPELINES for the encoders of a model."""
    if isinstance(model.conditioner.text, CLIPImage):
        return "variations"
    names = model.conditioner.encoders
    keys = names.keys() - {"text", "level"}  # the level comes with lowres or rgbd
    if len(keys) > 1 or not keys <= PIPELINES.keys() or "text" not in names:
        raise WrongFamily(f"diffusers has no pipeline for {', '.join(names) or 'no condition'}")
    if keys:
        return keys.pop()
    return "text" if model.autoencoder.in_channels == 3 else "text-rgbd"


def _find_folder_pipeline(files: Files) -> str:
    """Return the key in PIPELINES for the components of a folder."""
    components = {path.split("/")[0] for path in files}
    is_rgbd = files.get(layout.VAE, {}).get("in_channels", 3) != 3
    channels = files.get(layout.UNET, {}).get("in_channels", 4)
    # LDM3D-SR has a low-resolution scheduler, which may be missing as it is unused; its UNet has
    # the channels of a second latent.
    if is_rgbd and ("low_res_scheduler" in components or channels == 8):
        return "rgbd"
    for component, pipeline_key in PIPELINE_OF_COMPONENT.items():
        if component in components:
            return pipeline_key
    if "image_encoder" in components and "text_encoder" not in components:
        return "variations"
    missing = {"unet", "vae", "text_encoder", "scheduler"} - components
    if missing or "text_encoder_2" in components:
        reason = f"no {', '.join(sorted(missing))}" if missing else "`text_encoder_2`"
        name = files[layout.INDEX].get("_class_name")
        raise FileFormatError(f"`{name}` is not a supported pipeline (it has {reason})")
    if files[layout.UNET].get("in_channels") == layout.INPAINTING_CHANNELS:
        return "masked"
    return "text-rgbd" if is_rgbd else "text"


def _get_training_size(model: LatentDiffusion) -> int:
    """Return the side in latent pixels at which a model was trained."""
    family = detect_family(model.state_dict())
    if family is not None and family.name == "sd2" and model.parameterization == "v":
        return max(model.image_size, V_MODEL_SIZE)
    return model.image_size


def _make_noise_config(spec: JsonMapping) -> Files:
    """Return the scheduler config for the noise that is added to a condition."""
    params = dict((spec.get("params") or {}).get("noise_schedule_config") or {})
    params["name"] = params.pop("beta_schedule", "linear")
    config = schedulers.make_noise_schedule_config({"params": params})
    return {"_class_name": "DDPMScheduler", "clip_sample": False, **config}
