"""Safe latent diffusion and the safety checker, from the command line to the PNG and back."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkerhelp import write_checker
from imagehelp import QUICK, pixels
from ldm.commands.main import main
from ldm.diffusion.names import SLD_CONCEPTS
from ldm.generate.command_line import parse_request, to_argv
from ldm.generate.safety import hide_flagged
from ldm.generate.tasks import TASKS
from ldm.imaging.metadata import format_parameters, parse_parameters, read_info
from quick import some

sys.path.append(str(Path(__file__).parents[1] / "loading"))

from tinyfamilies import write


def parse(*words):
    return parse_request(TASKS["txt2img"], words)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sld", "mild"], "unknown preset of sld `mild`, choose one of weak, medium, strong"),
        (["--sld", "1,2,3"], "takes 5 numbers (warmup, scale, threshold, momentum_scale, "),
        (["--sld", "1,2,x,0,0"], "`1,2,x,0,0` is not five numbers"),
        (["--sld", "1,2,0,0,2"], "beta must be in 0 … 1, got 2"),
        (["--sld", "max", "--sld-concept", "@concept.txt"], "no file `concept.txt`"),
        (["--sld-concept", "a cat"], "sld_concept needs sld (--sld-concept)"),
        (["--unsafe", "black"], "unsafe needs safety_checker (--unsafe)"),
        (["--safety-checker", "x", "--unsafe", "rick"], "unknown choice `rick`"),
    ],
)
def test_a_wrong_value_is_named_at_once(capsys, words, message):
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_file_of_a_concept_is_read_from_the_command_line_alone(tmp_path):
    (tmp_path / "concept.txt").write_text("a cat,\na dog\n")
    argument = f"@{tmp_path / 'concept.txt'}"
    request = parse("--sld", "10,1000,0.01,0.3,0.4", "--sld-concept", argument)
    assert request.sampling.sld_concept == "a cat, a dog"
    assert parse(*to_argv(request)) == request
    other = request.with_values({"sld_concept": argument})
    assert other.sampling.sld_concept == argument


def test_a_png_says_how_it_was_guided_and_can_be_made_again(tiny, tmp_path, capsys):
    words = [*tiny.flags, *QUICK, "--outdir", str(tmp_path), "--sld", "0,20,0.1,0.3,0.4"]
    assert main(["txt2img", *words, "--sld-concept", "diffusers"]) == 0
    png = tmp_path / "samples" / "00000.png"
    info = read_info(png)
    assert info["sld"] == [0, 20, 0.1, 0.3, 0.4]
    assert info["sld_concept"] == SLD_CONCEPTS["diffusers"]
    assert main(["replay", str(png)]) == 0
    assert capsys.readouterr().out.endswith("identical\n")


def test_a1111_text_names_them():
    text = 'a cat\nSteps: 3, Seed: 1, SLD: "10, 1000, 0.01, 0.3, 0.4", SLD concept: original'
    info = parse_parameters(text)
    assert (info["sld"], info["sld_concept"]) == ("10, 1000, 0.01, 0.3, 0.4", "original")
    assert parse("--sld", info["sld"]).sampling.sld == (10, 1000, 0.01, 0.3, 0.4)


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    return write_checker(tmp_path_factory.mktemp("checker") / "checker.safetensors")


@pytest.fixture
def made(tiny, checker, tmp_path, capsys):
    """Make two images, and their grid; return infos, stderr and the folder."""

    def make(*words):
        flags = [*tiny.flags, *QUICK[:-1], "--n_samples", "2", "--outdir", str(tmp_path)]
        words = ["--safety-checker", str(checker), *words, "--json"]
        assert main(["txt2img", *flags, *words]) == 0
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], err

    return make


def test_scores_are_reported_and_the_image_is_kept(made, tmp_path):
    infos, err = made()
    safety = infos[0]["safety"]
    assert (safety["flagged"], safety["concepts"], safety["action"]) == (True, [2], None)
    assert len(safety["scores"]) == 17
    assert "image 0 is flagged by concept 2" in err
    assert err.count(": kept") == 2
    info = read_info(infos[0]["path"])
    assert info["safety"] == safety
    assert "Safety checker: flagged +" in format_parameters(info)
    assert pixels(infos[0]["path"]).std() > 1


@pytest.mark.parametrize("action", some(("black", "blur"), "black"))
def test_a_flagged_image_is_hidden_and_says_so(made, action, capsys):
    plain, _ = made()
    hidden, err = made("--unsafe", action)
    assert err.count("replaced by black" if action == "black" else ": blurred") == 2
    now, before = (pixels(infos[0]["path"]) for infos in (hidden, plain))
    if action == "black":
        assert not now.any()
    else:
        assert 0 < np.abs(np.diff(now, axis=0)).mean() < np.abs(np.diff(before, axis=0)).mean() / 3
    assert read_info(hidden[0]["path"])["safety"]["action"] == action
    assert main(["replay", hidden[0]["path"]]) == 0  # without the checker
    assert capsys.readouterr().out == "identical\n"


def test_a_dropped_image_is_nowhere(made, tmp_path):
    infos, err = made("--unsafe", "drop")
    assert [info["path"] for info in infos] == [None, None]
    assert err.count(": dropped") == 2
    assert not list(tmp_path.rglob("*.png"))


def test_what_is_not_a_checker_is_refused_before_the_model_is_loaded(tiny, tmp_path, capsys):
    for name, message in {
        str(tiny.ckpt): "base_v.safetensors` is another model, not a safety checker",
        "own": "base_v.safetensors` contains no safety checker",
        "nope.bin": "no safety checker in `nope.bin`",
    }.items():
        words = [*tiny.flags, "--safety-checker", name, "--outdir", str(tmp_path)]
        assert main(["txt2img", *words]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_depth_of_a_hidden_image_is_hidden():
    image, depth = Image.new("RGB", (8, 8), "red"), Image.new("I;16", (8, 8), 900)
    _, shown_depth = hide_flagged(image, depth, {"safety": {"action": "blur"}})
    assert shown_depth.mode == "I;16"
    assert shown_depth.getextrema() == (0, 0)
    assert image.getextrema()[0] == (255, 255)  # never in place
    assert hide_flagged(image, depth, {}) == (image, depth)
    assert hide_flagged(image, depth, {"safety": {"action": "drop"}}) == (None, None)


@pytest.mark.slow
def test_a_folder_of_the_safe_pipeline_says_what_its_authors_do(tmp_path, capsys):
    write("sd1", tmp_path / "sd1.safetensors")
    folder = tmp_path / "safe"
    assert main(["convert", str(tmp_path / "sd1.safetensors"), str(folder)]) == 0
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipelineSafe"
    (folder / "model_index.json").write_text(json.dumps(index))
    words = ["txt2img", "--ckpt", str(folder), *QUICK, "--H", "16", "--W", "16"]
    notice = "the model's own pipeline uses safe latent diffusion"
    for flags, is_said in (([], True), (["--sld", "max"], False)):
        assert main([*words, *flags, "--outdir", str(tmp_path / "out")]) == 0
        assert (notice in capsys.readouterr().err) == is_said
