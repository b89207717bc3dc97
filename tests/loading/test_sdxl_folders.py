"""Diffusers folders of SDXL: configs, variants and shards; test_diffusers_images has images."""

import json
import shutil

import pytest
import torch

import ldm
from ldm.loading.config import format_yaml, parse_yaml, read_yaml
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.diffusers.layout import EXTRA_WEIGHTS
from ldm.loading.files.checkpoint import read_checkpoint, write_checkpoint
from ldm.loading.weight_names import select_prefix
from ldm.loading.weights import open_checkpoint
from ldm.runtime.errors import ConfigError, FileFormatError, MissingFile, UnknownName
from loading.tinyfamilies import change_json, read_json
from quick import slow_except

FAMILIES = ("xl", "xl-refiner", "xl-inpainting", "playground", "cosxl", "ssd-1b")


@pytest.fixture
def folder(convert_family, tmp_path):
    """A folder as others publish it, without our file of extra weights."""
    path = shutil.copytree(convert_family("xl")[2], tmp_path / "folder")
    (path / EXTRA_WEIGHTS).unlink()
    return path


@pytest.mark.parametrize("name", slow_except(FAMILIES, "xl"))
def test_a_folder_is_loaded_without_extra_weights(convert_family, tmp_path, name):
    source, _, converted = convert_family(name)
    folder = shutil.copytree(converted, tmp_path / "folder")
    (folder / EXTRA_WEIGHTS).unlink()
    ours, theirs = ldm.load(source), ldm.load(folder)
    state, folder_state = ours.state_dict(), theirs.state_dict()
    differing = {name for name in state if not torch.equal(state[name], folder_state[name])}
    assert all(name.endswith("logit_scale") for name in differing)
    for attribute in ("parameterization", "scale_factor", "upcast_autoencoder", "latent_size"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert list(theirs.conditioner.encoders) == list(ours.conditioner.encoders)
    assert theirs.conditioner.text.null == ours.conditioner.text.null
    assert torch.allclose(ours.schedule.sigmas, theirs.schedule.sigmas)


def test_settings_in_the_configs_of_a_folder_are_used(folder):
    change_json(folder / "scheduler/scheduler_config.json", timestep_spacing="leading")
    change_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    change_json(folder / "vae/config.json", force_upcast=False)
    change_json(folder / "unet/config.json", sample_size=64)
    model = ldm.load(folder, dtype=torch.float16)
    assert model.defaults.scheduler == "leading"
    assert model.conditioner.text.null == model.conditioner.text_2.null == ""
    assert model.autoencoder.quant_conv.weight.dtype == torch.float16
    assert model.latent_size == (64, 64)
    assert "version: laion2b_s39b_b160k" in open_checkpoint(folder).metadata["ldm.config"]


@pytest.mark.parametrize(
    ("options", "scheduler", "is_warned"),
    [
        ({"use_exponential_sigmas": True}, "exponential", False),
        ({"use_beta_sigmas": True, "steps_offset": 0}, "beta_sigma", False),
        ({"timestep_spacing": "leading", "steps_offset": 0}, "leading", True),
        ({"timestep_spacing": "trailing", "steps_offset": 0}, "trailing", False),
        ({"timestep_spacing": "linspace"}, "normal", False),
        ({"timestep_spacing": "linspace", "solver_order": 2}, "sgm_uniform_a1111", False),
    ],
)
def test_timestep_spacings_are_used_and_ignored_settings_warned_of(
    folder, caplog, options, scheduler, is_warned
):
    change_json(folder / "scheduler/scheduler_config.json", **options)
    assert ldm.load(folder).defaults.scheduler == scheduler
    assert ("`steps_offset` is ignored" in caplog.text) == is_warned


def test_noise_levels_that_diffusers_does_not_have_survive_a_round_trip(convert_family, tmp_path):
    file = read_checkpoint(convert_family("xl")[0])
    config = parse_yaml(file.metadata["ldm.config"])
    denoiser = config["model"]["params"]["denoiser_config"]["params"]
    target = "sgm.modules.diffusionmodules.discretizer.EDMDiscretization"
    denoiser["discretization_config"] = {"target": target}
    source = tmp_path / "edm.safetensors"
    write_checkpoint(source, file.state_dict, {"ldm.config": format_yaml(config)})
    folder = convert(plan_conversion(source, tmp_path / "edm"))
    for path in (folder, convert(plan_conversion(folder, tmp_path / "back.safetensors"))):
        assert torch.equal(ldm.load(path).schedule.sigmas, ldm.load(source).schedule.sigmas)


def test_another_autoencoder_stays_in_float32_although_that_of_the_folder_need_not(folder):
    vae = shutil.copytree(folder / "vae", folder.with_name("sdxl-vae"))
    change_json(folder / "vae/config.json", force_upcast=False)
    model = ldm.load(folder, vae=vae, dtype=torch.float16)
    assert model.autoencoder.quant_conv.weight.dtype == torch.float32
    for target in (folder.with_name("x.safetensors"), folder.with_name("converted")):
        model = ldm.load(convert(plan_conversion(folder, target, vae=vae)), dtype=torch.float16)
        assert model.autoencoder.quant_conv.weight.dtype == torch.float32


def test_a_turbo_folder_is_sampled_with_its_scheduler(folder, tmp_path):
    scheduler = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    change_json(folder / "scheduler/scheduler_config.json", **scheduler)
    defaults = ldm.load(folder.rename(tmp_path / "sdxl-turbo")).defaults
    assert (defaults.sampler, defaults.scheduler) == ("euler_a", "trailing")
    assert (defaults.scale, defaults.steps) == (1.0, 4)


@pytest.mark.parametrize(
    ("name", "scheduler"), [("turbo", "EulerAncestralDiscreteScheduler"), ("lcm", "LCMScheduler")]
)
def test_a_few_step_model_has_the_same_defaults_from_file_and_folder(
    convert_family, tmp_path, name, scheduler
):
    file = tmp_path / f"sd_xl_{name}.safetensors"
    file.hardlink_to(convert_family("xl")[0])
    folder = convert(plan_conversion(file, tmp_path / f"sdxl-{name}"))
    assert read_json(folder / "model_index.json")["scheduler"] == ["diffusers", scheduler]
    defaults = ldm.load(file).defaults
    assert ldm.load(folder).defaults == defaults
    (folder / EXTRA_WEIGHTS).unlink()
    assert ldm.load(folder).defaults.sampler == defaults.sampler


def test_the_scale_factor_of_an_autoencoder_survives_a_round_trip(convert_family, tmp_path):
    state = select_prefix(convert_family("xl")[1], "first_stage_model.")
    config = read_yaml("configs/stable-diffusion-xl/sd_xl_base.yaml")
    first_stage = config["model"]["params"]["first_stage_config"]
    first_stage["params"]["ddconfig"] |= {"ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1}
    file = tmp_path / "sdxl_vae.safetensors"
    write_checkpoint(file, state, {"ldm.config": format_yaml({"model": first_stage})})
    convert(plan_conversion(file, tmp_path / "vae"))
    assert read_json(tmp_path / "vae/config.json")["scaling_factor"] == 0.13025
    convert(plan_conversion(tmp_path / "vae", tmp_path / "back.safetensors"))
    assert read_checkpoint(tmp_path / "back.safetensors").metadata["ldm.scale_factor"] == "0.13025"


def test_koala_is_refused_by_name(folder):
    change_json(folder / "unet/config.json", mid_block_type=None)
    with pytest.raises(ConfigError, match="a UNet without a middle block, such as KOALA's, is"):
        ldm.load(folder)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae"])
def test_a_missing_component_is_named(folder, component):
    shutil.rmtree(folder / component)
    with pytest.raises(FileFormatError, match=f"folder` has no `{component}/config.json`: "):
        ldm.load(folder)


def test_missing_weights_of_a_component_are_reported(folder):
    (folder / "text_encoder_2/model.safetensors").unlink()
    remedy = "download the complete folder again"
    message = f"no weights in `.*text_encoder_2`, only config.json: {remedy}"
    with pytest.raises(MissingFile, match=message):
        ldm.load(folder)


def test_a_missing_variant_is_refused(convert_family, folder):
    with pytest.raises(MissingFile, match="no weights of variant `bf16` in `.*: leave out `var"):
        ldm.load(folder, variant="bf16")
    with pytest.raises(UnknownName, match="unknown variant `fp16`, choose one of base, lcm"):
        ldm.load(convert_family("xl")[0], variant="fp16")


def test_a_component_without_the_variant_is_read_from_the_file_without_suffix(folder, caplog):
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    state = {name: value + 1 for name, value in read_checkpoint(unet).state_dict.items()}
    write_checkpoint(unet.with_suffix(".fp16.safetensors"), state)
    plain, model = ldm.load(folder), ldm.load(folder, variant="fp16")
    assert "has no variant fp16, using none" in caplog.text
    assert torch.equal(plain.unet.out[0].weight + 1, model.unet.out[0].weight)
    assert torch.equal(plain.autoencoder.quant_conv.weight, model.autoencoder.quant_conv.weight)


def test_half_precision_files_and_shards_are_read(folder):
    path = folder / "text_encoder_2/model.safetensors"
    state = {name: value.half() for name, value in read_checkpoint(path).state_dict.items()}
    names = sorted(state)
    shards = {f"model.fp16-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, shard in shards.items():
        write_checkpoint(path.with_name(file), {name: state[name] for name in shard})
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    index = path.with_name("model.safetensors.index.fp16.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    path.unlink()
    text = ldm.load(folder).conditioner.text_2.model
    assert torch.equal(text.text_projection, state["text_projection.weight"].float().T)
