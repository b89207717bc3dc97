"""`ldm.models.diffusion.ddpm` of the original: its model classes, and the names that it imports."""

from ldm.compat.autoencoder import AutoencoderKL, IdentityFirstStage, VQModelInterface
from ldm.compat.ddim import DDIMSampler
from ldm.compat.ddpm_base import DDPM, DiffusionWrapper, uniform_on_device
from ldm.compat.ddpm_families import (
    ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion,
    LatentFinetuneDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
    LatentUpscaleFinetuneDiffusion,
)
from ldm.compat.diffusion_util import extract_into_tensor, make_beta_schedule, noise_like
from ldm.compat.distributions import DiagonalGaussianDistribution, normal_kl
from ldm.compat.ema import LitEma
from ldm.compat.latent_diffusion import LatentDiffusion
from ldm.compat.util import (
    count_params,
    default,
    disabled_train,
    exists,
    instantiate_from_config,
    isimage,
    ismap,
    log_txt_as_img,
    mean_flat,
)

__all__ = [
    "DDPM",
    "AutoencoderKL",
    "DDIMSampler",
    "DiagonalGaussianDistribution",
    "DiffusionWrapper",
    "IdentityFirstStage",
    "ImageEmbeddingConditionedLatentDiffusion",
    "LatentDepth2ImageDiffusion",
    "LatentDiffusion",
    "LatentFinetuneDiffusion",
    "LatentInpaintDiffusion",
    "LatentUpscaleDiffusion",
    "LatentUpscaleFinetuneDiffusion",
    "LitEma",
    "VQModelInterface",
    "count_params",
    "default",
    "disabled_train",
    "exists",
    "extract_into_tensor",
    "instantiate_from_config",
    "isimage",
    "ismap",
    "log_txt_as_img",
    "make_beta_schedule",
    "mean_flat",
    "noise_like",
    "normal_kl",
    "uniform_on_device",
]
