"""Initial weights: from files of other widths and models, and the measured scale."""

from pathlib import Path

import pytest
import torch

from goldfile import gold
from ldm.loading.config import instantiate, read_yaml
from ldm.train.runs.initial import load_initial_weights, resize_weight

ROOT = Path(__file__).parents[2]


def test_weights_of_another_width_equal_the_originals() -> None:
    golden = gold("misc_cond")
    narrow, wide = golden.inputs("make_it_fit"), golden.outputs("make_it_fit")
    ours = resize_weight(narrow["conv_in_4ch"], wide["conv_in_7ch"].shape)
    torch.testing.assert_close(ours, wide["conv_in_7ch"], rtol=1e-6, atol=0)


def test_weights_of_another_model_are_refused_in_one_line() -> None:
    raw = read_yaml(ROOT / "configs/train/tiny.yaml")["model"]
    path = str(ROOT / "checkpoints/demo.safetensors")
    with pytest.raises(ValueError, match=r"`.*` does not fit the config: \d+ missing") as error:
        load_initial_weights(instantiate(raw, where="model"), {"ckpt_path": path})
    assert "model.diffusion_model.input_blocks.0.0.weight (64, 4, 3, 3)" in str(error.value)


def test_outputs_and_biases_are_repeated() -> None:
    assert resize_weight(torch.tensor([1.0, 2.0]), torch.Size([5])).tolist() == [1, 2, 1, 2, 1]
    weight = torch.arange(4.0).view(2, 2)
    assert resize_weight(weight, weight.shape) is weight
    assert resize_weight(weight, torch.Size([3, 2]))[2].tolist() == [0, 0.5]
