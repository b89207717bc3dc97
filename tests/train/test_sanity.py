"""Before the first step: a model that is read wrongly is told from one that is read rightly."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.data.drawings import EmojiTransform
from ldm.data.folder import Folder
from ldm.data.source import DatasetSource, collate
from ldm.loading.load import load
from ldm.train.monitoring import sanity
from ldm.train.monitoring.sanity import Findings

EMOJI = Path(__file__).parents[1] / "data/emoji"


@pytest.fixture(scope="module")
def demo() -> Any:
    return load()


@pytest.fixture(scope="module")
def source() -> DatasetSource:
    return DatasetSource(Folder(root=EMOJI, transform=EmojiTransform(size=64), seed=1))


def found(model: Any, source: DatasetSource) -> Findings:
    return sanity.look(model, source.first_samples(6), torch.Generator().manual_seed(0), size=4)


def test_a_trained_model_is_far_better_than_a_guess(demo: Any, source: DatasetSource) -> None:
    right = found(demo, source)
    assert right.best == "v"
    assert right.loss < 0.5 * right.guess
    assert right.complaint() is None


@pytest.mark.parametrize("wrong", ["eps", "x0"])
def test_what_a_model_really_predicts_is_named(
    demo: Any, source: DatasetSource, wrong: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(demo, "parameterization", wrong)
    complaint = found(demo, source).complaint()
    assert complaint is not None
    assert complaint.startswith("the model predicts `v`, but model.params.parameterization says")


@pytest.mark.parametrize("scale", [0.18215, 1 / 0.18215])
def test_a_wrong_scale_of_latents_is_named(
    demo: Any, source: DatasetSource, scale: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(demo, "scale_factor", scale)
    complaint = found(demo, source).complaint()
    assert complaint is not None
    assert "scale_factor does not suit this autoencoder" in complaint


def test_random_weights_stop_a_fine_tune_unless_it_is_told_otherwise(
    demo: Any, source: DatasetSource, monkeypatch: Any
) -> None:
    last = demo.unet.out[2].weight
    monkeypatch.setattr(last, "data", torch.zeros_like(last))
    trainer = SimpleNamespace(sanity=True)
    run = SimpleNamespace(
        settings=SimpleNamespace(trainer=trainer), source=source, model=demo, seed=1,
        device=torch.device("cpu"), precision=torch.no_grad, batch_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="hardly better than a guess: are its weights loaded"):
        sanity.check(run)
    trainer.sanity = False
    sanity.check(run)


def test_an_autoencoder_must_do_better_than_flat_colours(demo: Any, source: DatasetSource) -> None:
    image = collate(source.first_samples(4))["jpg"]
    assert sanity._reconstruction(demo.autoencoder, image) is None
    assert "hardly better than flat colours" in str(
        sanity._reconstruction(_Grey(), image)  # type: ignore[arg-type]
    )


class _Grey:
    """Draws everything grey."""

    def encode(self, image: torch.Tensor) -> Any:
        return SimpleNamespace(mode=lambda: torch.zeros_like(image))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z
