"""The depth network of a depth model: from the checkpoint, or from the file of MiDaS."""

import json
import os
import re
import shutil

import pytest
import torch

import ldm
from goldfile import gold
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.loading.weight_names import restore_names
from pipelines.goldmodels import TINY_DPT, model_of

FILE = "dpt_hybrid-midas-501f0c75.pt"


@pytest.fixture(scope="module")
def whole():
    return restore_names(model_of(gold("e2e_depth2img"), "depth", whole=True).state_dict())


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    """A depth model without its depth network, and the network in a file as MiDaS publishes it."""
    folder = tmp_path_factory.mktemp("midas")
    recorded = gold("e2e_depth2img")
    config = json.loads(json.dumps(recorded.meta["config_depth"]))
    params, target = config["params"], "ldm.modules.midas.api.MiDaSInference"
    params["cond_stage_config"]["params"]["arch"] = recorded.meta["tiny_arch"]
    params["depth_stage_config"] = {"target": target, "params": {"arch": TINY_DPT}}
    (folder / "depth.yaml").write_text(json.dumps({"model": config}))
    lean = {name: value for name, value in whole.items() if not name.startswith("depth_model.")}
    write_checkpoint(folder / "lean.safetensors", lean)
    write_checkpoint(folder / "whole.safetensors", whole)
    (folder / "midas").mkdir()
    torch.save(network(whole), folder / "midas" / FILE)
    return folder


@pytest.fixture
def files(written, tmp_path):
    return shutil.copytree(written, tmp_path / "files", copy_function=os.link)


def network(whole, factor=1.0):
    prefix = "depth_model.model."
    return {k.removeprefix(prefix): v * factor for k, v in whole.items() if k.startswith(prefix)}


def load_depth(files, name="lean.safetensors", **options):
    model = ldm.load(files / "depth.yaml", files / name, **options)
    return model.conditioner.depth.state_dict()


def equal(state, whole, factor=1.0):
    wanted = network(whole, factor)
    return all(
        torch.equal(value, wanted[name.removeprefix("model.")]) for name, value in state.items()
    )


def test_the_network_is_found_beside_the_checkpoint(files, whole):
    (files / "midas" / FILE).rename(files / FILE)
    assert equal(load_depth(files), whole)


@pytest.mark.parametrize(
    ("old", "wrapped", "name"),
    [(False, True, "lean"), pytest.param(True, False, "whole", marks=pytest.mark.slow)],
    ids=["zip", "legacy"],
)
def test_a_given_file_comes_before_the_checkpoint(files, whole, old, wrapped, name):
    path, content = files / "other.pt", network(whole, 2.0)
    content = {"optimizer": {}, "model": content} if wrapped else content
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert equal(load_depth(files, f"{name}.safetensors", midas=path), whole, 2.0)


@pytest.mark.slow
def test_the_network_is_read_from_another_depth_model(files, whole):
    assert equal(load_depth(files, midas=files / "whole.safetensors"), whole)


def test_without_a_network_two_lines_say_where_to_put_it(files):
    with pytest.raises(
        FileNotFoundError,
        match=r"lean.safetensors` contains no depth network .*\nhint: put `dpt_hybrid.* beside it",
    ):
        load_depth(files)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_depth(files, midas="absent.pt")


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        pytest.param(
            "scratch.layer1_rn.weight",
            None,
            "does not fit the depth network: 1 missing",
            marks=pytest.mark.slow,
        ),
        (
            "scratch.layer1_rn.weight",
            torch.zeros(3),
            "1 mismatched\nmismatched: depth_model.model.scratch.layer1_rn.weight",
        ),
        (".*backbone.*", None, "is another network of MiDaS; depth models need dpt_hybrid"),
        ("pretrained.*|scratch.*", None, "is not a file of MiDaS"),
    ],
)
def test_files_of_something_else_are_refused(files, whole, names, value, message):
    content = {k: v for k, v in network(whole).items() if not re.fullmatch(names, k)}
    content |= {"layer.weight": torch.zeros(3)} | ({} if value is None else {names: value})
    torch.save(content, files / "x.pt")
    with pytest.raises(ValueError, match=message):
        load_depth(files, midas=files / "x.pt")


def test_models_without_depth_need_none(tiny_yaml, tiny_state, tmp_path):
    write_checkpoint(tmp_path / "tiny.ckpt", tiny_state)
    ldm.load(tiny_yaml, tmp_path / "tiny.ckpt", midas="absent.pt")
