"""Cond and Conditioner: three slots, named encoders, dropped records."""

import pytest
import torch

from ldm.conditioning import Cond, Conditioner, Encoder


class Lengths(Encoder):
    slot, key, null, droppable = "crossattn", "txt", "", True

    def forward(self, texts):
        return torch.tensor([[[float(len(text))]] for text in texts])


class Levels(Encoder):
    slot, key, null, droppable = "vector", "level", 0, True

    def forward(self, levels):
        return torch.tensor([[float(level)] for level in levels])


def test_each_encoder_fills_its_slot():
    cond = Conditioner(text=Lengths(), level=Levels())({"txt": ["ab", "c"], "level": [3, 4]})
    assert cond.crossattn.tolist() == [[[2.0]], [[1.0]]]
    assert cond.vector.tolist() == [[3.0], [4.0]]
    assert cond.concat is None
    assert len(cond) == 2


def test_two_encoders_of_one_slot_are_joined_along_tokens():
    cond = Conditioner(text=Lengths(), again=Lengths())({"txt": ["ab"]})
    assert cond.crossattn.tolist() == [[[2.0], [2.0]]]


def test_dropping_all_leaves_the_null_condition():
    conditioner = Conditioner(text=Lengths())
    assert conditioner({"txt": ["ab", "c"]}, drop=1.0).crossattn.sum() == 0


def test_dropping_takes_about_the_share_asked_for():
    generator = torch.Generator().manual_seed(0)
    cond = Conditioner(text=Lengths())({"txt": ["a"] * 1000}, drop=0.1, generator=generator)
    assert 70 < (cond.crossattn == 0).sum() < 130


def test_rows_are_repeated_in_place_and_joined_in_order():
    a, b = Cond(torch.zeros(2, 1, 1)), Cond(torch.ones(1, 1, 1))
    assert a.cat(b).crossattn.flatten().tolist() == [0, 0, 1]
    assert a.cat(b)[1:].repeat(2).crossattn.flatten().tolist() == [0, 0, 1, 1]


def test_conditions_of_different_slots_cannot_be_joined():
    with pytest.raises(ValueError, match="cannot join"):
        Cond(crossattn=torch.zeros(1, 1, 1)).cat(Cond(vector=torch.zeros(1, 1)))


def test_a_missing_record_is_named():
    with pytest.raises(KeyError, match="reads `txt`, the batch has `jpg`"):
        Conditioner(text=Lengths())({"jpg": []})
