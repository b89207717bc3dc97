"""Score folders of images, and report all settings that the scores depend on.

Features are cached on disk (`ldm.runtime.hashes`) by the content of the images, so that those of
the reference and of unchanged folders are computed once.
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
from ldm.imaging.pixels import resize_and_center_crop
from ldm.imaging.reading import list_images, load_image
from ldm.runtime.errors import ArgumentError, FileFormatError, MissingFile, errors_as
from ldm.runtime.files import compute_sha256, write_atomically
from ldm.runtime.hashes import get_cache_folder
from ldm.runtime.types import JsonObject
from ldm.runtime.version import __version__

__all__ = [
    "ImageSet",
    "Result",
    "check_counts",
    "compute_scores",
    "find_image_sets",
    "read_features",
    "score_sets",
]

BATCH_SIZE = 32
SCALE_PREFIX = "scale-"  # of folder names, before the guidance scale
# Metadata of the first image that the result of its folder includes.
FACTS = ("checkpoint", "checkpoint_hash", "sampler", "scheduler_in_use", "steps", "scale", "eta",
         "rescale", "guidance_interval", "size", "dtype", "ldm")  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Images that are scored together.

    Args:
        series: Name of the set's curve in the figure.
        files: Image files, in the order of the prompts.
        scale: Guidance scale; None = unknown.
        side: Size in pixels of a square center crop, after resizing; None = images unchanged.
        prompts: Prompts, one per file; None = those in the metadata of the files.
    """

    series: str
    files: Sequence[Path]
    scale: float | None = None
    side: int | None = None
    prompts: Sequence[str] | None = None

    @property
    def title(self) -> str:
        """Name of this set in messages."""
        return self.series if self.scale is None else f"{self.series} at scale {self.scale:g}"

    def first(self, count: int | None) -> "ImageSet":
        """Return the set of the first `count` images; None = all."""
        if count is not None and not 1 <= count <= len(self.files):
            message = f"{count} images requested, {self.title} has {len(self.files)}"
            raise ArgumentError(message, "count")
        prompts = None if self.prompts is None else self.prompts[:count]
        return ImageSet(self.series, self.files[:count], self.scale, self.side, prompts)

    def load(self, index: int) -> Image.Image:
        """Load an image as RGB, resized to `side`."""
        image = load_image(self.files[index]).convert("RGB")
        if self.side is None:
            return image
        return resize_and_center_crop(image, self.side, round_side=round)

    def read_prompts(self) -> list[str] | None:
        """Return the prompt of each image; None if one is unknown."""
        if self.prompts is not None:
            return list(self.prompts)
        prompts = [read_info(path).get("prompt") for path in self.files]
        return None if any(prompt is None for prompt in prompts) else [str(p) for p in prompts]


@dataclass(frozen=True)
class Result:
    """The scores of one set.

    Args:
        series, scale: See `ImageSet`.
        count: Number of images.
        scores: Scores by name: `fid`, `kid`, `precision`, `recall`, `prompt_score`.
        facts: How the images were generated, from the metadata of the first one.
        choices: Networks, reference and settings that the scores depend on besides the images.
    """

    series: str
    scale: float | None
    count: int
    scores: dict[str, Estimate]
    facts: JsonObject = field(default_factory=dict)
    choices: JsonObject = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """Return the result as JSON."""
        return {**asdict(self), "ldm": __version__}


def find_image_sets(out: str | Path) -> list[ImageSet]:
    """List the image sets that `generate_images` has written into a folder.

    Raises:
        FileFormatError: A folder's name does not end in a guidance scale.
        MissingFile: There are no images.
    """
    sets = []
    for folder in Path(out).expanduser().glob(f"*/{SCALE_PREFIX}*/"):
        with errors_as(FileFormatError, f"`{folder}` is not named by a guidance scale"):
            scale = float(folder.name.removeprefix(SCALE_PREFIX))
        sets.append(ImageSet(folder.parent.name, list_images(folder), scale))
    if not sets:
        raise MissingFile(f"`{out}` has no images of an evaluation")
    return sorted(sets, key=lambda images: (images.series, images.scale or 0))


