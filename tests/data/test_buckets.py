"""Aspect-ratio buckets."""

import pytest

from ldm.data.buckets import Buckets


def test_sizes_have_about_one_area_and_are_multiples_of_the_step():
    sizes = Buckets(512).sizes
    assert (512, 512) in sizes
    assert (sizes[0], sizes[-1]) == ((256, 1024), (1024, 256))
    assert all(w % 64 == h % 64 == 0 and 0.7 * 512**2 < w * h <= 512**2 for w, h in sizes)
    assert all((h, w) in sizes for w, h in sizes)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((3000, 3000), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((1920, 1080), (640, 384)),
        ((9000, 100), (1024, 256)),
    ],
)
def test_an_image_goes_to_the_nearest_aspect_ratio(image, size):
    buckets = Buckets(512)
    assert buckets.sizes[buckets.find_nearest(*image)] == size


def test_sides_stay_within_the_limits():
    sides = {side for size in Buckets(512, shortest=320, longest=768).sizes for side in size}
    assert (min(sides), max(sides)) == (320, 768)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 500}, "500 is not a multiple"),
        ({"size": 64, "shortest": 128}, "no bucket of size 64 has sides from 128 to 128"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Buckets(**options)
