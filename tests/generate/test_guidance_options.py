"""Guidance methods, FreeU and clip skip as options: plan, PNG text, replay, form."""

import pytest

from imagehelp import ONE_IMAGE_FLAGS
from ldm import pipelines
from ldm.app.form import get_field_values
from ldm.diffusion.names import FREEU_PRESETS, SLD_CONCEPTS
from ldm.generate.command_line import parse_request
from ldm.generate.plan import plan_batches
from ldm.generate.tasks import TASKS
from ldm.imaging.metadata import format_parameters, parse_parameters, read_info
from ldm.runtime.errors import ArgumentError


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--pag", "--apg", "--freeu"],
         {"pag": 3.0, "apg": [0.0, 15.0, -0.5], "freeu": [1.4, 1.6, 0.9, 0.2]}),
        (["--perp-neg", "0.5", "--negative-prompt", "a dog", "--freeu", "1.25,1.5,0.5,0.25",
          "--freeu-version", "2"],
         {"perp_neg": 0.5, "freeu": [1.25, 1.5, 0.5, 0.25], "freeu_version": "2"}),
        (["--sld", "0,20,0.1,0.3,0.4", "--sld-concept", "diffusers"],
         {"sld": [0.0, 20.0, 0.1, 0.3, 0.4], "sld_concept": SLD_CONCEPTS["diffusers"]}),
    ],
)  # fmt: skip
def test_a_png_records_its_guidance_and_can_be_replayed(txt2img, run_ldm, flags, expected):
    _, (png,), _ = txt2img("--skip_grid", *flags)
    info = read_info(png)
    assert {name: info[name] for name in expected} == expected
    values = get_field_values(info)
    for name, value in expected.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        assert values[name] == text
    assert run_ldm("replay", png).is_identical


def test_a_guidance_rescale_reaches_the_pipeline(txt2img, monkeypatch):
    calls, make = [], pipelines.txt2img
    monkeypatch.setattr(
        pipelines, "txt2img", lambda *args, **kwargs: calls.append(kwargs) or make(*args, **kwargs)
    )
    txt2img("--guidance-rescale", "0.5")
    assert {kwargs["guidance_rescale"] for kwargs in calls} == {0.5}


def test_guidance_options_are_parsed_from_the_text_of_a_png():
    text = ('a cat\nSteps: 3, Seed: 1, APG: "0, 15, -0.5", Perp-neg: 1.5, PAG scale: 3, '
            'FreeU: "1.5, 1.6, 0.9, 0.2", FreeU version: diffusers, '
            'SLD: "10, 1000, 0.01, 0.3, 0.4", SLD concept: original')  # fmt: skip
    info = parse_parameters(text)
    assert info["sld_concept"] == "original"
    assert (info["perp_neg"], info["pag"], info["freeu_version"]) == (1.5, 3.0, "diffusers")
    request = parse_request(TASKS["txt2img"], ["--apg", info["apg"], "--freeu", info["freeu"]])
    assert request.sampling.apg == (0, 15, -0.5)
    assert request.sampling.freeu == tuple(vars(FREEU_PRESETS["sd1"]).values())
    request = request.with_values({"apg": None, "sld": info["sld"]})
    assert request.sampling.sld == (10, 1000, 0.01, 0.3, 0.4)


def test_each_line_of_a_file_needs_a_negative_prompt_for_perp_neg(tmp_path):
    (tmp_path / "prompts.txt").write_text('a cat --negative-prompt "a dog"\na red apple\n')
    flags = ["--perp-neg", "--from-file", str(tmp_path / "prompts.txt")]
    with pytest.raises(ArgumentError, match="a negative prompt: `a red apple` has none"):
        plan_batches(parse_request(TASKS["txt2img"], flags))
    flags += ["--negative-prompt", "blurry"]
    assert len(plan_batches(parse_request(TASKS["txt2img"], flags))) == 3


@pytest.mark.slow
def test_clip_skip_changes_the_image_is_recorded_and_replayed(run_ldm, tmp_path):
    flags = [*ONE_IMAGE_FLAGS, "--prompt", "a cat face", "--outdir", tmp_path]
    (plain,), (path,) = (run_ldm("txt2img", *flags, "--clip-skip", skip).out for skip in (1, 2))
    plain, info = read_info(plain), read_info(path)
    assert plain["sha256"] != info["sha256"]
    assert "Clip skip" not in format_parameters(plain)
    assert parse_parameters(format_parameters(info))["clip_skip"] == info["clip_skip"] == 2
    assert run_ldm("replay", path).is_identical


def test_a_clip_skip_beyond_the_layers_is_an_error_in_one_line(run_ldm, tmp_path):
    error = run_ldm("txt2img", *ONE_IMAGE_FLAGS, "--clip-skip", 9, "--outdir", tmp_path).error
    assert "error: clip_skip 9: the text encoder has 3 layers (--clip-skip)" in error
