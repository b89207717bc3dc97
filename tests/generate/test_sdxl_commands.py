"""The commands on tiny models of SDXL: base, refiner and inpainting."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.generate.command_line import parse_request
from ldm.generate.load import load_models
from ldm.generate.replay import compare_infos
from ldm.generate.tasks import TASKS
from ldm.imaging.metadata import read_info
from ldm.loading.addons.embeddings import write_embeddings
from ldm.loading.config import format_yaml, parse_yaml
from ldm.loading.files.checkpoint import (
    CONFIG_KEY,
    read_checkpoint,
    to_ema_name,
    write_checkpoint,
)
from make_tiny_sdxl import make_tiny_sdxl

SMALL_FLAGS = ["--H", "64", "--W", "64", "--n_samples", "2", "--n_iter", "1", "--precision", "full"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def run(models, tmp_path, run_ldm):
    """Runs a command, by default with the base; see `run_ldm`."""

    def run(command, *flags, ckpt="xl"):
        model = ["--ckpt", models[ckpt], "--outdir", tmp_path / "out"]
        return run_ldm(command, *SMALL_FLAGS, *model, *flags)

    return run


def test_an_image_of_base_and_refiner_replays_identically(run, run_ldm, models):
    options = {
        "refiner": str(models["xl-refiner"]),
        "refiner_start": 0.5,
        "prompt_2": "oil",
        "negative_prompt_2": "grey",
        "original_size": [512, 768],
        "crop": [0, 8],
        "target_size": [64, 64],
        "aesthetic_score": 7.0,
        "negative_original_size": [64, 128],
        "negative_aesthetic_score": 2.0,
    }
    flags = [
        f"--{name.replace('_', '-')}={','.join(map(str, value)) if type(value) is list else value}"
        for name, value in options.items()
    ]
    _, out, _ = run("txt2img", "--steps", "4", "--prompt", "a fox", *flags, "--json")
    info = json.loads(out[1])
    refiner = info["refiner"]
    assert info.items() >= {**options, "refiner": refiner, "steps": 4, "scale": 5.0}.items()
    assert (info["scheduler"], info["scheduler_in_use"]) == (None, "sgm_uniform")
    assert info["request"].items() >= options.items()
    name = models["xl-refiner"].stem
    with Image.open(info["path"]) as image:
        text = image.info["parameters"]
    assert f"Refiner: {name} [{refiner['hash']}], Refiner switch at: 0.5" in text
    _, (command,), _ = run_ldm("replay", info["path"], "--show-command")
    assert f"--refiner={options['refiner']} --refiner-start=0.5" in command
    moved = models["xl-refiner"].rename(models["xl-refiner"].with_name("moved.safetensors"))
    assert "pass the path of that file (--refiner)" in run_ldm("replay", info["path"]).err
    assert run_ldm("replay", info["path"], "--refiner", moved).is_identical
    moved.rename(options["refiner"])


def test_step_counts_that_only_uniform_steps_of_the_original_fail_at_are_allowed(run):
    flags = ["--steps", "3", "--legacy", "steps,truncate", "--n_samples", "1", "--skip_grid"]
    assert len(run("txt2img", *flags).paths) == 1  # the default scheduler is `sgm_uniform`
    _, _, err = run("txt2img", *flags, "--scheduler", "uniform")
    assert "the original fails at 3 steps" in err


def test_the_ema_weights_of_a_refiner_are_recorded(run, models, tmp_path):
    file = read_checkpoint(models["xl-refiner"])
    config = parse_yaml(file.metadata[CONFIG_KEY], ["model.params.use_ema=true"])
    ema = {to_ema_name(k): v for k, v in file.state_dict.items() if k.startswith("model.")}
    path = tmp_path / "refiner.safetensors"
    write_checkpoint(path, file.state_dict | ema, {CONFIG_KEY: format_yaml(config)})
    _, out, _ = run("txt2img", "--steps", "2", "--refiner", path, "--n_samples", "1", "--json")
    info = json.loads(out[0])
    assert info["refiner"]["ema"] is True
    raw = {**info, "refiner": {k: v for k, v in info["refiner"].items() if k != "ema"}}
    digest = info["refiner"]["hash"]
    assert compare_infos(info, raw) == [f"refiner: ['{digest} EMA'] then, ['{digest}'] now"]


def test_a_line_of_a_prompt_file_has_prompts_for_both_text_encoders(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na fox --prompt-2 'oil, thick'")
    flags = ["--from-file", tmp_path / "prompts.txt", "--steps", "1", "--n_samples", "1"]
    _, out, _ = run("txt2img", *flags, "--json")
    infos = [json.loads(line) for line in out]
    assert [info.get("prompt_2") for info in infos] == [None, "oil, thick"]


@pytest.mark.slow
def test_a_refiner_takes_the_embeddings_that_have_vectors_for_it(models, tmp_path):
    clip, openclip = torch.ones(1, 32), torch.ones(2, 48)
    tokens = {"both": [clip, openclip[:1]], "clip": [clip], "openclip": [openclip]}
    flags = ["--ckpt", str(models["xl"]), "--refiner", str(models["xl-refiner"])]
    for token, vectors in tokens.items():
        path = tmp_path / f"{token}.safetensors"
        write_embeddings(path, {token: vectors})
        flags += ["--embedding", str(path)]
    loaded = load_models(parse_request(TASKS["txt2img"], flags))
    assert loaded.base.conditioner.text.added_embeddings.keys() == {"both", "clip"}
    assert loaded.refiner.conditioner.text.added_embeddings.keys() == {"both", "openclip"}


@pytest.mark.parametrize(
    ("command", "ckpt", "flags"),
    [
        ("img2img", "xl", ["--strength", "0.5"]),
        ("inpaint", "xl", ["--mask-box", "0,0,32,64"]),
        pytest.param("img2img", "xl-refiner", ["--strength", "0.3", "--aesthetic-score", "9"],
                     marks=pytest.mark.slow),
        pytest.param("inpaint", "xl-inpainting", ["--mask-box", "0,0,32,64"],
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_img2img_and_inpaint_take_models_of_sdxl(run, run_ldm, photo, command, ckpt, flags):
    image = ["--init-img", photo, "--steps", "2", "--n_samples", "1"]
    out = run(command, *image, *flags, "--skip_grid", ckpt=ckpt).paths
    assert read_info(out[0])["scale"] == 5.0
    if ckpt == "xl-inpainting":
        assert run_ldm("replay", out[0]).is_identical


@pytest.mark.slow
def test_a_distilled_model_has_defaults_of_its_own(run):
    _, out, _ = run("txt2img", "--variant", "turbo", "--n_samples", "1", "--json")
    info = json.loads(out[0])
    assert (info["scale"], info["steps"], info["sampler"]) == (1.0, 4, "euler_a")
    assert (info["scheduler"], info["scheduler_in_use"]) == (None, "turbo")


@pytest.mark.slow
def test_the_quirk_float_watermark_embeds_the_watermark_of_the_original(run, run_ldm):
    flags = ["--H", "256", "--W", "256", "--steps", "1", "--scale", "1", "--n_samples", "1"]
    images = []
    for legacy, method in (([], "dwtDctSvd"), (["--legacy", "float-watermark"], "dwtDct (floats)")):
        _, out, _ = run("txt2img", *flags, *legacy)
        info = read_info(out[0])
        assert (info["watermark"], info["payload"]) == (method, "SDXL")
        images.append(np.asarray(Image.open(out[0])))
    assert (images[0] != images[1]).any()
    assert run_ldm("replay", out[0]).is_identical


def test_an_unusual_size_and_the_scale_factor_of_another_vae_are_warned_of(run, models):
    flags = ["--H", "72", "--steps", "1", "--n_samples", "1", "--vae", models["xl-inpainting"]]
    _, _, err = run("txt2img", *flags)
    assert "72x64 (height x width) is far from the sizes that this model was trained with" in err
    assert "used with scale factor 0.13025 of " in err


def test_options_that_the_base_does_not_read_are_refused_in_one_line(run):
    error = run("txt2img", "--aesthetic-score", "5").error
    assert "for the refiner, the base does not read it" in error
