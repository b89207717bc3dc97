"""The data section of a config becomes what a run reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.train.sources import open_sources

EMOJI = Path(__file__).parents[1] / "data/emoji"
TRAIN = {"root": EMOJI, "split": "train", "transform": {"name": "emoji", "size": 16}}


def section(**params: Any) -> dict[str, Any]:
    return {"params": {"batch_size": 4, "train": TRAIN, **params}}


def test_a_folder_is_trained_on_and_another_split_is_held_out() -> None:
    data = section(validation={**TRAIN, "split": "heldout"})
    train, held_out = open_sources(nn.Identity(), data, 23)
    assert held_out is not None
    assert (train.length, held_out.length) == (23, 1)
    batch = next(train.batches(4, start=2))
    assert batch["jpg"].shape == (4, 3, 16, 16)
    assert torch.equal(held_out.first(1)[0]["jpg"], held_out.first(1)[0]["jpg"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"trian": TRAIN}, "did you mean `train`"),
        ({"train": {"root": EMOJI}}, "data.params.train needs `transform`"),
        ({"train": {**TRAIN, "transform": {"name": "emojis"}}}, "did you mean `emoji`"),
    ],
)
def test_what_is_wrong_is_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_sources(nn.Identity(), section(**params), 23)
