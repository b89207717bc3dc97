"""Tiny models on disk, each a YAML and a checkpoint in the original layout; commands on them."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from goldfile import GoldenFile, load_golden
from imagehelp import ONE_IMAGE_FLAGS, QUICK_FLAGS
from ldm.app.model_cache import ModelCache
from ldm.commands.main import main
from ldm.generate.load import load_models
from ldm.loading.files.checkpoint import read_checkpoint, to_ema_name, write_checkpoint
from ldm.loading.weight_names import restore_names
from pipelines.goldmodels import build_recorded_model, get_config

# Tiny models, and the golden file that has their config.
GOLDEN_NAMES = {
    "inpaint": "inpaint", "depth": "depth2img", "upscale": "upscale", "unclip": "unclip",
    "base_v": "img2img", "base_eps": "img2img",
}  # fmt: skip


class ModelFiles(NamedTuple):
    """The files of a model, in the order of the arguments of `ldm.load`."""

    config: Path
    ckpt: Path

    @property
    def flags(self) -> list[str]:
        return ["--ckpt", str(self.ckpt), "--config", str(self.config)]


class CommandResult(NamedTuple):
    """Exit status of a command, lines of stdout, and stderr."""

    status: int
    out: list[str]
    err: str

    @property
    def is_identical(self) -> bool:
        """Whether `ldm replay` has reproduced the image."""
        return (self.status, self.out) == (0, ["identical"])

    @property
    def paths(self) -> list[str]:
        """The paths that a successful command lists."""
        assert self.status == 0, self.err
        return self.out

    @property
    def error(self) -> str:
        """The error of a command that failed without output: the last line of stderr."""
        assert (self.status, self.out) == (1, [])
        return self.err.splitlines()[-1]


@pytest.fixture(scope="session")
def model_cache() -> ModelCache:
    return ModelCache(max_bytes=1e9)


@pytest.fixture(autouse=True)
def cache_models(model_cache, monkeypatch):
    """Share loaded models between tests, except those that a test may change."""

    def load(config, ckpt, **options):
        has_addons = options.get("loras") or options.get("embeddings")
        is_half = options.get("dtype") != torch.float32  # which a run may convert to float32
        if has_addons or is_half or not Path(ckpt or ".").exists():
            return ldm.load(config, ckpt, **options)
        return model_cache(config, ckpt, **options)

    monkeypatch.setitem(load_models.__kwdefaults__, "load", load)


@pytest.fixture(autouse=True)
def shrink_midas_input(monkeypatch):
    """Resize inputs of MiDaS to 96 pixels a side instead of 384, which is faster."""
    monkeypatch.setattr("ldm.encoders.depth.MIDAS_SIZE", 96)


@pytest.fixture(scope="session")
def golden() -> GoldenFile:
    return load_golden("e2e_txt2img")


@pytest.fixture(scope="session")
def ema_model(golden, tmp_path_factory) -> ModelFiles:
    """A model with raw and EMA weights, whose config selects the EMA weights."""
    files = write_model(golden, "base_v", tmp_path_factory.mktemp("ema"))
    config = json.loads(files.config.read_text())
    config["model"]["params"]["use_ema"] = True
    files.config.write_text(json.dumps(config))
    state = read_checkpoint(files.ckpt).state_dict
    ema = {to_ema_name(name): 1.1 * v for name, v in state.items() if name.startswith("model.")}
    write_checkpoint(files.ckpt, state | ema)
    return files


@pytest.fixture
def tiny_model(families) -> ModelFiles:
    return families["base_v"]


def write_model(golden: GoldenFile, name: str, folder: Path) -> ModelFiles:
    files = ModelFiles(folder / f"{name}.yaml", folder / f"{name}.safetensors")
    files.config.write_text(json.dumps({"model": get_config(golden, name)}))
    state = build_recorded_model(golden, name, with_depth_network=True).state_dict()
    write_checkpoint(files.ckpt, restore_names(state))
    return files


FAMILIES: dict[str, ModelFiles] = {}  # shared, as each conftest has its own fixture `families`


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """The files of a tiny model of each family."""
    if not FAMILIES:
        folder = tmp_path_factory.mktemp("families")
        for name, golden_name in GOLDEN_NAMES.items():
            FAMILIES[name] = write_model(load_golden(f"e2e_{golden_name}"), name, folder)
    return FAMILIES


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (70, 60, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def run_ldm(capsys):
    """Runs `ldm` with any arguments; returns a `CommandResult`."""

    def run_ldm(*arguments):
        capsys.readouterr()
        try:
            status = main([*map(str, arguments)])
        except SystemExit as exit_error:
            status = exit_error.code
        out, err = capsys.readouterr()
        return CommandResult(status, out.splitlines(), err)

    return run_ldm


@pytest.fixture
def run(families, tmp_path, run_ldm):
    """Runs a command on the tiny model of a family; see `run_ldm`."""

    common_flags = [*ONE_IMAGE_FLAGS, "--outdir", tmp_path / "out"]

    def run(command, family, *flags):
        return run_ldm(command, *families[family].flags, *common_flags, *flags)

    return run


@pytest.fixture
def txt2img(tiny_model, tmp_path, run_ldm):
    """Runs txt2img at 64x64, with a grid; see `run_ldm`."""
    size = ["--H", 64, "--W", 64, "--outdir", tmp_path / "out"]
    return partial(run_ldm, "txt2img", *tiny_model.flags, *QUICK_FLAGS, *size)
