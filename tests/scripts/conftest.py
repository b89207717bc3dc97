"""A tiny model on disk, as a YAML and a checkpoint in the original layout."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import ldm
from goldfile import Gold, gold
from ldm.loading import checkpoint, legacy
from recipe import fill


@dataclass(frozen=True)
class Files:
    """Paths of a model, and the flags that name them."""

    config: Path
    ckpt: Path

    @property
    def flags(self) -> list[str]:
        return ["--config", str(self.config), "--ckpt", str(self.ckpt)]


@pytest.fixture(scope="session")
def recorded() -> Gold:
    return gold("e2e_txt2img")


@pytest.fixture(scope="session")
def models(recorded, tmp_path_factory) -> dict[str, Files]:
    """The two models of the recorded pictures: `base_eps` and `base_v`."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write(recorded, name, folder) for name in ("base_eps", "base_v")}


@pytest.fixture
def tiny(models) -> Files:
    return models["base_v"]


def write(recorded: Gold, name: str, folder: Path) -> Files:
    config = copy.deepcopy(recorded.meta[f"config_{name}"])
    config["params"]["cond_stage_config"]["params"]["arch"] = recorded.meta["tiny_arch"]
    files = Files(folder / f"{name}.yaml", folder / f"{name}.ckpt")
    files.config.write_text(json.dumps({"model": config}))
    state = legacy.rename_back(ldm.instantiate(config).state_dict())
    checkpoint.write(files.ckpt, fill(state, recorded.meta["salt"]))
    return files
