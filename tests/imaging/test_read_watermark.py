import json

from PIL import Image

from ldm.commands.read_watermark import main
from ldm.imaging.watermark import embed


def _marked(path):
    noise = Image.effect_noise((256, 300), 90).convert("RGB")
    embed(noise, b"StableDiffusionV1").save(path)
    return str(path)


def test_the_script_names_payload_method_and_agreement(tmp_path, capsys):
    path = _marked(tmp_path / "a.png")
    assert main([path]) == 0
    assert capsys.readouterr().out.startswith(
        f"{path}: StableDiffusionV1 by dwtDctSvd, found: 100.0% of the bits, "
    )


def test_the_script_writes_json(tmp_path, capsys):
    path = _marked(tmp_path / "a.png")
    assert main(["--json", "--all", path]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == path
    assert report["findings"][0]["payload"] == "StableDiffusionV1"
    assert len(report["findings"]) == 6


def test_the_script_says_none_and_why(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    Image.new("RGB", (512, 512)).save(tmp_path / "plain.png")
    assert main([str(tmp_path / "small.png"), str(tmp_path / "plain.png")]) == 1
    small, plain = capsys.readouterr().out.splitlines()
    assert small.endswith("no known watermark (too small for one: fewer than 256x256 pixels)")
    assert plain.endswith("no known watermark")


def test_a_missing_file_is_one_line_on_stderr(tmp_path, capsys):
    assert main([str(tmp_path / "none.png")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
