"""Scores against other packages on the same features, and standard errors against repetition."""

import numpy as np
import pytest
import torch

from ldm.evaluation.metrics import (
    Statistics,
    cosines,
    fid,
    frechet_distance,
    kid,
    mean_estimate,
    precision_recall,
)


@pytest.fixture(scope="module")
def samples():
    """Two sets of features of different distributions: (400, 16) and (500, 16) float64."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 16))
    b = rng.normal(size=(500, 16)) * 1.3 + 0.2
    return torch.from_numpy(a), torch.from_numpy(b)


def test_frechet_distance_equals_the_reference_value(samples):
    a, b = map(Statistics.of, samples)
    assert frechet_distance(a, b) == pytest.approx(2.668662863, abs=1e-9)
    assert fid(samples[0], b).value == pytest.approx(frechet_distance(a, b), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_fewer_images_than_features_is_finite(samples):
    few = Statistics.of(samples[0][:8])
    assert 0 < frechet_distance(few, Statistics.of(samples[1])) < 100


@pytest.mark.slow  # to import the packages
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frechet_distance_agrees_with_pytorch_fid_and_clean_fid(samples):
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    clean_fid = pytest.importorskip("cleanfid.fid")
    a, b = (x.numpy() for x in samples)
    arguments = a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)
    own = frechet_distance(*map(Statistics.of, samples))
    assert own == pytest.approx(pytorch_fid.calculate_frechet_distance(*arguments), rel=1e-12)
    assert own == pytest.approx(clean_fid.frechet_distance(*arguments), rel=1e-12)


def test_kid_has_the_value_of_clean_fid(samples):
    a, b = samples[0], samples[1][:400]
    theirs = 0.2643463551764813  # kernel_distance(a, b, num_subsets=1, max_subset_size=400)
    assert kid(a, b).value == pytest.approx(theirs, rel=1e-12)
    subsets = kid(samples[0], samples[1], subset_size=100)
    assert subsets.value == pytest.approx(theirs, abs=4 * subsets.error)


def test_standard_errors_are_those_of_repeated_draws(samples):
    """Observed: 0.127 and 0.125 for FID, 0.0195 and 0.0183 for KID."""
    torch.manual_seed(0)
    reference = samples[1][:400]
    statistics = Statistics.of(reference)
    draws = [torch.randn(400, 16) for _ in range(24)]
    for score in (lambda x: fid(x, statistics), lambda x: kid(x, reference)):
        estimates = [score(x) for x in draws]
        spread = np.std([estimate.value for estimate in estimates])
        assert np.mean([estimate.error for estimate in estimates]) == pytest.approx(spread, rel=0.4)


def test_precision_and_recall_are_fractions_inside_the_other_manifold(samples):
    x, y = samples[0][:60, :2], samples[1][:50, :2]

    def inside(points, manifold):
        distances = torch.linalg.vector_norm(manifold[:, None] - manifold, dim=-1)
        radii = distances.sort(dim=1).values[:, 3]
        near = torch.linalg.vector_norm(points[:, None] - manifold, dim=-1) <= radii
        return float(near.any(dim=1).double().mean())

    precision, recall = precision_recall(x, y)
    assert (precision.value, recall.value) == pytest.approx((inside(x, y), inside(y, x)))
    far_precision, far_recall = precision_recall(x, y + 100)
    assert (far_precision.value, far_recall.value) == (0, 0)


def test_mean_of_cosines_has_the_error_of_a_mean():
    x, y = torch.randn(50, 8), torch.randn(50, 8)
    values = cosines(x, 3 * y)
    assert torch.allclose(values.float(), torch.cosine_similarity(x, y), atol=1e-6)
    estimate = mean_estimate(values)
    assert estimate.error == pytest.approx(float(values.std()) / 50**0.5)
