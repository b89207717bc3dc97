"""scripts/txt2img.py as a user meets it, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.imaging.metadata import read_info
from scripts.txt2img import main

ROOT = Path(__file__).parents[2]
QUICK = ["--steps", "2", "--n_iter", "1", "--H", "64", "--W", "64", "--precision", "full"]


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """Runs the script in this process; returns its status, lines of stdout, text of stderr."""

    def run(*flags: str) -> tuple[int, list[str], str]:
        status = main([*tiny.flags, *QUICK, "--outdir", str(tmp_path / "out"), *flags])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


CASES = [
    "ddim", "ddim_v_eta1", "plms", "dpm", "scale1", "fixed_code_iter2", "niter2", "from_file",
    "from_file_repeat",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_legacy_command_lines_give_the_recorded_pictures(recorded, models, tmp_path, capsys, name):
    info = recorded.case(name)["info"]
    options, command = dict(info["options"]), ["--legacy", "--no-watermark"]
    if lines := options.pop("from_file"):
        (tmp_path / "prompts.txt").write_text("\n".join(lines))
        command += ["--from-file", str(tmp_path / "prompts.txt")]
    for key, value in options.items():
        if value is not False:
            command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    outdir = tmp_path / "out"
    assert main([*models[info["model"]].flags, *command, "--outdir", str(outdir)]) == 0
    names = sorted((outdir / "samples").iterdir())
    close(np.stack([pixels(path) for path in names]), recorded.outputs(name)["images"])
    close(pixels(outdir / "grid-0000.png"), recorded.outputs(name)["grid"])


def close(ours: np.ndarray, theirs) -> None:
    """At most 1 apart, under 5 % of the pixels: the original differs from itself by 0.2 %."""
    assert ours.shape == tuple(theirs.shape)
    apart = np.abs(ours - theirs.numpy().astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.05
