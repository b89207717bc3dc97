"""Options of safe latent diffusion, from the command line to the PNG and back."""

import pytest

from ldm.commands.main import main
from ldm.diffusion.names import SLD_CONCEPTS
from ldm.generate.command_line import parse_request, to_argv
from ldm.generate.tasks import TASKS
from ldm.imaging.metadata import parse_parameters, read_info
from picturehelp import QUICK


def parse(*words):
    return parse_request(TASKS["txt2img"], words)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sld", "mild"], "unknown preset of sld `mild`, choose one of weak, medium, strong"),
        (["--sld", "1,2,3"], "takes five numbers (warmup, scale, threshold, momentum_scale, "),
        (["--sld", "1,2,x,0,0"], "`1,2,x,0,0` is not five numbers"),
        (["--sld", "1,2,0,0,2"], "beta must be in 0 … 1, got 2"),
        (["--sld", "max", "--sld-concept", "@concept.txt"], "no file `concept.txt`"),
        (["--sld-concept", "a cat"], "sld_concept needs sld (--sld-concept)"),
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
