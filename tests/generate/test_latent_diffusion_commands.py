"""Commands for models of latent-diffusion: folders with `model.ckpt` and `config.yaml`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ldm
from goldfile import load_golden
from ldm.commands.main import main
from ldm.encoders.towers import CLIP
from ldm.generate.command_line import parse_request, to_argv
from ldm.generate.tasks import PAGE_TASKS, TASKS
from ldm.imaging.metadata import read_info
from ldm.imaging.reading import read_size
from ldm.loading.weight_names import restore_names

MODELS = {
    "class2img": ("ldm_class", "config"),
    "uncond2img": ("ldm_uncond", "config_vq"),
    "semantic2img": ("ldm_concat", "config_semantic"),
    "layout2img": ("ldm_layout", "config"),
    "upscale": ("ldm_concat", "config_sr"),
    "inpaint": ("ldm_concat", "config_inpaint"),
    "txt2img": ("ldm_text2img", "config"),
    "knn2img": ("ldm_rdm", "config"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return task -> folder of a model."""
    folder = tmp_path_factory.mktemp("models")
    for task, (golden_name, config_name) in MODELS.items():
        golden = load_golden(golden_name)
        config = golden.meta[config_name]
        weights = golden.weights(restore_names(ldm.instantiate(config).state_dict()))
        (folder / task).mkdir()
        torch.save({"state_dict": weights}, folder / task / "model.ckpt")
        (folder / task / "config.yaml").write_text(json.dumps({"model": config}))
    return {task: folder / task for task in MODELS}


def write_clip(path):
    """Write a CLIP with embeddings of 32 features."""
    text = {"width": 64, "heads": 1, "layers": 1, "embed_dim": 32}
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "heads": 1, "layers": 1}
    save_file(CLIP(text, vision).state_dict(), path)
    return str(path)


