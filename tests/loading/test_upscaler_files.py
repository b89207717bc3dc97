"""Files of the x2 latent upscaler: k-diffusion's pickle and JSON, and diffusers' folder."""

import json
import shutil

import pytest
import torch

import ldm
from ldm.loading.config import format_yaml
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.inspection import inspect_checkpoint
from ldm.loading.load import load, save_model
from ldm.loading.model_config import read_config
from ldm.loading.weights import identify_weights, open_checkpoint
from ldm.runtime.errors import ArgumentError, ConfigError, MissingArgument, WeightsMismatch
from loading.tinyfamilies import read_json
from pipelines.goldmodels import StepRecorder
from tinyupscaler import build_tiny_upscaler, make_random_latent, make_tiny_config


@pytest.fixture(scope="module")
def model():
    return build_tiny_upscaler()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """A folder with `x2.safetensors` (ours), `x2.pth` (original), `folder` (diffusers), a YAML."""
    folder = tmp_path_factory.mktemp("x2")
    text = format_yaml(make_tiny_config())
    (folder / "x2.yaml").write_text(text)
    save_model(model, folder / "x2.safetensors", {"ldm.config": text})
    convert(plan_conversion(folder / "x2.safetensors", folder / "folder"))
    weights = model.unet.state_dict()
    raw_weights = {name: value + 1 for name, value in weights.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    content = {"model": raw_weights, "model_ema": weights, "opt": optimizer, "step": 470_000}
    torch.save(content, folder / "x2.pth")
    return folder


def assert_equal(model, expected, *, except_for=()):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == list(except_for)


def test_the_original_pickle_uses_ema_weights_and_networks_of_another_model(model, files):
    loaded = load(files / "x2.yaml", files / "x2.pth", base=model)
    assert_equal(loaded, model)
    ours, theirs = loaded.autoencoder, model.autoencoder
    assert ours.decoder.conv_in.weight.data_ptr() == theirs.decoder.conv_in.weight.data_ptr()
    loaded = load(files / "x2.yaml", files / "x2.pth", text_encoder=files / "x2.safetensors")
    assert_equal(loaded, model)
    assert loaded.provenance["text_encoder"]["path"] == str(files / "x2.safetensors")


def test_the_original_pickle_alone_names_what_it_needs(files):
    message = r"no autoencoder and no text encoder.*ViT-L/14"
    with pytest.raises(MissingArgument, match=message) as caught:
        load(ckpt=files / "x2.pth")
    assert caught.value.argument == "text_encoder"


def test_sizes_are_read_from_the_weights_or_the_json(files, tmp_path):
    expected = make_tiny_config()["model"]["params"]["unet"]["params"]
    weights = identify_weights(open_checkpoint(files / "x2.pth"))
    _, config = read_config(weights)
    params = config["model"]["params"]["unet"]["params"]
    assert params == {key: expected[key] for key in params}
    _, config = read_config(weights, overrides=["model.params.unet.params.depths=[3]"])
    assert config["model"]["params"]["unet"]["params"] == params | {"depths": [3]}
    shutil.copy(files / "x2.pth", tmp_path / "upscaler_2_1_slim.pth")
    (tmp_path / "config_upscaler_2.json").write_text("{}")
    sidecar = tmp_path / "config_upscaler_2_1.json"  # the longer one of two that match
    sidecar.write_text(json.dumps({"model": expected}))
    source, config = read_config(
        identify_weights(open_checkpoint(tmp_path / "upscaler_2_1_slim.pth"))
    )
    assert (source, config["model"]["params"]["unet"]["params"]) == (str(sidecar), expected)
    sidecar.write_text(json.dumps({"model": {"type": "image_v2"}}))
    with pytest.raises(ConfigError, match=r"must be of type `image_v1`, got `image_v2`"):
        read_config(weights, sidecar)
    del weights.state_dict["unet.inner_model.mapping_cond.weight"]
    with pytest.raises(WeightsMismatch, match=r"x2.pth` is not a complete x2 latent upscaler"):
        read_config(weights)


def test_a_folder_converts_back_to_the_original_pickle(model, files, tmp_path):
    assert_equal(load(ckpt=files / "folder"), model)
    convert(plan_conversion(files / "folder", tmp_path / "x2.pth"))
    content = torch.load(tmp_path / "x2.pth", weights_only=True)
    theirs = model.unet.state_dict()
    assert content["model_ema"].keys() == theirs.keys()
    assert all(torch.equal(content["model_ema"][name], theirs[name]) for name in theirs)


def test_folders_of_diffusers_have_no_embedding_of_noise_levels(model, files, tmp_path):
    folder = shutil.copytree(files / "folder", tmp_path / "folder")
    (folder / "original.safetensors").unlink()
    loaded = load(ckpt=folder)
    assert_equal(loaded, model, except_for=["unet.low_res_noise_embed.weight"])
    options = {"latent": make_random_latent(), "seeds": 0, "steps": 1}
    images = [ldm.upscale_latent(m, ["a cat"], **options) for m in (model, loaded)]
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)
    with pytest.raises(ArgumentError, match="leaves out the embedding of noise levels"):
        ldm.upscale_latent(loaded, ["a cat"], noise_sigma=0.3, **options)


