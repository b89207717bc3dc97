"""Which components a family has in a diffusers folder, and what is written about each.

    describe(model, spec)   a translated config -> {"unet/config.json": {…}, …, "model_index.json"}
    recall(files)           the same files -> a config in the original's words

The way back takes the published YAML of the family and puts the folder's numbers into it, so the
result can be read by every program that reads those.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm.encoders.depth import MiDaSDepth
from ldm.encoders.image import CLIPImage, ImageEmbedding
from ldm.encoders.lowres import LowRes
from ldm.encoders.text import TextEncoder
from ldm.loading.config import read_yaml
from ldm.loading.diffusers import encoders, networks, schedulers
from ldm.loading.diffusers.keys import used_text_blocks
from ldm.loading.families import PUBLISHED, recognise_family
from ldm.model import LatentDiffusion

__all__ = ["INDEX", "folder_configs", "original_config"]

Files = dict[str, Any]

INDEX = "model_index.json"
VERSION = "0.35.0"  # of diffusers, that its readers take such files to be made by
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "image_normalizer": ("stable_diffusion", "StableUnCLIPImageNormalizer"),
    "image_noising_scheduler": ("diffusers", "DDPMScheduler"),
    "low_res_scheduler": ("diffusers", "DDPMScheduler"),
    "depth_estimator": ("transformers", "DPTForDepthEstimation"),
}
NONE = (None, None)
UNCHECKED = {"safety_checker": NONE, "requires_safety_checker": False}
# By the encoder that decides: the pipeline, and what its index says besides the components.
PIPELINES = {
    "": ("StableDiffusionPipeline", {**UNCHECKED, "feature_extractor": NONE}),
    "masked": ("StableDiffusionInpaintPipeline", {**UNCHECKED, "feature_extractor": NONE}),
    "depth": ("StableDiffusionDepth2ImgPipeline", {}),
    "lowres": ("StableDiffusionUpscalePipeline", {}),
    "image": ("StableUnCLIPImg2ImgPipeline", {}),
    "sees": ("StableDiffusionImageVariationPipeline", UNCHECKED),
}
# By the same, and by whose CLIP reads (or sees): the YAML to start from.
TEMPLATES = {
    ("", True): "v1-inference",
    ("", False): "v2-inference",
    ("masked", True): "v1-inpainting-inference",
    ("masked", False): "v2-inpainting-inference",
    ("depth", False): "v2-midas-inference",
    ("lowres", False): "x4-upscaling",
    ("image", True): "v2-1-stable-unclip-l-inference",
    ("image", False): "v2-1-stable-unclip-h-inference",
    ("sees", True): "v1-image-variation-inference",
}
INPAINTING = 9  # channels that such a UNet reads
WIDE = 96  # latent side at which SD 2's v models were trained; their original YAML says 64


def folder_configs(model: nn.Module, spec: Mapping[str, Any]) -> Files:
    """Every file of the folder but weights: path -> JSON, or text.

        model: of the spec, on the meta device.
    Raises ValueError for what diffusers cannot express.
    """
    params = spec["params"]
    if not isinstance(model, LatentDiffusion):
        return {"config.json": networks.vae_config(params, None, 512)}
    side, betas, zero = _side(model), params["schedule"]["params"]["betas"], model.schedule.zero_snr
    scheduler = schedulers.ddim_config(betas, model.parameterization, zero_snr=zero)
    vae = params["autoencoder"]["params"]
    if "ddconfig" not in vae:
        raise ValueError("diffusers has no pipeline for models without an autoencoder")
    files: Files = {
        "unet/config.json": networks.unet_config(model.unet, side),
        "vae/config.json": networks.vae_config(vae, model.scale_factor, side * model.downscale),
        "scheduler/scheduler_config.json": scheduler,
    }
    kind = _kind(model)
    files |= _conditions(model, params["conditioner"]["params"], kind)
    pipeline, more = PIPELINES[kind]
    index: Files = {"_class_name": pipeline, "_diffusers_version": VERSION, **more}
    index |= {part: CLASSES[part] for part in sorted({path.split("/")[0] for path in files} - {FE})}
    if f"{FE}/{PROCESSOR}" in files:
        index[FE] = ("transformers", files[f"{FE}/{PROCESSOR}"]["image_processor_type"])
    if kind == "lowres":
        index["max_noise_level"] = model.conditioner.get(LowRes).max_noise_level
    return files | {INDEX: index}


def original_config(files: Files) -> dict[str, Any]:
    """The config in the original's words. Raises ValueError for a folder of another kind."""
    if INDEX not in files:
        raw = read_yaml(f"{PUBLISHED}/v1-inference.yaml")
        stage = raw["model"]["params"]["first_stage_config"]
        stage["params"] = networks.vae_params(files["config.json"])
        return {"model": stage}
    kind = _kind_of(files)
    part = "image_encoder/config.json" if kind in ("image", "sees") else TEXT
    is_openai = encoders.by_openai(files[part], part)
    if (kind, is_openai) not in TEMPLATES:
        raise ValueError(f"`{files[INDEX]['_class_name']}` with {part} of SD 1 has no original")
    raw = read_yaml(f"{PUBLISHED}/{TEMPLATES[kind, is_openai]}.yaml")
    params = raw["model"]["params"]
    unet = networks.unet_params(files["unet/config.json"])
    schedule = files["scheduler/scheduler_config.json"]
    where = "scheduler/scheduler_config.json"
    params["unet_config"]["params"] = unet
    params["first_stage_config"]["params"] |= networks.vae_params(files["vae/config.json"])
    params |= schedulers.beta_params(schedule, where)
    params["parameterization"] = schedulers.prediction(schedule, where)
    params["scale_factor"] = files["vae/config.json"].get("scaling_factor", 0.18215)
    params["image_size"] = unet["image_size"] or params["image_size"]
    params["channels"] = unet["out_channels"]
    if TEXT in files:
        params["cond_stage_config"]["params"] = encoders.text_params(files[TEXT])
    _recall_conditions(files, params, kind)
    return raw


