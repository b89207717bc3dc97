"""Score sets of images, and report all settings that the scores depend on.

Features are cached on disk (`ldm.runtime.hashes`) by the content of the images, so that those of
the reference and of unchanged folders are computed only once.
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

from ldm.evaluation.extractors import FeatureExtractor, PromptScorer
from ldm.evaluation.metrics import (
    Estimate,
    Statistics,
    estimate_mean,
    fid,
    kid,
    precision_recall,
)
from ldm.evaluation.progress import Progress
from ldm.imaging.metadata import read_info
from ldm.imaging.pixels import resize_and_center_crop
from ldm.imaging.reading import list_images, load_image
from ldm.runtime.errors import (
    ArgumentError,
    FileFormatError,
    MissingFile,
    describe_error,
    errors_as,
)
from ldm.runtime.files import compute_sha256, write_atomically
from ldm.runtime.hashes import get_cache_folder
from ldm.runtime.types import JsonObject
from ldm.runtime.version import __version__

__all__ = [
    "ImageSet",
    "Result",
    "compute_scores",
    "find_image_sets",
    "read_features",
    "score_sets",
]

BATCH_SIZE = 32
SCALE_PREFIX = "scale-"  # of folder names, before the guidance scale
# Metadata keys of the first image that are copied into the result
INFO_KEYS = ("checkpoint", "checkpoint_hash", "sampler", "scheduler_in_use", "steps", "scale",
             "eta", "rescale", "guidance_interval", "size", "dtype", "ldm")  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Images that are scored together.

    Args:
        series: Name of the curve in the figure that the set belongs to.
        files: Paths of the images, in the order of the prompts.
        scale: Guidance scale; None = unknown.
        side: Side in pixels of the square to which images are resized and cropped; None = images
            are scored unchanged.
        prompts: One prompt per file; None = those in the metadata of the files.
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

    def select_first(self, count: int | None) -> "ImageSet":
        """Return the set of the first `count` images; None = all."""
        if count is not None and not 1 <= count <= len(self.files):
            message = f"{count} images requested, {self.title} has {len(self.files)}"
            raise ArgumentError(message, "count")
        prompts = None if self.prompts is None else self.prompts[:count]
        return ImageSet(self.series, self.files[:count], self.scale, self.side, prompts)

    def load(self, index: int) -> Image.Image:
        """Load an image as RGB, resized and cropped to `side`."""
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
        generation_info: How the images were generated, from the metadata of the first one.
        score_settings: Networks, reference and hash of the images: what the scores depend on.
    """

    series: str
    scale: float | None
    count: int
    scores: dict[str, Estimate]
    generation_info: JsonObject = field(default_factory=dict)
    score_settings: JsonObject = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """Return the result, and the version of this package, as a JSON object."""
        return {**asdict(self), "ldm": __version__}


def find_image_sets(outdir: str | Path) -> list[ImageSet]:
    """List the image sets that `generate_images` has written into a folder.

    Raises:
        FileFormatError: The name of a folder does not end with a guidance scale.
        MissingFile: There are no images.
    """
    sets = []
    for folder in Path(outdir).expanduser().glob(f"*/{SCALE_PREFIX}*/"):
        with errors_as(FileFormatError, f"`{folder}` is not named by a guidance scale"):
            scale = float(folder.name.removeprefix(SCALE_PREFIX))
        sets.append(ImageSet(folder.parent.name, list_images(folder), scale))
    if not sets:
        raise MissingFile(f"`{outdir}` has no images of an evaluation")
    return sorted(sets, key=lambda image_set: (image_set.series, image_set.scale or 0))


