"""The depth network of a depth model, from the checkpoint or from a file of MiDaS."""

import re

import pytest
import torch

import ldm
from ldm.loading.files.checkpoint import write_checkpoint
from loading.tinyfamilies import make_state_and_yaml

MIDAS_FILE = "dpt_hybrid-midas-501f0c75.pt"
PREFIX = "depth_model.model."


@pytest.fixture
def folder(tmp_path):
    """A folder with a depth model, and the same without its depth network."""
    state, config = make_state_and_yaml("depth")
    partial = {name: value for name, value in state.items() if not name.startswith(PREFIX)}
    for name, content in (("whole", state), ("partial", partial)):
        write_checkpoint(tmp_path / f"{name}.safetensors", content, {"ldm.config": config})
    return tmp_path


def make_midas_state(factor=1.0):
    """Make the weights of the depth network with MiDaS' names."""
    state, _ = make_state_and_yaml("depth")
    return {k.removeprefix(PREFIX): v * factor for k, v in state.items() if k.startswith(PREFIX)}


def assert_network_has_weights(path, factor=1.0, **options):
    model = ldm.load(path, **options).conditioner.depth.model
    torch.testing.assert_close(dict(model.state_dict()), make_midas_state(factor), rtol=0, atol=0)


def test_the_network_is_found_beside_the_checkpoint(folder):
    torch.save(make_midas_state(), folder / MIDAS_FILE)
    assert_network_has_weights(folder / "partial.safetensors")


@pytest.mark.parametrize(
    ("is_legacy", "is_wrapped", "name"),
    [(False, True, "partial"), pytest.param(True, False, "whole", marks=pytest.mark.slow)],
    ids=["zip", "legacy"],
)
def test_a_given_file_takes_precedence_over_the_checkpoint(folder, is_legacy, is_wrapped, name):
    path, content = folder / "other.pt", make_midas_state(2.0)
    content = {"optimizer": {}, "model": content} if is_wrapped else content
    torch.save(content, path, _use_new_zipfile_serialization=not is_legacy)
    assert_network_has_weights(folder / f"{name}.safetensors", 2.0, midas=path)


@pytest.mark.slow
def test_the_network_is_read_from_another_depth_model(folder):
    assert_network_has_weights(folder / "partial.safetensors", midas=folder / "whole.safetensors")


def test_the_error_for_a_missing_network_says_where_to_put_it(folder):
    message = r"partial\..*` contains no depth network .*\nhint: put `dpt_hybrid.* beside it"
    with pytest.raises(FileNotFoundError, match=message):
        ldm.load(folder / "partial.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        ldm.load(folder / "partial.safetensors", midas="absent.pt")


LAYER = "scratch.layer1_rn.weight"


@pytest.mark.parametrize(
    ("removed_names", "added_weights", "message"),
    [
        (LAYER, {LAYER: torch.zeros(3)}, f"1 mismatched\nmismatched: {PREFIX}{LAYER}"),
        (".*backbone.*", {}, "is another network of MiDaS; depth models need dpt_hybrid"),
        ("pretrained.*|scratch.*", {"x": torch.zeros(3)}, "is not a file of MiDaS"),
    ],
)
def test_files_of_other_networks_are_refused(folder, removed_names, added_weights, message):
    state = make_midas_state()
    kept = {name: state[name] for name in state if not re.fullmatch(removed_names, name)}
    torch.save(kept | added_weights, folder / "x.pt")
    with pytest.raises(ValueError, match=message):
        ldm.load(folder / "partial.safetensors", midas=folder / "x.pt")
