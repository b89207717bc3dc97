"""Paths of files in a diffusers folder, and its index of classes. Does not import torch."""

import json
from pathlib import Path

from ldm.runtime.errors import FileFormatError
from ldm.runtime.files import read_text
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "COMPONENT_CLASSES", "EXTRA_WEIGHTS", "INPAINTING_CHANNELS", "MISSING_FILES_REMEDY",
    "MODEL_INDEX", "NO_COMPONENT", "SCHEDULER_CONFIG", "TEXT_2_CONFIG", "TEXT_CONFIG",
    "UNET_CONFIG", "VAE_CONFIG", "check_files", "make_index", "read_json",
]  # fmt: skip

MODEL_INDEX = "model_index.json"
EXTRA_WEIGHTS = "original.safetensors"  # of ours: tensors that diffusers does not have
UNET_CONFIG = "unet/config.json"
VAE_CONFIG = "vae/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
TEXT_CONFIG = "text_encoder/config.json"
TEXT_2_CONFIG = "text_encoder_2/config.json"

DIFFUSERS_VERSION = "0.35.0"  # written into the index
# (package, class) by component, as in the index.
COMPONENT_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "image_normalizer": ("stable_diffusion", "StableUnCLIPImageNormalizer"),
    "image_noising_scheduler": ("diffusers", "DDPMScheduler"),
    "low_res_scheduler": ("diffusers", "DDPMScheduler"),
    "depth_estimator": ("transformers", "DPTForDepthEstimation"),
}
NO_COMPONENT = (None, None)  # in the index, instead of (package, class) of a missing component
INPAINTING_CHANNELS = 9  # input channels of the UNet: latent, mask, latent of the masked image
MISSING_FILES_REMEDY = "download the complete folder again"
MAX_JSON_BYTES = 1 << 24


def check_files(files: JsonMapping, folder: str, *paths: str) -> None:
    """Raise FileFormatError unless a folder has these files; `folder` is its path for messages."""
    for path in paths:
        if path not in files:
            raise FileFormatError(f"`{folder}` has no `{path}`: {MISSING_FILES_REMEDY}")


def make_index(class_name: str, files: JsonMapping, extras: JsonMapping) -> JsonObject:
    """Return the index of a folder.

    Args:
        class_name: Class of the pipeline.
        files: The other files, by path.
        extras: Entries besides the components that have files.
    """
    components = {path.split("/")[0] for path in files} & COMPONENT_CLASSES.keys()
    return {
        "_class_name": class_name,
        "_diffusers_version": DIFFUSERS_VERSION,
        **{component: COMPONENT_CLASSES[component] for component in sorted(components)},
        "scheduler": ("diffusers", files[SCHEDULER_CONFIG]["_class_name"]),
        **extras,
    }


def read_json(path: Path) -> JsonObject:
    """Read a JSON object: a config of diffusers, transformers or peft.

    Raises:
        FileFormatError: It is damaged, too long, or not an object.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise FileFormatError(f"`{path}`: {size} bytes is too much for a config")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise FileFormatError(f"`{path}` is damaged: {error}") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"`{path}` is not a config: a JSON object is expected")
    return content
