"""Image files of all kinds: read as expected, or refused in one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from imaging.badimages import REFUSED
from ldm.imaging.reading import load_depth, load_image, load_mask, make_mask, save_depth


def gradient(mode="RGB", size=(40, 30)):
    ramp = np.linspace(0, 255, size[0]).astype(np.uint8)
    return Image.fromarray(np.tile(ramp, (size[1], 1))).convert(mode)


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("LA", "png"), ("YCbCr", "jpg"),
     ("RGB", "webp"), ("RGB", "bmp"), ("P", "gif")],
)  # fmt: skip
def test_every_mode_becomes_the_same_rgb(tmp_path, mode, ending):
    path = tmp_path / f"x.{ending}"
    gradient(mode).save(path)
    opened = load_image(path)
    assert (opened.mode, opened.size) == ("RGB", (40, 30))
    if mode != "1":
        apart = np.asarray(opened).astype(int) - np.asarray(gradient()).astype(int)
        assert np.abs(apart).mean() < 4


def test_sixteen_bits_become_eight_without_being_cut_off(tmp_path):
    levels = np.linspace(0, 65535, 40).astype(np.uint16)
    Image.fromarray(np.tile(levels, (30, 1))).save(tmp_path / "deep.png")
    opened = np.asarray(load_image(tmp_path / "deep.png"))[0, :, 0]
    assert np.abs(opened.astype(int) - (levels / 257).round()).max() <= 1


def test_images_are_turned_as_their_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient().save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").size == (30, 40)


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def test_of_an_animation_the_first_frame_is_used(tmp_path, caplog):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)
    assert "animated" in caplog.text


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_an_image_is_refused_in_one_line(tmp_path, name):
    write, message = REFUSED[name]
    write(tmp_path / "x.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_image(tmp_path / "x.png")
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_size_is_fitted_or_refused(tmp_path):
    mask = Image.new("L", (20, 15))
    mask.paste(255, (0, 0, 10, 15))
    mask.save(tmp_path / "mask.png")
    fit = np.asarray(load_mask(tmp_path / "mask.png", (40, 30)))
    assert fit.shape == (30, 40)
    assert fit[:, :20].min() == 255
    assert fit[:, 20:].max() == 0
    with pytest.raises(ValueError, match="is 20x15, the image 40x40"):
        load_mask(tmp_path / "mask.png", (40, 40))


def test_masks_grow_and_soften(tmp_path):
    gradient().save(tmp_path / "x.png")
    plain, grown, soft = (
        np.asarray(make_mask(tmp_path / "x.png", box=(10, 10, 20, 20), grow=grow, blur=blur))
        for grow, blur in ((0, 0), (3, 0), (3, 2))
    )
    assert (plain > 0).sum() == 100
    assert (grown > 0).sum() == 256
    assert 0 < soft[15, 6] < 255


def test_an_image_without_mask_is_refused(tmp_path):
    gradient().save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="has no transparency"):
        make_mask(tmp_path / "x.png")
    with pytest.raises(ValueError, match="is empty: nothing would be inpainted"):
        make_mask(tmp_path / "x.png", box=(500, 500, 600, 600))


def test_depth_survives_a_file_of_sixteen_bits(tmp_path):
    depth = torch.rand(1, 1, 20, 30, generator=torch.Generator().manual_seed(0)) * 9 - 4
    save_depth(tmp_path / "depth.png", depth)
    back = load_depth(tmp_path / "depth.png")
    span = (depth - depth.min()) / (depth.max() - depth.min())
    torch.testing.assert_close(back, span, rtol=0, atol=1e-4)
    inverted = load_depth(tmp_path / "depth.png", inverted=True)
    torch.testing.assert_close(inverted, 1 - back)


def test_maps_of_eight_bits_and_of_one_value_are_read(tmp_path):
    gradient("RGB").save(tmp_path / "x.png")
    assert load_depth(tmp_path / "x.png").shape == (1, 1, 30, 40)
    Image.new("L", (8, 8), 7).save(tmp_path / "flat.png")
    assert load_depth(tmp_path / "flat.png").isfinite().all()
