"""Load Inception and CLIP from given files, or from published files that are downloaded."""

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

__all__ = ["find_clip", "load_clip_scorer", "load_extractor"]

DEFAULT_INCEPTION, DEFAULT_CLIP = "fid-inception", "open-clip-g"  # names of published files

log = logging.getLogger(__name__)


def load_extractor(
    file: str | Path | None, resize: str, device: torch.device
) -> InceptionExtractor | None:
    """Load Inception; if there is no file, log a warning and return None.

    Args:
        file: Weights file; None = DEFAULT_INCEPTION, if it is downloaded.
        resize: See `InceptionExtractor`.
    """
    check_name("resize", resize, RESIZE_MODES, argument="resize")
    path = _find_weights(file, DEFAULT_INCEPTION)
    if path is None:
        log.warning("no Inception is given: FID, KID, precision and recall are not computed")
        return None
    return InceptionExtractor(load_inception(path, device=device), resize, get_sha256(path))


def find_clip(file: str | Path | None) -> Path | None:
    """Find and check the weights of CLIP without loading them; if there is no file, return None.

    Args:
        file: Weights file or folder; None = DEFAULT_CLIP, if it is downloaded.
    """
    path = _find_weights(file, DEFAULT_CLIP)
    if path is None:
        log.warning("no CLIP is given: the CLIP score is not computed")
        return None
    check_clip(path)
    return path


def load_clip_scorer(path: Path, device: torch.device) -> CLIPScorer:
    """Load CLIP from a file or folder, see `find_clip`."""
    clip = load_clip(path, device=device)
    digest = compute_short_hash(path) if path.is_dir() else get_sha256(path)
    return CLIPScorer(clip, f"CLIP score ({get_clip_name(clip)})", digest)


def _find_weights(file: str | Path | None, name: str) -> Path | None:
    return find_on_disk(read_published_files()[name]) if file is None else resolve_checkpoint(file)
