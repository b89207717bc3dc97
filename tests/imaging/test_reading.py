"""Image files of all kinds: read as expected, or refused in one line."""

import errno
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from imaging.badimages import UNREADABLE_FILES, make_png
from ldm.imaging.reading import (
    IMAGE_SUFFIXES,
    decode_srgb,
    decode_stored,
    flatten_on_white,
    list_images,
    load_image,
    open_image,
    read_size,
)

RAMP = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (30, 1))  # (30, 40)
GRAY = Image.fromarray(RAMP)


def encode(image, suffix, **options):
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[f".{suffix}"], **options)
    return file.getvalue()


def decode(data):
    return np.asarray(flatten_on_white(decode_srgb(data, "x")), int)


def make_exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def make_tiff(values, bits, sample_format=1, photometric=1, order="<"):
    """Make the bytes of a gray TIFF of one strip, with the bytes `values`."""
    tags = {256: RAMP.shape[1], 257: RAMP.shape[0], 258: bits, 259: 1, 262: photometric,
            273: 134, 277: 1, 278: RAMP.shape[0], 279: len(values), 339: sample_format}  # fmt: skip
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items()]
    header = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return header + b"".join(entries) + bytes(4) + values


def pack_12_bits(pixels):
    even, odd = pixels[:, 0::2].astype(int), pixels[:, 1::2].astype(int)
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], -1)
    return packed.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [("L", "png", 0), ("P", "png", 0), ("CMYK", "jpg", 9), ("CMYK", "tif", 1), ("LA", "png", 0),
     ("YCbCr", "jpg", 9), ("LAB", "tif", 2), ("PA", "tif", 0), ("I", "tif", 0), ("RGB", "webp", 9),
     ("RGB", "bmp", 0), ("P", "gif", 0), ("RGB", "jp2", 9), ("RGB", "qoi", 0), ("L", "pgm", 0),
     ("RGB", "tga", 0), ("RGB", "avif", 9), ("RGB", "sgi", 0), ("RGBA", "dds", 0)],
)  # fmt: skip
def test_every_mode_becomes_the_same_rgb(mode, suffix, tolerance):
    image = GRAY.convert({"LAB": "RGB", "PA": "P"}.get(mode, "L")).convert(mode)
    assert abs(decode(encode(image, suffix)) - RAMP[..., None]).max() <= tolerance


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(RAMP * np.uint16(257)), "png"),
        encode(Image.fromarray(RAMP * np.uint16(257)), "pgm"),
        make_tiff((RAMP * np.uint16(257)).astype(">u2").tobytes(), 16, order=">"),
        make_tiff((65535 - RAMP * np.uint16(257)).tobytes(), 16, photometric=0),
        make_tiff(pack_12_bits(RAMP.astype(np.uint16) * 16 + 8), 12),
        make_tiff((RAMP.astype(np.uint32) * 257).tobytes(), 32),
        encode(Image.fromarray(RAMP.astype(np.float32) / 255), "tif"),
        encode(Image.fromarray(RAMP.astype(np.float32) / 255), "pfm"),
        encode(Image.fromarray(RAMP.astype(np.float32)), "tif"),
    ],
    ids=["png", "pgm", "big-endian", "white-is-zero", "12", "32", "float", "pfm", "float-255"],
)
def test_more_than_eight_bits_become_eight(data):
    assert abs(decode(data) - RAMP[..., None]).max() <= 1


