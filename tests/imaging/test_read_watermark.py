"""`ldm read-watermark`."""

import json

import pytest
from PIL import Image

from ldm.commands.read_watermark import main
from ldm.imaging.watermark import embed_watermark


@pytest.fixture
def marked(tmp_path):
    noise = Image.effect_noise((256, 300), 90).convert("RGB")
    embed_watermark(noise, b"StableDiffusionV1").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_payload_method_and_agreement_are_printed(marked, capsys):
    assert main([marked]) == 0
    line = f"{marked}: StableDiffusionV1 by dwtDctSvd, found: 100.0% of the bits, "
    assert capsys.readouterr().out.startswith(line)


def test_detections_are_printed_as_json(marked, capsys):
    assert main(["--json", "--all", marked]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == marked
    assert report["findings"][0]["payload"] == "StableDiffusionV1"
    assert len(report["findings"]) == 6


def test_an_image_without_watermark_and_a_missing_file_are_reported(tmp_path, capsys):
    for name, side in (("small", 64), ("plain", 512)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    assert main([str(tmp_path / f"{name}.png") for name in ("small", "plain", "none")]) == 1
    captured = capsys.readouterr()
    small, plain = captured.out.splitlines()
    assert small.endswith("no known watermark (too small for one: fewer than 256x256 pixels)")
    assert plain.endswith("no known watermark")
    assert len(captured.err.splitlines()) == 1
