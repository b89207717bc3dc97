"""Malicious pickles are refused without running their code; files of old trainers are read."""

import argparse
import pickle
import sys
import types
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.loading.files import pickles
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.files.pickles import list_foreign_imports
from loading import payloads


def test_malicious_files_are_refused_and_not_run(tmp_path):
    """The message names the function that a pickle calls."""
    marker = tmp_path / "marker"
    files, calls = payloads.write_malicious_files(tmp_path, marker), payloads.make_calls(marker)
    before = set(sys.modules)
    for name, path in files.items():
        with pytest.raises(ValueError, match=r".") as caught:
            read_checkpoint(path)
        assert str(path) in str(caught.value), name
        writer, _, call = name.partition(" ")
        if call in calls and writer != "write_bytes":
            assert f"`{call}`" in str(caught.value)
    assert len(files) >= 60
    assert not marker.exists()
    assert not {"antigravity", "pdb", "webbrowser"} & (set(sys.modules) - before)


def test_an_ordinary_unpickler_runs_the_payloads(tmp_path):
    """Otherwise, that they are refused would prove nothing."""
    marker = tmp_path / "marker"
    for name in ("os.system", "builtins.eval", "builtins.exec", "subprocess.getoutput"):
        pickle.loads(payloads.make_pickle(payloads.make_calls(marker)[name]))
        assert marker.exists(), name
        marker.unlink()


@pytest.mark.parametrize("name", ["inst", "stack-global", "stack-global-memo", "newobj"])
def test_imports_are_listed_for_every_opcode(tmp_path, name):
    body = payloads.make_indirect_calls(tmp_path / "marker")[name]
    path = payloads.write_zip(tmp_path / "x.ckpt", payloads.make_pickle(body, 4))
    assert "os.system" in list_foreign_imports(path, "zip")


def test_stand_ins_keep_no_state():
    stand_in = next(cls for cls, name in pickles.STAND_INS if name == "numpy.dtype")
    instance = stand_in("f8", False, True)
    instance.__setstate__({"x": 1})
    assert vars(instance) == {}


# Objects of old trainers in published files.


class ForeignCall:
    """Pickles as a call of a class or function in a module that is not installed."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture
def make_importable(monkeypatch):
    """Makes a class or function that can be imported from a module of any name."""

    def make_importable(module, name, base=object):
        def function(*arguments): ...

        imitation = type(name, (base,), {}) if name[0].isupper() else function
        imitation.__module__, imitation.__qualname__, imitation.__name__ = module, name, name
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            part = ".".join(parts[:i])
            if sys.modules.get(part) is None or i == len(parts):
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        setattr(sys.modules[module], name, imitation)
        return imitation

    return make_importable


def make_checkpoint(state, callback, score):
    return {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {callback: {"monitor": "val/loss", "best_model_score": score}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{}]}],
        "lr_schedulers": [{"_last_lr": [score]}],
    }


STATE = {"model.a.weight": torch.arange(6.0).view(2, 3), "model.a.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("package", "is_legacy"), [("pytorch_lightning", True), ("lightning.pytorch", False)]
)
def test_lightning_files_load_without_lightning(tmp_path, make_importable, package, is_legacy):
    path, module = tmp_path / "last.ckpt", f"{package}.callbacks.model_checkpoint"
    content = make_checkpoint(STATE, make_importable(module, "ModelCheckpoint"), np.float64(0.5))
    torch.save(content, path, _use_new_zipfile_serialization=not is_legacy)
    sys.modules.pop(module)
    file = read_checkpoint(path)
    assert file.step == 470000
    assert file.format == ("legacy" if is_legacy else "zip")
    assert torch.equal(file.state_dict["model.a.weight"], STATE["model.a.weight"])
    assert "callbacks" in file.other_keys


def test_several_threads_read_files_of_old_trainers(tmp_path):
    """The names that torch allows belong to the process: a thread must not remove another's."""
    torch.save({"state_dict": STATE, "score": np.float64(0.5)}, tmp_path / "x.ckpt")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            files = list(pool.map(read_checkpoint, [tmp_path / "x.ckpt"] * 300))
    finally:
        sys.setswitchinterval(interval)
    assert all(file.state_dict.keys() == STATE.keys() for file in files)


def test_other_objects_of_old_trainers_are_ignored(tmp_path, make_importable):
    stopping = make_importable("pytorch_lightning.callbacks.early_stopping", "EarlyStopping")
    attributes = make_importable("pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    content = {
        "state_dict": STATE,
        "callbacks": {stopping: {}},
        "metrics": defaultdict(list, {"loss": [0.5]}),
        "hparams": attributes(lr=1e-4, optimizer=attributes(betas=(0.9, 0.99))),
        "hyper_parameters": argparse.Namespace(lr=1e-4),
        "config": OmegaConf.create({"lr": 1e-4, "sizes": [1, "x", None], "copy": "${lr}"}),
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        scalar = make_importable(module, "scalar")
        content[module] = ForeignCall(scalar, np.dtype("f8"), b"12345678")
    torch.save(content, tmp_path / "x.ckpt")
    assert set(read_checkpoint(tmp_path / "x.ckpt").state_dict) == set(STATE)
    assert list_foreign_imports(tmp_path / "x.ckpt", "zip") == []


def test_parameters_and_nested_tensors_load(tmp_path):
    nested = {768: [{"w": torch.nn.Parameter(torch.ones(2))}, {"w": torch.ones(3)}]}
    torch.save(nested, tmp_path / "hypernetwork.pt")
    state = read_checkpoint(tmp_path / "hypernetwork.pt").state_dict
    assert set(state) == {"768.0.w", "768.1.w"}
    assert not state["768.0.w"].requires_grad


def test_a_pickle_that_torch_refuses_gives_its_cause_without_advice_to_load_it_unsafely(tmp_path):
    torch.save(STATE, tmp_path / "x.ckpt", pickle_protocol=4)
    with pytest.raises(ValueError, match=r"x\.ckpt` is refused: Unsupported operand \d+$"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert list_foreign_imports(tmp_path / "x.ckpt", "zip") == []


def test_an_older_torch_is_refused(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "x.ckpt")
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(ValueError, match=r"needs torch 2\.10"):
        read_checkpoint(tmp_path / "x.ckpt")
