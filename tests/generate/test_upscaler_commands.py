"""The x2 latent upscaler on the command line: alone, and after a text-to-image model."""

import json
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ldm
from ldm.imaging.metadata import read_info
from ldm.imaging.pixels import to_pil
from ldm.loading.config import format_yaml
from ldm.loading.files.latents import load_latent, save_latent
from ldm.loading.load import save_model
from ldm.model import LatentSpace
from tinyupscaler import build_tiny_upscaler, make_tiny_config

FLAGS = ["--n_samples", "1", "--n_iter", "1", "--skip_grid", "--device", "cpu"]


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    """A folder with `x2.safetensors`, an upscaler, `x2.pth`, only its UNet, and small images."""
    folder, model = tmp_path_factory.mktemp("x2"), build_tiny_upscaler()
    save_model(model, folder / "x2.safetensors", {"ldm.config": format_yaml(make_tiny_config())})
    torch.save({"model_ema": model.unet.state_dict()}, folder / "x2.pth")
    (folder / "small").mkdir()
    image = Image.linear_gradient("L").resize((60, 50)).convert("RGB")
    for name in ("one", "two"):
        image.save(folder / f"small/{name}.png")
    return folder


@pytest.fixture
def run(tmp_path, run_ldm):
    def run(*flags):
        return run_ldm(*flags, *FLAGS, "--outdir", tmp_path / "out")

    return run


@pytest.mark.slow
def test_an_image_and_a_folder_are_upscaled(upscaler, run, run_ldm):
    ckpt = ["--ckpt", upscaler / "x2.safetensors", "--steps", 1, "--noise-sigma", 0.2]
    (path,) = run("upscale", *ckpt, "--init-img", upscaler / "small/one.png").paths
    with Image.open(path) as image:
        assert image.size == (120, 100)
    info = read_info(path)
    assert (info["noise_sigma"], info["scale"], info["sampler"]) == (0.2, 1.0, "euler")
    assert info["scheduler_in_use"] == "time_uniform"
    assert run_ldm("replay", path).is_identical
    paths = run("upscale", *ckpt, "--indir", upscaler / "small").paths
    assert [path.rpartition("/")[2] for path in paths] == ["one.png", "two.png"]


def test_images_of_a_text_to_image_model_are_upscaled(upscaler, run, run_ldm, families):
    flags = ["--steps", 2, "--H", 64, "--W", 64, "--json"]
    upscaling = ["--upscaler", upscaler / "x2.safetensors", "--upscaler-steps", 2]
    status, (line,), _ = run("txt2img", *families["base_eps"].flags, *flags, *upscaling)
    assert status == 0
    info = json.loads(line)
    assert info["upscaler"]["path"] == str(upscaler / "x2.safetensors")
    assert (info["upscaler_steps"], info["upscaler_scale"]) == (2, 1.0)
    with Image.open(info["path"]) as image:
        assert image.size == (2 * info["size"][1], 2 * info["size"][0])
    assert run_ldm("replay", info["path"]).is_identical


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("upscale", ["--ckpt", "x2.pth", "--text-encoder", "no.ckpt"], "no checkpoint `no.ckpt`"),
        ("txt2img", ["--ckpt", "x2.safetensors"], "is an x2 latent upscaler: use `upscale_latent`"
         " (ldm upscale, scripts/upscale.py)"),
    ],
)  # fmt: skip
def test_wrong_checkpoints_are_refused(upscaler, run, monkeypatch, command, flags, message):
    monkeypatch.chdir(upscaler)
    image = ["--init-img", "small/one.png"] if command == "upscale" else []
    status, _, err = run(command, *flags, *image)
    assert status != 0
    assert message in err.replace("\n", " ")


@pytest.mark.slow
def test_unsuitable_upscalers_are_refused(upscaler, run, families):
    flags = [*families["base_eps"].flags, "--H", 64, "--W", 64, "--steps", 1]
    _, _, err = run("txt2img", *flags, "--upscaler", upscaler / "x2.pth")
    assert "has no" in err
    assert "text encoder (CLIP ViT-L/14), and `base_eps.safetensors` has none that fits" in err
    assert "pass its diffusers folder" in err
    _, _, err = run("txt2img", *flags, "--upscaler", "checkpoints/demo.safetensors")
    assert "is not an x2 latent upscaler" in err


def test_saved_latents_are_upscaled(upscaler, run, run_ldm, families, tmp_path):
    flags = [*families["base_eps"].flags, "--H", 64, "--W", 64, "--steps", 1, "--save-latents"]
    image, latent = run("txt2img", *flags, "--precision", "full").paths
    samples = tmp_path / "out/samples"
    assert (image, latent) == (str(samples / "00000.png"), str(samples / "00000.latent"))
    base = ldm.load(*families["base_eps"])
    decoded = to_pil(base.decode(load_latent(latent).normalize(base)))[0]
    with Image.open(image) as file:
        assert decoded.tobytes() == file.convert("RGB").tobytes()
    ckpt = ["--ckpt", upscaler / "x2.safetensors", "--steps", 1]
    status, (path,), _ = run("upscale", *ckpt, "--init-img", samples)
    assert (status, path) == (0, str(tmp_path / "out/00000.png"))
    with Image.open(path) as file:
        assert file.size == (128, 128)
    assert run_ldm("replay", path).is_identical


def test_unsuitable_latents_are_refused(upscaler, run, tmp_path):
    file, sdxl_space = tmp_path / "a.latent", LatentSpace(4, 8, 3, 0.13025, False)
    model = build_tiny_upscaler()
    ckpt = ["--ckpt", upscaler / "x2.safetensors", "--init-img", file]

    def refuse(*flags):
        status, out, err = run("upscale", *ckpt, *flags)
        assert (status == 0, out) == (False, [])
        return err

    save_latent(file, torch.zeros(4, 8, 8), model, {})
    assert "a latent is doubled as it is, leave height out" in refuse("--H", 64)
    save_file({"latent_tensor": torch.zeros(1, 4, 8, 8)}, file, {"ldm.latent_space":
              json.dumps(asdict(sdxl_space))})  # fmt: skip
    assert "is a latent of another kind than `x2.safetensors` reads" in refuse()
    save_file({"latent_tensor": torch.zeros(2, 4, 8, 8)}, file)
    assert "is not one latent: its shape is (2, 4, 8, 8)" in refuse()
    save_file({"latent": torch.zeros(1)}, file)
    assert "is not a latent" in refuse()
    ckpt[1:] = ["checkpoints/demo-upscaler.safetensors", "--init-img", file]
    save_latent(file, torch.zeros(4, 8, 8), model, {})
    assert "only the x2 latent upscaler takes latents" in refuse()


def test_a_latent_in_the_first_format_of_comfyui_is_scaled(tmp_path):
    values = torch.rand(1, 4, 8, 8)
    save_file({"latent_tensor": values}, tmp_path / "a.latent")
    assert torch.equal(load_latent(tmp_path / "a.latent").latent, values / 0.18215)
