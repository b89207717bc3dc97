"""The figure of the demo model over guidance scales, with few images and untrained classifiers."""

import json
from pathlib import Path

import pytest

import evaluate_scales
from classifiers import EmojiClassifiers
from ldm.imaging.reading import list_images

EMOJI = Path(__file__).parents[1] / "data" / "emoji"
FLAGS = ["--data", str(EMOJI), "--count", "4", "--steps", "1", "--batch", "4"]


@pytest.fixture
def classifiers_path(monkeypatch, tmp_path):
    """Path of a file of classifiers, which are not trained."""
    for name in ("train_objects", "train_styles"):
        monkeypatch.setattr(EmojiClassifiers, name, lambda *args: None)
    monkeypatch.setattr(evaluate_scales, "NUM_COMPONENTS", 2)
    monkeypatch.setattr(evaluate_scales.ClassifierFeatures, "num_features", 4)
    return tmp_path / "classifiers.pt"


@pytest.mark.slow
def test_images_of_all_scales_are_made_once_and_scored(classifiers_path, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [
        *FLAGS,
        "--scales",
        "1.5",
        "2",
        "--classifiers",
        str(classifiers_path),
        "--out",
        str(out),
    ]
    evaluate_scales.main(flags)
    table = capsys.readouterr().out
    paths = [out / f"demo-ddim-1-{scale}.json" for scale in ("1.5", "2")]
    results = [json.loads(path.read_text()) for path in paths]
    assert [result["count"] for result in results] == [4, 4]
    assert {"fid", "kid", "precision", "recall", "prompt_score"} <= results[0]["scores"].keys()
    assert "| demo-ddim-1 | 1.5 | 4 |" in table
    times = {path: path.stat().st_mtime_ns for path in list_images(out / "demo-ddim-1/scale-2")}
    evaluate_scales.main([*flags, "--score", "2"])
    assert "| demo-ddim-1 | 2 | 2 |" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert (out / "figure.svg").is_file() == (out / "figure.png").is_file()
