"""scripts/replay.py: a picture tells how it was made, and is made again."""

import pytest
from PIL import Image, PngImagePlugin

from ldm.commands.main import main
from ldm.imaging.metadata import write_png
from quick import some

QUICK = ["--steps=2", "--n_samples=1", "--n_iter=1", "--H=64", "--W=64", "--precision=full"]


@pytest.fixture
def shots(tiny, tmp_path, capsys):
    """Makes pictures and returns their paths."""

    def shots(*flags: str) -> list[str]:
        outdir = ["--outdir", str(tmp_path / "out")]
        assert main(["txt2img", *tiny.flags, *QUICK, *outdir, *flags]) == 0
        return capsys.readouterr().out.splitlines()

    return shots


@pytest.fixture
def again(tiny, capsys):
    def again(path: str, *flags: str) -> tuple[int, str]:
        status = main(["replay", path, "--ckpt", str(tiny.ckpt), *flags])
        out, err = capsys.readouterr()
        return status, out if status < 2 and out else err

    return again


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


@pytest.mark.parametrize("flags", some(CASES, *QUICK_CASES), ids=" ".join)
def test_a_picture_is_made_again_identically(shots, again, flags):
    path = shots(*flags, "--skip_grid")[-1]
    assert again(path) == (0, "identical\n")


def test_a_different_model_is_named_as_the_reason(shots, again, models, tmp_path):
    path = shots("--skip_grid")[0]
    other = models["base_eps"]
    new = str(tmp_path / "new.png")
    flags = ["--ckpt", str(other.ckpt), "--config", str(other.config), "--output", new]
    status, out = again(path, *flags)
    assert status == 1
    first, *reasons = out.splitlines()
    assert "of the pixels differ, by" in first
    assert any(line.strip().startswith("config_hash: ") for line in reasons)
    with Image.open(new) as picture:
        assert picture.size == (64, 64)


def test_input_files_are_found_from_any_folder(tiny, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(photo.parent)
    flags = ["--init-img", photo.name, "--n_samples", "1", "--steps", "2", "--skip_grid"]
    assert main(["img2img", *tiny.flags, *flags, "--outdir", str(tmp_path / "out")]) == 0
    path = capsys.readouterr().out.strip()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["replay", path]) == 0


def test_an_edited_picture_is_told_from_a_changed_program(shots, again, tmp_path):
    path = shots("--skip_grid")[0]
    text = PngImagePlugin.PngInfo()
    with Image.open(path) as picture:
        text.add_text("ldm", picture.info["ldm"])
        picture.putpixel((3, 3), (255, 0, 255))
        picture.save(tmp_path / "edited.png", pnginfo=text)
    status, out = again(str(tmp_path / "edited.png"))
    assert status == 1
    assert out.splitlines()[0].startswith("0.02% of the pixels differ")
    assert out.splitlines()[1:] == ["  the file was edited after it was made"]


def test_pictures_that_cannot_be_made_again_are_refused(shots, again, tmp_path):
    grid = shots("--n_samples", "2")[-1]
    assert "is a grid, replay its images: 00000.png, 00001.png" in again(grid)[1]
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    assert "contains no generation metadata" in again(str(plain))[1]
    write_png(plain, Image.new("RGB", (8, 8)), {"prompt": "a fox"})
    assert "`seed` is missing" in again(str(plain))[1]


def test_a_checkpoint_that_is_not_at_hand_is_asked_for(shots, tiny, tmp_path, capsys):
    path = shots("--skip_grid")[0]
    assert main(["replay", path]) == 0
    tiny.ckpt.rename(tmp_path / "elsewhere.safetensors")
    assert main(["replay", path]) == 1
    (tmp_path / "elsewhere.safetensors").rename(tiny.ckpt)
    assert "made with base_v.safetensors (hash " in capsys.readouterr().err
