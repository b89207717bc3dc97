"""What is done with the verdicts of a safety checker: report them; act only if that is asked."""

import logging
from collections.abc import Sequence

from PIL import Image, ImageFilter

from ldm.encoders.safety import SafetyChecker, Verdict
from ldm.generate.output import RunListener
from ldm.generate.provenance import Info
from ldm.runtime.types import JsonMapping

__all__ = ["hide_flagged", "judge", "report"]

BLUR = 1 / 16  # standard deviation, in longer sides of the image
RESULTS = {None: "it is kept", "black": "it is saved all black", "blur": "it is saved blurred",
           "drop": "it is not saved"}  # fmt: skip

log = logging.getLogger(__name__)


def judge(
    checker: SafetyChecker | None, images: Sequence[Image.Image], unsafe: str | None
) -> list[Info]:
    """Return the entry of each image's info: scores, and what is done if it is flagged.

    Args:
        checker: None = images are not judged, entries are empty.
        unsafe: "black", "blur" or "drop"; None = flagged images are kept.
    """
    if checker is None:
        return [{} for _ in images]
    return [{"safety": _describe(verdict, unsafe)} for verdict in checker.judge(images)]


def hide_flagged(
    image: Image.Image, depth: Image.Image | None, info: JsonMapping
) -> tuple[Image.Image | None, Image.Image | None]:
    """Return what is shown of an image with this info and of its depth: both, or neither.

    The depth of an image that is black or blurred is 0.
    """
    action = (info.get("safety") or {}).get("action")
    if action == "drop":
        return None, None
    if action is None:
        return image, depth
    if action == "blur":
        hidden = image.filter(ImageFilter.GaussianBlur(max(image.size) * BLUR))
    else:
        hidden = Image.new(image.mode, image.size)
    return hidden, depth and Image.new(depth.mode, depth.size)


def report(info: JsonMapping, listener: RunListener) -> None:
    """Log the scores of an image; warn if it was flagged, and say what is done with it."""
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
        f"{RESULTS[safety['action']]}"
    )


def _describe(verdict: Verdict, unsafe: str | None) -> Info:
    return {
        "flagged": verdict.is_flagged,
        "concepts": verdict.concepts,
        "special": verdict.special,
        "scores": list(verdict.scores),
        "special_scores": list(verdict.special_scores),
        "action": unsafe if verdict.is_flagged else None,
    }
