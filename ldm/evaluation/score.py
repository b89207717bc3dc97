"""Score folders of images, and report all choices with the numbers.

Features are cached in ~/.cache/ldm/evaluation by the content of the images, so that those of the
reference and of unchanged folders are computed once.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.evaluation.extractors import FeatureExtractor, PromptJudge
from ldm.evaluation.metrics import (
    Estimate,
    Statistics,
    fid,
    kid,
    mean_estimate,
    precision_recall,
)
from ldm.evaluation.progress import Progress
from ldm.imaging.metadata import read_info
from ldm.imaging.reading import IMAGE_SUFFIXES, load_image
from ldm.runtime.errors import ArgumentError, MissingFile
from ldm.runtime.files import replace_when_written, sha256_of_file
from ldm.runtime.hashes import cache_folder
from ldm.runtime.types import JsonObject
from ldm.runtime.version import __version__

__all__ = [
    "ImageSet",
    "Result",
    "check_counts",
    "compute_scores",
    "find_image_sets",
    "fit_square",
    "list_images",
    "read_features",
    "score_sets",
]  # fmt: skip

BATCH_SIZE = 32
SCALE = "scale-"  # prefix of folder names, before the guidance scale
# Metadata of the first image that the result of its folder includes.
FACTS = ("checkpoint", "checkpoint_hash", "sampler", "scheduler_in_use", "steps", "scale", "eta",
         "rescale", "guidance_interval", "size", "dtype", "ldm")  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Images that are scored together."""

    series: str  # name of the line in the figure that the set is a point of
    files: Sequence[Path]  # in order
    scale: float | None = None  # guidance scale; None = unknown
    side: int | None = None  # pixels to resize the short side to, and center-crop; None = keep
    prompts: Sequence[str] | None = None  # one per file; None = those in the metadata of the files

    @property
    def title(self) -> str:
        """Name of this set in messages."""
        return self.series if self.scale is None else f"{self.series} at scale {self.scale:g}"

    def first(self, count: int | None) -> "ImageSet":
        """Return the set of the first `count` images; None = all."""
        if count is not None and count > len(self.files):
            message = f"{count} images requested, {self.title} has {len(self.files)}"
            raise ArgumentError(message, "count")
        prompts = None if self.prompts is None else self.prompts[:count]
        return ImageSet(self.series, self.files[:count], self.scale, self.side, prompts)

    def load(self, index: int) -> Image.Image:
        """Load an image as RGB, resized to `side`."""
        image = load_image(self.files[index]).convert("RGB")
        return image if self.side is None else fit_square(image, self.side)

    def read_prompts(self) -> list[str] | None:
        """Return the prompt of each image; None if one is unknown."""
        if self.prompts is not None:
            return list(self.prompts)
        prompts = [read_info(path).get("prompt") for path in self.files]
        return None if any(prompt is None for prompt in prompts) else [str(p) for p in prompts]


@dataclass(frozen=True)
class Result:
    """The scores of one set."""

    series: str
    scale: float | None
    count: int
    scores: dict[str, Estimate]  # by name: `fid`, `kid`, `precision`, `recall`, `prompt_score`
    facts: JsonObject = field(
        default_factory=dict
    )  # of the generation, from the first image's metadata
    # everything that scores depend on besides the images
    choices: JsonObject = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """Return the result as JSON."""
        return {**asdict(self), "ldm": __version__}


