"""Synthetic conditioning images."""

from random import Random

import pytest
import torch
from PIL import Image

from ldm.data.conditions import LowRes, PseudoDepth, RandomMask, build_conditions
from ldm.data.drawings import EmojiTransform
from ldm.data.former_options import rename_options
from ldm.data.transforms import PhotoTransform

IMAGE, OPAQUE = torch.zeros(3, 32, 32), torch.ones(1, 32, 32)
CONDITIONS = {"mask": {}, "lr": {"factor": 4}, "depth": None}


def test_masks_differ_in_area_and_are_sometimes_full():
    masks = [RandomMask(full_probability=0.25)(IMAGE, OPAQUE, Random(k)) for k in range(200)]
    areas = torch.stack([mask.mean() for mask in masks])
    assert {value for mask in masks for value in mask.unique().tolist()} == {0.0, 1.0}
    assert 30 < (areas == 1).sum() < 80
    assert (areas == 0).sum() == 0
    assert len(areas.unique()) > 100


def test_a_low_resolution_image_keeps_a_uniform_color_with_any_filter():
    uniform = torch.tensor([0.2, -0.5, 1.0])[:, None, None].expand(3, 32, 16)
    for seed in range(20):
        small = LowRes(factor=4, blur=1.0)(uniform, OPAQUE, Random(seed))
        torch.testing.assert_close(small, uniform[:, :8, :4].clone(), atol=1e-5, rtol=0)


def test_blur_softens_edges():
    image = torch.cat([IMAGE[..., :16] - 1, IMAGE[..., 16:] + 1], dim=2)
    sharp, blurred = (
        sum(LowRes(blur=blur)(image, OPAQUE, Random(k)).diff(dim=2).max() for k in range(20))
        for blur in (0.0, 1.0)
    )
    assert sharp > 1.1 * blurred


def test_pseudo_depth_rises_from_the_edge_to_the_center_of_the_silhouette():
    squares = (torch.arange(64) - 32) ** 2
    disc = squares[:, None] + squares[None] < 24**2
    depth = PseudoDepth(luminance=0.0)(torch.zeros(3, 64, 64), disc[None].float(), Random(0))
    row = depth[0, 32]
    assert depth[0][~disc].max() == 0
    assert (row[8:33].diff() > -1e-6).all()
    assert row[32] == depth.max() > 0.9
    assert abs(float(depth[0, 32, 14] - depth[0, 19, 19])) < 0.1  # equally far from the edge


def test_bright_pixels_are_nearer():
    image = torch.cat([IMAGE[:, :16] - 1, IMAGE[:, 16:] + 1], dim=1)
    depth = PseudoDepth(ramp_width=1, luminance=0.5)(image, OPAQUE, Random(0))
    assert depth[0, 30, 16] > depth[0, 1, 16]


def test_unknown_conditions_and_options_are_named():
    with pytest.raises(ValueError, match="unknown condition `masks`, did you mean `mask`"):
        build_conditions({"masks": {}})
    message = "mask.full_probability: `a` is not a number of at least 0"
    with pytest.raises(ValueError, match=message):
        build_conditions({"mask": {"whole": "a"}})
    with pytest.raises(ValueError, match="lr.factor: `0` is not a number of at least 1"):
        build_conditions({"lr": {"factor": 0}})
    with pytest.raises(ValueError, match="mask: unknown option `size`, .*full_probability"):
        build_conditions({"mask": {"size": 3}})


def test_options_are_read_under_their_former_names():
    former = {"mask": {"whole": 0.1, "boxes": 0.2}, "depth": {"depth": 3}}
    assert build_conditions(former) == {
        "mask": RandomMask(full_probability=0.1, box_probability=0.2),
        "depth": PseudoDepth(ramp_width=3),
    }
    for former_name in ("random_colour_probability", "any_colour"):
        options = rename_options("emoji", {former_name: 1})
        assert options == {"random_color_probability": 1}
    assert rename_options("hub", {"hub": "x", "cache": "y"}) == {"hub": "x", "cache_dir": "y"}
    former = {"lanes": 4, "least": {"width": 8}, "shuffle": 9, "streams": 5}
    assert rename_options("shards", former) == {
        "streams": 5, "minimum": {"width": 8}, "shuffle": 9,
    }  # fmt: skip


def test_conditions_do_not_change_the_image_of_a_sample():
    image = Image.new("RGBA", (32, 32), (9, 9, 9, 255))
    row = {"image": image, "object": "pig", "style": "flat"}
    plain, sample = (
        EmojiTransform(size=64, crop=32, conditions=conditions)(row, Random(0))
        for conditions in (None, CONDITIONS)
    )
    assert torch.equal(plain["jpg"], sample["jpg"])
    shapes = {name: tuple(sample[name].shape) for name in ("mask", "lr", "depth")}
    assert shapes == {"mask": (1, 32, 32), "lr": (3, 8, 8), "depth": (1, 32, 32)}
    photo = PhotoTransform(size=32, conditions=CONDITIONS)({"image": image}, Random(0))
    assert photo["lr"].shape == (3, 8, 8)
