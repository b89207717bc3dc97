"""Pictures as people have them: handled as expected, or refused in one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from imaging.badpictures import REFUSED
from ldm.imaging.pixels import fitted, squeezed
from ldm.imaging.reading import mask_of, open_depth, open_mask, open_picture, save_depth


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
    opened = open_picture(path)
    assert (opened.mode, opened.size) == ("RGB", (40, 30))
    if mode != "1":
        apart = np.asarray(opened).astype(int) - np.asarray(gradient()).astype(int)
        assert np.abs(apart).mean() < 4


def test_sixteen_bits_become_eight_without_being_cut_off(tmp_path):
    levels = np.linspace(0, 65535, 40).astype(np.uint16)
    Image.fromarray(np.tile(levels, (30, 1))).save(tmp_path / "deep.png")
    opened = np.asarray(open_picture(tmp_path / "deep.png"))[0, :, 0]
    assert np.abs(opened.astype(int) - (levels / 257).round()).max() <= 1


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient().save(tmp_path / "x.jpg", exif=exif)
    assert open_picture(tmp_path / "x.jpg").size == (30, 40)


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert open_picture(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def test_of_an_animation_the_first_frame_is_used(tmp_path, caplog):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)
    assert "animated" in caplog.text


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused_in_one_line(tmp_path, name):
    make, message = REFUSED[name]
    make(tmp_path / "x.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_picture(tmp_path / "x.png")
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_size_is_fitted_or_refused(tmp_path):
    mask = Image.new("L", (20, 15))
    mask.paste(255, (0, 0, 10, 15))
    mask.save(tmp_path / "mask.png")
    fit = np.asarray(open_mask(tmp_path / "mask.png", (40, 30)))
    assert fit.shape == (30, 40)
    assert fit[:, :20].min() == 255
    assert fit[:, 20:].max() == 0
    with pytest.raises(ValueError, match="is 20x15, the picture 40x40"):
        open_mask(tmp_path / "mask.png", (40, 40))


def test_masks_grow_and_soften(tmp_path):
    gradient().save(tmp_path / "x.png")
    plain, grown, soft = (
        np.asarray(mask_of(tmp_path / "x.png", box=(10, 10, 20, 20), grow=grow, blur=blur))
        for grow, blur in ((0, 0), (3, 0), (3, 2))
    )
    assert (plain > 0).sum() == 100
    assert (grown > 0).sum() == 256
    assert 0 < soft[15, 6] < 255


def test_a_picture_without_mask_is_refused(tmp_path):
    gradient().save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="is opaque"):
        mask_of(tmp_path / "x.png")
    with pytest.raises(ValueError, match="is empty: nothing would be painted"):
        mask_of(tmp_path / "x.png", box=(500, 500, 600, 600))


def test_depth_survives_a_file_of_sixteen_bits(tmp_path):
    depth = torch.rand(1, 1, 20, 30, generator=torch.Generator().manual_seed(0)) * 9 - 4
    save_depth(tmp_path / "depth.png", depth)
    back = open_depth(tmp_path / "depth.png")
    span = (depth - depth.min()) / (depth.max() - depth.min())
    torch.testing.assert_close(back, span, rtol=0, atol=1e-4)
    inverted = open_depth(tmp_path / "depth.png", inverted=True)
    torch.testing.assert_close(inverted, 1 - back)


def test_maps_of_eight_bits_and_of_one_value_are_read(tmp_path):
    gradient("RGB").save(tmp_path / "x.png")
    assert open_depth(tmp_path / "x.png").shape == (1, 1, 30, 40)
    Image.new("L", (8, 8), 7).save(tmp_path / "flat.png")
    assert open_depth(tmp_path / "flat.png").isfinite().all()


def test_pictures_are_scaled_and_cropped_to_a_size():
    picture = gradient(size=(100, 50))
    assert fitted(picture, (None, None)) is picture
    assert fitted(picture, (64, 64)).size == (64, 64)
    assert fitted(picture, (64, None)).size == (128, 64)
    assert fitted(picture, (None, 64)).size == (64, 32)
    assert squeezed(gradient(size=(150, 100)), 64).size == (128, 64)
    with pytest.raises(ValueError, match="smaller than 64"):
        squeezed(gradient(size=(150, 50)), 64)
