"""Image metrics (FID, KID, …) as functions of features (N, d), in float64.

FID: Heusel et al. 2017 (arXiv:1706.08500); KID: Bińkowski et al. 2018 (arXiv:1801.01401);
precision and recall: Kynkäänniemi et al. 2019 (arXiv:1904.06991); CLIP score: Hessel et al. 2021
(arXiv:2104.08718).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.runtime.errors import ArgumentError

__all__ = [
    "Estimate",
    "Statistics",
    "cosine_similarity",
    "estimate_mean",
    "fid",
    "frechet_distance",
    "kid",
    "precision_recall",
]

NUM_SPLITS = 10  # random splits into halves, for standard errors
BLOCK_ROWS = 1024  # rows of a distance matrix at a time, to bound memory


@dataclass(frozen=True)
class Estimate:
    """A score and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Statistics:
    """Mean (d,) and unbiased covariance (d, d), float64, of the features of `count` images."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def from_features(cls, features: Tensor) -> "Statistics":
        """Compute the statistics of features (N, d), N > 1."""
        if features.ndim != 2 or len(features) < 2:
            shape = tuple(features.shape)
            raise ArgumentError(f"features must be (N, d) of at least 2 images, got {shape}")
        x = features.double()
        return cls(x.mean(dim=0), torch.atleast_2d(x.mT.cov()), len(x))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return ‖μ₁-μ₂‖² + tr(C₁) + tr(C₂) - 2 Σ√λ, where λ are the eigenvalues of √C₁ C₂ √C₁.

    Negative eigenvalues are rounding errors, and are set to 0.
    """
    return _compute_frechet_distance(a, b, _compute_matrix_sqrt(b.covariance))


def fid(features: Tensor, reference: Statistics, seed: int = 0) -> Estimate:
    """Compute the Fréchet distance of features (N, d) to a reference.

    The standard error is from `estimate_standard_error`, without that of the reference.
    """
    sqrt_covariance = _compute_matrix_sqrt(reference.covariance)

    def compute_distance(x: Tensor) -> float:
        statistics = Statistics.from_features(x)
        return _compute_frechet_distance(statistics, reference, sqrt_covariance)

    x = features.double()
    return Estimate(compute_distance(x), estimate_standard_error(compute_distance, x, seed))


