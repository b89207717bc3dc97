"""What models see beside the picture, made for training."""

from random import Random

import pytest
import torch
from PIL import Image

from ldm.data.conditions import Mask, Relief, Small, makers
from ldm.data.transforms import Emoji, Photo

IMAGE, OPAQUE = torch.zeros(3, 32, 32), torch.ones(1, 32, 32)
RECORDS = {"mask": {}, "lr": {"factor": 4}, "depth": None}


def test_masks_are_holes_of_many_kinds_and_sometimes_whole() -> None:
    masks = [Mask(whole=0.25)(IMAGE, OPAQUE, Random(seed)) for seed in range(200)]
    shares = torch.stack([mask.mean() for mask in masks])
    assert {value for mask in masks for value in mask.unique().tolist()} == {0.0, 1.0}
    assert 30 < (shares == 1).sum() < 80
    assert (shares == 0).sum() == 0
    assert len(shares.unique()) > 100


def test_a_small_picture_keeps_plain_colours_however_it_is_made() -> None:
    plain = torch.tensor([0.2, -0.5, 1.0])[:, None, None].expand(3, 32, 16)
    for seed in range(20):
        small = Small(factor=4, blur=1.0)(plain, OPAQUE, Random(seed))
        torch.testing.assert_close(small, plain[:, :8, :4].clone(), atol=1e-5, rtol=0)


def test_a_blurred_small_picture_has_softer_edges() -> None:
    image = torch.cat([IMAGE[..., :16] - 1, IMAGE[..., 16:] + 1], dim=2)
    steepest = {
        blur: [Small(blur=blur)(image, OPAQUE, Random(k)).diff(dim=2).max() for k in range(20)]
        for blur in (0.0, 1.0)
    }
    assert sum(steepest[0.0]) > 1.1 * sum(steepest[1.0])


def test_a_relief_rises_from_the_edge_to_the_middle_of_what_is_opaque() -> None:
    disc = ((torch.arange(64) - 32) ** 2)[:, None] + ((torch.arange(64) - 32) ** 2)[None] < 24**2
    relief = Relief(luminance=0.0)(torch.zeros(3, 64, 64), disc[None].float(), Random(0))
    row = relief[0, 32]
    assert relief[0][~disc].max() == 0
    assert (row[8:33].diff() > -1e-6).all()
    assert row[32] == relief.max() > 0.9
    assert abs(float(relief[0, 32, 14] - relief[0, 19, 19])) < 0.1  # as far from the edge


def test_bright_parts_stand_out() -> None:
    image = torch.cat([IMAGE[:, :16] - 1, IMAGE[:, 16:] + 1], dim=1)
    relief = Relief(depth=1, luminance=0.5)(image, OPAQUE, Random(0))
    assert relief[0, 30, 16] > relief[0, 1, 16]


def test_unknown_records_and_options_are_named() -> None:
    with pytest.raises(ValueError, match="unknown record `masks`, choose one of mask, lr, depth"):
        makers({"masks": {}})
    with pytest.raises(ValueError, match="record `mask` has no `size`, only whole, boxes"):
        makers({"mask": {"size": 3}})


def test_a_sample_holds_what_its_records_ask_for() -> None:
    picture = Image.new("RGBA", (32, 32), (9, 9, 9, 255))
    record = {"picture": picture, "object": "pig", "style": "flat"}
    sample = Emoji(size=64, crop=32, records=RECORDS)(record, Random(0))
    shapes = {name: tuple(value.shape) for name, value in sample.items() if name != "txt"}
    assert shapes == {
        "jpg": (3, 32, 32),
        "mask": (1, 32, 32),
        "lr": (3, 8, 8),
        "depth": (1, 32, 32),
    }
    photo = Photo(size=32, records=RECORDS)({"picture": picture}, Random(0))
    assert photo["lr"].shape == (3, 8, 8)


def test_records_leave_the_picture_and_its_caption_as_they_were() -> None:
    record = {"picture": Image.new("RGBA", (32, 32), (9, 9, 9, 255)), "object": "pig"}
    record |= {"style": "flat"}
    plain, more = (Emoji(size=64, records=r)(record, Random(1)) for r in (None, {"lr": {}}))
    assert torch.equal(plain["jpg"], more["jpg"])
