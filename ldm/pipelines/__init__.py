"""What a user asks for, as functions.

sampling   condition -> latent: the one loop
tasks      txt2img, img2img, inpaint, depth2img, upscale, unclip, vary: each a way into it
"""

from ldm.pipelines.frame import NonFinite, WrongFamily, latent_of
from ldm.pipelines.sampling import LEGACY, Stop, invert, noise_source, sample, seeded_noise
from ldm.pipelines.tasks import depth2img, depth_of, img2img, inpaint, txt2img, upscale
from ldm.pipelines.variations import imagined, unclip, vary

__all__ = [
    "LEGACY",
    "NonFinite",
    "Stop",
    "WrongFamily",
    "depth2img",
    "depth_of",
    "imagined",
    "img2img",
    "inpaint",
    "invert",
    "latent_of",
    "noise_source",
    "sample",
    "seeded_noise",
    "txt2img",
    "unclip",
    "upscale",
    "vary",
]
