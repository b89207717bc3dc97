"""Commands with models of color and depth: files, depth as an input, replay, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagehelp import QUICK_FLAGS, read_pixels
from ldm.imaging.metadata import read_info
from ldm.imaging.rgbd import join_side_by_side
from loading.tinyfamilies import write_family


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm3d")
    for name in ("ldm3d", "ldm3d-4c", "ldm3d-sr", "sd1"):
        write_family(name, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with an image of 40x24, its depth in 16 and in 8 bits, and unsuitable depth maps."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (24, 40, 3), np.uint8)).save(folder / "cat.png")
    levels = rng.integers(0, 256, (24, 40), np.uint8)
    Image.fromarray(levels.astype(np.uint16) * 257).save(folder / "cat_depth.png")
    Image.fromarray(levels).save(folder / "depth8.png")
    Image.fromarray(levels[:, :20]).save(folder / "narrow.png")
    Image.fromarray(levels.astype(np.float32) * 0.3).save(folder / "metres.tif")
    return folder


@pytest.fixture
def run(models, tmp_path, run_ldm):
    """Runs a command with a model; see `run_ldm`."""

    def run(command, name, *flags):
        model = ["--ckpt", models / f"{name}.safetensors", "--outdir", tmp_path]
        return run_ldm(command, *model, *QUICK_FLAGS, *flags)

    return run


def test_txt2img_saves_color_depth_grid_and_relief(run, run_ldm, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    flags = ("--H", 64, "--W", 128, "--n_samples", 2, "--glb", "--prompt", "a cat")
    status, lines, err = run("txt2img", "ldm3d", *flags)
    names = ["00000.png", "00000_depth.png", "00000.glb", "00001.png", "00001_depth.png",
             "00001.glb", "grid-0000.png"]  # fmt: skip
    assert status == 0
    assert [Path(line).name for line in lines] == names
    info = read_info(tmp_path / "samples/00000.png")
    low, high = info["depth_range"]
    assert f"depth of 00000.png: {low} … {high} of 65535" in err
    with Image.open(tmp_path / "samples/00000_depth.png") as depth:
        assert (depth.mode, depth.size, depth.getextrema()) == ("I;16", (128, 64), (low, high))
        assert read_info(tmp_path / "samples/00000_depth.png")["image"] == "depth"
        with Image.open(tmp_path / "samples/00000.png") as image:
            joined = np.asarray(join_side_by_side(image, depth))
    assert np.array_equal(read_pixels(tmp_path / "grid-0000.png")[2:66, 2:258], joined)
    mesh = trimesh.load(tmp_path / "samples/00000.glb", force="mesh")
    assert len(mesh.faces) == 2 * 63 * 127
    assert f"{len(mesh.faces)} triangles" in err
    for name in ("00000.png", "00001_depth.png"):
        assert run_ldm("replay", tmp_path / "samples" / name).is_identical


@pytest.mark.slow
def test_img2img_reads_depth_and_numbers_continue(run, tmp_path, inputs):
    flags = ("--init-img", inputs / "cat.png", "--skip_grid", "--strength", 0)
    for depth in ("cat_depth.png", "depth8.png"):
        assert run("img2img", "ldm3d-4c", *flags, "--depth", inputs / depth).status == 0
    from_16_bits, from_8_bits = (tmp_path / f"samples/0000{k}.png" for k in range(2))
    assert np.array_equal(read_pixels(from_16_bits), read_pixels(from_8_bits))
    from_16_bits.unlink()
    _, lines, _ = run("img2img", "ldm3d-4c", *flags, "--depth", inputs / "depth8.png", "--json")
    info = json.loads(lines[0])
    names = [Path(info[key]).name for key in ("path", "depth_path")]
    assert names == ["00002.png", "00002_depth.png"]
    assert read_info(from_8_bits)["inputs"]["depth"][0]["path"] == str(inputs / "depth8.png")


def test_a_folder_of_images_with_depth_is_an_input_of_img2img(run, tmp_path, inputs):
    (tmp_path / "in").mkdir()
    for name in ("cat.png", "cat_depth.png"):
        (tmp_path / "in" / name).write_bytes((inputs / name).read_bytes())
    flags = ("--indir", tmp_path / "in", "--depth", tmp_path / "in")
    _, lines, _ = run("img2img", "ldm3d-4c", *flags)
    assert [Path(line).name for line in lines] == ["cat.png", "cat_depth.png"]


def test_inpainting_keeps_depth_outside_the_mask(run, tmp_path, inputs):
    flags = ("--init-img", inputs / "cat.png", "--depth", inputs / "cat_depth.png", "--skip_grid")
    assert run("inpaint", "ldm3d-4c", *flags, "--mask-box", "8,8,16,16").status == 0
    with (
        Image.open(tmp_path / "samples/00000_depth.png") as new,
        Image.open(inputs / "cat_depth.png") as old,
    ):
        difference = np.abs(np.asarray(new, int) - np.asarray(old, int))
    assert difference[:, 17:].max() <= 1  # depth is truncated, not rounded
    assert difference[8:16, 8:16].max() > 1


@pytest.mark.slow
def test_color_and_depth_are_upscaled(run, tmp_path, inputs):
    flags = ("--init-img", inputs / "cat.png", "--depth", inputs / "cat_depth.png", "--skip_grid")
    for size in (["--target-size", "50,70"], []):
        assert run("upscale", "ldm3d-sr", *flags, *size).status == 0
    for name, size in {"00000": (70, 50), "00001_depth": (80, 48)}.items():
        with Image.open(tmp_path / f"samples/{name}.png") as image:
            assert image.size == size


def test_inputs_that_do_not_fit_are_refused_in_one_line(run, inputs, monkeypatch):
    image, depth = ("--init-img", inputs / "cat.png"), inputs / "cat_depth.png"
    cases = [
        ("img2img", "ldm3d", image, "`ldm3d.safetensors` also needs the depth of the image"),
        ("upscale", "ldm3d-sr", image, "also needs the depth of the image"),
        ("img2img", "ldm3d", (*image, "--depth", inputs / "narrow.png"),
         "the depth is 20x24, the image 40x24"),
        ("img2img", "ldm3d", (*image, "--depth", inputs / "metres.tif"), "not 0 … 1"),
        ("img2img", "sd1", (*image, "--depth", depth), "makes images without depth"),
        ("txt2img", "sd1", ("--glb",), "makes images without depth"),
        ("txt2img", "ldm3d", ("--glb",), "pip install trimesh"),
    ]  # fmt: skip
    monkeypatch.setattr("ldm.loading.load.fill_weights", None)  # must not be reached
    for command, name, flags, message in cases:
        if message == "pip install trimesh":
            monkeypatch.setattr("ldm.imaging.mesh.find_spec", lambda name: None)
        assert message in run(command, name, *flags).error