def check_counts(sets: Sequence[ImageSet]) -> None:
    """Raise ArgumentError unless all sets have equally many images: FID depends on their number."""
    first = sets[0]
    for image_set in sets:
        if len(image_set.files) != len(first.files):
            raise ArgumentError(
                f"{first.title} has {len(first.files)} images, {image_set.title} "
                f"{len(image_set.files)}: scores of different numbers of images cannot be compared",
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
        reference: Real images; None = no FID, KID, precision and recall.
        extractor: Computes the features for these scores; None = none of these scores.
        judge: Computes the prompt scores; None = no prompt score.
    """
    check_counts(sets)
    reference_features: Tensor | None = None
    choices: JsonObject = {}
    if extractor is not None and reference is not None:
        count, d = len(sets[0].files), extractor.dimensions
        for name, n in (("N", count), ("the number of reference images", len(reference.files))):
            if n <= d:
                log.warning("%s = %d is not above the %d features: FID is unreliable", name, n, d)
        reference_features = read_features(reference, extractor, "Reference")
        choices["features"] = extractor.describe()
        choices["reference"] = {
            "count": len(reference.files),
            "side": reference.side,
            "sha256": compute_sha256(*reference.files),
        }
    if judge is not None:
        choices["judge"] = judge.describe()
    results = []
    for image_set in sets:
        features = None
        if extractor is not None and reference_features is not None:
            features = read_features(image_set, extractor, image_set.title)
        prompt_scores = None if judge is None else _score_prompts(image_set, judge)
        scores = compute_scores(features, reference_features, prompt_scores)
        info = read_info(image_set.files[0])
        facts = {name: info[name] for name in FACTS if name in info}
        set_choices = {**choices, "sha256": compute_sha256(*image_set.files)}
        count = len(image_set.files)
        results.append(Result(image_set.series, image_set.scale, count, scores, facts, set_choices))
    return results


def compute_scores(
    features: Tensor | None, reference: Tensor | None, prompt_scores: Tensor | None
) -> dict[str, Estimate]:
    """Compute all scores by name; those that need an argument that is None are left out.

    Args:
        features: Features of the generated images, (N, d).
        reference: Features of real images, (M, d).
        prompt_scores: Prompt score of each image, (N,).
    """
    scores: dict[str, Estimate] = {}
    if features is not None and reference is not None:
        scores["fid"] = fid(features, Statistics.of(reference))
        scores["kid"] = kid(features, reference)
        scores["precision"], scores["recall"] = precision_recall(features, reference)
    if prompt_scores is not None:
        scores["prompt_score"] = mean_estimate(prompt_scores)
    return scores


def read_features(image_set: ImageSet, extractor: FeatureExtractor, title: str) -> Tensor:
    """Return the features (N, d) of a set, from the cache if possible."""

    def compute(indices: range) -> Tensor:
        return extractor.features([image_set.load(k) for k in indices])

    return _read_or_compute(image_set, title, compute, extractor.describe())


def _score_prompts(image_set: ImageSet, judge: PromptJudge) -> Tensor | None:
    """Return the prompt score of each image, (N,); None if prompts are unknown."""
    prompts = image_set.read_prompts()
    if prompts is None:
        log.warning("%s: no prompts are given or recorded: no prompt score", image_set.title)
        return None

    def compute(indices: range) -> Tensor:
        return judge.scores([image_set.load(k) for k in indices], [prompts[k] for k in indices])

    return _read_or_compute(image_set, image_set.title, compute, judge.describe(), prompts)


def _read_or_compute(
    image_set: ImageSet,
    title: str,
    compute: Callable[[range], Tensor],
    description: JsonObject,
    prompts: Sequence[str] = (),
) -> Tensor:
    """Return the values of a network for each image of a set, (N, …), from the cache if possible.

    Args:
        compute: (indices of a batch) -> their values.
        description: Description of the network; if its `sha256` is None, the cache is not used, as
            it could not tell networks apart.
    """
    count = len(image_set.files)
    content = [compute_sha256(*image_set.files), count, image_set.side, description, prompts]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path = get_cache_folder() / "evaluation" / f"{key}.npy"
    is_cached = description.get("sha256", "") is not None
    if is_cached and path.is_file():
        return torch.from_numpy(np.load(path))
    progress, batches = Progress(count, title), []
    for start in range(0, count, BATCH_SIZE):
        indices = range(start, min(start + BATCH_SIZE, count))
        batches.append(compute(indices))
        progress.add(len(indices))
    progress.close()
    values = torch.cat(batches)
    if is_cached:
        _write_to_cache(path, values)
    return values


def _write_to_cache(path: Path, values: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial, partial.open("wb") as file:
            np.save(file, values.cpu().numpy())
    except OSError as error:
        log.warning("features are not cached: %s", error)
