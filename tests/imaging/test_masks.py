"""Masks and depth maps in image files of many kinds."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.imaging.depth import load_depth, save_depth
from ldm.imaging.masks import load_mask, make_mask

REGION = np.zeros((30, 40), bool)
REGION[10:20, 10:30] = True


def make_layer(color, alpha):
    """Make a layer of one color, with the opacity `alpha` in the shape and 0 elsewhere."""
    image = Image.new("RGBA", (40, 30), color)
    image.putalpha(Image.fromarray(REGION.astype(np.uint8) * alpha))
    return image


def make_palette_image(*palette, indices=REGION):
    image = Image.fromarray(indices.astype(np.uint8)).convert("P")
    image.putdata(indices.astype(np.uint8).ravel().tolist())
    image.putpalette([channel for color in palette for channel in color])
    return image


def paint_shape(color, background="black"):
    image = Image.new("RGB", (40, 30), background)
    image.paste(color, mask=Image.fromarray(REGION.astype(np.uint8) * 255))
    return image


NEARLY_OPAQUE = paint_shape("white").convert("RGBA")
NEARLY_OPAQUE.putpixel((0, 0), (0, 0, 0, 254))
TRANSPARENT_CORNER = paint_shape("white").convert("RGBA")
TRANSPARENT_CORNER.putpixel((0, 0), (255, 255, 255, 0))
LABELS = REGION.astype(int)
LABELS[10, 10:30] = 2  # a second class within the shape
FLOATS = np.where(REGION, np.float32(0.003), np.float32(0))
FLOATS[0, 0] = np.nan


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(REGION.astype(np.uint8)), "png"),
        (Image.fromarray(REGION.astype(np.uint8) * 255), "bmp"),
        (Image.fromarray(REGION), "png"),
        (Image.fromarray(REGION.astype(np.uint16)), "png"),
        (Image.fromarray(REGION.astype(np.uint16) * 65535), "tif"),
        (Image.fromarray(REGION.astype(np.int32) * 7 - 3), "tif"),
        (Image.fromarray(FLOATS), "tif"),
        (paint_shape("red"), "png"),
        (paint_shape("red"), "webp"),
        (paint_shape((128, 128, 128), (127, 127, 127)), "png"),
        (make_layer("white", 255), "png"),
        (make_layer("black", 255), "tif"),
        (make_layer("red", 90), "webp"),
        (make_layer("white", 255).convert("LA"), "png"),
        (NEARLY_OPAQUE, "png"),
        (TRANSPARENT_CORNER, "png"),
        (make_palette_image((0, 0, 0), (128, 0, 0)), "png"),
        (make_palette_image((0, 0, 0), (0, 0, 128)), "gif"),
        (make_palette_image((255, 255, 255), (0, 0, 0), indices=~REGION), "png"),
        (make_palette_image((0, 0, 0), (128, 0, 0), (0, 128, 0), indices=LABELS), "png"),
    ],
)
def test_the_masked_area_is_found(tmp_path, image, suffix):
    image.save(tmp_path / f"mask.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    mask = make_mask(tmp_path / "x.png", tmp_path / f"mask.{suffix}")
    assert (np.asarray(mask) == REGION * 255).all()


def test_a_color_key_is_transparency(tmp_path):
    paint_shape("white").save(tmp_path / "mask.png", transparency=(0, 0, 0))
    mask = load_mask(tmp_path / "mask.png", (40, 30))
    assert (np.asarray(mask) == REGION * 255).all()


@pytest.mark.parametrize("factor", [1, 257])
def test_masks_of_more_than_two_values_are_not_changed(tmp_path, factor):
    soft = np.tile(np.arange(40, dtype=np.uint16) * 6, (30, 1))
    pixels = (soft * factor).astype(np.uint16 if factor > 1 else np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert (np.asarray(load_mask(tmp_path / "mask.png", (40, 30))) == soft).all()


def test_a_mask_of_another_size_is_resized_or_refused(tmp_path, caplog):
    Image.fromarray(REGION).resize((20, 15)).save(tmp_path / "mask.png")
    resized = np.asarray(load_mask(tmp_path / "mask.png", (40, 30)))
    assert (resized == REGION * 255).all()
    assert "is resized to 40x30" in caplog.text
    with pytest.raises(ValueError, match="is 20x15, the image 40x40"):
        load_mask(tmp_path / "mask.png", (40, 40))


def test_masks_are_grown_and_blurred(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    plain, grown, blurred = (
        np.asarray(make_mask(tmp_path / "x.png", box=(10, 10, 20, 20), grow=grow, blur=blur))
        for grow, blur in ((0, 0), (3, 0), (3, 2))
    )
    assert (plain > 0).sum() == 100
    assert (grown > 0).sum() == 256
    assert 0 < blurred[15, 6] < 255


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Image.new("L", (40, 30)), "nothing would be inpainted$"),
        (Image.new("RGBA", (40, 30), (9, 9, 9, 255)), "its highest value is 9 of 255"),
        (Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 3, (30, 1))), "is 117 of 255"),
        (Image.fromarray(LABELS.astype(np.uint8)), "its highest value is 2 of 255"),
    ],
)
def test_an_empty_mask_is_refused(tmp_path, mask, reason):
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    mask.save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=rf"x\.png` is empty: .*{reason}"):
        make_mask(tmp_path / "x.png", tmp_path / "mask.png")


def test_without_a_mask_the_transparent_pixels_are_inpainted(tmp_path):
    make_layer("red", 255).save(tmp_path / "x.png")
    assert (np.asarray(make_mask(tmp_path / "x.png")) == ~REGION * 255).all()
    paint_shape("red").save(tmp_path / "x.png", transparency=(255, 0, 0))
    assert (np.asarray(make_mask(tmp_path / "x.png")) == REGION * 255).all()
    paint_shape("red").save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="has no transparency"):
        make_mask(tmp_path / "x.png")
    with pytest.raises(ValueError, match="is empty: nothing would be inpainted"):
        make_mask(tmp_path / "x.png", box=(500, 500, 600, 600))


def test_depth_is_saved_in_16_bits(tmp_path):
    depth = torch.rand(1, 1, 20, 30, generator=torch.Generator().manual_seed(0)) * 9 - 4
    save_depth(tmp_path / "depth.png", depth)
    loaded = load_depth(tmp_path / "depth.png")
    normalized = (depth - depth.min()) / (depth.max() - depth.min())
    torch.testing.assert_close(loaded, normalized, rtol=0, atol=1e-4)
    inverted = load_depth(tmp_path / "depth.png", inverted=True)
    torch.testing.assert_close(inverted, 1 - loaded)


RAMP = np.arange(64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray((RAMP * 16).astype(np.uint16)), "png"),
        (Image.frombytes("I;16B", (64, 64), (RAMP * 16).astype(">u2").tobytes()), "tif"),
        (Image.fromarray((RAMP * 100000 - 9000).astype(np.int32)), "tif"),
        (Image.fromarray(RAMP.astype(np.float32) * 0.1 - 50), "tif"),
        (Image.fromarray((RAMP * 16).astype(np.uint16)), "pgm"),
    ],
)
def test_a_depth_map_of_any_bit_depth_is_normalized_to_0_1(tmp_path, image, suffix):
    image.save(tmp_path / f"x.{suffix}")
    expected = torch.from_numpy(RAMP / 4095).float()[None, None]
    torch.testing.assert_close(load_depth(tmp_path / f"x.{suffix}"), expected, rtol=0, atol=1e-4)


def test_a_depth_map_with_colors_logs_a_warning(tmp_path, caplog):
    paint_shape("red").save(tmp_path / "x.png")
    assert (load_depth(tmp_path / "x.png")[0, 0].numpy() == REGION).all()
    assert "x.png` has colors: their gray values are used as depth" in caplog.text


def test_non_finite_values_do_not_change_the_range(tmp_path, caplog):
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "x.tif")
    depth = load_depth(tmp_path / "x.tif").flatten()
    assert depth[:3].tolist() == [0, 1, 0]
    torch.testing.assert_close(depth[3:], torch.arange(4093) / 4092)
    assert "x.tif` has 3 values that are NaN or infinite" in caplog.text


def test_depth_maps_of_eight_bits_and_of_one_value_are_read(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (8, 1)))
    ramp.convert("RGB").save(tmp_path / "x.png")
    assert load_depth(tmp_path / "x.png")[0, 0, 3].tolist() == (torch.arange(64) / 63).tolist()
    Image.new("L", (8, 8), 7).save(tmp_path / "flat.png")
    assert not load_depth(tmp_path / "flat.png").any()


def test_labels_with_255_for_ignored_pixels_log_a_warning(tmp_path, caplog):
    """COCO and VOC label ignored pixels with 255, in a thin border."""
    values = np.zeros((8, 8), np.uint8)
    values[2:6, 2:6], values[1, 2:6] = 1, 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    mask = np.asarray(load_mask(tmp_path / "mask.png", (8, 8)))
    assert (mask == np.where(values == 1, 255, 0)).all()
    assert "looks like class labels with 255" in caplog.text


def test_a_photo_given_as_mask_logs_a_warning(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    load_mask(tmp_path / "photo.png", (8, 8))
    assert "photo.png` is a color image: bright areas" in caplog.text
    caplog.clear()
    soft = np.random.default_rng(0).integers(0, 255, (8, 8, 1), np.uint8).repeat(3, 2)
    Image.fromarray(soft).save(tmp_path / "soft.png")
    load_mask(tmp_path / "soft.png", (8, 8))
    assert not caplog.text