FE, PROCESSOR, TEXT = "feature_extractor", "preprocessor_config.json", "text_encoder/config.json"
NOISING = "image_noising_scheduler/scheduler_config.json"
LOWRES = "low_res_scheduler/scheduler_config.json"


def _conditions(model: LatentDiffusion, specs: Mapping[str, Any], kind: str) -> Files:
    """Files of what the model listens to."""
    conditioner, files = model.conditioner, Files()
    image = conditioner.find(ImageEmbedding)
    eye = None if image is None else image.clip.model.visual
    if kind == "sees":
        eye = conditioner.get(CLIPImage).model.visual
    else:
        text = conditioner.get(TextEncoder)
        files[TEXT] = encoders.text_config(text, used_text_blocks(text))
        for name, content in encoders.tokenizer_files(text).items():
            files[f"tokenizer/{name}"] = content
    if eye is not None:
        files["image_encoder/config.json"] = encoders.vision_config(eye)
        files[f"{FE}/{PROCESSOR}"] = encoders.image_processor(eye.image_size)
    if image is not None:
        width = {"embedding_dim": image.noise.width}
        name = CLASSES["image_normalizer"][1]
        files["image_normalizer/config.json"] = {"_class_name": name} | width
        files[NOISING] = _noise(specs["image"]["params"]["noise"])
    if kind == "lowres":
        files[LOWRES] = _noise(specs["lowres"])
    if kind == "depth":
        config = encoders.depth_config(conditioner.get(MiDaSDepth))
        files["depth_estimator/config.json"] = config
        files[f"{FE}/{PROCESSOR}"] = encoders.depth_processor(config["image_size"])
    return files


def _recall_conditions(files: Files, params: dict[str, Any], kind: str) -> None:
    if kind == "depth":
        depth = encoders.depth_params(files["depth_estimator/config.json"])
        params["depth_stage_config"]["params"] = depth
    if kind == "lowres":
        low = params["low_scale_config"]["params"]
        low["noise_schedule_config"] = schedulers.beta_params(files[LOWRES], LOWRES)
        low["max_noise_level"] = files[INDEX].get("max_noise_level", low["max_noise_level"])
    if kind in ("image", "sees"):
        stage = params["embedder_config" if kind == "image" else "cond_stage_config"]
        stage["params"] = encoders.vision_params(files["image_encoder/config.json"])
    if kind == "image":
        noise = params["noise_aug_config"]["params"]
        noise["timestep_dim"] = files["image_encoder/config.json"]["projection_dim"]
        noise["noise_schedule_config"] = schedulers.beta_params(files[NOISING], NOISING)


def _kind(model: LatentDiffusion) -> str:
    """The encoder that decides; "" is text alone."""
    names = dict(model.conditioner.named_children())
    if isinstance(names.get("text"), CLIPImage):
        return "sees"
    others = set(names) - {"text", "level"}
    if len(others) > 1 or not others <= set(PIPELINES) or "text" not in names:
        raise ValueError(f"diffusers has no pipeline for {', '.join(names) or 'no condition'}")
    return others.pop() if others else ""


def _kind_of(files: Files) -> str:
    parts = {path.split("/")[0] for path in files}
    for part, kind in (
        ("depth_estimator", "depth"),
        ("low_res_scheduler", "lowres"),
        ("image_normalizer", "image"),
    ):
        if part in parts:
            return kind
    if "image_encoder" in parts and "text_encoder" not in parts:
        return "sees"
    lacking = {"unet", "vae", "text_encoder", "scheduler"} - parts
    if lacking or "text_encoder_2" in parts:
        name, what = files[INDEX].get("_class_name"), ", ".join(sorted(lacking)) or "text_encoder_2"
        raise ValueError(f"`{name}` is not a pipeline that is known here (`{what}`)")
    return "masked" if files["unet/config.json"].get("in_channels") == INPAINTING else ""


def _side(model: LatentDiffusion) -> int:
    family = recognise_family(model.state_dict())
    is_wide = family is not None and family.name == "sd2" and model.parameterization == "v"
    return max(model.image_size, WIDE) if is_wide else model.image_size


def _noise(spec: Mapping[str, Any]) -> Files:
    """The schedule of noise on a condition."""
    params = dict((spec.get("params") or {}).get("noise_schedule_config") or {})
    params["name"] = params.pop("beta_schedule", "linear")
    config = schedulers.betas_config({"params": params})
    return {"_class_name": "DDPMScheduler", "clip_sample": False, **config}
