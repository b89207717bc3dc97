"""Catalogue: what a folder holds, without loading it."""

import shutil
from pathlib import Path

import pytest

from ldm.app.catalogue import list_checkpoints, read_catalogue

DEMO = Path(__file__).parents[2] / "checkpoints/demo.safetensors"


def test_the_demo_model_serves_what_text_is_enough_for(tmp_path):
    shutil.copy(DEMO, tmp_path / "demo.safetensors")
    catalogue = read_catalogue(tmp_path)
    assert catalogue.models["demo.safetensors"].tasks == ("txt2img", "img2img", "inpaint")
    assert catalogue.skipped == []


def test_files_that_are_no_models_are_skipped_with_a_line_each(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(DEMO.read_bytes()[:100_000])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "page.ckpt").write_text("<!doctype html>")
    (tmp_path / "README.md").write_text("no checkpoint")
    catalogue = read_catalogue(tmp_path)
    assert catalogue.models == {}
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "cut.safetensors",
        "empty.ckpt",
        "page.ckpt",
    ]
    for line, reason in zip(
        catalogue.skipped, ("damaged", "an empty file", "a web page"), strict=True
    ):
        assert reason in line
        assert "\n" not in line


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder `.*absent`"):
        read_catalogue(tmp_path / "absent")
