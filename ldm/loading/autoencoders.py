"""Find the scale factor of an autoencoder, and whether it overflows in float16.

The shapes do not show it: the autoencoders of SD 1, SD 2 and SDXL have the same, but their latents
are scaled by 0.18215 or 0.13025, and SDXL's overflows in float16, except for a corrected one.
"""

import re

from ldm.loading.families import Family
from ldm.loading.files.checkpoint import Checkpoint
from ldm.loading.published import identify_hash
from ldm.runtime.hashes import find_cached_sha256

__all__ = ["SCALE_KEY", "UPCAST_KEY", "find_scale_factor", "is_finite_in_half"]

SCALE, SCALE_XL = 0.18215, 0.13025  # scale factors of SD 1 and 2, and of SDXL
# Metadata keys of options in the VAE's config of a diffusers folder.
SCALE_KEY, UPCAST_KEY = "ldm.scale_factor", "ldm.force_upcast"
FIXED_VAE = "sdxl-vae-fp16"  # published name of the corrected one
# In lower-case file names: a corrected autoencoder; one of SDXL; one of SD.
FIXED_NAME = re.compile(r"fp16.?(vae.?)?fix|fix(ed)?.?fp16")
XL_NAME = re.compile("xl")
SD_NAME = re.compile(r"ft-?_?(mse|ema)|kl-?_?f8|840000|560000|sd[-_]?v[12]")


def find_scale_factor(source: Checkpoint, family: Family | None) -> tuple[float | None, str]:
    """Return (scale factor that an autoencoder was trained with, how it is known).

    Args:
        family: Of the whole model in the file; None = a file of an autoencoder only.

    Returns:
        (None, "") if nothing shows it.
    """
    if SCALE_KEY in source.metadata:
        return float(source.metadata[SCALE_KEY]), "by its config"
    if family is not None:
        return SCALE_XL if family.is_xl else SCALE, f"as it is of {family.title}"
    name = source.path.stem.lower()
    for pattern, scale in ((FIXED_NAME, SCALE_XL), (XL_NAME, SCALE_XL), (SD_NAME, SCALE)):
        if pattern.search(name):
            return scale, "by its name"
    return None, ""


def is_finite_in_half(source: Checkpoint) -> bool:
    """Return whether an autoencoder works in float16, by its config, hash or file name."""
    if UPCAST_KEY in source.metadata:
        return source.metadata[UPCAST_KEY] == "false"
    published = identify_hash(find_cached_sha256(source.path))
    is_fixed = published is not None and published.name == FIXED_VAE
    return is_fixed or FIXED_NAME.search(source.path.stem.lower()) is not None
