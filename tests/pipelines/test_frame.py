"""Models and tasks: every pair that does not fit is told in one line, before any work is done."""

from types import SimpleNamespace

import pytest

from ldm import pipelines
from ldm.pipelines import WrongFamily
from ldm.pipelines.frame import READS, SCRIPTS, TITLES

# What runs on models of which families.
FITS = {
    "txt2img": {"txt2img"},
    "img2img": {"txt2img"},
    "inpaint": {"inpaint", "txt2img"},
    "depth2img": {"depth2img"},
    "depth_of": {"depth2img"},
    "upscale": {"upscale"},
    "unclip": {"unclip"},
    "imagined": {"unclip"},
    "vary": {"vary"},
}
GIVEN = {"txt2img": 1, "inpaint": 3, "depth_of": 1}
PAIRS = [(task, family) for task in FITS for family in READS if family not in FITS[task]]


def model(keys):
    encoders = [SimpleNamespace(key=key) for key in keys]
    return SimpleNamespace(conditioner=SimpleNamespace(children=lambda: encoders))


@pytest.mark.parametrize(("task", "family"), PAIRS)
def test_a_model_of_another_family_names_its_own_script(task, family):
    given = [None] * GIVEN.get(task, 2)
    with pytest.raises(WrongFamily) as caught:
        getattr(pipelines, task)(model(READS[family]), *given)
    script = SCRIPTS.get(family, family)
    assert str(caught.value) == f"this is {TITLES[family]}: use scripts/{script}.py"


def test_a_model_of_no_known_family_says_what_it_reads():
    with pytest.raises(WrongFamily, match="this model reads `smell`, `txt`, and no task here"):
        pipelines.txt2img(model({"txt", "smell"}), ["a"])
    with pytest.raises(WrongFamily, match="this model reads nothing"):
        pipelines.txt2img(model(()), ["a"])
