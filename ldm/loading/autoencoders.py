"""What a file of an autoencoder does not say in its shapes: scale factor, and range of numbers.

The autoencoders of SD 1, SD 2 and SDXL are of the same shapes, but their latents are scaled by
0.18215 or 0.13025; that of SDXL overflows in float16, except for one that was mended.
"""

import re

from ldm.loading.families import Family
from ldm.loading.files.checkpoint import Checkpoint
from ldm.loading.published import identify_hash
from ldm.runtime.hashes import known_sha256

__all__ = ["SCALE_KEY", "UPCAST_KEY", "find_scale", "is_finite_in_half"]

SCALE, SCALE_XL = 0.18215, 0.13025
# Metadata from the config of a folder.
SCALE_KEY, UPCAST_KEY = "ldm.scale_factor", "ldm.force_upcast"
MENDED = "sdxl-vae-fp16"  # the published one
# In file names, small letters: a mended autoencoder; one of SDXL; one of SD.
FIXED_NAME = re.compile(r"fp16.?(vae.?)?fix|fix(ed)?.?fp16")
XL_NAME = re.compile("xl")
SD_NAME = re.compile(r"ft-?_?(mse|ema)|kl-?_?f8|840000|560000|sd[-_]?v[12]")


def find_scale(source: Checkpoint, family: Family | None) -> tuple[float | None, str]:
    """Return the scale factor that an autoencoder was trained with, if anything tells, and what.

    Args:
        family: of the whole model in the file, None for an autoencoder alone.
    """
    if SCALE_KEY in source.metadata:
        return float(source.metadata[SCALE_KEY]), "by its config"
    if family is not None:
        return SCALE_XL if family.is_xl else SCALE, f"as it is of {family.title}"
    name = source.path.stem.lower()
    for pattern, scale in ((FIXED_NAME, SCALE_XL), (XL_NAME, SCALE_XL), (SD_NAME, SCALE)):
        if pattern.search(name):
            return scale, "by its name"
    return None, "the file does not say its own"


def is_finite_in_half(source: Checkpoint) -> bool:
    """Return whether config, hash or name say that an autoencoder is finite in float16."""
    if UPCAST_KEY in source.metadata:
        return source.metadata[UPCAST_KEY] == "false"
    published = identify_hash(known_sha256(source.path))
    is_mended = published is not None and published.name == MENDED
    return is_mended or FIXED_NAME.search(source.path.stem.lower()) is not None
