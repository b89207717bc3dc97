"""Check images with a safety checker, report its scores, and hide flagged images on request."""

import logging
from collections.abc import Sequence

from PIL import Image, ImageFilter

from ldm.encoders.safety import SafetyChecker, Verdict
from ldm.generate.info import Info
from ldm.generate.listener import RunListener
from ldm.runtime.types import JsonMapping

__all__ = ["hide_flagged", "log_safety", "make_safety_infos"]

BLUR_SIGMA = 1 / 16  # as a fraction of the image's longer side
ACTION_TEXTS = {
    None: "kept",
    "black": "replaced by black",
    "blur": "blurred",
    "drop": "dropped",
}

log = logging.getLogger(__name__)


def make_safety_infos(
    checker: SafetyChecker | None, images: Sequence[Image.Image], unsafe_action: str | None
) -> list[Info]:
    """Return entries for the info of each image: scores, and the action if it is flagged.

    Args:
        checker: None = no checks, no entries.
        unsafe_action: "black", "blur" or "drop"; None = flagged images are kept.
    """
    if checker is None:
        return [{} for _ in images]
    return [
        {"safety": _make_safety_info(verdict, unsafe_action)} for verdict in checker.judge(images)
    ]


def hide_flagged(
    image: Image.Image, depth: Image.Image | None, info: JsonMapping
) -> tuple[Image.Image | None, Image.Image | None]:
    """Apply the action in the info to a flagged image and its depth; (None, None) = dropped.

    The depth of a black or blurred image is 0 everywhere.
    """
    action = (info.get("safety") or {}).get("action")
    if action == "drop":
        return None, None
    if action is None:
        return image, depth
    if action == "blur":
        hidden = image.filter(ImageFilter.GaussianBlur(max(image.size) * BLUR_SIGMA))
    else:
        hidden = Image.new(image.mode, image.size)
    return hidden, None if depth is None else Image.new(depth.mode, depth.size)


def log_safety(info: JsonMapping, listener: RunListener) -> None:
    """Log the highest score of an image, or warn of the scores that flag it.

    A score is a cosine similarity minus its threshold; above 0 the image is flagged.
    """
    safety = info.get("safety")
    if not safety:
        return
    scores = safety["scores"]
    if not safety["flagged"]:
        k = scores.index(max(scores))
        log.info(
            "safety checker: image %d passes, nearest to a threshold is concept %d (%+.3f)",
            info["index"], k, scores[k],
        )  # fmt: skip
        return
    concepts = ", ".join(f"{k} ({scores[k]:+.3f})" for k in safety["concepts"])
    listener.warn(
        f"safety checker: image {info['index']} is flagged by concept {concepts}: "
        f"{ACTION_TEXTS[safety['action']]}"
    )


def _make_safety_info(verdict: Verdict, unsafe_action: str | None) -> Info:
    return {
        "flagged": verdict.is_flagged,
        "concepts": verdict.concepts,
        "special": verdict.special_concepts,
        "scores": list(verdict.scores),
        "special_scores": list(verdict.special_scores),
        "action": unsafe_action if verdict.is_flagged else None,
    }
