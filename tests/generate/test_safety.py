"""Safe latent diffusion and the safety checker, from the command line to the PNG and back."""

import json

import numpy as np
import pytest
from PIL import Image

from checkerhelp import write_safety_checker
from imagehelp import ONE_IMAGE_FLAGS, read_pixels
from ldm.generate.command_line import parse_request, to_argv
from ldm.generate.safety import hide_flagged
from ldm.generate.tasks import TASKS
from ldm.imaging.metadata import format_parameters, read_info
from loading.tinyfamilies import write_family
from quick import slow_except


def parse(*flags):
    return parse_request(TASKS["txt2img"], flags)


def test_a_concept_is_read_from_a_file_only_on_the_command_line(tmp_path):
    (tmp_path / "concept.txt").write_text("a cat,\na dog\n")
    argument = f"@{tmp_path / 'concept.txt'}"
    request = parse("--sld", "10,1000,0.01,0.3,0.4", "--sld-concept", argument)
    assert request.sampling.sld_concept == "a cat, a dog"
    assert parse(*to_argv(request)) == request
    changed = request.with_values({"sld_concept": argument})
    assert changed.sampling.sld_concept == argument


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    return write_safety_checker(tmp_path_factory.mktemp("checker") / "checker.safetensors")


@pytest.fixture
def make_images(txt2img, checker):
    """Makes two images and their grid; returns their metadata and stderr."""

    def make_images(*flags):
        _, out, err = txt2img("--n_samples", 2, "--safety-checker", checker, "--json", *flags)
        return [json.loads(line) for line in out], err

    return make_images


def test_scores_are_reported_and_the_image_is_kept(make_images):
    infos, err = make_images()
    safety = infos[0]["safety"]
    assert (safety["flagged"], safety["concepts"], safety["action"]) == (True, [2], None)
    assert len(safety["scores"]) == 17
    assert "image 0 is flagged by concept 2" in err
    assert err.count(": kept") == 2
    info = read_info(infos[0]["path"])
    assert info["safety"] == safety
    assert "Safety checker: flagged +" in format_parameters(info)
    assert read_pixels(infos[0]["path"]).std() > 1


@pytest.mark.parametrize("action", slow_except(("black", "blur"), "black"))
def test_a_flagged_image_is_hidden_and_recorded_as_such(make_images, action, run_ldm):
    plain, _ = make_images()
    hidden, err = make_images("--unsafe", action)
    assert err.count("replaced by black" if action == "black" else ": blurred") == 2
    pixels, original = (read_pixels(infos[0]["path"]) for infos in (hidden, plain))
    if action == "black":
        assert not pixels.any()
    else:
        detail, original_detail = (np.abs(np.diff(p, axis=0)).mean() for p in (pixels, original))
        assert 0 < detail < original_detail / 3
    assert read_info(hidden[0]["path"])["safety"]["action"] == action
    assert run_ldm("replay", hidden[0]["path"]).is_identical  # without the checker


def test_a_dropped_image_is_not_saved(make_images, tmp_path):
    infos, err = make_images("--unsafe", "drop")
    assert [info["path"] for info in infos] == [None, None]
    assert err.count(": dropped") == 2
    assert not list(tmp_path.rglob("*.png"))


def test_a_file_that_is_not_a_safety_checker_is_refused_before_the_model_is_loaded(txt2img):
    for name, message in {
        "own": "base_v.safetensors` contains no safety checker",
        "nope.bin": "no safety checker in `nope.bin`",
    }.items():
        assert message in txt2img("--safety-checker", name).error


def test_the_depth_of_a_hidden_image_is_hidden():
    image, depth = Image.new("RGB", (8, 8), "red"), Image.new("I;16", (8, 8), 900)
    _, shown_depth = hide_flagged(image, depth, {"safety": {"action": "blur"}})
    assert shown_depth.mode == "I;16"
    assert shown_depth.getextrema() == (0, 0)
    assert image.getextrema()[0] == (255, 255)  # the input is not changed
    assert hide_flagged(image, depth, {}) == (image, depth)
    assert hide_flagged(image, depth, {"safety": {"action": "drop"}}) == (None, None)


@pytest.mark.slow
def test_a_folder_of_the_safe_pipeline_suggests_safe_latent_diffusion(tmp_path, run_ldm):
    write_family("sd1", tmp_path / "sd1.safetensors")
    folder = tmp_path / "safe"
    assert run_ldm("convert", tmp_path / "sd1.safetensors", folder).status == 0
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipelineSafe"
    (folder / "model_index.json").write_text(json.dumps(index))
    model = ["--ckpt", folder, *ONE_IMAGE_FLAGS, "--H", 16, "--W", 16, "--outdir", tmp_path / "out"]
    notice = "the model's own pipeline uses safe latent diffusion"
    for flags, is_suggested in (([], True), (["--sld", "max"], False)):
        status, _, err = run_ldm("txt2img", *model, *flags)
        assert (status, notice in err) == (0, is_suggested)