def test_floats_outside_their_range_are_rescaled_and_named(tmp_path, caplog):
    values = RAMP.astype(np.float32) * 100 - 7.5
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "x.tif")
    pixels = np.asarray(load_image(tmp_path / "x.tif"), int)[..., 0]
    assert abs(pixels[1:] - RAMP[1:] * (255 / RAMP.max())).max() <= 1
    assert pixels[0, :3].tolist() == [0, 255, 0]
    assert "has 3 values that are NaN or infinite" in caplog.text
    assert "has values from -7.5 to 23392.5" in caplog.text
    Image.fromarray(values * np.nan).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif` has no finite values"):
        load_image(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_images_are_rotated_by_their_exif_orientation(suffix, orientation):
    angle = {3: 180, 6: 270, 8: 90}[orientation]
    data = encode(GRAY.convert("RGB"), suffix, exif=make_exif(orientation), quality=95)
    rotated = np.asarray(GRAY.rotate(angle, expand=True), int)[..., None]
    assert abs(decode(data) - rotated).max() < 9
    assert read_size(io.BytesIO(data)) == rotated.shape[1::-1]
    if suffix in ("png", "tif"):
        data = encode(Image.fromarray(RAMP * np.uint16(257)), suffix, exif=make_exif(orientation))
        assert (decode(data) == rotated).all()


DAMAGED_EXIF = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack(  # the width is a string; orientation 6
    "<HHHI4sHHIHHI", 2, 256, 2, 4, b"abc\0", 274, 3, 1, 6, 0, 0
)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    ("exif", "rotations"), [(DAMAGED_EXIF, 1), (b"nonsense", 0), (make_exif(9), 0)]
)
def test_damaged_exif_data_are_ignored(suffix, exif, rotations):
    data = encode(GRAY.convert("RGB"), suffix, exif=exif, quality=95)
    rotated = np.rot90(RAMP, -rotations).astype(int)[..., None]
    assert abs(decode(data) - rotated).max() < 9
    assert read_size(io.BytesIO(data)) == rotated.shape[1::-1]


def test_transparency_is_composited_on_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    for image in (half, half.convert("RGBa")):
        assert flatten_on_white(image).getpixel((0, 0)) == (255, 127, 127)
    for mode in ("LA", "PA", "La"):
        clear = Image.new("RGBA", (4, 4)).convert(mode.upper()).convert(mode)
        assert flatten_on_white(clear).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("bits", "color_type", "key", "pixels"),
    [(8, 2, (0, 255, 0), b"\0\xff\0"), (16, 2, (0, 0x8001, 9), b"\0\0\x80\1\0\x09"),
     (16, 0, (40000,), struct.pack(">H", 40000)), (8, 0, (7,), b"\7"), (4, 0, (7,), b"\x70"),
     (2, 0, (1,), b"\x40"), (1, 0, (1,), b"\x80"), (8, 3, None, b"\0")],
)  # fmt: skip
def test_a_color_key_of_any_bit_depth_is_transparent(bits, color_type, key, pixels):
    chunks = [(b"PLTE", b"\x40\x80\0"), (b"tRNS", b"\0")]
    if key is not None:
        chunks = [(b"tRNS", struct.pack(f">{len(key)}H", *key))]
    image = decode_srgb(make_png(1, 1, bits, color_type, b"\0" + pixels, *chunks), "x")
    assert image.getpixel((0, 0))[3] == 0
    assert (np.asarray(flatten_on_white(image)) == 255).all()


def test_the_first_of_several_frames_is_used_with_a_warning(tmp_path, caplog):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for suffix in ("gif", "tiff", "webp", "png"):
        path = tmp_path / f"x.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(path).getpixel((0, 0)) == (255, 0, 0)
        assert f"x.{suffix}` is animated or has several pages" in caplog.text


@pytest.mark.parametrize("chunk", ["zTXt", "iTXt", "tEXt", "iCCP"])
def test_long_texts_are_ignored(chunk):
    text, info = "{}" * 1_000_000, PngImagePlugin.PngInfo()
    options = {"icc_profile": text.encode()} if chunk == "iCCP" else {"pnginfo": info}
    if chunk == "iTXt":
        info.add_itxt("workflow", text, zip=True)
    else:
        info.add_text("workflow", text, zip=chunk == "zTXt")
    assert (decode(encode(GRAY, "png", **options)) == RAMP[..., None]).all()


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED_RG = SRGB.replace(b"rXYZ", b"XXXX").replace(b"gXYZ", b"rXYZ").replace(b"XXXX", b"gXYZ")
LINEAR = SRGB.replace(struct.pack(">i", round(2.4 * 65536)), struct.pack(">i", 65536))
LINEAR_GRAY = LINEAR.replace(b"RGB XYZ", b"GRAYXYZ").replace(b"rTRC", b"kTRC")
# By name, as a profile holds the time of its creation, and pytest-xdist needs constant test ids.
PROFILES = {
    "swapped red and green": SWAPPED_RG,
    "linear": LINEAR,
    "linear gray": LINEAR_GRAY,
    "truncated": SRGB[:200],
    "not a profile": b"nonsense",
}


