"""Pictures as people have them, through the scripts: made of, or refused in one line."""

import numpy as np
import pytest
from PIL import Image

from imaging.badimages import REFUSED
from ldm.commands.main import main
from picturehelp import pixels

TASKS = ["img2img", "inpaint", "depth2img", "upscale", "unclip"]


def refused(task, capsys, *flags):
    """The one line with which a command says no; no model is loaded for that."""
    words = ["--ckpt", "absent.ckpt", "--outdir", "absent", *map(str, flags)]
    assert main([task, *words]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("task", TASKS)
def test_what_is_no_picture_is_refused_in_one_line(capsys, tmp_path, task, name):
    make, message = REFUSED[name]
    make(tmp_path / "x.png")
    box = ["--mask-box", "1,1,9,9"] if task == "inpaint" else []
    assert message in refused(task, capsys, "--init-img", tmp_path / "x.png", *box)


def test_what_is_no_mask_and_no_map_is_refused_in_one_line(capsys, tmp_path, photo):
    (tmp_path / "x.png").write_text("<html>")
    for task, flag in (("inpaint", "--mask"), ("depth2img", "--depth-map")):
        line = refused(task, capsys, "--init-img", photo, flag, tmp_path / "x.png")
        assert "is a web page, not an image" in line
    Image.new("L", (10, 70), 255).save(tmp_path / "x.png")
    line = refused("inpaint", capsys, "--init-img", photo, "--mask", tmp_path / "x.png")
    assert line.endswith("is 10x70, the image 60x70")


@pytest.fixture(scope="module")
def ramp():
    values = np.linspace(0, 255, 48).astype(np.uint8)
    return Image.fromarray(np.tile(values, (40, 1)))


SAVED = {
    "grey.png": lambda ramp, path: ramp.save(path),
    "palette.png": lambda ramp, path: ramp.convert("P").save(path),
    "deep.png": lambda ramp, path: deep(ramp).save(path),
    "alpha.png": lambda ramp, path: ramp.convert("LA").save(path),
    "animated.gif": lambda ramp, path: ramp.save(path, save_all=True, append_images=[bent(ramp)]),
    "turned.png": lambda ramp, path: ramp.transpose(Image.Transpose.ROTATE_90).save(
        path, exif=camera(6)
    ),
    "inks.tiff": lambda ramp, path: ramp.convert("RGB").convert("CMYK").save(path),
}


def deep(ramp):
    return Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)


def bent(ramp):
    return ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def camera(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_whatever_is_a_picture_is_used_as_people_expect(run, ramp, tmp_path):
    ramp.convert("RGB").save(tmp_path / "plain.png")
    flags = ["--n_samples", "1", "--steps", "1", "--init-img"]
    expected = pixels(run("img2img", "base_v", *flags, tmp_path / "plain.png")[1][0])
    assert expected.shape == (40, 48, 3)
    for name, save in SAVED.items():
        save(ramp, tmp_path / name)
        status, out, err = run("img2img", "base_v", *flags, tmp_path / name)
        assert status == 0, (name, err)
        assert (pixels(out[0]) == expected).all(), name
        assert ("animated" in err) == (name == "animated.gif")
