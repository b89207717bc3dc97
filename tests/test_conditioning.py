"""Cond and Conditioner: slots, encoders by name and class, dropped samples."""

import pytest
import torch
from torch import nn

from ldm.conditioning import Cond, Conditioner, Encoder


class LengthEncoder(Encoder):
    slot, key, droppable, null = "crossattn", "txt", True, ""

    def forward(self, texts):
        return torch.tensor([[[float(len(text))]] for text in texts])


class LevelEncoder(Encoder):
    slot, key = "vector", "level"

    def forward(self, levels):
        return torch.tensor([[float(level)] for level in levels])


def test_each_encoder_fills_its_slot():
    conditioner = Conditioner(text=LengthEncoder(), level=LevelEncoder())
    cond = conditioner({"txt": ["ab", "c"], "level": [3, 4]})
    assert cond.crossattn.tolist() == [[[2.0]], [[1.0]]]
    assert cond.vector.tolist() == [[3.0], [4.0]]
    assert cond.concat is None
    assert len(cond) == 2


def test_tokens_of_two_encoders_are_concatenated():
    cond = Conditioner(text=LengthEncoder(), text_2=LengthEncoder())({"txt": ["ab"]})
    assert cond.crossattn.tolist() == [[[2.0], [2.0]]]


def test_zeroed_samples_keep_their_mask():
    cond = Cond(crossattn=torch.ones(2, 3, 4), context_mask=torch.ones(2, 3, dtype=torch.bool))
    zeroed = cond.zero_samples(torch.tensor([True, False]))
    assert zeroed.crossattn.sum(dim=(1, 2)).tolist() == [0, 12]
    assert zeroed.context_mask.all()


def test_encoders_are_found_by_class():
    conditioner = Conditioner(level=LevelEncoder())
    assert conditioner.find(LevelEncoder) is conditioner.level
    assert conditioner.find(LengthEncoder) is conditioner.text is None
    assert conditioner.find_all(Encoder) == [conditioner.level]
    assert conditioner.keys == {"level"}
    assert not conditioner.state_dict()
    with pytest.raises(ValueError, match="no LengthEncoder; its encoders: LevelEncoder"):
        conditioner.get(LengthEncoder)
    with pytest.raises(TypeError, match="`text` must be an Encoder"):
        Conditioner(text=nn.Identity())


def test_samples_are_dropped_with_the_given_probability():
    batch = {"txt": ["a"] * 1000, "level": [1] * 1000}
    conditioner = Conditioner(text=LengthEncoder(), level=LevelEncoder())
    cond = conditioner(batch, drop=0.1, generator=torch.Generator().manual_seed(0))
    assert 70 < (cond.crossattn == 0).sum() < 130
    assert cond.vector.all()  # without a null sample nothing is dropped
    assert not conditioner(batch, drop={"txt": 1.0}).crossattn.any()
    assert conditioner(batch, drop={"level": 1.0}).crossattn.all()


def test_dropped_samples_of_training_are_zeros_or_the_legacy_ucg_value():
    conditioner = Conditioner(text=LengthEncoder(null="ab"), level=LevelEncoder(ucg_rate=1.0))
    batch = {"txt": ["a"], "level": [3]}

    def encode(drop):
        cond = conditioner(batch, drop=drop)
        return cond.crossattn.item(), cond.vector.item()

    assert encode(1.0) == (2, 3)
    assert encode(None) == (1, 0)
    conditioner.text.ucg_rate = 1.0
    assert encode(None) == (0, 0)
    conditioner.text.legacy_ucg_value = "abc"
    assert encode(None) == (3, 0)
    assert encode({"level": 1.0}) == (1, 0)


def test_an_encoder_may_fill_several_slots():
    class TokenAndVectorEncoder(LengthEncoder):
        def forward(self, texts):
            tokens = super().forward(texts)
            return Cond(crossattn=tokens, vector=tokens[:, 0] + 1)

    batch = {"txt": ["ab", "c"], "level": [3, 4]}
    encoders = {"text": LengthEncoder(), "text_2": TokenAndVectorEncoder(), "level": LevelEncoder()}
    cond = Conditioner(**encoders, join="features")(batch)
    assert cond.crossattn.tolist() == [[[2.0, 2.0]], [[1.0, 1.0]]]
    assert cond.vector.tolist() == [[3.0, 3.0], [2.0, 4.0]]
    assert Conditioner(**encoders)(batch).crossattn.shape == (2, 2, 1)


@pytest.mark.parametrize(
    ("axis", "mask", "expected"),
    [
        ("tokens", [[1, 0]], [[1, 0, 1]]),
        ("tokens", None, [[1, 1, 1]]),
        ("features", [[1, 0]], [[1, 0]]),
        ("features", None, [[1, 1]]),
    ],
)
def test_a_mask_of_one_encoder_excludes_only_its_own_tokens(axis, mask, expected):
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    masked = Cond(torch.zeros(1, 2, 1), context_mask=mask)
    other = Cond(torch.ones(1, 1, 1), context_mask=torch.tensor([[True]]) if mask is None else None)
    joined = masked.join_fields(Cond(vector=torch.ones(1, 1))).join_fields(other, axis)
    assert joined.context_mask.shape == joined.crossattn.shape[:2]
    assert joined.context_mask.int().tolist() == expected


def test_samples_are_repeated_in_place_and_concatenated_in_order():
    zeros, ones = Cond(torch.zeros(2, 1, 1)), Cond(torch.ones(1, 1, 1))
    assert zeros.cat_samples(ones).crossattn.flatten().tolist() == [0, 0, 1]
    assert zeros.cat_samples(ones)[1:].repeat(2).crossattn.flatten().tolist() == [0, 0, 1, 1]


def test_errors_name_slots_and_batch_keys():
    with pytest.raises(ValueError, match="cannot concatenate"):
        Cond(crossattn=torch.zeros(1, 1, 1)).cat_samples(Cond(vector=torch.zeros(1, 1)))
    with pytest.raises(KeyError, match="reads `txt`, the batch has `jpg`"):
        Conditioner(text=LengthEncoder())({"jpg": []})
