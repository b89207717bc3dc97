"""Pictures on colours, and the captions that say so."""

from random import Random

import pytest
import torch
from PIL import Image

from ldm.data.transforms import COLOURS, Emoji, Photo, Tags, caption, compose


@pytest.mark.parametrize(
    ("name", "style", "colour", "text"),
    [
        ("apple", "3d", "blue", "a 3d emoji of an apple on a blue background"),
        ("grapes", "android", "orange", "an android emoji of grapes on an orange background"),
        ("cactus", "", "", "an emoji of a cactus"),
        ("", "flat", "red", "a flat emoji on a red background"),
        ("bus", "noto", "", "a noto emoji of a bus"),
    ],
)
def test_a_caption_says_what_there_is(name: str, style: str, colour: str, text: str) -> None:
    assert caption(name, style, colour) == text


def test_a_composed_picture_keeps_the_colour_outside_and_the_object_inside() -> None:
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image = compose(picture, COLOURS["blue"], size=64, side=32)
    blue = torch.tensor(COLOURS["blue"]) / 127.5 - 1
    assert torch.allclose(image[:, 0, 0], blue)
    assert torch.allclose(image[:, 32, 32], torch.tensor([1.0, -1.0, -1.0]))


def test_transparent_pixels_leave_no_colour_behind() -> None:
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image = compose(picture, COLOURS["white"], size=64, side=48)
    assert image.min() == 1.0


def test_an_emoji_depends_on_its_random_generator_alone() -> None:
    record = {"picture": Image.new("RGBA", (32, 32), (9, 9, 9, 255)), "object": "pig"}
    record |= {"style": "flat", "keywords": ["hog"]}
    transform = Emoji(size=64)
    first, same, other = (transform(record, Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["jpg"], same["jpg"])
    assert first["txt"] == same["txt"]
    assert not torch.equal(first["jpg"], other["jpg"])


def test_a_crop_has_its_size() -> None:
    record = {"picture": Image.new("RGBA", (32, 32)), "object": "pig", "style": "flat"}
    assert Emoji(size=64, crop=24)(record, Random(0))["jpg"].shape == (3, 24, 24)


def test_a_photo_is_cut_to_a_square() -> None:
    sample = Photo(size=32)({"picture": Image.new("RGB", (90, 50)), "text": "night"}, Random(0))
    assert sample["jpg"].shape == (3, 32, 32)
    assert sample["txt"] == "night"


def test_a_photo_keeps_its_middle_or_a_part_of_chance() -> None:
    picture = Image.new("RGB", (96, 32))
    for x in range(96):
        picture.paste((2 * x, 0, 0), (x, 0, x + 1, 32))
    middle = Photo(size=32, flip=0)({"picture": picture}, Random(0))["jpg"]
    assert torch.allclose((middle[0, 0] + 1) * 127.5, 2.0 * torch.arange(32, 64), atol=1.01)
    parts = [Photo(size=32, flip=0, crop="random")({"picture": picture}, Random(k)) for k in (0, 1)]
    assert not torch.equal(parts[0]["jpg"], parts[1]["jpg"])
    with pytest.raises(ValueError, match="unknown crop `left`"):
        Photo(crop="left")


def test_what_is_transparent_in_a_photo_is_white() -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert Photo(size=8)({"picture": picture}, Random(0))["jpg"].min() == 1


def test_a_line_of_pixels_is_no_burden() -> None:
    assert (
        Photo(size=64)({"picture": Image.new("RGB", (1, 60000))}, Random(0))["jpg"].shape[1] == 64
    )


def test_tags_are_shuffled_and_dropped_but_for_the_first() -> None:
    tags = "1cat, sitting, red hat, snow"
    assert Tags(drop=1.0, keep=2)(tags, Random(0)) == "1cat, sitting"
    shuffled = {Tags()(tags, Random(seed)) for seed in range(20)}
    assert len(shuffled) == 6
    assert all(text.startswith("1cat, ") for text in shuffled)
