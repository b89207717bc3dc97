"""Catalog: the models and add-ons of a folder, found without loading them."""

import shutil
from pathlib import Path

from ldm.app.catalog import list_addons, list_checkpoints, read_catalog

DEMO = Path(__file__).parents[2] / "checkpoints/demo.safetensors"


def test_the_demo_model_serves_the_tasks_of_a_text_to_image_model(tmp_path):
    shutil.copy(DEMO, tmp_path / "demo.safetensors")
    catalog = read_catalog(tmp_path)
    assert catalog.models["demo.safetensors"].tasks == ("txt2img", "img2img", "inpaint")
    assert catalog.skip_reasons == []


def test_a_depth_model_is_listed_without_its_network(families, tmp_path, monkeypatch):
    for file in families["depth"]:
        shutil.copy(file, tmp_path)
    monkeypatch.setattr("ldm.encoders.depth._build_backbone", None)
    assert read_catalog(tmp_path).models["depth.safetensors"].tasks == ("depth2img",)


def test_files_that_are_not_models_are_skipped_with_one_line_each(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(DEMO.read_bytes()[:100_000])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "page.ckpt").write_text("<!doctype html>")
    (tmp_path / "README.md").write_text("no checkpoint")
    shutil.copy(DEMO, tmp_path / "yaml.safetensors")
    (tmp_path / "yaml.yaml").write_text("5")
    catalog = read_catalog(tmp_path)
    assert catalog.models == {}
    names = ["cut.safetensors", "empty.ckpt", "page.ckpt", "yaml.safetensors"]
    assert list(list_checkpoints(tmp_path)) == names
    reasons = ("damaged", "an empty file", "a web page", "cannot be used")
    for line, reason in zip(catalog.skip_reasons, reasons, strict=True):
        assert reason in line
        assert str(tmp_path) not in line
        assert "\n" not in line


def test_models_in_subfolders_and_diffusers_folders_are_named_by_their_path(tmp_path):
    (tmp_path / "people").mkdir()
    shutil.copy(DEMO, tmp_path / "people/a.safetensors")
    unet = tmp_path / "people/pipeline/unet"
    unet.mkdir(parents=True)
    (unet.parent / "model_index.json").write_text("{}")
    shutil.copy(DEMO, unet / "model.safetensors")
    assert list(list_checkpoints(tmp_path)) == ["people/a.safetensors", "people/pipeline"]
    catalog = read_catalog(tmp_path)
    assert list(catalog.models) == ["people/a.safetensors"]
    assert len(catalog.skip_reasons) == 1
    assert "`people/pipeline`" in catalog.skip_reasons[0]


def test_symlinked_files_and_uppercase_suffixes_are_listed(tmp_path):
    for name in ("a/x.SAFETENSORS", "a/._x.safetensors", "b/y.CKPT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("models", "models/loras"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "models/b").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "models/gone.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert list(list_checkpoints(tmp_path / "models")) == ["a/x.SAFETENSORS", "b/y.CKPT"]
    assert list(list_addons(tmp_path / "models", "lora")) == ["a/x"]
