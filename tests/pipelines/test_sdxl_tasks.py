"""SDXL's options: micro-conditions, the step at which the refiner starts, and errors."""

import functools
import logging

import pytest
import torch

from ldm.loading.build import build_on_meta
from ldm.model import LatentDiffusion
from ldm.pipelines import WrongFamily, img2img, inpaint, txt2img
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sdxl import check_size, find_handover, get_micro_conditions
from ldm.runtime.errors import ArgumentError
from loading.tinyfamilies import make_small_config

IMAGE = torch.zeros(1, 3, 64, 64)


@functools.cache
def build_model(family: str) -> LatentDiffusion:
    """Build a model on the meta device, which cannot run."""
    model: LatentDiffusion = build_on_meta(make_small_config(family))
    model.provenance["checkpoint"] = f"{family}.safetensors"
    return model


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("xl", {"refiner": "xl"}, "`xl.safetensors` is not the refiner of Stable Diffusion XL"),
        ("sd2", {"refiner": "xl-refiner"}, "refiner is for Stable Diffusion XL, which `sd2.safe"),
        ("playground", {"refiner": "xl-refiner"}, "latents other than those of `playground.safe"),
        ("sd2", {"crop": (8, 8)}, "crop is for Stable Diffusion XL"),
        ("xl", {"aesthetic_score": 7.0}, "aesthetic_score is for the refiner"),
        ("xl", {"refiner_start": 0.8}, "refiner_start needs a refiner"),
        ("xl", {"refiner": "xl-refiner", "refiner_strength": 2.0}, "must be in 0 … 1, got 2.0"),
        ("xl", {"refiner": "xl-refiner", "refiner_start": 1, "refiner_strength": 0}, "not both"),
        ("xl", {"refiner": "xl-refiner", "size": (64, 72)}, "multiples of 64 with a refiner, got"),
        ("xl", {"size": (64, 60)}, "multiples of 8, got 64 x 60"),
        ("xl", {"negative_prompt_2": ["a", "b"]}, "2 negative prompts were given for 1 images"),
        ("xl", {"scheduler": "turbo", "steps": 11}, "1 … 10 with scheduler `turbo`"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_model_are_refused_in_one_line(family, options, message):
    if "refiner" in options:
        options = options | {"refiner": build_model(options["refiner"])}
    with pytest.raises(ArgumentError) as caught:
        txt2img(build_model(family), ["a"], **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_refiner_alone_is_for_img2img():
    with pytest.raises(WrongFamily, match="`xl-refiner.safetensors` is the refiner .* `img2img`"):
        txt2img(build_model("xl-refiner"), ["a"])
    with pytest.raises(WrongFamily, match="pass it as `refiner` with a base model"):
        inpaint(build_model("xl-refiner"), ["a"], IMAGE, IMAGE[:, :1])
    with pytest.raises(ArgumentError, match="prompt_2 needs a second text encoder"):
        img2img(build_model("xl-refiner"), ["a"], IMAGE, prompt_2=["b"])
    with (
        pytest.warns(UserWarning, match="`xl-refiner.safetensors` does not read target_size"),
        pytest.raises(ArgumentError, match="syntax"),  # which is checked later
    ):
        img2img(build_model("xl-refiner"), ["a"], IMAGE, target_size=(64, 64), syntax="none")


def test_micro_conditions_default_to_the_size_and_negative_ones_to_the_positive():
    options = {"crop": (8, 16), "negative_target_size": (512, 640)}
    positive, negative = get_micro_conditions(build_model("xl"), options, (64, 128), Quirks())
    assert positive == {
        "original_size_as_tuple": (64, 128),
        "crop_coords_top_left": (8, 16),
        "target_size_as_tuple": (64, 128),
    }
    assert negative == positive | {"target_size_as_tuple": (512, 640)}
    positive, negative = get_micro_conditions(build_model("xl-refiner"), {}, (64, 128), Quirks())
    assert (positive["aesthetic_score"], negative["aesthetic_score"]) == ((6.0,), (2.5,))
    legacy = Quirks(frozenset({"api-scores"}))
    positive, negative = get_micro_conditions(build_model("xl-refiner"), {}, (64, 128), legacy)
    assert (positive["aesthetic_score"], negative["aesthetic_score"]) == ((5.0,), (5.0,))


@pytest.mark.parametrize(
    ("options", "legacy", "index"),
    [
        ({}, (), 42),  # round(0.15 * 50) = 8 steps of 50 for the refiner
        ({}, ("legacy-steps",), 44),
        ({"refiner_strength": 0.0}, (), 50),
        ({"refiner_start": 0.8}, (), 40),  # timesteps 999, 979 … 219; the refiner has 199 …
        ({"refiner_start": 0.0}, (), 0),
    ],
)
def test_the_handover_is_at_the_given_step(options, legacy, index):
    schedule = build_model("xl").schedule
    sigmas = schedule.get_step_sigmas(50, "sgm_uniform")
    assert find_handover(schedule, sigmas, options, Quirks(frozenset(legacy))) == index


def test_an_unusual_size_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    for size in ((512, 512), (768, 1280)):
        check_size(build_model("xl"), size, {})
    assert "512x512 (height x width) is far from the sizes" in caplog.text
    assert "nearest is 1024x1024" in caplog.text
    assert "768x1280" not in caplog.text
