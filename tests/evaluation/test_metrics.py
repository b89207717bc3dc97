"""Metrics against other packages on the same features, standard errors against repeated draws."""

import numpy as np
import pytest
import torch

from ldm.evaluation.metrics import (
    Statistics,
    cosine_similarity,
    estimate_mean,
    fid,
    frechet_distance,
    kid,
    precision_recall,
)


@pytest.fixture(scope="module")
def features():
    """Features of two distributions: (400, 16) and (500, 16) float64."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 16))
    b = rng.normal(size=(500, 16)) * 1.3 + 0.2
    return torch.from_numpy(a), torch.from_numpy(b)


def test_frechet_distance_equals_the_reference_value(features):
    a, b = map(Statistics.from_features, features)
    assert frechet_distance(a, b) == pytest.approx(2.668662863, abs=1e-9)
    assert fid(features[0], b).value == pytest.approx(frechet_distance(a, b), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_fewer_images_than_features_is_finite(features):
    a, b = features
    assert 0 < frechet_distance(Statistics.from_features(a[:8]), Statistics.from_features(b)) < 100


@pytest.mark.slow  # to import the packages
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frechet_distance_agrees_with_pytorch_fid_and_clean_fid(features):
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    clean_fid = pytest.importorskip("cleanfid.fid")
    a, b = (x.numpy() for x in features)
    arguments = a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)
    distance = frechet_distance(*map(Statistics.from_features, features))
    assert distance == pytest.approx(pytorch_fid.calculate_frechet_distance(*arguments), rel=1e-12)
    assert distance == pytest.approx(clean_fid.frechet_distance(*arguments), rel=1e-12)


def test_kid_has_the_value_of_clean_fid(features):
    a, b = features
    expected = 0.2643463551764813  # kernel_distance(a, b, num_subsets=1, max_subset_size=400)
    assert kid(a, b[:400]).value == pytest.approx(expected, rel=1e-12)
    subsets = kid(a, b, subset_size=100)
    assert subsets.value == pytest.approx(expected, abs=4 * subsets.standard_error)


def test_standard_errors_are_those_of_repeated_draws(features):
    """Observed: 0.127 and 0.125 for FID, 0.0195 and 0.0183 for KID."""
    torch.manual_seed(0)
    _, b = features
    reference = b[:400]
    statistics = Statistics.from_features(reference)
    draws = [torch.randn(400, 16) for _ in range(24)]
    for metric in (lambda x: fid(x, statistics), lambda x: kid(x, reference)):
        estimates = [metric(x) for x in draws]
        spread = np.std([estimate.value for estimate in estimates])
        standard_errors = [estimate.standard_error for estimate in estimates]
        assert np.mean(standard_errors) == pytest.approx(spread, rel=0.4)


def test_precision_and_recall_are_fractions_inside_the_manifold_of_the_other_features(features):
    x, y = (f[:n, :2] for f, n in zip(features, (60, 50), strict=True))

    def compute_fraction_inside(points, manifold):
        distances = torch.linalg.vector_norm(manifold[:, None] - manifold, dim=-1)
        radii = distances.sort(dim=1).values[:, 3]
        is_inside = torch.linalg.vector_norm(points[:, None] - manifold, dim=-1) <= radii
        return float(is_inside.any(dim=1).double().mean())

    precision, recall = precision_recall(x, y)
    expected = (compute_fraction_inside(x, y), compute_fraction_inside(y, x))
    assert (precision.value, recall.value) == pytest.approx(expected)
    assert [metric.value for metric in precision_recall(x, y + 100)] == [0, 0]


def test_mean_cosine_similarity_has_the_standard_error_of_a_mean():
    x, y = torch.randn(50, 8), torch.randn(50, 8)
    values = cosine_similarity(x, 3 * y)
    assert torch.allclose(values.float(), torch.cosine_similarity(x, y), atol=1e-6)
    estimate = estimate_mean(values)
    assert estimate.standard_error == pytest.approx(float(values.std()) / 50**0.5)
