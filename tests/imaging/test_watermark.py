import io
import logging
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from goldfile import gold
from ldm.imaging.watermark import (
    METHODS,
    PAYLOADS,
    _to_rgb,
    _to_yuv,
    agreement,
    can_hold,
    embed,
    identify,
    mark,
    read,
)

SIZES = [(256, 256), (300, 222), (259, 257), (270, 265)]


def _noise(size=(256, 256), seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def _photo_like(size=(512, 512)):
    rough = _noise((size[0] // 16, size[1] // 16)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(rough, _noise(size, 1).filter(ImageFilter.GaussianBlur(1)), 0.3)


def _flat(size=(512, 512)):
    picture = Image.new("RGB", size, (70, 130, 230))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((80, 60, 430, 450), fill=(250, 20, 10))
    draw.rectangle((200, 200, 300, 240), fill=(255, 255, 255))
    return picture


def _as_jpeg(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _bgr(picture):
    return np.ascontiguousarray(np.asarray(picture)[..., ::-1])


def _package_embed(picture, payload, method):
    encoder = pytest.importorskip("imwatermark").WatermarkEncoder()
    encoder.set_watermark("bytes", payload)
    return Image.fromarray(np.ascontiguousarray(encoder.encode(_bgr(picture), method)[..., ::-1]))


def _package_read(picture, length, method):
    decoder = pytest.importorskip("imwatermark").WatermarkDecoder("bits", length)
    return np.array(decoder.decode(_bgr(picture), method), np.uint8)


def _psnr(a, b):
    error = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return 10 * np.log10(255**2 / (error**2).mean())


@pytest.mark.parametrize("case", ["wm0", "wm1"])
def test_dwt_dct_equals_the_recorded_pictures_exactly(case):
    recorded = gold("watermark")
    picture = Image.fromarray(recorded.inputs(case)["image"].numpy())
    marked = np.asarray(embed(picture, b"SDV2", "dwtDct"))
    assert (marked == recorded.outputs(case)["marked"].numpy()).all()


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("size", SIZES)
def test_dwt_dct_equals_the_package_pixel_for_pixel(size, payload):
    for picture in (_noise(size), _photo_like(size), _flat(size)):
        expected = _package_embed(picture, payload, "dwtDct")
        assert (np.asarray(embed(picture, payload, "dwtDct")) == np.asarray(expected)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_the_package_and_we_read_the_same_bits_from_anything(size, method):
    plain = _photo_like(size)
    theirs, ours = _package_embed(plain, b"SDV2", method), embed(plain, b"SDV2", method)
    for picture in (plain, theirs, ours):
        for length in (32, 48, 136):
            expected = _package_read(picture, length, method)
            assert (read(picture, length, method) == expected).all()


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("picture", [_photo_like(), _flat()], ids=["photo", "flat"])
def test_the_package_reads_ours_and_we_read_the_packages(picture, payload):
    bits = _package_read(embed(picture, payload), len(payload) * 8, "dwtDctSvd")
    assert np.packbits(bits).tobytes() == payload
    assert agreement(_package_embed(picture, payload, "dwtDctSvd"), payload) == 1


def test_yuv_equals_opencv_for_every_colour():
    cv2 = pytest.importorskip("cv2")
    low = np.arange(1 << 16, dtype=np.uint32)
    for high in range(0, 256, 5):
        cube = np.stack([low & 255, low >> 8, np.full_like(low, high)], -1).astype(np.uint8)[None]
        planes = _to_yuv(cube)
        assert (np.stack(planes, -1) == cv2.cvtColor(cube, cv2.COLOR_RGB2YUV)).all()
        back = _to_rgb(cube[..., 0], cube[..., 1], cube[..., 2])
        assert (back == cv2.cvtColor(cube, cv2.COLOR_YUV2RGB)).all()


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("picture", [_photo_like(), _flat()], ids=["photo", "flat"])
def test_the_default_survives_jpeg_and_is_identified(picture, name):
    marked = embed(picture, PAYLOADS[name])
    for quality, verdicts in ((95, ["found"]), (80, ["found", "damaged"])):
        best = identify(_as_jpeg(marked, quality))[0]
        assert (best.payload, best.method) == (name, "dwtDctSvd")
        assert best.verdict in verdicts
    assert _psnr(picture, marked) > 38


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_originals_method_is_identified_in_a_photo(name):
    best = identify(embed(_noise((512, 512)), PAYLOADS[name], "dwtDct"))[0]
    assert (best.payload, best.method) == (name, "dwtDct")
    assert best.verdict == "found"


@pytest.mark.parametrize("picture", [_noise(), _photo_like(), _flat(), Image.new("L", (300, 300))])
def test_nothing_is_found_in_unmarked_pictures(picture):
    findings = identify(picture)
    assert len(findings) == len(METHODS) * len(PAYLOADS)
    assert {f.verdict for f in findings} == {"absent"}


def test_a_damaged_watermark_is_named():
    bits = np.unpackbits(np.frombuffer(b"StableDiffusionV1", np.uint8))
    bits[::7] ^= 1
    best = identify(embed(_noise(), bits.tolist()))[0]
    assert (best.payload, best.verdict) == ("StableDiffusionV1", "damaged")
    assert best.agreement == pytest.approx(1 - 20 / 136)


def test_the_mark_leaves_small_changes_only():
    picture = _flat()
    difference = np.asarray(picture, int) - np.asarray(embed(picture, b"SDV2"), int)
    assert abs(difference).max() <= 14
    assert not difference[..., 0].any()


def test_small_pictures_are_refused_and_saved_without():
    small = _noise((256, 255))
    assert not can_hold(small)
    assert not can_hold(_noise((20000, 4)))
    assert identify(small) == []
    with pytest.raises(ValueError, match=r"image too small for a watermark: 256x255"):
        embed(small, b"SDV2")
    with pytest.raises(ValueError, match="too small"):
        read(small, 32)


def test_mark_warns_instead_of_failing(caplog):
    with caplog.at_level(logging.WARNING):
        small = _noise((64, 64))
        assert mark(small, b"SDV2") is small
        assert agreement(mark(_flat(), b"SDV2"), b"SDV2") == 1
    assert [record.getMessage() for record in caplog.records] == [
        "64x64 is too small for a watermark, saved without"
    ]


def test_mark_says_when_it_cannot_be_read_back(caplog):
    mark(Image.new("RGB", (256, 256), (100, 100, 130)), b"SDV2", "dwtDct")
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
        embed(**{"image": _noise(), "payload": b"SDV2", **change})


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_of_512_is_marked_in_a_tenth_of_a_second(method):
    picture = _noise((512, 512))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        embed(picture, b"SDV2", method)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1
