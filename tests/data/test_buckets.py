"""Sizes for pictures of all proportions."""

import pytest

from ldm.data.buckets import Buckets


def test_sizes_have_about_one_area_and_whole_steps() -> None:
    sizes = Buckets(512).sizes
    assert (512, 512) in sizes
    assert sizes[0] == (256, 1024)
    assert sizes[-1] == (1024, 256)
    assert all(w % 64 == h % 64 == 0 and 0.7 * 512**2 < w * h <= 512**2 for w, h in sizes)
    assert all((h, w) in sizes for w, h in sizes)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((3000, 3000), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((1920, 1080), (640, 384)),
        ((9000, 100), (1024, 256)),
    ],
)
def test_a_picture_goes_where_least_is_cut_off(
    picture: tuple[int, int], size: tuple[int, int]
) -> None:
    buckets = Buckets(512)
    assert buckets.sizes[buckets.index(*picture)] == size


def test_limits_hold() -> None:
    sides = {side for size in Buckets(512, shortest=320, longest=768).sizes for side in size}
    assert (min(sides), max(sides)) == (320, 768)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 500}, "500 is no multiple of step 64"), ({"size": 64, "shortest": 128}, "no sides")],
)
def test_impossible_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets(**options)
