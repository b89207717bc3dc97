"""Images and captions of training samples."""

import json
from random import Random

import pytest
import torch
from PIL import Image

from ldm.data.drawings import BACKGROUND_COLORS, EmojiTransform, format_caption
from ldm.data.transforms import SIZE_KEYS, PhotoTransform, TagShuffle


def make_ramp():
    """Make an image of 96x32 whose red value is twice the column."""
    image = Image.new("RGB", (96, 32))
    for x in range(96):
        image.paste((2 * x, 0, 0), (x, 0, x + 1, 32))
    return image


@pytest.mark.parametrize(
    ("name", "style", "color", "caption"),
    [
        ("apple", "3d", "blue", "a 3d emoji of an apple on a blue background"),
        ("grapes", "android", "orange", "an android emoji of grapes on an orange background"),
        ("cactus", "", "", "an emoji of a cactus"),
        ("", "flat", "red", "a flat emoji on a red background"),
        ("bus", "noto", "", "a noto emoji of a bus"),
    ],
)
def test_a_caption_names_object_style_and_color_if_they_are_known(name, style, color, caption):
    assert format_caption(name, style, color) == caption


def test_a_drawing_is_composited_on_the_named_background():
    transform = EmojiTransform(size=64, scale=(0.5, 0.5))
    red = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image = transform.make_image_fields(red, Random(0), "blue")["jpg"]
    assert torch.allclose(image[:, 0, 0], torch.tensor(BACKGROUND_COLORS["blue"]) / 127.5 - 1)
    assert torch.allclose(image[:, 32, 32], torch.tensor([1.0, -1.0, -1.0]))
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))  # its hidden color must not bleed
    assert transform.make_image_fields(clear, Random(0), "white")["jpg"].min() == 1.0


@pytest.mark.parametrize(
    ("transform", "size"),
    [
        (EmojiTransform(), 128),
        (EmojiTransform(size=64, crop=32), 32),
        (PhotoTransform(size=64, crop="random", buckets={"step": 32}), 64),
    ],
)
def test_the_training_resolution_is_that_of_the_crop(transform, size):
    assert transform.image_size == size


def test_an_emoji_is_a_function_of_its_random_generator():
    row = {"image": Image.new("RGBA", (32, 32), (9, 9, 9, 255)), "object": "pig"}
    row |= {"style": "flat", "keywords": ["hog"]}
    transform = EmojiTransform(size=64, crop=24)
    first, same, other = (transform(row, Random(seed)) for seed in (1, 1, 2))
    assert first["jpg"].shape == (3, 24, 24)
    assert torch.equal(first["jpg"], same["jpg"])
    assert first["txt"] == same["txt"]
    assert not torch.equal(first["jpg"], other["jpg"])


def test_a_photo_is_cropped_at_its_center_or_at_random():
    row = {"image": make_ramp(), "text": "night"}
    centered = PhotoTransform(size=32, flip=0)(row, Random(0))
    assert centered["txt"] == "night"
    red = (centered["jpg"][0, 0] + 1) * 127.5
    assert torch.allclose(red, 2.0 * torch.arange(32, 64), atol=1.01)
    crop = PhotoTransform(size=32, flip=0, crop="random")
    assert not torch.equal(*(crop(row, Random(k))["jpg"] for k in (0, 1)))
    with pytest.raises(ValueError, match="unknown crop `left`"):
        PhotoTransform(crop="left")


def test_transparent_and_narrow_photos_become_opaque_and_square():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert PhotoTransform(size=8)({"image": clear}, Random(0))["jpg"].min() == 1
    line = Image.new("RGB", (1, 60000))
    assert PhotoTransform(size=64)({"image": line}, Random(0))["jpg"].shape == (3, 64, 64)


def test_tags_are_shuffled_and_dropped_but_for_the_first():
    tags = "1cat, sitting, red hat, snow"
    assert TagShuffle(drop=1.0, keep=2)(tags, Random(0)) == "1cat, sitting"
    shuffled = {TagShuffle()(tags, Random(seed)) for seed in range(20)}
    assert len(shuffled) == 6
    assert all(text.startswith("1cat, ") for text in shuffled)


def test_keys_of_latent_caches_are_those_of_version_0_1():
    emoji = EmojiTransform(size=64, random_color_probability=0.5, conditions={"lr": {"blur": 1.0}})
    assert json.dumps(emoji.get_cache_key()) == (
        '["Emoji", {"size": 64, "scale": [0.79, 0.83], "shift": 2, "flip": 0.0, "crop": null, '
        '"any_colour": 0.5, "records": {"lr": "Small(factor=4, blur=1.0)"}}]'
    )
    conditions = {"mask": {"full_probability": 0.1}, "depth": {"ramp_width": 3}}
    photo = PhotoTransform(size=32, conditions=conditions)
    assert json.dumps(photo.get_cache_key()) == (
        '["Photo", {"size": 32, "crop": "centre", "flip": 0.5, "records": {'
        '"mask": "Mask(whole=0.1, boxes=0.5)", "depth": "Relief(depth=3, luminance=0.25)"}}]'
    )


def test_a_sample_has_original_size_crop_and_target_size():
    image = make_ramp()
    for flip in (0.0, 1.0):
        sample = PhotoTransform(size=32, flip=flip, crop="random")({"image": image}, Random(1))
        original, crop, target = (sample[key].tolist() for key in SIZE_KEYS)
        assert (original, target, crop[0]) == ([32, 96], [32, 32], 0)
        column = float((sample["jpg"][0, 0, 0] + 1) * 127.5) / 2
        assert crop[1] == pytest.approx(95 - column if flip else column, abs=1.01)
        assert 0 < crop[1] < 64
    halved = PhotoTransform(size=16, flip=0.0, buckets={"step": 8})({"image": image}, Random(0))
    assert [halved[key].tolist() for key in SIZE_KEYS] == [[32, 96], [0, 0], [8, 24]]
    emoji = EmojiTransform(size=64, crop=24)
    row = {"image": Image.new("RGBA", (32, 32)), "object": "pig", "style": "flat"}
    sizes = [emoji(row, Random(0))[key].tolist() for key in SIZE_KEYS]
    assert sizes[::2] == [[64, 64], [24, 24]]
    assert max(sizes[1]) > 0


def test_metadata_may_give_the_original_size_and_a_score():
    row = {"image": Image.new("RGB", (8, 8)), "original_height": 600, "original_width": 800}
    sample = PhotoTransform(size=8)({**row, "aesthetic_score": "5.5"}, Random(0))
    assert sample["original_size_as_tuple"].tolist() == [600, 800]
    assert sample["aesthetic_score"].tolist() == [5.5]
    plain = PhotoTransform(size=8, original_size_keys=("h", "w"))(row, Random(0))
    assert plain["original_size_as_tuple"].tolist() == [8, 8]
    assert plain["aesthetic_score"].tolist() == [6.0]
    empty = {**row, "aesthetic_score": "", "original_width": ""}  # empty fields of a CSV
    assert PhotoTransform(size=8)(empty, Random(0))["aesthetic_score"].tolist() == [6.0]