def kid(
    features: Tensor,
    reference: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Compute the mean over random subsets of the unbiased MMD² with kernel (x·y / d + 1)³.

    Args:
        features, reference: (N, d) and (M, d).
        subset_size: Number of images of each subset, reduced to N or M if larger.
    """
    x, y = features.double(), reference.double()
    subset_size = min(subset_size, len(x), len(y))
    if subset_size < 2:
        message = "features and reference must have at least 2 images each"
        raise ArgumentError(f"{message}, got {len(x)} and {len(y)}")
    generator = torch.Generator().manual_seed(seed)
    if subset_size == len(x) == len(y):
        subsets = 1  # every subset would be the full set
    distances = []
    for _ in range(subsets):
        a, b = _draw_rows(x, subset_size, generator), _draw_rows(y, subset_size, generator)
        distances.append(
            _average_kernel_within(a) + _average_kernel_within(b) - 2 * _average_kernel(a, b)
        )

    def compute_score(half: Tensor) -> float:  # without the reference's term, which cancels out
        return _average_kernel_within(half) - 2 * _average_kernel(half, y)

    mean = sum(distances) / len(distances)
    return Estimate(mean, estimate_standard_error(compute_score, x, seed))


def precision_recall(
    features: Tensor, reference: Tensor, *, neighbors: int = 3
) -> tuple[Estimate, Estimate]:
    """Compute the fraction of each set, (N, d) and (M, d), in the manifold of the other.

    The manifold of a set is the union of balls around its points; the radius of a ball is the
    distance to the k-th nearest neighbor, k = `neighbors`.

    Returns:
        Precision (of `features`) and recall (of `reference`); NaN if a set has too few points.
    """
    if min(len(features), len(reference)) <= neighbors:
        return Estimate(math.nan, math.nan), Estimate(math.nan, math.nan)
    x, y = features.double(), reference.double()
    is_inside_y = _is_in_manifold(x, y, neighbors)
    is_inside_x = _is_in_manifold(y, x, neighbors)
    return estimate_mean(is_inside_y.double()), estimate_mean(is_inside_x.double())


def cosine_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Return the cosine similarity of each pair of embeddings, (N, d) each: (N,) float64."""
    x, y = images.double(), texts.double()
    return torch.nn.functional.cosine_similarity(x, y, dim=1)


def estimate_mean(values: Tensor) -> Estimate:
    """Return the mean of values (N,), one per image, with the standard error σ/√N."""
    x = values.double()
    standard_error = float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return Estimate(float(x.mean()), standard_error)


def estimate_standard_error(
    compute_score: Callable[[Tensor], float], features: Tensor, seed: int = 0
) -> float:
    """Estimate the standard error of a score of features (N, d) from random halves of them.

    The scores of two halves have independent errors, each with twice the variance of the score of
    all features: if Δ is the difference of both scores, the standard error is √(mean Δ²) / 2 over
    NUM_SPLITS random splits. A bias, such as that of FID, cancels out.
    """
    half = len(features) // 2
    if half < 2:
        return math.nan
    generator = torch.Generator().manual_seed(seed)
    sum_of_squares = 0.0
    for _ in range(NUM_SPLITS):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        first, second = features[order[:half]], features[order[half : 2 * half]]
        sum_of_squares += (compute_score(first) - compute_score(second)) ** 2
    return math.sqrt(sum_of_squares / NUM_SPLITS) / 2


def _compute_matrix_sqrt(covariance: Tensor) -> Tensor:
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    sqrt: Tensor = (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.mT
    return sqrt


def _compute_frechet_distance(
    statistics: Statistics, reference: Statistics, sqrt_covariance: Tensor
) -> float:
    """Compute the Fréchet distance, given the matrix square root of the reference's covariance."""
    covariance = statistics.covariance
    product = sqrt_covariance @ covariance @ sqrt_covariance
    # √C₁ C₂ √C₁ has the eigenvalues of C₁ C₂, and is symmetric except for rounding.
    eigenvalues = torch.linalg.eigvalsh((product + product.mT) / 2)
    traces = covariance.trace() + reference.covariance.trace()
    squared_mean_difference = (statistics.mean - reference.mean).square().sum()
    return float(squared_mean_difference + traces - 2 * eigenvalues.clamp(min=0).sqrt().sum())


def _average_kernel(x: Tensor, y: Tensor) -> float:
    """Return the mean of the kernel over all pairs of a row of x (N, d) and one of y (M, d)."""
    total = sum(
        float(_apply_kernel(block @ y.mT, x.shape[1]).sum()) for block in x.split(BLOCK_ROWS)
    )
    return total / (len(x) * len(y))


def _average_kernel_within(x: Tensor) -> float:
    """Return the mean of the kernel over all pairs of different rows of x (N, d)."""
    n, d = x.shape
    diagonal = float(_apply_kernel(x.square().sum(dim=1), d).sum())  # pairs of a row with itself
    return (_average_kernel(x, x) * n * n - diagonal) / (n * (n - 1))


def _apply_kernel(dot_products: Tensor, d: int) -> Tensor:
    return (dot_products / d + 1) ** 3


def _draw_rows(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw rows of x without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:count].to(x.device)]


def _is_in_manifold(x: Tensor, points: Tensor, neighbors: int) -> Tensor:
    """Return whether each row of x (N, d) is in the manifold of `points` (M, d), bool (N,)."""
    radii = torch.cat(
        [
            # + 1, as the nearest neighbor is the point itself
            torch.cdist(block, points).kthvalue(neighbors + 1, dim=1).values
            for block in points.split(BLOCK_ROWS)
        ]
    )
    return torch.cat(
        [(torch.cdist(block, points) <= radii).any(dim=1) for block in x.split(BLOCK_ROWS)]
    )
