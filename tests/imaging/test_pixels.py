"""Conversion of tensors and images, resizing, grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.imaging.pixels import make_grid, resize_to, resize_to_multiple, to_pil, to_tensor, to_uint8


def make_images(count, size=(6, 5)):
    shape = (count, size[1], size[0], 3)
    pixels = np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_are_clamped_and_rounded_or_truncated(dtype):
    values = torch.tensor([-999, 0.4, 0.6, 254.4, 254.6, 999], dtype=dtype)
    image = (values / 127.5 - 1).expand(2, 3, 1, 6)
    assert to_uint8(image).shape == (2, 1, 6, 3)
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]
    assert to_uint8(image, truncate=True)[0, 0, :, 0].tolist() == [0, 0, 0, 254, 254, 255]
    assert (to_uint8(torch.zeros(1, 3, 4, 5, dtype=torch.bfloat16)) == 128).all()


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((1, 3, 2, 2), torch.nan))


def test_every_pixel_value_survives_the_conversion_to_a_tensor_and_back():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    image = to_tensor(Image.fromarray(ramp))
    assert image.shape == (1, 3, 16, 16)
    assert (image.min(), image.max()) == (-1, 1)
    assert (np.asarray(to_pil(image)[0]) == ramp).all()
    assert to_tensor(Image.new("P", (3, 2))).shape == (1, 3, 2, 3)


@pytest.mark.parametrize(("count", "columns"), [(1, 3), (2, 3), (3, 3), (7, 3), (4, 1), (5, 8)])
def test_grid_equals_torchvision(count, columns):
    utils = pytest.importorskip("torchvision.utils")
    images = make_images(count)
    batch = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    expected = utils.make_grid(batch, nrow=columns, padding=2).permute(1, 2, 0).numpy()
    assert (np.asarray(make_grid(images, columns)) == expected).all()


@pytest.mark.parametrize(
    ("images", "columns"),
    [([], 3), (make_images(2), 0), ([*make_images(1), *make_images(1, (4, 4))], 2)],
)
def test_impossible_grids_are_refused(images, columns):
    with pytest.raises(ValueError, match="grid"):
        make_grid(images, columns)


def test_images_are_scaled_and_cropped_to_a_size():
    image = Image.new("RGB", (100, 50))
    assert resize_to(image, (None, None)) is image
    assert resize_to(image, (64, 64)).size == (64, 64)
    assert resize_to(image, (64, None)).size == (128, 64)
    assert resize_to(image, (None, 64)).size == (64, 32)


def test_images_are_resized_to_a_multiple():
    assert resize_to_multiple(Image.new("RGB", (150, 100)), 64, "BICUBIC").size == (128, 64)
    with pytest.raises(ValueError, match="150x50 pixels is too small: each side needs at least 64"):
        resize_to_multiple(Image.new("RGB", (150, 50)), 64, "BICUBIC")