def list_images(folder: str | Path) -> list[Path]:
    """List the images of a folder, sorted by name.

    Raises:
        MissingFile: there is no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise MissingFile(f"no folder `{folder}`")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise MissingFile(f"`{folder}` has no images")
    return files


def find_image_sets(out: str | Path) -> list[ImageSet]:
    """List the image sets that `generate_settings` has written into a folder."""
    folders = Path(out).expanduser().glob(f"*/{SCALE}*/")
    sets = [
        ImageSet(folder.parent.name, list_images(folder), float(folder.name.removeprefix(SCALE)))
        for folder in folders
    ]
    if not sets:
        raise MissingFile(f"`{out}` has no images of an evaluation")
    return sorted(sets, key=lambda each: (each.series, each.scale or 0))


def check_counts(sets: Sequence[ImageSet]) -> None:
    """Raise ArgumentError unless all sets have equally many images, on which FID depends."""
    first = sets[0]
    for other in sets:
        if len(other.files) != len(first.files):
            raise ArgumentError(
                f"{first.title} has {len(first.files)} images, {other.title} {len(other.files)}: "
                "scores of different numbers of images cannot be compared",
                "count",
            )


def score_sets(
    sets: Sequence[ImageSet],
    reference: ImageSet | None = None,
    extractor: FeatureExtractor | None = None,
    judge: PromptJudge | None = None,
) -> list[Result]:
    """Score sets of equally many images.

    Args:
        reference: real images; FID, KID, precision and recall need it and an extractor.
        judge: scores images and prompts; the prompt score needs it.
    Raises:
        ArgumentError: the sets have different numbers of images.
    """
    check_counts(sets)
    real: Tensor | None = None
    choices: JsonObject = {}
    if extractor is not None and reference is not None:
        count, d = len(sets[0].files), extractor.dimensions
        for name, n in (("N", count), ("the number of reference images", len(reference.files))):
            if n <= d:
                log.warning("%s = %d is not above the %d features: FID means little", name, n, d)
        real = read_features(reference, extractor, "Reference")
        choices["features"] = extractor.describe()
        choices["reference"] = {
            "count": len(reference.files),
            "side": reference.side,
            "sha256": sha256_of_file(*reference.files),
        }
    if judge is not None:
        choices["judge"] = judge.describe()
    results = []
    for each in sets:
        features = None
        if extractor is not None and real is not None:
            features = read_features(each, extractor, each.title)
        values = None if judge is None else _judge_set(each, judge)
        scores = compute_scores(features, real, values)
        info = read_info(each.files[0])
        facts = {name: info[name] for name in FACTS if name in info}
        own = {**choices, "sha256": sha256_of_file(*each.files)}
        results.append(Result(each.series, each.scale, len(each.files), scores, facts, own))
    return results


def compute_scores(
    features: Tensor | None, reference: Tensor | None, values: Tensor | None
) -> dict[str, Estimate]:
    """Compute all scores by name; those that need a missing argument are left out.

    Args:
        features: features of the generated images, (N, d).
        reference: features of real images, (M, d).
        values: prompt score of each image, (N,).
    """
    scores: dict[str, Estimate] = {}
    if features is not None and reference is not None:
        scores["fid"] = fid(features, Statistics.of(reference))
        scores["kid"] = kid(features, reference)
        scores["precision"], scores["recall"] = precision_recall(features, reference)
    if values is not None:
        scores["prompt_score"] = mean_estimate(values)
    return scores


def read_features(images: ImageSet, extractor: FeatureExtractor, what: str) -> Tensor:
    """Return the features (N, d) of a set, from the cache if possible."""

    def compute(rows: range) -> Tensor:
        return extractor.features([images.load(k) for k in rows])

    return _read_or_compute(images, what, compute, extractor.describe())


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """Resize the short side to `side` pixels (bicubic) and center-crop."""
    short = min(image.size)
    width, height = (max(round(length * side / short), side) for length in image.size)
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return scaled.crop((left, top, left + side, top + side))


def _judge_set(images: ImageSet, judge: PromptJudge) -> Tensor | None:
    """Return the prompt score (N,) of each image; None if prompts are unknown."""
    prompts = images.read_prompts()
    if prompts is None:
        log.warning("%s: no prompts are given or recorded: no prompt score", images.title)
        return None

    def compute(rows: range) -> Tensor:
        return judge.scores([images.load(k) for k in rows], [prompts[k] for k in rows])

    return _read_or_compute(images, images.title, compute, judge.describe(), prompts)


def _read_or_compute(
    images: ImageSet,
    what: str,
    compute: Callable[[range], Tensor],
    description: JsonObject,
    prompts: Sequence[str] = (),
) -> Tensor:
    """Return what `compute` makes of the rows of a set, from the cache if it was kept there."""
    count = len(images.files)
    content = [sha256_of_file(*images.files), count, images.side, description, prompts]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path = cache_folder() / "evaluation" / f"{key}.npy"
    if path.is_file():
        return torch.from_numpy(np.load(path))
    progress, parts = Progress(count, what), []
    for start in range(0, count, BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, count))
        parts.append(compute(rows))
        progress.add(len(rows))
    progress.close()
    values = torch.cat(parts)
    _store(path, values)
    return values


def _store(path: Path, values: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_when_written(path) as part, part.open("wb") as file:
            np.save(file, values.cpu().numpy())
    except OSError as error:
        log.warning("features are not cached: %s", error)
