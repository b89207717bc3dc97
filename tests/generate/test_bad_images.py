"""Unusual image files as inputs of commands: used, or refused in one line."""

import numpy as np
import pytest
from PIL import Image

from imagehelp import read_pixels
from imaging.badimages import UNREADABLE_FILES

TASKS = ["inpaint", "depth2img", "upscale", "unclip"]


@pytest.fixture
def refuse(run_ldm):
    """Runs a command that refuses its input before it loads a model; returns its error line."""

    def refuse(task, *flags):
        result = run_ldm(task, "--ckpt", "absent.ckpt", "--outdir", "absent", *flags)
        assert result.err.count("\n") == 1
        return result.error

    return refuse


CASES = [*(("img2img", name) for name in UNREADABLE_FILES), *((task, "cut") for task in TASKS)]


@pytest.mark.parametrize(("task", "name"), CASES)
def test_a_file_that_is_not_an_image_is_refused_in_one_line(refuse, tmp_path, task, name):
    write, message = UNREADABLE_FILES[name]
    write(tmp_path / "x.png")
    box = ["--mask-box", "1,1,9,9"] if task == "inpaint" else []
    assert message in refuse(task, "--init-img", tmp_path / "x.png", *box)


def test_a_file_that_is_not_a_mask_or_depth_map_is_refused_in_one_line(refuse, tmp_path, photo):
    (tmp_path / "x.png").write_text("<html>")
    for task, flag in (("inpaint", "--mask"), ("depth2img", "--depth-map")):
        line = refuse(task, "--init-img", photo, flag, tmp_path / "x.png")
        assert "is a web page, not an image" in line
    Image.new("L", (10, 70), 255).save(tmp_path / "x.png")
    line = refuse("inpaint", "--init-img", photo, "--mask", tmp_path / "x.png")
    assert "is 10x70, the image 60x70" in line


def test_a_gray_animation_is_used_as_the_rgb_image_of_its_first_frame(run, tmp_path):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (40, 1)))
    flipped = ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ramp.convert("RGB").save(tmp_path / "plain.png")
    ramp.save(tmp_path / "animated.gif", save_all=True, append_images=[flipped])
    flags = ["--steps", "1", "--init-img"]
    expected = read_pixels(run("img2img", "base_v", *flags, tmp_path / "plain.png").out[0])
    assert expected.shape == (40, 48, 3)
    status, out, err = run("img2img", "base_v", *flags, tmp_path / "animated.gif")
    assert status == 0, err
    assert (read_pixels(out[0]) == expected).all()
    assert "animated.gif` is animated or has several pages, the first is used" in err
