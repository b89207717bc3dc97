"""Pictures on colours, and the captions that say so."""

from random import Random

import pytest
import torch
from PIL import Image

from ldm.data.transforms import COLOURS, Emoji, Photo, caption, compose


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
