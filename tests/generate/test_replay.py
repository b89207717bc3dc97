"""`ldm replay`: an image is reproduced from its metadata."""

import pytest
from PIL import Image, PngImagePlugin

from imagehelp import ONE_IMAGE_FLAGS
from ldm.imaging.metadata import read_info, write_png
from ldm.runtime.hashes import find_cached_sha256
from quick import slow_except

QUICK_CASES = [
    ["--n_samples", "3"],
    ["--sampler", "euler_a", "--eta", "0.5", "--spacing", "karras", "--negative-prompt", "red"],
    ["--sampler", "euler_a_cfg_pp", "--sigmas", "14.6,0.7,0"],
    ["--precision", "bf16", "model.params.scale_factor=0.2"],
]
CASES = [
    *QUICK_CASES,
    ["--n_samples", "2", "--n_iter", "2", "--fixed_code", "--eta", "1"],
    ["--n_samples", "2", "--n_iter", "2", "--legacy", "--eta", "1"],
    ["--n_samples", "2", "--n_iter", "2", "--legacy", "--fixed_code", "--eta", "0.5"],
    ["--sampler", "euler", "--s-churn", "2", "--s-noise", "1.01"],
    ["--sampler", "dpm2", "--scheduler", "karras", "--rho", "5"],
    ["--H", "128", "--W", "128", "--tile", "64", "--steps", "1"],
]


@pytest.mark.parametrize("flags", slow_except(CASES, *QUICK_CASES), ids=" ".join)
def test_an_image_replays_identically(txt2img, run_ldm, flags):
    path = txt2img(*flags, "--skip_grid").out[-1]
    assert run_ldm("replay", path).is_identical


def test_a_different_model_is_reported_as_the_reason(txt2img, run_ldm, families, tmp_path):
    path, new = txt2img("--skip_grid").out[0], tmp_path / "new.png"
    flags = [*families["base_eps"].flags, "--output", new]
    status, (first, *reasons), _ = run_ldm("replay", path, *flags)
    assert status == 1
    assert "of the pixels differ, by" in first
    assert any(line.strip().startswith("config_hash: ") for line in reasons)
    with Image.open(new) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(("flags", "ema"), [([], True), (["--no-ema"], False)])
def test_a_replay_uses_the_weights_of_the_image(run_ldm, ema_model, tmp_path, flags, ema):
    size = ["--H", 64, "--W", 64, "--outdir", tmp_path]
    path = run_ldm("txt2img", *ema_model.flags, *ONE_IMAGE_FLAGS, *size, *flags).out[0]
    info, copy = read_info(path), tmp_path / "copy.png"
    assert info["ema"] == ema
    assert run_ldm("replay", path).is_identical
    del info["request"]["ema"]  # as in files of older versions
    with Image.open(path) as image:
        write_png(copy, image, info)
    assert run_ldm("replay", copy).is_identical
    other = "--no-ema" if ema else "--ema"
    status, (_, *reasons), _ = run_ldm("replay", path, other)
    assert status == 1
    assert f"  ema: {ema} then, {not ema} now" in reasons


def test_input_files_are_found_from_any_folder(run, run_ldm, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(photo.parent)
    path = run("img2img", "base_v", "--init-img", photo.name).out[0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_ldm("replay", path).is_identical


def test_hashes_of_large_input_files_are_cached_on_disk(run, photo, monkeypatch):
    monkeypatch.setattr("ldm.runtime.hashes.LARGE_FILE_BYTES", 1)
    (path,) = run("img2img", "base_v", "--init-img", str(photo), "--n_samples", "1").out
    assert find_cached_sha256(photo) == read_info(path)["inputs"]["init_img"][0]["sha256"]


def test_an_edited_image_is_reported_as_edited(txt2img, run_ldm, tmp_path):
    path = txt2img("--skip_grid").out[0]
    text = PngImagePlugin.PngInfo()
    with Image.open(path) as image:
        text.add_text("ldm", image.info["ldm"])
        image.putpixel((3, 3), (255, 0, 255))
        image.save(tmp_path / "edited.png", pnginfo=text)
    status, (first, *reasons), _ = run_ldm("replay", tmp_path / "edited.png")
    assert status == 1
    assert first.startswith("0.02% of the pixels differ")
    assert reasons == ["  the file was edited after it was made"]


def test_images_that_cannot_be_replayed_are_refused(txt2img, run_ldm, tmp_path):
    grid = txt2img("--n_samples", "2").out[-1]
    assert "is a grid, replay its images: 00000.png, 00001.png" in run_ldm("replay", grid).err
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    assert "contains no generation parameters" in run_ldm("replay", plain).err
    write_png(plain, Image.new("RGB", (8, 8)), {"prompt": "a fox"})
    assert "`seed` is missing" in run_ldm("replay", plain).err


def test_a_package_named_in_an_image_is_not_imported_unless_allowed_again(txt2img, run_ldm):
    path = txt2img("--skip_grid", "--allow-module", "subprocess").out[0]
    error = run_ldm("replay", path).error
    assert "made with classes of `subprocess`: allow it again if you trust" in error
    assert "(--allow-module)" in error
    assert run_ldm("replay", path, "--allow-module", "subprocess").is_identical


@pytest.mark.parametrize(("key", "value"), [("dtype", "int8"), ("inputs", 5), ("line", 5)])
def test_damaged_parameters_are_refused_in_one_line(txt2img, run_ldm, key, value, tmp_path):
    path, copy = txt2img("--skip_grid").out[0], tmp_path / "copy.png"
    with Image.open(path) as image:
        write_png(copy, image, read_info(path) | {key: value})
    assert f"generation parameters in {copy} are damaged" in run_ldm("replay", copy).error


def test_a_missing_folder_is_named_before_an_image_is_made(txt2img, run_ldm, tmp_path):
    path = txt2img("--skip_grid").out[0]
    error = run_ldm("replay", path, "--output", tmp_path / "no/new.png").error
    assert error.endswith("no` to save `new.png` in (--output)")


def test_a_missing_checkpoint_is_named(txt2img, run_ldm, tiny_model, tmp_path):
    path = txt2img("--skip_grid").out[0]
    tiny_model.ckpt.rename(tmp_path / "elsewhere.safetensors")
    result = run_ldm("replay", path)
    (tmp_path / "elsewhere.safetensors").rename(tiny_model.ckpt)
    assert "made with base_v.safetensors (hash " in result.error
