"""Load Inception and CLIP from given files, or from published files that are on this machine."""

import logging
from pathlib import Path

import torch

from ldm.evaluation.extractors import RESIZE_MODES, CLIPScorer, InceptionExtractor
from ldm.loading.addons.clip import check_clip, get_clip_name, load_clip
from ldm.loading.addons.inception import load_inception
from ldm.loading.files.checkpoint import compute_short_hash
from ldm.loading.published import find_on_disk, read_published_files, resolve_checkpoint
from ldm.runtime.errors import check_name
from ldm.runtime.hashes import get_sha256

__all__ = ["find_clip_weights", "load_clip_scorer", "load_inception_extractor"]

DEFAULT_INCEPTION, DEFAULT_CLIP = "fid-inception", "open-clip-g"  # names of published files
# network, name of a published file, scores
MISSING_WEIGHTS = "no weights of %s given, and `%s` is not on this machine: %s not computed"

log = logging.getLogger(__name__)


def load_inception_extractor(
    file: str | Path | None, resize: str, device: torch.device
) -> InceptionExtractor | None:
    """Load Inception; if there is no file, log a warning and return None.

    Args:
        file: Weights file; None = DEFAULT_INCEPTION, if it is on this machine.
        resize: See `InceptionExtractor`.
    """
    check_name("resize", resize, RESIZE_MODES, argument="resize")
    path = _find_weights(file, DEFAULT_INCEPTION)
    if path is None:
        log.warning(
            MISSING_WEIGHTS, "Inception", DEFAULT_INCEPTION, "FID, KID, precision and recall are"
        )
        return None
    return InceptionExtractor(load_inception(path, device=device), resize, get_sha256(path))


def find_clip_weights(file: str | Path | None) -> Path | None:
    """Find and check the weights of CLIP without loading them.

    If there is no file, log a warning and return None.

    Args:
        file: Weights file or folder; None = DEFAULT_CLIP, if it is on this machine.
    """
    path = _find_weights(file, DEFAULT_CLIP)
    if path is None:
        log.warning(MISSING_WEIGHTS, "CLIP", DEFAULT_CLIP, "the CLIP score is")
        return None
    check_clip(path)
    return path


def load_clip_scorer(path: Path, device: torch.device) -> CLIPScorer:
    """Load CLIP from a file or folder, see `find_clip_weights`."""
    clip = load_clip(path, device=device)
    weights_hash = compute_short_hash(path) if path.is_dir() else get_sha256(path)
    return CLIPScorer(clip, f"CLIP score ({get_clip_name(clip)})", weights_hash)


def _find_weights(file: str | Path | None, name: str) -> Path | None:
    return find_on_disk(read_published_files()[name]) if file is None else resolve_checkpoint(file)
