"""The small models that ship beside the one for text: found without being named, and at work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ldm
from ldm.generate.flags import DEMO_SCALE, DEMO_SCALES, DEMOS
from ldm.imaging.metadata import read_info
from ldm.runtime.files import find_file
from scripts import inpaint, upscale

PICTURE = next((Path(__file__).parents[1] / "data/emoji/images/flat").glob("*.png"))
CASES: list[Any] = [
    (inpaint, ["--mask-box", "16,16,48,48", "--prompt", "a flat emoji"], (64, 64)),
    (upscale, ["--prompt", ""], (256, 256)),
]


@pytest.mark.parametrize(("script", "flags", "size"), CASES)
def test_a_script_without_ckpt_uses_the_model_that_ships_and_says_so(
    script: Any, flags: list[str], size: tuple[int, int], tmp_path: Path, capsys: Any
) -> None:
    photo = tmp_path / "photo.png"
    with Image.open(PICTURE) as picture:
        picture.convert("RGB").resize((64, 64)).save(photo)
    words = ["--init-img", str(photo), "--outdir", str(tmp_path), "--steps", "2", *flags]
    assert script.main(words) == 0
    out, err = capsys.readouterr()
    path = out.splitlines()[0]
    with Image.open(path) as picture:
        assert picture.size == size
    assert err.count("using the small model that ships with ldm") == 1
    info = read_info(path)
    task = script.PARSER.get_default("task")
    assert info["checkpoint"] == Path(DEMOS[task]).name
    assert info["scale"] == DEMO_SCALES.get(task, DEMO_SCALE)


def test_the_inpainting_model_has_the_autoencoder_of_the_demo_model() -> None:
    """So that programs that have both keep one of them in memory."""
    text, other = (ldm.load(ckpt=ckpt) for ckpt in (None, find_file(DEMOS["inpaint"])))
    theirs = other.autoencoder.state_dict()
    for name, value in text.autoencoder.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_shipped_models_are_small() -> None:
    assert sum(find_file(path).stat().st_size for path in DEMOS.values()) < 13e6