@pytest.mark.slow
def test_the_unet_file_of_a_folder_is_loaded(model, files, tmp_path):
    shutil.copy(
        files / "folder/unet/diffusion_pytorch_model.safetensors", tmp_path / "u.safetensors"
    )
    loaded = load(files / "x2.yaml", tmp_path / "u.safetensors", text_encoder=files / "folder")
    assert_equal(loaded, model, except_for=["unet.low_res_noise_embed.weight"])


def test_noise_levels_follow_the_config_of_the_scheduler(files, tmp_path):
    folder = shutil.copytree(files / "folder", tmp_path / "folder")
    path = folder / "scheduler/scheduler_config.json"
    config = read_json(path)
    path.write_text(json.dumps(config | {"interpolation_type": "linear"}))
    assert load(ckpt=folder).defaults.scheduler == "normal"
    path.write_text(json.dumps(config | {"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="unknown prediction_type `epsilon`"):
        load(ckpt=folder)
    (folder / "original.safetensors").unlink()
    path.write_text(json.dumps(config | {"rescale_betas_zero_snr": True}))
    with pytest.raises(ConfigError, match="`rescale_betas_zero_snr` is not supported here"):
        load(ckpt=folder)


def test_a_folder_cannot_have_another_range_of_sigmas(model, tmp_path):
    config = make_tiny_config()
    config["model"]["params"]["schedule"]["params"]["sigma_max"] = 10.0
    save_model(model, tmp_path / "x2.safetensors", {"ldm.config": format_yaml(config)})
    with pytest.raises(ConfigError, match=r"supports only sigmas 0.02917 … 14.61"):
        convert(plan_conversion(tmp_path / "x2.safetensors", tmp_path / "folder"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [0, 1, 3.0])
def test_the_pipeline_of_diffusers_computes_the_same(files, scale):
    from diffusers import StableDiffusionLatentUpscalePipeline

    pipeline = StableDiffusionLatentUpscalePipeline.from_pretrained(str(files / "folder"))
    latent, x_T = make_random_latent(2, 8, 12), make_random_latent(2, 16, 24)
    prompts, recorder = ["a cat", "a dog on a bench"], StepRecorder()
    theirs = pipeline(
        prompts, image=latent, num_inference_steps=7, guidance_scale=scale, latents=x_T.clone(),
        output_type="latent",
    ).images  # fmt: skip
    ldm.upscale_latent(
        load(ckpt=files / "folder"), prompts, latent=latent, scale=scale, steps=7, x_T=x_T,
        callback=recorder, legacy=["unmasked"],
    )  # fmt: skip
    torch.testing.assert_close(recorder.xs[-1], theirs, atol=2e-4, rtol=0)  # observed: 3e-5


def test_the_original_pickle_is_inspected(files):
    report = inspect_checkpoint(files / "x2.pth")
    assert (report.family, report.task) == ("x2", "upscale_latent")
    assert [part.name for part in report.parts] == ["unet"]
    assert (report.missing, report.unexpected) == ([], [])
    assert report.note.startswith("needs autoencoder and text encoder (CLIP ViT-L/14)")
