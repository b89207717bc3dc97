"""Files of a diffusers folder, and the classes that its index names. Does not import torch."""

import json
from pathlib import Path

from ldm.runtime.errors import FileFormatError
from ldm.runtime.files import read_text
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "CLASSES", "EXTRA_WEIGHTS", "INDEX", "INPAINTING_CHANNELS", "NO_COMPONENT", "REMEDY",
    "SCHEDULER", "TEXT", "TEXT_2", "UNET", "VAE", "check_files", "make_index", "read_json",
]  # fmt: skip

INDEX = "model_index.json"
EXTRA_WEIGHTS = "original.safetensors"  # of ours: tensors that diffusers does not have
UNET = "unet/config.json"
VAE = "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
TEXT = "text_encoder/config.json"
TEXT_2 = "text_encoder_2/config.json"

VERSION = "0.35.0"  # of diffusers, as written into the index
# (package, class) by component, as in the index.
CLASSES = {
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
NO_COMPONENT = (None, None)  # in place of the class of a component that a folder does not have
INPAINTING_CHANNELS = 9  # of the UNet's input: latent, mask, and latent of the masked image
REMEDY = "download the complete folder again"  # of missing files, for messages
MAX_JSON = 1 << 24  # bytes


def check_files(files: JsonMapping, folder: str, *paths: str) -> None:
    """Raise FileFormatError unless a folder has these files; `folder` is its path for messages."""
    for path in paths:
        if path not in files:
            raise FileFormatError(f"`{folder}` has no `{path}`: {REMEDY}")


def make_index(class_name: str, files: JsonMapping, extras: JsonMapping) -> JsonObject:
    """Return the index of a folder.

    Args:
        class_name: Class of the pipeline.
        files: The other files, by path.
        extras: Entries besides the components that have files.
    """
    components = {path.split("/")[0] for path in files} & CLASSES.keys()
    return {
        "_class_name": class_name,
        "_diffusers_version": VERSION,
        **{component: CLASSES[component] for component in sorted(components)},
        "scheduler": ("diffusers", files[SCHEDULER]["_class_name"]),
        **extras,
    }


def read_json(path: Path) -> JsonObject:
    """Read a JSON object: a config of diffusers, transformers or peft.

    Raises:
        FileFormatError: It is damaged, too long, or not an object.
    """
    size = path.stat().st_size
    if size > MAX_JSON:
        raise FileFormatError(f"`{path}`: {size} bytes is too much for a config")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise FileFormatError(f"`{path}` is damaged: {error}") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"`{path}` is not a config: a JSON object is expected")
    return content
