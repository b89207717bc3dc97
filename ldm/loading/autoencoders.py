"""Find the scale factor of an autoencoder, and whether it works in float16.

Shapes do not show either: they are the same for SD 1, SD 2 and SDXL, but latents are scaled by
0.18215 or 0.13025, and SDXL's autoencoder overflows in float16, except for a corrected version.
"""

import math
import re
from contextlib import suppress

from ldm.loading.families import Family
from ldm.loading.files.checkpoint import Checkpoint
from ldm.loading.published import find_by_sha256
from ldm.runtime.errors import FileFormatError
from ldm.runtime.hashes import find_cached_sha256

__all__ = ["SCALE_KEY", "UPCAST_KEY", "find_scale_factor", "works_in_float16"]

SCALE_FACTOR, SDXL_SCALE_FACTOR = 0.18215, 0.13025  # scale factors of SD 1 and 2, and of SDXL
# Metadata keys of options of the VAE in a diffusers folder.
SCALE_KEY, UPCAST_KEY = "ldm.scale_factor", "ldm.force_upcast"
FIXED_VAE = "sdxl-vae-fp16"  # published name of the corrected autoencoder
# Patterns in lower-case file names: the corrected autoencoder; others of SDXL; those of SD 1 or 2.
FIXED_VAE_PATTERN = re.compile(r"fp16.?(vae.?)?fix|fix(ed)?.?fp16")
SDXL_PATTERN = re.compile("xl")
SD_PATTERN = re.compile(r"ft-?_?(mse|ema)|kl-?_?f8|840000|560000|sd[-_]?v[12]")


def find_scale_factor(file: Checkpoint, family: Family | None) -> tuple[float | None, str]:
    """Return (scale factor that an autoencoder was trained with, evidence for messages).

    Returns (None, "") if it is unknown.

    Args:
        family: Family of the whole model in the file; None = the file of an autoencoder.
    Raises:
        FileFormatError: The scale factor in the metadata is not a positive number.
    """
    if SCALE_KEY in file.metadata:
        text = file.metadata[SCALE_KEY]
        with suppress(ValueError):
            if 0 < float(text) < math.inf:
                return float(text), "by its config"
        raise FileFormatError(
            f"`{file.path}`: the scale factor `{text}` of its autoencoder is not a positive number"
        )
    if family is not None:
        return SDXL_SCALE_FACTOR if family.is_sdxl else SCALE_FACTOR, f"as that of {family.title}"
    name = file.path.stem.lower()
    for pattern, factor in (
        (FIXED_VAE_PATTERN, SDXL_SCALE_FACTOR),
        (SDXL_PATTERN, SDXL_SCALE_FACTOR),
        (SD_PATTERN, SCALE_FACTOR),
    ):
        if pattern.search(name):
            return factor, "by its name"
    return None, ""


def works_in_float16(file: Checkpoint) -> bool:
    """Return whether SDXL's autoencoder in a file works in float16, by config, hash or name."""
    if UPCAST_KEY in file.metadata:
        return file.metadata[UPCAST_KEY] == "false"
    published = find_by_sha256(find_cached_sha256(file.path))
    is_fixed = published is not None and published.name == FIXED_VAE
    return is_fixed or FIXED_VAE_PATTERN.search(file.path.stem.lower()) is not None
