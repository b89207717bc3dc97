"""Metadata of PNG files: ours, and the text of A1111."""

import hashlib
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.imaging.metadata import fingerprint, parameters_text, read_info, write_png

INFO = {
    "prompt": "a red apple, 3d emoji",
    "negative_prompt": "blurry",
    "seed": 42,
    "sampler": "euler_a",
    "scheduler": "karras",
    "steps": 20,
    "eta": 0.0,
    "scale": 7.5,
    "size": [512, 768],
    "legacy": [],
    "watermark": {"payload": "SDV2", "method": "dwtDctSvd"},
    "checkpoint": "v2-1_768-ema-pruned.safetensors",
    "checkpoint_hash": "dcd690123c",
    "dtype": "float16",
    "ldm": "0.1.0",
}
TEXT = """a red apple, 3d emoji
Negative prompt: blurry
Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 768x512, \
Model hash: dcd690123c, Model: v2-1_768-ema-pruned, Version: ldm 0.1.0"""
IMAGE = Image.effect_noise((20, 10), 50).convert("RGB")


def write_text(path, **texts):
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def test_the_parameters_text_is_as_a1111_writes_it():
    assert parameters_text(INFO) == TEXT
    text = parameters_text({"sampler": "ddim", "eta": 0.5, "checkpoint": "a, b: c.ckpt"})
    assert text == 'Sampler: DDIM, Model: "a, b: c", Eta DDIM: 0.5'


def test_info_and_pixels_come_back_as_written(tmp_path):
    write_png(tmp_path / "a.png", IMAGE, INFO)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.tobytes() == IMAGE.tobytes()
        assert saved.info["parameters"] == TEXT
        assert json.loads(saved.info["ldm"])["seed"] == 42
    expected = hashlib.sha256(IMAGE.tobytes()).hexdigest()
    assert read_info(tmp_path / "a.png") == {**INFO, "sha256": expected}
    assert fingerprint(IMAGE) == expected


@pytest.mark.parametrize(
    "prompt",
    ["café", "ein Bär 🐻 und 日本語", "two\nlines", 'quotes " and \\', "\0 zero", "", "caf\udce9"],
)
def test_any_prompt_comes_back(tmp_path, prompt):
    write_png(tmp_path / "a.png", IMAGE, {**INFO, "prompt": prompt})
    assert read_info(tmp_path / "a.png")["prompt"] == prompt


def test_sets_and_paths_are_written_as_lists_and_text(tmp_path):
    write_png(tmp_path / "a.png", IMAGE, {"legacy": frozenset({"steps", "noise"}), "x": tmp_path})
    info = read_info(tmp_path / "a.png")
    assert (info["legacy"], info["x"]) == (["noise", "steps"], str(tmp_path))


def test_a1111_text_is_read(tmp_path):
    text = (
        "a cat,\nby night\nNegative prompt: dog,\nblurry\nSteps: 28, Sampler: DPM++ 2M Karras, "
        "CFG scale: 7, Seed: 123, Size: 512x768, Model hash: abc, Model: x, Clip skip: 2, "
        'Denoising strength: 0.5, Lora hashes: "a: 1, b: 2", Version: v1.6.0'
    )
    assert read_info(write_text(tmp_path / "a.png", parameters=text)) == {
        "prompt": "a cat,\nby night",
        "negative_prompt": "dog,\nblurry",
        "steps": 28,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "scale": 7.0,
        "seed": 123,
        "size": [768, 512],
        "checkpoint_hash": "abc",
        "checkpoint": "x",
        "strength": 0.5,
        "version": "v1.6.0",
        "other": {"Clip skip": "2", "Lora hashes": "a: 1, b: 2"},
    }


@pytest.mark.parametrize("broken", [{}, {"ldm": "{"}, {"ldm": "[1]"}, {"ldm": "null"}])
def test_our_parameters_text_is_read_where_the_json_is_missing_or_broken(tmp_path, broken):
    info = read_info(write_text(tmp_path / "a.png", parameters=TEXT, **broken))
    keys = ("prompt", "negative_prompt", "steps", "sampler", "scheduler", "scale", "seed", "size")
    assert {key: info[key] for key in keys} == {key: INFO[key] for key in keys}


@pytest.mark.parametrize("text", ["", "only a prompt", 'Steps: x, Size: 3, Seed: "1', "\n\n"])
def test_strange_texts_do_no_harm(tmp_path, text):
    assert "steps" not in read_info(write_text(tmp_path / "a.png", parameters=text))


def test_an_image_without_texts_has_no_info(tmp_path):
    IMAGE.save(tmp_path / "a.jpg")
    assert read_info(tmp_path / "a.jpg") == {}


def test_other_programs_read_our_files(tmp_path):
    sd_parsers = pytest.importorskip("sd_parsers")
    write_png(tmp_path / "a.png", IMAGE, INFO)
    parsed = sd_parsers.ParserManager().parse(tmp_path / "a.png")
    assert [p.value for p in parsed.prompts] == ["a red apple, 3d emoji"]
    assert [p.value for p in parsed.negative_prompts] == ["blurry"]
    assert [model.hash for model in parsed.models] == ["dcd690123c"]
    sampler = parsed.samplers[0]
    assert (sampler.name, sampler.parameters["seed"]) == ("Euler a", "42")
