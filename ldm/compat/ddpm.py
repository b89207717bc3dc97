"""`ldm.models.diffusion.ddpm` of the original: its model classes, and the names it imports."""

from ldm.compat.autoencoder import (
    AutoencoderKL as AutoencoderKL,
    IdentityFirstStage as IdentityFirstStage,
    VQModelInterface as VQModelInterface,
)
from ldm.compat.ddim import DDIMSampler as DDIMSampler
from ldm.compat.ddpm_base import (
    DDPM as DDPM,
    DiffusionWrapper as DiffusionWrapper,
    uniform_on_device as uniform_on_device,
)
from ldm.compat.ddpm_subclasses import (
    ImageEmbeddingConditionedLatentDiffusion as ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion as LatentDepth2ImageDiffusion,
    LatentFinetuneDiffusion as LatentFinetuneDiffusion,
    LatentInpaintDiffusion as LatentInpaintDiffusion,
    LatentUpscaleDiffusion as LatentUpscaleDiffusion,
    LatentUpscaleFinetuneDiffusion as LatentUpscaleFinetuneDiffusion,
)
from ldm.compat.diffusion_util import (
    extract_into_tensor as extract_into_tensor,
    make_beta_schedule as make_beta_schedule,
    noise_like as noise_like,
)
from ldm.compat.distributions import (
    DiagonalGaussianDistribution as DiagonalGaussianDistribution,
    normal_kl as normal_kl,
)
from ldm.compat.ema import LitEma as LitEma
from ldm.compat.latent_diffusion import LatentDiffusion as LatentDiffusion
from ldm.compat.util import (
    count_params as count_params,
    default as default,
    disabled_train as disabled_train,
    exists as exists,
    instantiate_from_config as instantiate_from_config,
    isimage as isimage,
    ismap as ismap,
    log_txt_as_img as log_txt_as_img,
    mean_flat as mean_flat,
)