def write_database(folder):
    """Write a database of two files, as that of the original."""
    folder.mkdir()
    for seed, name in enumerate(("part_0.npz", "part_1.npz")):
        values = np.random.default_rng(seed).normal(size=(4, 32)).astype(np.float32)
        np.savez(folder / name, embedding=values, img_id=np.arange(4))
    return str(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return task -> flags with its input files."""
    folder = tmp_path_factory.mktemp("inputs")
    values = np.random.default_rng(0)
    paths = {name: str(folder / name) for name in ("map.png", "small.png", "mask.png", "x.json")}
    Image.fromarray(values.integers(0, 7, (32, 48), np.uint8)).save(paths["map.png"])
    Image.fromarray(values.integers(0, 256, (32, 48, 3), np.uint8)).save(paths["small.png"])
    Image.fromarray(np.eye(32, 48, dtype=np.uint8) * 255).save(paths["mask.png"])
    (folder / "x.json").write_text('[{"category": 5, "box": [0.1, 0.2, 0.5, 0.5]}]')
    return {
        "class2img": ["--class", "2", "--class", "7"],
        "uncond2img": [],
        "semantic2img": ["--segmentation", paths["map.png"]],
        "layout2img": ["--layout", paths["x.json"]],
        "upscale": ["--init-img", paths["small.png"]],
        "inpaint": ["--init-img", paths["small.png"], "--mask", paths["mask.png"]],
        "txt2img": ["--prompt", "a virus", "--n_iter", "1", "--H", "64", "--W", "64"],
        "knn2img": [
            "--prompt",
            "a bear",
            "--clip",
            write_clip(folder / "clip.safetensors"),
            "--database",
            write_database(folder / "database"),
            "--knn",
            "3",
            "--H",
            "64",
            "--W",
            "64",
        ],
    }


SIZES = {  # (width, height) of the images
    "class2img": (32, 32), "uncond2img": (32, 32), "semantic2img": (48, 32),
    "layout2img": (32, 32), "upscale": (192, 128), "inpaint": (48, 32), "txt2img": (64, 64),
    "knn2img": (64, 64),
}  # fmt: skip


@pytest.mark.parametrize("task", MODELS)
def test_images_are_made_and_replayed(task, models, inputs, tmp_path, run_ldm):
    flags = ["--ckpt", str(models[task]), *inputs[task], "--steps", "2", "--n_samples", "2"]
    assert main([task, *flags, "--outdir", str(tmp_path)]) == 0
    paths = sorted((tmp_path / "samples").glob("*.png"))
    assert len(paths) == (4 if task == "class2img" else 2)
    assert {read_size(path) for path in paths} == {SIZES[task]}
    assert run_ldm("replay", paths[-1]).is_identical


def test_each_class_has_its_own_images(models, inputs, tmp_path):
    flags = ["--ckpt", str(models["class2img"]), *inputs["class2img"], "--steps", "1"]
    main(["class2img", *flags, "--n_samples", "1", "--outdir", str(tmp_path)])
    infos = [read_info(path) for path in sorted((tmp_path / "samples").glob("*.png"))]
    assert [info["classes"] for info in infos] == [[2], [7]]


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("class2img", [], "a class is missing (--class)"),
        ("class2img", ["--class", "11"], "classes of `model.ckpt` are 0 … 10, got 11 (--class)"),
        ("uncond2img", ["--scale", "5"], "uncond2img has no guidance, leave scale out (--scale)"),
        ("semantic2img", [], "a segmentation map is missing (--segmentation)"),
        ("layout2img", ["--layout", "none.json"], "no file `none.json`"),
        ("upscale", [], "an input image is missing (--init-img)"),
        ("knn2img", [], "a CLIP model is missing, such as ViT-L-14.pt (--clip)"),
    ],
)
def test_wrong_inputs_are_named_in_one_line(task, flags, message, models, tmp_path, capsys):
    argv = [task, "--ckpt", str(models[task]), *flags, "--outdir", str(tmp_path / "out")]
    assert main(argv) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"ldm {task}: error: {message}" or (message in error and "none.json" in error)


@pytest.mark.parametrize("mode", ["RGB", "text"])
def test_files_that_are_not_maps_or_layouts_are_refused(mode, models, tmp_path, capsys):
    path = tmp_path / "input.png"
    task, flag = ("semantic2img", "--segmentation") if mode == "RGB" else ("layout2img", "--layout")
    if mode == "RGB":
        Image.new("RGB", (32, 32)).save(path)
    else:
        path.write_text('{"boxes": 3}')
    assert main([task, "--ckpt", str(models[task]), flag, str(path)]) == 1
    assert flag in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"category": 5.5, "box": [0.1, 0.2, 0.5, 0.5]', "must be in 0 … 8190, got 5.5 (--layout)"),
        ('"category": 5, "box": [10, 20, 50, 50]', "got (5, 10.0, 20.0, 50.0, 50.0) (--layout)"),
    ],
)
def test_invalid_boxes_of_a_layout_are_named(fields, message, models, tmp_path, capsys):
    path = tmp_path / "boxes.json"
    path.write_text(f"[{{{fields}}}]")
    assert main(["layout2img", "--ckpt", str(models["layout2img"]), "--layout", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"`{path}`: " in error
    assert error.strip().endswith(message)


def test_a_prompt_is_said_to_be_ignored(models, tmp_path, capsys):
    flags = ["--ckpt", str(models["uncond2img"]), "--steps", "1", "--n_samples", "1"]
    main(["uncond2img", *flags, "--prompt", "a cat", "--outdir", str(tmp_path)])
    message = "`model.ckpt` is an unconditional model: prompt is ignored"
    assert message in capsys.readouterr().err


def test_a_prompt_that_the_text_encoder_truncates_is_named(models, tmp_path, capsys):
    flags = ["--ckpt", str(models["txt2img"]), "--steps", "1", "--n_samples", "1", "--n_iter", "1"]
    size = ["--H", "64", "--W", "64", "--outdir", str(tmp_path)]
    main(["txt2img", *flags, *size, "--prompt", "word " * 74 + "straw-berries and cream"])
    assert (
        "longer than 75 tokens: `straw-berries and cream …` is left out" in capsys.readouterr().err
    )
    assert main(["txt2img", *flags, *size, "--syntax", "a1111", "--prompt", "a (cat:1.2)"]) == 1
    assert "supports the syntax `plain` only (--syntax)" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["class2img", "txt2img", "uncond2img"])
def test_models_are_converted_to_files_only(task, models, tmp_path, capsys):
    assert main(["convert", str(models[task]), str(tmp_path / "x.safetensors")]) == 0
    original, converted = ldm.load(models[task]), ldm.load(tmp_path / "x.safetensors")
    expected = original.state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in converted.state_dict().items())
    assert main(["convert", str(models[task]), str(tmp_path / "folder")]) == 1
    assert "converted to files only, not to folders" in capsys.readouterr().err


def test_a_file_that_is_not_a_database_is_refused(models, inputs, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", vectors=np.zeros((4, 32)))
    flags = [*inputs["knn2img"], "--database", str(tmp_path / "x.npz")]
    assert main(["knn2img", "--ckpt", str(models["knn2img"]), *flags]) == 1
    assert "has no array `embedding` of numbers (--database)" in capsys.readouterr().err


def test_a_model_without_cross_attention_refuses_loras(models, tmp_path, capsys):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    flags = ["--ckpt", str(models["uncond2img"]), "--lora", str(tmp_path / "lora.safetensors")]
    assert main(["uncond2img", *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a model without cross-attention does not support LoRAs (--lora)" in error


def test_models_of_other_tasks_are_named(models, capsys):
    assert main(["txt2img", "--ckpt", str(models["upscale"]), "--prompt", "a cat"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is a super-resolution model: use `super_resolve` (ldm upscale" in error


def test_classes_are_read_back_from_their_command_line():
    request = parse_request(TASKS["class2img"], ["--class", "2", "--class", "7"])
    assert request.get_values()["classes"] == (2, 7)
    assert parse_request(TASKS["class2img"], to_argv(request)) == request


def test_the_page_leaves_these_tasks_out():
    names = {"class2img", "uncond2img", "semantic2img", "layout2img", "knn2img"}
    assert TASKS.keys() - PAGE_TASKS.keys() == names
