"""Watermarks, compared with the package invisible-watermark (imwatermark)."""

import io
import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from goldfile import load_golden
from ldm.imaging.watermark import (
    METHODS,
    PAYLOADS,
    can_hold_watermark,
    detect_watermarks,
    embed_floats,
    embed_or_warn,
    embed_watermark,
    measure_agreement,
    read_bits,
    rgb_to_yuv,
    yuv_to_rgb,
)

SIZES = [(256, 256), (300, 222), (259, 257), (270, 265)]


def make_noise(size=(256, 256), seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def make_photo(size=(512, 512)):
    rough = make_noise((size[0] // 16, size[1] // 16)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(rough, make_noise(size, 1).filter(ImageFilter.GaussianBlur(1)), 0.3)


def make_flat(size=(512, 512)):
    image = Image.new("RGB", size, (70, 130, 230))
    draw = ImageDraw.Draw(image)
    draw.ellipse((80, 60, 430, 450), fill=(250, 20, 10))
    draw.rectangle((200, 200, 300, 240), fill=(255, 255, 255))
    return image


def compress_to_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def to_bgr(image):
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


def embed_by_package(image, payload, method):
    encoder = pytest.importorskip("imwatermark").WatermarkEncoder()
    encoder.set_watermark("bytes", payload)
    return Image.fromarray(np.ascontiguousarray(encoder.encode(to_bgr(image), method)[..., ::-1]))


def read_by_package(image, length, method):
    decoder = pytest.importorskip("imwatermark").WatermarkDecoder("bits", length)
    return np.array(decoder.decode(to_bgr(image), method), np.uint8)


@pytest.mark.parametrize("case", ["wm0", "wm1"])
def test_dwt_dct_equals_the_recorded_images_exactly(case):
    recorded = load_golden("watermark")
    image = Image.fromarray(recorded.inputs(case)["image"].numpy())
    marked = np.asarray(embed_watermark(image, b"SDV2", "dwtDct"))
    assert (marked == recorded.outputs(case)["marked"].numpy()).all()


@pytest.mark.parametrize("case", ["uint8_levels", "fractional"])
def test_the_watermark_of_sdxl_on_floats_equals_the_recorded_one(case):
    """44 of the 48 bits can be read from the recorded 8-bit image; with our method all can."""
    recorded = load_golden("sdxl_watermark")
    pixels = recorded.inputs("uint8_levels")["image"].numpy()
    values = pixels.astype(np.float32)
    if case == "fractional":
        row, column = np.mgrid[:256, :256]
        values += (0.125 * ((row + 2 * column) % 7)[..., None]).astype(np.float32)
    marked = embed_floats(values / np.float32(255) * np.float32(255), PAYLOADS["SDXL"]) / 255
    saved = (marked.clip(0, 1) * 255).astype(np.uint8)
    expected = recorded.outputs(case)
    corner = marked.clip(0, 1)[:16, :16].transpose(2, 0, 1) * 255
    np.testing.assert_allclose(corner, expected["corner"].numpy(), rtol=0, atol=1e-3)
    error = np.abs(saved.astype(int) - expected["saved"].numpy().astype(int))
    assert error.max() <= 1
    assert (error > 0).sum() < 20
    bits = read_bits(Image.fromarray(expected["saved"].numpy()), 48, "dwtDct")
    assert (bits == expected["decoded"].numpy()).all()
    assert (read_bits(Image.fromarray(saved), 48, "dwtDct") == bits).all()
    ours = embed_watermark(Image.fromarray(pixels), PAYLOADS["SDXL"])
    assert measure_agreement(ours, PAYLOADS["SDXL"]) == 1


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("size", SIZES)
def test_dwt_dct_equals_the_package_pixel_for_pixel(size, payload):
    for image in (make_noise(size), make_photo(size), make_flat(size)):
        expected = embed_by_package(image, payload, "dwtDct")
        assert (np.asarray(embed_watermark(image, payload, "dwtDct")) == np.asarray(expected)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_the_package_and_we_read_the_same_bits_from_any_image(size, method):
    plain = make_photo(size)
    by_package = embed_by_package(plain, b"SDV2", method)
    by_us = embed_watermark(plain, b"SDV2", method)
    for image, length in ((plain, 136), (by_package, 32), (by_us, 48)):
        assert (read_bits(image, length, method) == read_by_package(image, length, method)).all()


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("make", [make_photo, make_flat])
def test_the_package_reads_ours_and_we_read_the_packages(make, payload):
    image = make((256, 256))
    bits = read_by_package(embed_watermark(image, payload), len(payload) * 8, "dwtDctSvd")
    assert np.packbits(bits).tobytes() == payload
    assert measure_agreement(embed_by_package(image, payload, "dwtDctSvd"), payload) == 1


def test_yuv_equals_opencv_for_colors_of_the_whole_cube():
    cv2 = pytest.importorskip("cv2")
    first_two = np.arange(1 << 16, dtype=np.uint32)
    for third in range(0, 256, 5):
        channels = [first_two & 255, first_two >> 8, np.full_like(first_two, third)]
        colors = np.stack(channels, -1).astype(np.uint8)[None]
        yuv = np.stack(rgb_to_yuv(colors), -1)
        assert (yuv == cv2.cvtColor(colors, cv2.COLOR_RGB2YUV)).all()
        rgb = yuv_to_rgb(colors[..., 0], colors[..., 1], colors[..., 2])
        assert (rgb == cv2.cvtColor(colors, cv2.COLOR_YUV2RGB)).all()


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("make", [make_photo, make_flat])
def test_the_default_method_survives_jpeg_and_is_detected(make, name):
    image = make()
    marked = embed_watermark(image, PAYLOADS[name])
    for quality, verdicts in ((95, ["found"]), (80, ["found", "damaged"])):
        best = detect_watermarks(compress_to_jpeg(marked, quality))[0]
        assert (best.payload, best.method) == (name, "dwtDctSvd")
        assert best.verdict in verdicts
    error = np.asarray(image, float) - np.asarray(marked, float)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 38


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_originals_method_is_detected_in_a_photo(name):
    best = detect_watermarks(embed_watermark(make_noise((512, 512)), PAYLOADS[name], "dwtDct"))[0]
    assert (best.payload, best.method) == (name, "dwtDct")
    assert best.verdict == "found"


@pytest.mark.parametrize(
    "make", [make_noise, make_photo, make_flat, lambda: Image.new("L", (300, 300))]
)
def test_nothing_is_found_in_unmarked_images(make):
    findings = detect_watermarks(make())
    assert len(findings) == len(METHODS) * len(PAYLOADS)
    assert {f.verdict for f in findings} == {"absent"}


def test_a_damaged_watermark_is_detected():
    bits = np.unpackbits(np.frombuffer(b"StableDiffusionV1", np.uint8))
    bits[::7] ^= 1
    best = detect_watermarks(embed_watermark(make_noise(), bits.tolist()))[0]
    assert (best.payload, best.verdict) == ("StableDiffusionV1", "damaged")
    assert best.agreement == pytest.approx(1 - 20 / 136)


def test_the_watermark_changes_pixels_little():
    image = make_flat()
    difference = np.asarray(image, int) - np.asarray(embed_watermark(image, b"SDV2"), int)
    assert abs(difference).max() <= 14
    assert not difference[..., 0].any()


def test_small_images_are_refused():
    small = make_noise((256, 255))
    assert not can_hold_watermark(small.size)
    assert not can_hold_watermark((20000, 4))
    assert detect_watermarks(small) == []
    with pytest.raises(ValueError, match=r"image too small for a watermark: 256x255"):
        embed_watermark(small, b"SDV2")
    with pytest.raises(ValueError, match="too small"):
        read_bits(small, 32)


def test_a_small_image_is_saved_without_watermark_and_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        small = make_noise((64, 64))
        assert embed_or_warn(small, b"SDV2") is small
        assert measure_agreement(embed_or_warn(make_flat(), b"SDV2"), b"SDV2") == 1
    assert [record.getMessage() for record in caplog.records] == [
        "64x64 is too small for a watermark, saved without"
    ]


def test_a_watermark_that_cannot_be_read_back_is_warned_of(caplog):
    embed_or_warn(Image.new("RGB", (256, 256), (100, 100, 130)), b"SDV2", "dwtDct")
    assert "cannot be read back" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payload": b""}, "payload"),
        ({"payload": [0, 2]}, "payload"),
        ({"payload": [0, -1]}, "payload"),
        ({"method": "rivaGan"}, "unknown watermark `rivaGan`, choose one of dwtDctSvd, dwtDct"),
        ({"image": Image.new("RGBA", (300, 300))}, "mode `RGBA`"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        embed_watermark(**{"image": make_noise(), "payload": b"SDV2", **change})
