"""The depth network of a depth model: from the checkpoint, or from the file of MiDaS."""

import re

import pytest
import torch
from tinyfamilies import make_content

import ldm
from ldm.loading.files.checkpoint import write_checkpoint

FILE = "dpt_hybrid-midas-501f0c75.pt"
PREFIX = "depth_model.model."


@pytest.fixture
def files(tmp_path):
    """A depth model, whole and without its depth network."""
    state, config = make_content("depth")
    partial = {name: value for name, value in state.items() if not name.startswith(PREFIX)}
    for name, content in (("whole", state), ("partial", partial)):
        write_checkpoint(tmp_path / f"{name}.safetensors", content, {"ldm.config": config})
    return tmp_path


def make_midas_state(factor=1.0):
    """The depth network's weights, as MiDaS publishes them."""
    state, _ = make_content("depth")
    return {k.removeprefix(PREFIX): v * factor for k, v in state.items() if k.startswith(PREFIX)}


def check_network(path, factor=1.0, **options):
    model = ldm.load(path, **options).conditioner.depth.model
    torch.testing.assert_close(dict(model.state_dict()), make_midas_state(factor), rtol=0, atol=0)


def test_the_network_is_found_beside_the_checkpoint(files):
    torch.save(make_midas_state(), files / FILE)
    check_network(files / "partial.safetensors")


@pytest.mark.parametrize(
    ("old", "wrapped", "name"),
    [(False, True, "partial"), pytest.param(True, False, "whole", marks=pytest.mark.slow)],
    ids=["zip", "legacy"],
)
def test_a_given_file_comes_before_the_checkpoint(files, old, wrapped, name):
    path, content = files / "other.pt", make_midas_state(2.0)
    content = {"optimizer": {}, "model": content} if wrapped else content
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    check_network(files / f"{name}.safetensors", 2.0, midas=path)


@pytest.mark.slow
def test_the_network_is_read_from_another_depth_model(files):
    check_network(files / "partial.safetensors", midas=files / "whole.safetensors")


def test_without_a_network_two_lines_say_where_to_put_it(files):
    with pytest.raises(
        FileNotFoundError,
        match=r"partial\..*` contains no depth network .*\nhint: put `dpt_hybrid.* beside it",
    ):
        ldm.load(files / "partial.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        ldm.load(files / "partial.safetensors", midas="absent.pt")


LAYER = "scratch.layer1_rn.weight"


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        (LAYER, {LAYER: torch.zeros(3)}, f"1 mismatched\nmismatched: {PREFIX}{LAYER}"),
        (".*backbone.*", {}, "is another network of MiDaS; depth models need dpt_hybrid"),
        ("pretrained.*|scratch.*", {"x": torch.zeros(3)}, "is not a file of MiDaS"),
    ],
)
def test_files_of_other_networks_are_refused(files, names, change, message):
    content = {k: v for k, v in make_midas_state().items() if not re.fullmatch(names, k)} | change
    torch.save(content, files / "x.pt")
    with pytest.raises(ValueError, match=message):
        ldm.load(files / "partial.safetensors", midas=files / "x.pt")
