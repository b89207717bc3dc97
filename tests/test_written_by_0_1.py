"""Images, runs and caches of version 0.1 can still be replayed, resumed and read.

tests/data/written_by_0_1/README.md says how they were made. Only what users call is called here:
the commands and `ldm.load`.
"""

import csv
import json
import lzma
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import ldm
import recipe
from imagehelp import read_pixels
from quick import slow_except

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data/written_by_0_1"
SHIPPED = ROOT / "checkpoints"
ORIGINAL_ROOT = "/tmp/ldm-0.1"  # root of the repository when the files were written
RUN_PREFIX = "2026-11-29T12-00-00_"
TINY = DATA / f"logs/{RUN_PREFIX}tiny/checkpoints/last.safetensors"
LORA = DATA / f"logs/{RUN_PREFIX}lora/checkpoints/last.safetensors"
WORD = DATA / f"logs/{RUN_PREFIX}word/checkpoints/last.safetensors"

IMAGES = sorted(path.stem for path in (DATA / "images").glob("*.png") if "grid" not in path.name)
QUICK_IMAGES = ("bf16", "img2img-legacy", "legacy", "mask", "plain", "prior", "upscale")
# The machine-dependent columns of log.csv.
MEASUREMENTS = {"images_per_second", "memory_gib"}


def run_command(name: str, *argv: Any) -> int | str:
    """Run `python scripts/NAME.py ARGV …` in this process and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        try:
            runpy.run_path(str(ROOT / f"scripts/{name}.py"), run_name="__main__")
        except SystemExit as error:
            return error.code or 0
    return 0


def read_image_info(path: Path) -> dict[str, Any]:
    """Read the metadata of an image, without the hash of its pixels."""
    with Image.open(path) as image:
        info: dict[str, Any] = json.loads(image.info["ldm"])
    return {key: value for key, value in info.items() if key != "sha256"}


def copy_with_local_paths(path: Path, folder: Path) -> Path:
    """Copy an image, with the paths of its input files changed to those on this machine."""
    text = PngInfo()
    with Image.open(path) as image:
        text.add_text("ldm", image.info["ldm"].replace(ORIGINAL_ROOT, str(ROOT)))
        image.save(folder / path.name, pnginfo=text)
    return folder / path.name


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the rows of a run's log.csv, without empty cells."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v and k not in MEASUREMENTS} for row in rows]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by the name that an image records.

    Those of `models` get random weights; shipped ones get their former decoders, of `decoders`.
    """
    folder = tmp_path_factory.mktemp("models")
    for path in (DATA / "models").glob("*.json"):
        model = json.loads(path.read_text())
        shapes: dict[str, list[int]] = model["shapes"]
        state = {
            name: recipe.make_weight(name, tuple(shape), "0.1") for name, shape in shapes.items()
        }
        tables = path.with_name(f"{path.stem}-tables.safetensors")
        state |= load_file(tables) if tables.exists() else {}
        config = json.dumps(model["config"])
        save_file(state, folder / f"{path.stem}.safetensors", {"ldm.config": config})
    for name in ("demo", "demo-inpainting", "demo-upscaler"):
        decoder = DATA / f"decoders/{name.removesuffix('-inpainting')}.safetensors"
        _copy_with_weights(load_file(decoder), SHIPPED / f"{name}.safetensors", folder)
    return {TINY.name: TINY, **{path.name: path for path in folder.iterdir()}}


def _copy_with_weights(weights: dict[str, torch.Tensor], path: Path, folder: Path) -> None:
    """Copy a safetensors file byte for byte, except for some weights."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name, value in weights.items():
        first, last = header[name]["data_offsets"]
        data[start + first : start + last] = value.numpy().tobytes()
    (folder / path.name).write_bytes(data)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A copy of the folders of runs and of the caches, with the states unpacked."""
    for folder in ("logs", "cache"):
        shutil.copytree(DATA / folder, tmp_path / folder)
    for path in tmp_path.glob("logs/*/checkpoints/state-*/*.xz"):
        path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
        path.unlink()
    return tmp_path


