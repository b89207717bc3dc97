"""Initial weights: from checkpoints with other shapes, other models, and diffusers folders."""

from pathlib import Path

import pytest
import torch

import ldm
from goldfile import load_golden
from ldm.loading.config import instantiate, parse_yaml
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.loading.weight_names import to_original_name
from ldm.loading.weights import open_checkpoint
from ldm.train.runs.initial_weights import load_initial_weights, resize_weight
from loading import tinyfamilies
from train.tinyrun import ROOT, build_tiny_model


def test_resized_weights_equal_the_originals() -> None:
    golden = load_golden("misc_cond")
    inputs, expected = golden.inputs("make_it_fit"), golden.outputs("make_it_fit")
    actual = resize_weight(inputs["conv_in_4ch"], expected["conv_in_7ch"].shape)
    torch.testing.assert_close(actual, expected["conv_in_7ch"], rtol=1e-6, atol=0)


def test_weights_of_another_model_are_refused_in_one_line() -> None:
    path = str(ROOT / "checkpoints/demo.safetensors")
    with pytest.raises(ValueError, match=r"`.*` does not fit the config: \d+ missing") as error:
        load_initial_weights(build_tiny_model(), {"ckpt_path": path})
    assert "model.diffusion_model.input_blocks.0.0.weight (64, 4, 3, 3)" in str(error.value)


def test_outputs_and_biases_are_repeated() -> None:
    assert resize_weight(torch.tensor([1.0, 2.0]), torch.Size([5])).tolist() == [1, 2, 1, 2, 1]
    weight = torch.arange(4.0).view(2, 2)
    assert resize_weight(weight, weight.shape) is weight
    assert resize_weight(weight, torch.Size([3, 2]))[2].tolist() == [0, 0.5]


def test_a_diffusers_folder_is_trained_from(tmp_path: Path) -> None:
    state = tinyfamilies.write_family("sd2-v", tmp_path / "tiny.safetensors")
    convert(plan_conversion(tmp_path / "tiny.safetensors", tmp_path / "folder"))
    config = parse_yaml(open_checkpoint(tmp_path / "folder").metadata["ldm.config"])["model"]
    model = instantiate(config, where="model")
    first_stage = {"params": {"ckpt_path": "gone.ckpt"}}  # which the whole model replaces
    params = {"ckpt_path": str(tmp_path / "folder"), "first_stage_config": first_stage}
    assert load_initial_weights(model, params)
    for name in ("unet.out.2.weight", "autoencoder.decoder.conv_in.weight"):
        assert torch.equal(model.get_parameter(name), state[to_original_name(name)])


def test_another_prediction_type_in_the_config_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "noob.safetensors"
    write_checkpoint(path, tinyfamilies.write_family("xl-v", path))
    for family, is_warned in (("xl-v", False), ("xl", True)):
        model = instantiate(tinyfamilies.make_small_config(family), where="model")
        load_initial_weights(model, {"ckpt_path": str(path)})
        assert ("noob.safetensors` looks like a model that predicts v" in caplog.text) == is_warned


def test_a_folder_of_another_program_fits_the_config_of_our_file(
    tmp_path: Path,
) -> None:
    tiny = ROOT / "tests/data/written_by_0_1/logs/2026-11-29T12-00-00_tiny/checkpoints"
    file, folder = open_checkpoint(tiny / "last.safetensors"), tmp_path / "folder"
    convert(plan_conversion(file.path, folder))
    (folder / "original.safetensors").unlink()  # our config and vocabulary
    config = tmp_path / "model.yaml"
    config.write_text(file.metadata["ldm.config"], "utf-8")
    expected, model = ldm.load(config, file.path), ldm.load(config, folder)
    prompts = ["a 3d emoji of a red apple", "zebra"]
    with torch.no_grad():
        contexts = [m.conditioner.text(prompts) for m in (expected, model)]
    assert torch.equal(*contexts)
    assert torch.equal(expected.unet.out[2].weight, model.unet.out[2].weight)
