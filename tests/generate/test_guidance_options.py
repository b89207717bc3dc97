"""Rules of guidance and FreeU as options: plan, PNG text, replay, form."""

import pytest

from imagehelp import QUICK
from ldm.app.form import get_field_values
from ldm.commands.main import main
from ldm.diffusion.names import FREEU_PRESETS
from ldm.generate.command_line import parse_request
from ldm.generate.plan import plan_batches
from ldm.generate.tasks import TASKS
from ldm.imaging.metadata import parse_parameters, read_info
from ldm.runtime.errors import ArgumentError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--pag", "--apg", "--freeu"],
         {"pag": 3.0, "apg": [0.0, 15.0, -0.5], "freeu": [1.4, 1.6, 0.9, 0.2]}),
        (["--perp-neg", "0.5", "--negative-prompt", "a dog", "--freeu", "1.25,1.5,0.5,0.25",
          "--freeu-version", "2"],
         {"perp_neg": 0.5, "freeu": [1.25, 1.5, 0.5, 0.25], "freeu_version": "2"}),
    ],
)  # fmt: skip
def test_a_png_says_how_it_was_guided_and_can_be_made_again(
    tiny, tmp_path, capsys, words, expected
):
    outdir = ["--outdir", str(tmp_path)]
    assert main(["txt2img", *tiny.flags, *QUICK, *outdir, *words]) == 0
    png = tmp_path / "samples" / "00000.png"
    info = read_info(png)
    assert {name: info[name] for name in expected} == expected
    values = get_field_values(info)
    shown = {name: ",".join(map(str, v)) if isinstance(v, list) else v
             for name, v in expected.items()}  # fmt: skip
    assert {name: values[name] for name in shown} == shown
    assert main(["replay", str(png)]) == 0
    assert capsys.readouterr().out.endswith("identical\n")


def test_the_text_of_a_png_can_be_entered_again():
    text = ('a cat\nSteps: 3, Seed: 1, APG: "0, 15, -0.5", Perp-neg: 1.5, PAG scale: 3, '
            'FreeU: "1.5, 1.6, 0.9, 0.2", FreeU version: diffusers')  # fmt: skip
    info = parse_parameters(text)
    assert (info["perp_neg"], info["pag"], info["freeu_version"]) == (1.5, 3.0, "diffusers")
    request = parse_request(TASKS["txt2img"], ["--apg", info["apg"], "--freeu", info["freeu"]])[0]
    assert request.sampling.apg == (0, 15, -0.5)
    assert request.sampling.freeu == tuple(vars(FREEU_PRESETS["sd1"]).values())


def test_each_line_of_a_file_needs_a_negative_prompt_for_perp_neg(tmp_path):
    (tmp_path / "prompts.txt").write_text('a cat --negative-prompt "a dog"\na red apple\n')
    words = ["--perp-neg", "--from-file", str(tmp_path / "prompts.txt")]
    with pytest.raises(ArgumentError, match="a negative prompt: `a red apple` has none"):
        plan_batches(parse_request(TASKS["txt2img"], words)[0])
    words += ["--negative-prompt", "blurry"]
    assert len(plan_batches(parse_request(TASKS["txt2img"], words)[0])) == 3