@pytest.mark.parametrize("name", slow_except(IMAGES, *QUICK_IMAGES))
def test_an_image_replays(
    name: str, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = copy_with_local_paths(DATA / f"images/{name}.png", tmp_path), tmp_path / "new.png"
    checkpoint = read_image_info(old)["checkpoint"]
    flags = ["--ckpt", checkpoints[checkpoint]] if checkpoint in checkpoints else []
    status = run_command("replay", old, *flags, "--output", new)
    out, err = capsys.readouterr()
    difference = np.abs(read_pixels(old) - read_pixels(new))
    # Identical where it was made. Other processors sum in another order: with AVX2 or SSE4 pixels
    # were up to 1 of 255 away in float32, and up to 4 in bfloat16, which has 8 bits.
    assert difference.max() <= (2 if read_image_info(old)["dtype"] == "float32" else 12), err
    assert (status, out == "identical\n") == ((1, False) if difference.any() else (0, True))
    assert read_image_info(new) == read_image_info(old)


def test_another_checkpoint_of_the_same_name_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The decoders of the shipped models have changed since version 0.1."""
    assert run_command("replay", copy_with_local_paths(DATA / "images/mask.png", tmp_path)) == 1
    assert "\n  checkpoint: 49eec7a0b8 then, " in capsys.readouterr().out


def test_flags_name_moved_addons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = DATA / "images/addons.png", tmp_path / "new.png"
    flags = ["--ckpt", TINY, "--lora", f"{LORA}:0.7", "--embedding", WORD, "--output", new]
    assert run_command("replay", old, *flags) in (0, 1), capsys.readouterr().err
    assert np.abs(read_pixels(old) - read_pixels(new)).max() <= 2


def test_a_grid_names_its_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("replay", DATA / "images/plain-grid.png") == 1
    assert "00000.png, 00001.png" in capsys.readouterr().err


def test_the_same_command_writes_the_same_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--H 32 --W 32 --steps 4 --n_iter 1 --n_samples 2 --precision full --json --skip_grid"
    flags = [*flags.split(), "--prompt", "a cat", "--ckpt", TINY, "--outdir", tmp_path]
    assert run_command("txt2img", *flags) == 0
    new, old = json.loads(capsys.readouterr().out.splitlines()[1]), DATA / "images/plain.json"
    environment = {key: new[key] for key in ("path", "torch", "ldm", "threads")}
    expected = json.loads(old.read_text()) | environment
    expected["scheduler"] = expected.pop("grid")  # renamed; new keys may be added
    assert {key: new[key] for key in expected} == expected
    info = read_image_info(Path(new.pop("path")))
    assert {key: info[key] for key in new} == new


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param("tiny", [], marks=pytest.mark.slow),
        pytest.param(
            "lora",
            ["data.params.latents.cache={}/cache", "data.params.texts.cache={}/cache"],
            marks=pytest.mark.slow,
        ),
        ("word", ["data.params.prior.root={}/logs/class"]),
        pytest.param("autoencoder", [], marks=pytest.mark.slow),
    ],
)
def test_a_run_continues_from_its_state(name: str, overrides: list[str], runs: Path) -> None:
    arguments = [override.format(runs) for override in overrides]
    files = [*runs.glob("logs/class/*"), *runs.glob("cache/*")]
    before = {path: path.read_bytes() for path in files}
    resume = ["-t", "-r", "-n", name, "-l", runs / "logs"]
    assert run_command("train", *resume, "lightning.trainer.max_steps=4", *arguments) == 0
    log = read_log(runs / f"logs/{RUN_PREFIX}{name}/log.csv")
    expected = read_log(DATA / f"continued/{name}.csv")
    assert [row["step"] for row in log] == [row["step"] for row in expected]
    for row, expected_row in zip(log, expected, strict=True):
        # With AVX2 or SSE4 the losses were up to 1.8e-5 away.
        assert row == pytest.approx(expected_row, rel=1e-4)
    assert (runs / f"logs/{RUN_PREFIX}{name}/checkpoints/state-00000004/run.json").exists()
    # Class images, latents and contexts are read, none is computed again.
    files = [*runs.glob("logs/class/*"), *runs.glob("cache/*")]
    assert {path: path.read_bytes() for path in files} == before


def test_both_formats_of_a_lora_give_the_same_weights() -> None:
    base: Any = ldm.load(TINY).state_dict()
    kohya, diffusers = (
        ldm.load(TINY, loras=[(path, 1.0)]).state_dict()
        for path in (LORA, LORA.with_name("last-diffusers.safetensors"))
    )
    assert any(not torch.equal(value, base[name]) for name, value in kohya.items())
    assert all(torch.equal(value, diffusers[name]) for name, value in kohya.items())
