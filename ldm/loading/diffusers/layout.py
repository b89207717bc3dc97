"""Files of a diffusers folder, and the classes that its index names."""

from ldm.runtime.errors import FileFormatError
from ldm.runtime.types import JsonMapping

__all__ = [
    "CLASSES", "INDEX", "INPAINTING_CHANNELS", "NO_COMPONENT", "SCHEDULER", "TEXT", "TEXT_2",
    "UNET", "VAE", "VERSION", "WHOLE", "require",
]  # fmt: skip

INDEX = "model_index.json"
UNET = "unet/config.json"
VAE = "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
TEXT = "text_encoder/config.json"
TEXT_2 = "text_encoder_2/config.json"

VERSION = "0.35.0"  # of diffusers, as written into the index
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "DDIMScheduler"),
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
NO_COMPONENT = (None, None)
INPAINTING_CHANNELS = 9  # of the UNet's input
WHOLE = "download the folder again, whole"


def require(files: JsonMapping, folder: str, *paths: str) -> None:
    """Raise FileFormatError unless a folder has these files; `folder` is its path for messages."""
    for path in paths:
        if path not in files:
            raise FileFormatError(f"`{folder}` has no `{path}`: {WHOLE}")