@pytest.mark.parametrize(
    ("mode", "profile", "suffix"),
    [
        ("RGB", "swapped red and green", "png"),
        ("RGB", "swapped red and green", "jpg"),
        ("RGB", "linear", "webp"),
        ("RGB", "linear", "avif"),
        ("RGBA", "swapped red and green", "tif"),
        ("P", "swapped red and green", "png"),
        ("L", "linear gray", "jpg"),
        ("LA", "linear gray", "png"),
    ],
)
def test_colors_are_converted_to_srgb_as_lcms_does(mode, profile, suffix):
    rgb = Image.merge("RGB", [GRAY, GRAY.rotate(180), Image.new("L", GRAY.size, 90)])
    image = rgb.quantize(64) if mode == "P" else rgb.convert(mode)
    data = encode(image, suffix, icc_profile=PROFILES[profile])
    with Image.open(io.BytesIO(data)) as file:
        source = file.convert("L" if profile == "linear gray" else "RGB")
    expected = ImageCms.profileToProfile(
        source, io.BytesIO(PROFILES[profile]), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert abs(np.asarray(expected, int) - np.asarray(source.convert("RGB"), int)).max() > 50
    assert (decode(data) == np.asarray(expected)).all()


def test_the_gamma_of_a_png_is_applied_unless_it_is_that_of_srgb():
    rows = b"".join(b"\0" + row.tobytes() for row in RAMP)
    from_linear, from_srgb = (
        decode(make_png(40, 30, 8, 0, rows, (b"gAMA", struct.pack(">I", gamma))))
        for gamma in (100000, 45455)
    )
    x = from_linear / 255
    linear = np.where(from_linear < 11, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    assert abs(linear * 255 - RAMP[..., None]).max() < 1.2  # rounding of white: 0.5 * 2.27
    assert (from_srgb == RAMP[..., None]).all()


def test_a_bitmap_whose_fourth_channel_is_unused_is_opaque():
    data = encode(Image.merge("RGBA", [*[GRAY] * 3, Image.new("L", GRAY.size)]), "tga")
    assert (decode(data) == RAMP[..., None]).all()


def test_a_profile_of_srgb_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(pixels), "png", icc_profile=SRGB)
    assert (decode(data) == pixels).all()


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", "not a profile"),
        ("RGB", "truncated"),
        ("RGB", "linear gray"),
        ("CMYK", "swapped red and green"),
    ],
)
def test_an_unsuitable_profile_is_ignored_and_warned_of(mode, profile, tmp_path, caplog):
    image = GRAY.convert("RGB").convert(mode)
    image.save(tmp_path / "x.tif", icc_profile=PROFILES[profile])
    assert abs(np.asarray(load_image(tmp_path / "x.tif"), int) - RAMP[..., None]).max() <= 1
    assert "x.tif` has an ICC profile that is damaged or does not fit" in caplog.text


def test_masks_and_depth_maps_have_values_without_the_profile():
    data = encode(GRAY, "png", icc_profile=LINEAR_GRAY)
    assert (decode_stored(data, "x").to_gray_array() == RAMP).all()


@pytest.mark.parametrize("name", UNREADABLE_FILES)
def test_a_file_that_is_not_an_image_is_refused_in_one_line(tmp_path, name):
    write, message = UNREADABLE_FILES[name]
    write(tmp_path / "x.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_image(tmp_path / "x.png")
    assert "\n" not in str(caught.value)


def test_suffixes_are_those_that_pillow_decodes():
    common = "png jpg jpeg jpe jfif mpo webp avif gif bmp dib tif tiff jp2 ppm pgm qoi psd tga ico"
    assert {f".{suffix}" for suffix in common.split()} < set(IMAGE_SUFFIXES)
    assert not {".mpg", ".pdf", ".eps", ".h5", ".wmf"} & set(IMAGE_SUFFIXES)


@pytest.mark.parametrize(
    ("code", "space"),
    [(b"\x09\x10\0\1", "HDR (PQ)"), (b"\x0c\x0d\0\1", "wide-gamut"), (b"\1\x0d\0\1", None)],
)
def test_a_png_with_a_color_space_other_than_srgb_is_warned_of(tmp_path, caplog, code, space):
    path = tmp_path / "x.png"
    Image.new("RGB", (2, 2)).save(path)
    data = path.read_bytes()
    chunk = b"cICP" + code
    chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:33] + chunk + data[33:])
    load_image(path)
    assert (f"has {space} colors" in caplog.text) if space else not caplog.text


def test_the_images_of_a_folder_are_listed_without_hidden_files(tmp_path):
    for name in ("b.png", "a.JPG", "._a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "c.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.png"]
    with pytest.raises(FileNotFoundError, match="has no images"):
        list_images(tmp_path / "c.png")


def test_errors_of_the_operating_system_are_not_damage(tmp_path):
    """Such as of a full disk, while a copy of the image is written."""
    GRAY.save(tmp_path / "x.png")
    full_disk = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space") as caught, open_image(tmp_path / "x.png"):
        raise full_disk
    assert caught.value is full_disk