def _check_counts(sets: Sequence[ImageSet]) -> None:
    """Raise ArgumentError unless all sets have the same number of images, as FID depends on it."""
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
    prompt_scorer: PromptScorer | None = None,
) -> list[Result]:
    """Score sets that have the same number of images.

    Args:
        reference: Real images; None = no FID, KID, precision and recall.
        extractor: Computes the features for these four scores; None = the scores are left out.
        prompt_scorer: Computes the prompt score; None = no prompt score.
    """
    _check_counts(sets)
    reference_features: Tensor | None = None
    shared_settings: JsonObject = {}
    if extractor is not None and reference is not None:
        count, d = len(sets[0].files), extractor.num_features
        for name, n in (("N", count), ("the number of reference images", len(reference.files))):
            if n <= d:
                log.warning("%s = %d is not above the %d features: FID is unreliable", name, n, d)
        reference_features = read_features(reference, extractor)
        shared_settings["features"] = extractor.describe()
        shared_settings["reference"] = {
            "count": len(reference.files),
            "side": reference.side,
            "sha256": compute_sha256(*reference.files),
        }
    if prompt_scorer is not None:
        shared_settings["prompt_scorer"] = prompt_scorer.describe()
    results = []
    for image_set in sets:
        features = None
        if extractor is not None and reference_features is not None:
            features = read_features(image_set, extractor)
        prompt_scores = None
        if prompt_scorer is not None:
            prompt_scores = _compute_prompt_scores(image_set, prompt_scorer)
        info = read_info(image_set.files[0])
        result = Result(
            image_set.series,
            image_set.scale,
            len(image_set.files),
            compute_scores(features, reference_features, prompt_scores),
            generation_info={key: info[key] for key in INFO_KEYS if key in info},
            score_settings={**shared_settings, "sha256": compute_sha256(*image_set.files)},
        )
        results.append(result)
    return results


def compute_scores(
    features: Tensor | None, reference: Tensor | None, prompt_scores: Tensor | None
) -> dict[str, Estimate]:
    """Compute all scores by name; those for which an argument is None are left out.

    Args:
        features: Features of the generated images, (N, d).
        reference: Features of real images, (M, d).
        prompt_scores: Prompt score of each image, (N,).
    """
    scores: dict[str, Estimate] = {}
    if features is not None and reference is not None:
        scores["fid"] = fid(features, Statistics.from_features(reference))
        scores["kid"] = kid(features, reference)
        scores["precision"], scores["recall"] = precision_recall(features, reference)
    if prompt_scores is not None:
        scores["prompt_score"] = estimate_mean(prompt_scores)
    return scores


def read_features(image_set: ImageSet, extractor: FeatureExtractor) -> Tensor:
    """Return the features (N, d) of a set, from the cache if possible."""

    def compute(indices: range) -> Tensor:
        return extractor.extract_features([image_set.load(k) for k in indices])

    return _read_or_compute(image_set, compute, extractor.describe())


def _compute_prompt_scores(image_set: ImageSet, scorer: PromptScorer) -> Tensor | None:
    """Return the prompt score of each image, (N,); None if prompts are unknown."""
    prompts = image_set.read_prompts()
    if prompts is None:
        log.warning("%s: no prompts are given or recorded: no prompt score", image_set.title)
        return None

    def compute(indices: range) -> Tensor:
        return scorer.score([image_set.load(k) for k in indices], [prompts[k] for k in indices])

    return _read_or_compute(image_set, compute, scorer.describe(), prompts)


def _read_or_compute(
    image_set: ImageSet,
    compute: Callable[[range], Tensor],
    description: JsonObject,
    prompts: Sequence[str] = (),
) -> Tensor:
    """Return the output of a network for each image of a set, (N, …), from the cache if possible.

    Args:
        compute: (indices of a batch of images) -> outputs.
        description: Description of the network; if its `sha256` is None, the cache is not used, as
            other weights would have the same key.
    """
    count = len(image_set.files)
    key_data = [compute_sha256(*image_set.files), count, image_set.side, description, prompts]
    key = hashlib.sha256(json.dumps(key_data).encode()).hexdigest()
    path = get_cache_folder() / "evaluation" / f"{key}.npy"
    is_cached = description.get("sha256", "") is not None
    if is_cached and path.is_file():
        return torch.from_numpy(np.load(path))
    progress, batches = Progress(count, image_set.title), []
    for start in range(0, count, BATCH_SIZE):
        indices = range(start, min(start + BATCH_SIZE, count))
        batches.append(compute(indices))
        progress.add(len(indices))
    progress.close()
    outputs = torch.cat(batches)
    if is_cached:
        _write_to_cache(path, outputs)
    return outputs


def _write_to_cache(path: Path, outputs: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial, partial.open("wb") as file:
            np.save(file, outputs.cpu().numpy())
    except OSError as error:
        log.warning("features are not cached: %s", describe_error(error))
