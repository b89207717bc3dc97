"""Tiny models on disk, each a YAML and a checkpoint in the original layout."""

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
from imagehelp import QUICK
from ldm.app.model_cache import ModelCache
from ldm.commands.main import main
from ldm.generate.load import load_models
from ldm.loading.files.checkpoint import read_checkpoint, to_ema_name, write_checkpoint
from ldm.loading.weight_names import restore_names
from pipelines.goldmodels import build_recorded_model, get_config

# Tiny models by family, and the golden file that their config is from.
RECORDINGS = {"inpaint": "inpaint", "depth": "depth2img", "upscale": "upscale", "unclip": "unclip",
              "base_v": "img2img", "base_eps": "img2img"}  # fmt: skip


class ModelFiles(NamedTuple):
    """Paths of a model, in the order of `ldm.load`, and the flags that name them."""

    config: Path
    ckpt: Path

    @property
    def flags(self) -> list[str]:
        return ["--ckpt", str(self.ckpt), "--config", str(self.config)]


@pytest.fixture(scope="session")
def model_cache() -> ModelCache:
    return ModelCache(max_bytes=1e9)


@pytest.fixture(autouse=True)
def cache_models(model_cache, monkeypatch):
    """Share loaded models between tests, except those that a test may change."""

    def load(config, ckpt, **options):
        has_additions = options.get("loras") or options.get("embeddings")
        is_half = options.get("dtype") != torch.float32  # which a run may convert to float32
        if has_additions or is_half or not Path(ckpt or ".").exists():
            return ldm.load(config, ckpt, **options)
        return model_cache(config, ckpt, **options)

    monkeypatch.setitem(load_models.__kwdefaults__, "load", load)


@pytest.fixture(autouse=True)
def shrink_midas_input(monkeypatch):
    """Give MiDaS 96 pixels a side instead of 384, which is faster."""
    monkeypatch.setattr("ldm.encoders.depth.MIDAS_SIZE", 96)


@pytest.fixture(scope="session")
def recorded() -> GoldenFile:
    return load_golden("e2e_txt2img")


@pytest.fixture(scope="session")
def ema_model(recorded, tmp_path_factory) -> ModelFiles:
    """A model with raw and EMA weights, whose config asks for the EMA weights."""
    files = write_model(recorded, "base_v", tmp_path_factory.mktemp("ema"))
    config = json.loads(files.config.read_text())
    config["model"]["params"]["use_ema"] = True
    files.config.write_text(json.dumps(config))
    state = read_checkpoint(files.ckpt).state
    ema = {to_ema_name(name): 1.1 * v for name, v in state.items() if name.startswith("model.")}
    write_checkpoint(files.ckpt, state | ema)
    return files


@pytest.fixture
def tiny(families) -> ModelFiles:
    return families["base_v"]


def write_model(recorded: GoldenFile, name: str, folder: Path) -> ModelFiles:
    files = ModelFiles(folder / f"{name}.yaml", folder / f"{name}.safetensors")
    files.config.write_text(json.dumps({"model": get_config(recorded, name)}))
    state = build_recorded_model(recorded, name, with_depth_network=True).state_dict()
    write_checkpoint(files.ckpt, restore_names(state))
    return files


FAMILIES: dict[str, ModelFiles] = {}  # shared, as each conftest has its own fixture `families`


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """The files of a tiny model of each family."""
    if not FAMILIES:
        folder = tmp_path_factory.mktemp("families")
        for name, recorded in RECORDINGS.items():
            FAMILIES[name] = write_model(load_golden(f"e2e_{recorded}"), name, folder)
    return FAMILIES


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (70, 60, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def run_ldm(capsys):
    """Runs `ldm` with any arguments; returns exit status, lines of stdout and stderr."""

    def run_ldm(*arguments):
        capsys.readouterr()
        try:
            status = main([*map(str, arguments)])
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run_ldm


@pytest.fixture
def run(families, tmp_path, run_ldm):
    """Runs a command on the tiny model of a family; see `run_ldm`."""

    def run(command, name, *flags):
        return run_ldm(command, *families[name].flags, *QUICK, "--outdir", tmp_path / "out", *flags)

    return run


@pytest.fixture
def txt2img(tiny, tmp_path, run_ldm):
    """Runs txt2img at 64x64, with a grid; see `run_ldm`."""
    size = ["--H", 64, "--W", 64, "--outdir", tmp_path / "out"]
    return partial(run_ldm, "txt2img", *tiny.flags, *QUICK[:-1], *size)
