"""--clip-skip: in images, their text, a replay, and for models that do not take it."""

import pytest

from ldm.commands.main import main
from ldm.imaging.metadata import format_parameters, parse_parameters, read_info

QUICK = ["--steps=1", "--n_iter=1", "--n_samples=1", "--skip_grid", "--prompt=a cat face"]


@pytest.mark.slow
def test_it_changes_the_image_is_recorded_and_made_again(tmp_path, capsys):
    infos = []
    for skip in ("1", "2"):
        assert main(["txt2img", *QUICK, "--clip-skip", skip, "--outdir", str(tmp_path)]) == 0
        path = capsys.readouterr().out.strip()
        infos.append(read_info(path))
    plain, skipped = infos
    assert plain["sha256"] != skipped["sha256"]
    assert "Clip skip" not in format_parameters(plain)
    assert parse_parameters(format_parameters(skipped))["clip_skip"] == skipped["clip_skip"] == 2
    assert main(["replay", path]) == 0
    assert capsys.readouterr().out == "identical\n"


@pytest.mark.parametrize(
    ("skip", "status", "message"),
    [
        ("9", 1, "error: clip_skip 9: the text encoder has 3 layers (--clip-skip)"),
        ("0", 2, "`0` is not a positive whole number"),
    ],
)
def test_a_layer_that_is_not_there_is_one_line(skip, status, message, tmp_path, capsys):
    try:
        returned = main(["txt2img", *QUICK, "--clip-skip", skip, "--outdir", str(tmp_path)])
    except SystemExit as stopped:
        returned = stopped.code
    assert returned == status
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_other_models_say_that_they_ignore_it(tiny, tmp_path, capsys):
    words = [*tiny.flags, *QUICK, "--H=64", "--W=64", "--clip-skip=2"]
    assert main(["txt2img", *words, "--outdir", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert err.count("clip_skip 2 is ignored: it is for Stable Diffusion 1, which `base_v") == 1
