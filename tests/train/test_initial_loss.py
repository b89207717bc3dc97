"""The check of the initial loss detects models with wrong settings or weights."""

from typing import Any

import pytest
import torch

from ldm.data.drawings import EmojiTransform
from ldm.data.folder import ImageFolder
from ldm.data.source import DatasetSource
from ldm.loading.load import load
from ldm.train.monitoring.initial_loss import (
    BaselineComparison,
    check_initial_loss,
    compare_with_baseline,
)
from train.tinyrun import EMOJI


@pytest.fixture(scope="module")
def demo() -> Any:
    return load()


@pytest.fixture(scope="module")
def source() -> DatasetSource:
    return DatasetSource(ImageFolder(root=EMOJI, transform=EmojiTransform(size=64), seed=1))


def compare(model: Any, source: DatasetSource) -> BaselineComparison:
    generator = torch.Generator().manual_seed(0)
    return compare_with_baseline(model, source.load_fixed_samples(6), generator, batch_size=4)


def test_a_trained_model_is_far_better_than_the_baseline(demo: Any, source: DatasetSource) -> None:
    comparison = compare(demo, source)
    assert comparison.best_fit == "v"
    assert comparison.loss < 0.5 * comparison.baseline_loss
    assert comparison.find_problem() is None


WRONG_TYPE = "the model predicts `v`, but model.params.parameterization says"
WRONG_SCALE = "model.params.scale_factor does not fit this autoencoder"


@pytest.mark.parametrize(
    ("attribute", "value", "problem"),
    [
        ("parameterization", "eps", WRONG_TYPE),
        ("parameterization", "x0", WRONG_TYPE),
        ("scale_factor", 0.18215, WRONG_SCALE),
        ("scale_factor", 1 / 0.18215, WRONG_SCALE),
    ],
)
def test_a_wrong_parameter_of_a_model_is_named(
    demo: Any, source: DatasetSource, attribute: str, value: Any, problem: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(demo, attribute, value)
    assert (compare(demo, source).find_problem() or "").startswith(problem)


def test_untrained_weights_are_refused(demo: Any, source: DatasetSource, monkeypatch: Any) -> None:
    last = demo.unet.out[2].weight
    monkeypatch.setattr(last, "data", torch.zeros_like(last))
    message = "hardly better than a trivial baseline: are its weights loaded"
    with pytest.raises(ValueError, match=message):
        check_initial_loss(demo, source.load_fixed_samples(4), batch_size=8, seed=1)


def test_an_autoencoder_must_do_better_than_mean_colors(
    demo: Any, source: DatasetSource, monkeypatch: Any
) -> None:
    check_initial_loss(demo.autoencoder, source.load_fixed_samples(2), batch_size=8, seed=1)
    monkeypatch.setattr(demo.autoencoder, "decode", lambda z: torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match="hardly better than mean colors"):
        check_initial_loss(demo.autoencoder, source.load_fixed_samples(2), batch_size=8, seed=1)
