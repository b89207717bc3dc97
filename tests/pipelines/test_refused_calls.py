"""Calls with a wrong model or keyword are refused before any network runs."""

from types import SimpleNamespace

import pytest
from torch import nn

import ldm
from ldm import pipelines
from ldm.model import LatentDiffusion
from ldm.pipelines import WrongFamily
from ldm.pipelines.families import FAMILIES
from ldm.runtime.errors import ArgumentError, UnknownName

# Families of a task's models, and the number of its positional arguments after the model.
TASKS = {
    "txt2img": ({"text"}, 1),
    "img2img": ({"text", "refiner"}, 2),
    "inpaint": ({"inpainting", "text"}, 3),
    "depth2img": ({"depth"}, 2),
    "estimate_depth": ({"depth"}, 1),
    "upscale": ({"upscaling"}, 2),
    "unclip": ({"unclip"}, 2),
    "sample_prior": ({"unclip"}, 2),
    "vary": ({"variation"}, 2),
    "class2img": ({"class"}, 1),
    "uncond2img": ({"unconditional"}, 1),
    "semantic2img": ({"semantic"}, 1),
    "layout2img": ({"layout"}, 1),
    "super_resolve": ({"super-resolution"}, 1),
    "knn2img": ({"retrieval"}, 1),
}


def make_model(keys):
    model = LatentDiffusion.__new__(LatentDiffusion)
    model.conditioner = SimpleNamespace(keys=frozenset(keys))
    model.provenance = {}
    return model


@pytest.mark.parametrize("task", TASKS)
def test_the_error_for_a_model_of_another_family_names_its_task(task):
    families, num_arguments = TASKS[task]
    for name in FAMILIES.keys() - families:
        with pytest.raises(WrongFamily) as caught:
            getattr(pipelines, task)(make_model(FAMILIES[name].keys), *[None] * num_arguments)
        assert f"use `{FAMILIES[name].function}`" in str(caught.value)


def test_the_task_of_every_family_is_public():
    assert {family.function for family in FAMILIES.values()} <= set(ldm.__all__)


def test_the_error_for_a_model_of_no_family_names_its_conditions():
    with pytest.raises(
        WrongFamily, match="this model reads `smell`, `txt`, and no task provides that"
    ):
        pipelines.txt2img(make_model({"txt", "smell"}), ["a"])
    with pytest.raises(WrongFamily, match="this is an unconditional model: use `uncond2img`"):
        pipelines.txt2img(prompts=["a"], model=make_model(()))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("txt2img", {"stesp": 3}, "unknown keyword of txt2img `stesp`, did you mean `steps`?"),
        ("txt2img", {"strength": 0.2}, "unknown keyword of txt2img `strength`"),
        ("txt2img", {"guidance_scale": 3}, "`guidance_scale`, did you mean `scale`?"),
        ("txt2img", {"rescale": 0.5}, "`rescale`, did you mean `guidance_rescale`?"),
        ("img2img", {"size": (64, 64)}, "unknown keyword of img2img `size`"),
        ("estimate_depth", {"steps": 3}, "unknown keyword of estimate_depth `steps`"),
        ("txt2img", {"grid": "edm", "scheduler": "karras"}, "unknown keyword of txt2img `grid`"),
    ],
)
def test_unknown_keywords_are_refused_with_a_suggestion(task, options, message):
    with pytest.raises(UnknownName, match=message):
        getattr(pipelines, task)(make_model({"txt"}), *[None] * TASKS[task][1], **options)


@pytest.mark.parametrize(
    ("model", "text"),
    [(None, "None"), ("sdxl.ckpt", "'sdxl.ckpt'"), (nn.Sequential(nn.Identity()), "Sequential")],
)
def test_an_argument_that_is_not_a_model_is_refused(model, text):
    for call in (
        lambda: pipelines.txt2img(model, ["a"]),
        lambda: ldm.set_loras(model, []),
        lambda: ldm.load_preview("taesd.pth", model),
    ):
        with pytest.raises(ArgumentError, match=f"a whole model of `ldm.load`, got {text}$"):
            call()
