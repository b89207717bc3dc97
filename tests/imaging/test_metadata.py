"""Metadata of images: our JSON, and the text of A1111."""

import hashlib
import json

import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from ldm.imaging.metadata import format_parameters, hash_pixels, read_info, write_png
from ldm.prompts.a1111 import EMPHASIS_MODES

INFO = {
    "prompt": "a red apple, 3d emoji",
    "negative_prompt": "blurry",
    "seed": 42,
    "sampler": "euler_a",
    "scheduler": "karras",
    "steps": 20,
    "eta": 1.0,
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


LORAS = {
    "loras": [
        {"path": "/x/one.safetensors", "weight": 0.25, "hash": "0" * 10, "a1111_hash": "1" * 12},
        {"path": "/x/two.pt", "weight": -1.0, "hash": "2" * 10, "a1111_hash": "3" * 12},
    ]
}


@pytest.mark.parametrize(
    ("info", "text"),
    [
        (INFO, TEXT),
        (
            {"sampler": "ddim", "eta": 0.5, "checkpoint": "a, b: c.ckpt"},
            'Sampler: DDIM, Model: "a, b: c", Eta DDIM: 0.5',
        ),
        (
            {"sampler": "euler_a", "eta": 0.0, "s_churn": 0.0, "s_noise": 1.01},
            "Sampler: Euler a, Eta: 0, Sigma noise: 1.01",
        ),
        (
            {"sampler": "heun", "s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.0},
            "Sampler: Heun, Sigma churn: 5, Sigma tmin: 0.1, Sigma tmax: 9",
        ),
        (
            {"mask_box": [1, 2, 30, 40], "mask_grow": 12, "mask_blur": 8.0},
            'Mask box: "1, 2, 30, 40", Mask expand: 12, Mask blur: 8',
        ),
        ({"mask_box": None, "mask_grow": 0, "noise_level": 0}, "Noise level: 0"),
        (
            {"noise_level": [0, 100], "mix_noise_level": 7, "weight": [2.0, 0.5]},
            'Noise level: "0, 100", Mix noise level: 7, Image weights: "2, 0.5"',
        ),
        (
            {"vae": {"path": "/x/mse.ckpt", "hash": "c6a580b13a"}},
            "VAE hash: c6a580b13a, VAE: mse.ckpt",
        ),
        (
            {"prompt": "a cat", "seed": 7, **LORAS},
            "a cat <lora:one:0.25> <lora:two:-1>\n"
            'Seed: 7, Lora hashes: "one: 111111111111, two: 333333333333"',
        ),
    ],
)
def test_parameters_are_formatted_as_a1111_writes_them(info, text):
    assert format_parameters(info) == text


@pytest.mark.parametrize(
    ("sampler", "scheduler", "scheduler_in_use", "schedule_type"),
    [
        # A1111 uses the same steps for DDIM, and has no name for those of other samplers.
        ("ddim", None, "uniform", None),
        ("plms", "uniform", "uniform", None),
        ("euler", None, "uniform", "DDIM uniform"),
        ("ddim", None, "trailing", "Trailing"),
        ("dpm", None, "time_uniform", "Uniform in time"),
        ("dpmpp_2m", "karras", "karras", "Karras"),
    ],
)
def test_a_schedule_type_of_a1111_is_written_only_for_its_own_steps(
    sampler, scheduler, scheduler_in_use, schedule_type, tmp_path
):
    sampling = {"sampler": sampler, "scheduler": scheduler, "scheduler_in_use": scheduler_in_use}
    text = format_parameters({**INFO, **sampling})
    expected = f", Schedule type: {schedule_type}," if schedule_type else "Sampler:"
    assert expected in text
    assert ("Schedule type" in text) == (schedule_type is not None)
    read = read_info(write_text(tmp_path / "a.png", parameters=text))
    assert read.get("scheduler") == (scheduler_in_use if schedule_type else None)


def test_info_and_pixels_are_read_as_written(tmp_path):
    write_png(tmp_path / "a.png", IMAGE, INFO)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.tobytes() == IMAGE.tobytes()
        assert saved.info["parameters"] == TEXT
        assert json.loads(saved.info["ldm"])["seed"] == 42
    expected = hashlib.sha256(IMAGE.tobytes()).hexdigest()
    assert read_info(tmp_path / "a.png") == {**INFO, "sha256": expected}
    assert hash_pixels(IMAGE) == expected


@pytest.mark.parametrize(
    "prompt",
    ["café", "ein Bär 🐻 und 日本語", "two\nlines", 'quotes " and \\', "\0 zero", "", "caf\udce9"],
)
def test_any_prompt_is_read_as_written(tmp_path, prompt):
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
        'Denoising strength: 0.5, Mask blur: 4, Lora hashes: "a: 1, b: 2", Version: v1.6.0'
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
        "clip_skip": 2,
        "mask_blur": 4.0,
        "version": "v1.6.0",
        "syntax": "a1111",
        "other": {"Lora hashes": "a: 1, b: 2"},
    }


@pytest.mark.parametrize("syntax", ["a1111_no_norm", "a1111_ignore", "a1111_none"])
def test_emphasis_modes_of_a1111_are_prompt_syntaxes(tmp_path, syntax):
    mode = EMPHASIS_MODES[syntax]
    text = f"a cat\nSteps: 4, Sampler: Euler, CFG scale: 7, Emphasis: {mode}, Version: v1.10.1"
    info = read_info(write_text(tmp_path / "a.png", parameters=text))
    assert (info["syntax"], "other" in info) == (syntax, False)
    text = format_parameters({**INFO, "syntax": syntax})
    assert f"Emphasis: {mode}, Prompt syntax: {syntax}" in text
    assert read_info(write_text(tmp_path / "b.png", parameters=text))["syntax"] == syntax


@pytest.mark.parametrize(
    ("sampler", "version", "schedule_type", "expected"),
    [
        ("DPM++ 2M", "v1.10.1", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "f2.0.1v1.10.1-previous-659-gc055f2d4", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "v1.8.0-dev", None, ("dpmpp_2m", "normal")),
        ("DPM++ 2M", "v1.10.1", "Uniform", ("dpmpp_2m", "normal")),
        ("DPM++ 3M SDE", "v1.9.4", "Automatic", ("dpmpp_3m_sde", "exponential")),
        ("DPM++ 2M SDE Heun", "1.9.4", "SGM Uniform", ("dpmpp_2m_sde_heun", "sgm_uniform_a1111")),
        ("Euler a", "v1.10.1", None, ("euler_a", "normal")),
        ("DDIM", "v1.10.1", "Karras", ("ddim", "uniform")),
        ("UniPC", "v1.6.0", None, ("unipc", "uniform")),
        ("Euler", "v1.10.1", "DDIM", ("euler", "ddim_uniform")),
        ("Euler", "ldm 0.1.0", "Uniform", ("euler", "uniform")),  # as version 0.1 wrote it
    ],
)
def test_schedules_of_a1111_are_read(tmp_path, sampler, version, schedule_type, expected):
    schedule = f", Schedule type: {schedule_type}" if schedule_type else ""
    text = f"Steps: 4, Sampler: {sampler}{schedule}, CFG scale: 7, Version: {version}"
    info = read_info(write_text(tmp_path / "a.png", parameters=text))
    assert "other" not in info
    assert (info["sampler"], info["scheduler"]) == expected


@pytest.mark.parametrize(("version", "scale"), [("v1.10.1", 0.8), ("f2.0.1v1.10.1", 10.0)])
def test_the_scale_of_ddim_cfg_pp_of_a1111_is_converted(tmp_path, version, scale):
    text = f"Steps: 20, Sampler: DDIM CFG++, CFG scale: 10, Version: {version}"
    info = read_info(write_text(tmp_path / "a.png", parameters=text))
    assert (info["sampler"], info["scheduler"], info["scale"]) == ("euler_cfg_pp", "uniform", scale)


def test_sigmas_and_rho_are_written_to_the_text_and_read_from_it(tmp_path):
    sigmas = [14.6, 3.0, 0.1 + 0.2, 0.0]
    sampling = {"sigmas": sigmas, "scheduler_in_use": None, "sampler": "euler", "scheduler": None}
    text = format_parameters({**INFO, **sampling})
    assert 'Sigmas: "14.6, 3.0, 0.30000000000000004, 0.0"' in text
    assert "Schedule type" not in text
    info = read_info(write_text(tmp_path / "a.png", parameters=text))
    assert info["sigmas"] == sigmas
    rho = {"scheduler_in_use": "polyexponential", "rho": 2.0}
    text = format_parameters({**INFO, **rho})
    assert "Schedule type: Polyexponential" in text
    assert "Schedule rho: 2" in text
    info = read_info(write_text(tmp_path / "a.png", parameters=text))
    assert (info["scheduler"], info["rho"]) == ("polyexponential", 2.0)


@pytest.mark.parametrize("damaged", [{}, {"ldm": "{"}, {"ldm": "[1]"}, {"ldm": "null"}])
def test_our_parameters_are_read_where_the_json_is_missing_or_damaged(tmp_path, damaged):
    text = format_parameters({**INFO, **LORAS})
    info = read_info(write_text(tmp_path / "a.png", parameters=text, **damaged))
    keys = ("prompt", "negative_prompt", "steps", "sampler", "scheduler", "scale", "seed", "size")
    assert {key: info[key] for key in keys} == {key: INFO[key] for key in keys}


def test_options_of_sdxl_are_written_to_the_text_and_read_from_it(tmp_path):
    refiner = {"path": "/x/sd_xl_refiner_1.0.safetensors", "hash": "7440042bbd"}
    sdxl = {"prompt_2": "oil, thick", "original_size": [768, 1024], "crop": [0, 64],
            "negative_aesthetic_score": 2.5, "refiner_start": 0.8}  # fmt: skip
    text = format_parameters({**INFO, **sdxl, "refiner": refiner})
    assert "Refiner: sd_xl_refiner_1.0 [7440042bbd], Refiner switch at: 0.8" in text
    info = read_info(write_text(tmp_path / "a.png", parameters=text))
    assert info.items() >= sdxl.items()
    assert info["refiner"] == {"path": "sd_xl_refiner_1.0", "hash": "7440042bbd"}
    text = format_parameters({"refiner": refiner, "refiner_strength": 0.15})
    assert text.endswith("Refiner switch at: 0.85")


@pytest.mark.parametrize("text", ["", "only a prompt", 'Steps: x, Size: 3, Seed: "1', "\n\n"])
def test_malformed_texts_are_ignored(tmp_path, text):
    assert "steps" not in read_info(write_text(tmp_path / "a.png", parameters=text))


def save_with_user_comment(path, comment):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    IMAGE.save(path, exif=exif)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize(
    ("prefix", "encoding"), [("UNICODE\0", "utf-16-be"), ("ASCII\0\0\0", "utf-8")]
)
def test_the_text_in_the_exif_data_of_a1111_is_read(tmp_path, suffix, prefix, encoding):
    path, comment = tmp_path / f"a.{suffix}", prefix.encode() + TEXT.encode(encoding)
    save_with_user_comment(path, comment)
    assert read_info(path).items() >= {"seed": 42, "scheduler": "karras"}.items()


def test_a_damaged_comment_in_the_exif_data_is_ignored(tmp_path):
    save_with_user_comment(tmp_path / "a.jpg", b"UNICODE\0\xd8")
    assert read_info(tmp_path / "a.jpg") == {}


def test_an_image_without_texts_has_no_info(tmp_path):
    IMAGE.save(tmp_path / "a.jpg")
    assert read_info(tmp_path / "a.jpg") == {}


def test_sd_parsers_reads_our_files(tmp_path):
    sd_parsers = pytest.importorskip("sd_parsers")
    write_png(tmp_path / "a.png", IMAGE, {**INFO, **LORAS})
    parsed = sd_parsers.ParserManager().parse(tmp_path / "a.png")
    assert [p.value for p in parsed.prompts] == [
        "a red apple, 3d emoji <lora:one:0.25> <lora:two:-1>"
    ]
    assert [p.value for p in parsed.negative_prompts] == ["blurry"]
    assert [model.hash for model in parsed.models] == ["dcd690123c"]
    sampler = parsed.samplers[0]
    assert (sampler.name, sampler.parameters["seed"]) == ("Euler a", "42")
