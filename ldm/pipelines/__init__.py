"""Tasks such as text to image, as functions.

tasks               txt2img, img2img, inpaint, depth2img, upscale, upscale_rgbd, upscale_latent
variations          unclip, vary, and the Karlo prior
latent_diffusion    class2img, uncond2img, semantic2img, layout2img, super_resolve, knn2img
retrieval           neighbors of a prompt, for knn2img
task                their decorator, which checks model and keywords
arguments           checks of the types of their arguments
options             their keywords; those for prompts, SDXL, … are in the modules that read them
generate            encode, sample and decode, for all tasks with prompts
prompts             texts -> parsed prompts
conditions          parsed prompts and other inputs -> conditions of a model
images              images -> latents, and back
sampling            condition -> latent: the sampling loop, and DDIM inversion
sampling_options    its keywords: noise levels, defaults, checks
families            the families of models, and the task for each
quirks              differences of the original scripts, enabled by the keyword `legacy`
"""

from ldm.diffusion.names import LEGACY
from ldm.pipelines.images import add_depth, encode_image
from ldm.pipelines.latent_diffusion import (
    class2img,
    knn2img,
    layout2img,
    semantic2img,
    super_resolve,
    uncond2img,
)
from ldm.pipelines.latent_upscaling import Upscaling
from ldm.pipelines.quirks import make_noise_source, make_seeded_noise_source
from ldm.pipelines.sampling import invert, sample
from ldm.pipelines.tasks import (
    depth2img,
    estimate_depth,
    img2img,
    inpaint,
    txt2img,
    upscale,
    upscale_latent,
    upscale_rgbd,
)
from ldm.pipelines.variations import sample_prior, unclip, vary
from ldm.runtime.errors import NonFinite, Stop, WrongFamily

__all__ = [
    "LEGACY",
    "NonFinite",
    "Stop",
    "Upscaling",
    "WrongFamily",
    "add_depth",
    "class2img",
    "depth2img",
    "encode_image",
    "estimate_depth",
    "img2img",
    "inpaint",
    "invert",
    "knn2img",
    "layout2img",
    "make_noise_source",
    "make_seeded_noise_source",
    "sample",
    "sample_prior",
    "semantic2img",
    "super_resolve",
    "txt2img",
    "unclip",
    "uncond2img",
    "upscale",
    "upscale_latent",
    "upscale_rgbd",
    "vary",
]
