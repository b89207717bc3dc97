"""Base models of LoRAs and embeddings, and their names in the metadata of these files."""

from dataclasses import dataclass

from ldm.model import LatentDiffusion
from ldm.pipelines.families import is_sdxl

__all__ = ["BASE_MODELS", "BaseModel", "find_base_model"]


@dataclass(frozen=True)
class BaseModel:
    """A base model for LoRAs and embeddings.

    Args:
        title: Name in messages.
        context_dim: Dimension of the context of cross-attention.
        architecture: Value of `modelspec.architecture`.
        version: Value of kohya's `ss_base_model_version`.
    """

    title: str
    context_dim: int
    architecture: str
    version: str


SD1 = BaseModel("Stable Diffusion 1", 768, "stable-diffusion-v1", "sd_v1")
SD2 = BaseModel("Stable Diffusion 2", 1024, "stable-diffusion-v2-512", "sd_v2")
SD2_V = BaseModel("Stable Diffusion 2", 1024, "stable-diffusion-v2-768-v", "sd_v2_v")
SDXL = BaseModel("Stable Diffusion XL", 2048, "stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
REFINER = BaseModel(
    "Stable Diffusion XL refiner", 1280, "stable-diffusion-xl-v1-refiner", "sdxl_refiner_v1-0"
)
BASE_MODELS = {base.context_dim: base for base in (SD1, SD2, SDXL, REFINER)}


def find_base_model(model: LatentDiffusion) -> BaseModel | None:
    """Return the base model that a model is or was fine-tuned from; None for other families."""
    if is_sdxl(model):
        return REFINER if "aesthetic_score" in model.conditioner.keys else SDXL
    context_dim = model.unet.context_dim
    base = BASE_MODELS.get(context_dim) if isinstance(context_dim, int) else None
    return SD2_V if base is SD2 and model.parameterization == "v" else base
