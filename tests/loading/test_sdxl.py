"""SDXL: configs and files of `generative-models` and other programs are loaded."""

from dataclasses import astuple
from pathlib import Path

import pytest
import torch
import yaml

import ldm
from ldm.diffusion.schedule import ContinuousSchedule, Schedule
from ldm.loading import inspection
from ldm.loading.buffers import make_buffers
from ldm.loading.build import build_on_meta
from ldm.loading.config import format_yaml, read_yaml
from ldm.loading.convert import convert, find_config_text, plan_conversion
from ldm.loading.files.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ldm.loading.find_variant import detect_model_variant
from ldm.loading.inspection import inspect_checkpoint
from ldm.loading.legacy import translate_config
from ldm.loading.matching import match_weights
from ldm.loading.model_config import read_config
from ldm.loading.weight_names import rename_weights, restore_names, select_prefix
from ldm.loading.weights import has_transposed_projection, identify_weights
from ldm.model import Defaults
from ldm.runtime.errors import ConfigError, MissingArgument, UnknownName, WeightsMismatch
from loading.tinyfamilies import convert_to_pipeline_state, make_small_config, write_family
from nets.nethelp import describe_tensors, get_shapes, read_original_tensors

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/stable-diffusion-xl"
SLOW = pytest.mark.slow
SIZES = ["original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"]


def build(config):
    return build_on_meta(config, where="x.yaml")


@pytest.fixture(scope="module")
def build_model():
    """Function of a config's name -> model on the meta device, built once."""
    models = {}

    def build_model(name):
        if name not in models:
            models[name] = build(read_yaml(CONFIGS / f"{name}.yaml"))
        return models[name]

    return build_model


@pytest.mark.parametrize("name", ["sd_xl_base", "sd_xl_refiner"])
def test_full_size_models_have_the_names_and_shapes_of_the_original(build_model, name):
    model = build_model(name)
    state = restore_names(model.state_dict(), make_buffers(model))
    assert describe_tensors(state) == read_original_tensors(name)


@pytest.mark.parametrize(
    ("name", "num_parameters", "prediction", "schedule"),
    [
        ("sd_xl_base", 2_567_463_684, "eps", Schedule),
        pytest.param("sd_xl_v", 2_567_463_684, "v", Schedule, marks=SLOW),
        ("sd_xl_inpaint", 2_567_478_084, "eps", Schedule),
        ("sd_xl_refiner", 2_259_526_660, "eps", Schedule),
        pytest.param("sd_xl_cosxl", 2_567_463_684, "v", ContinuousSchedule, marks=SLOW),
        pytest.param("playground-v2.5", 2_567_463_684, "edm", ContinuousSchedule, marks=SLOW),
        ("ssd-1b", 1_331_334_404, "eps", Schedule),
        pytest.param("segmind-vega", 745_225_604, "eps", Schedule, marks=SLOW),
    ],
)
def test_shipped_configs_are_built(build_model, name, num_parameters, prediction, schedule):
    model = build_model(name)
    assert sum(p.numel() for p in model.unet.parameters()) == num_parameters
    assert model.parameterization == prediction
    assert type(model.schedule) is schedule
    assert model.image_size == 128
    assert model.defaults.scale == 5.0
    texts = ["text"] if name == "sd_xl_refiner" else ["text", "text_2"]
    sizes = [*SIZES[:2], "aesthetic_score"] if name == "sd_xl_refiner" else SIZES
    masked = ["masked"] if name == "sd_xl_inpaint" else []
    assert list(model.conditioner.encoders) == texts + sizes + masked
    assert model.conditioner.text.null == ("" if name == "sd_xl_refiner" else None)


def test_former_yamls_of_sgm_are_read():
    """Weightings in the denoiser, removed parameters, and a class name misspelled by A1111."""
    config = make_small_config("xl")
    params = config["model"]["params"]
    params["denoiser_config"]["params"]["weighting_config"] = {
        "target": "sgm.modules.diffusionmodules.denoiser_weighting.EpsWeighting"
    }
    unet = params["network_config"]["params"]
    unet |= {"use_spatial_transformer": True, "legacy": False, "transformer_depth_middle": 2}
    vae = params["first_stage_config"]
    vae["target"] = "sgm.models.autoencoder.AutoencoderKLInferenceWrapper"
    text = format_yaml(config).replace("EmbedderND", "EmbedderAND")
    former, current = build(yaml.safe_load(text)), build(make_small_config("xl"))
    assert get_shapes(former) == get_shapes(current)


def test_a_unet_of_sgm_has_transformers_without_a_context_too():
    """They are at `attention_resolutions` and in the middle, with self-attention only."""
    config = make_small_config("xl")
    params = config["model"]["params"]
    params["conditioner_config"] = None
    unet = params["network_config"]["params"]
    del unet["context_dim"], unet["num_classes"], unet["adm_in_channels"]
    model = build(config)
    shapes = get_shapes(model.unet)
    for name in ("input_blocks.5.1", "middle_block.1", "output_blocks.0.1"):
        assert shapes[f"{name}.transformer_blocks.1.attn2.to_k.weight"] == [128, 128]
    x = torch.zeros(1, 4, 8, 8, device="meta")
    assert model.unet(x, torch.zeros(1, device="meta")).shape == x.shape


def test_parameters_of_training_are_accepted():
    config = make_small_config("xl")
    config["model"]["params"] |= {
        "optimizer_config": {"target": "os.system"}, "use_ema": True, "input_key": "jpg",
        "loss_fn_config": {"target": "os.system"}, "ckpt_path": "none.ckpt",
    }  # fmt: skip
    embedder = config["model"]["params"]["conditioner_config"]["params"]["emb_models"][0]
    embedder |= {"is_trainable": True, "ucg_rate": 0.1, "legacy_ucg_value": ""}
    conditioner = build(config).conditioner
    assert conditioner.text.ucg_rate == 0.1
    assert conditioner.text.is_trainable
    assert not conditioner.text_2.is_trainable


@pytest.mark.parametrize(
    ("key", "change", "error", "message"),
    [
        ("scale", 1.0, UnknownName, "did you mean `scale_factor`"),
        ("network_wrapper", "sgm.x.IdentityWrapper", ConfigError, "network_wrapper"),
        ("disable_first_stage_autocast", "x", ConfigError, "autocast must be true or false, got"),
        ("denoiser_config", {"target": "x.Denoiser", "params": {"flip": 1}}, UnknownName, "flip"),
        ("denoiser_config", {"target": "x.DiscreteDenoiser", "params": {"n": 1}}, UnknownName,
         "`n`, choose one of discretization_config, do_append_zero, flip, num_idx, quantize_c_n"),
        ("denoiser_config", "x", ConfigError, "invalid parameters"),
        ("conditioner_config", {"params": {"emb_models": [{"target": "x"}]}}, ConfigError,
         "needs one `input_key`"),
    ],
)  # fmt: skip
def test_unsupported_configs_are_refused(key, change, error, message):
    config = make_small_config("xl")
    config["model"]["params"][key] = change
    with pytest.raises(error, match=message):
        build(config)


@pytest.mark.parametrize(
    ("denoiser_params", "discretization_params", "name", "length", "last"),
    [
        ({"num_idx": 50}, {}, "LegacyDDPM", 50, 14.6146),
        ({}, {"sigma_max": 14.61, "rho": 3.0}, "EDM", 1000, 14.61),
    ],
)
def test_discretizations_give_the_noise_levels(
    denoiser_params, discretization_params, name, length, last
):
    config = make_small_config("xl")
    params = config["model"]["params"]["denoiser_config"]["params"]
    target = f"sgm.modules.diffusionmodules.discretizer.{name}Discretization"
    discretization = {"target": target, "params": discretization_params}
    params |= denoiser_params | {"discretization_config": discretization}
    sigmas = build(config).schedule.sigmas
    assert len(sigmas) == length
    assert sigmas[-1] == pytest.approx(last, rel=1e-5)


def test_the_denoiser_is_built_as_the_config_says():
    config = make_small_config("xl")
    params = config["model"]["params"]["denoiser_config"]["params"]
    params |= {"flip": False, "do_append_zero": True}
    params["scaling_config"] = {"target": "x.EDMScaling", "params": {"sigma_data": 1.0}}
    model = build(config)
    assert model.denoiser.sigma_data == 1
    assert (model.schedule.flip_timesteps, model.schedule.append_zero) == (True, True)
    table = make_buffers(model)["denoiser.sigmas"]
    assert len(table) == 1001
    assert table[0] == model.schedule.sigmas[-1].float()
    assert table[-1] == 0


def make_checkpoint(build_model, name, **other_tensors):
    """Make a checkpoint with the shapes of a full-size UNet, without using memory."""
    state = {
        f"unet.{key}": torch.zeros(1).expand(value.shape)
        for key, value in build_model(name).unet.state_dict().items()
    }
    return Checkpoint(Path("model.safetensors"), "zip", restore_names(state) | other_tensors)


V, ZERO_SNR = {"v_pred": torch.empty(0)}, {"ztsnr": torch.empty(0)}
COSXL = {"edm_vpred.sigma_max": torch.tensor(90.0)}


@pytest.mark.parametrize(
    ("name", "markers", "detected"),
    [
        ("sd_xl_base", {}, "sd_xl_base"),
        ("sd_xl_base", V, "sd_xl_v"),
        ("sd_xl_base", ZERO_SNR, "sd_xl_base"),
        ("sd_xl_inpaint", {}, "sd_xl_inpaint"),
        ("sd_xl_refiner", {}, "sd_xl_refiner"),
        ("sd_xl_base", COSXL, "sd_xl_cosxl"),
        (
            "sd_xl_base",
            {"edm_mean": torch.ones(1, 4, 1, 1), "edm_std": torch.empty(0)},
            "playground-v2.5",
        ),
        ("ssd-1b", {}, "ssd-1b"),
        pytest.param("segmind-vega", {}, "segmind-vega", marks=SLOW),
    ],
)
def test_families_are_recognized(build_model, name, markers, detected):
    weights = identify_weights(make_checkpoint(build_model, name, **markers))
    source, config = read_config(weights)
    assert Path(source).stem == detected
    params = translate_config(config)["params"]
    assert not weights.prediction_type.is_disputed
    if detected == "sd_xl_cosxl":
        expected = {"sigma_min": 0.002, "sigma_max": 90.0, "uses_log_sigma": True}
        assert params["schedule"]["params"] == expected
    if detected == "playground-v2.5":
        assert params["latent_mean"] == [1.0] * 4
        assert params["latent_std"] == [8.4927, 5.9022, 6.5498, 5.2299]


@pytest.mark.parametrize(
    ("name", "markers", "zero_snr"),
    [
        ("sd_xl_base", {**V, **ZERO_SNR}, True),
        ("sd_xl_inpaint", {**V, **ZERO_SNR}, True),
        ("sd_xl_refiner", V, False),
        ("sd_xl_inpaint", COSXL, None),
    ],
)
def test_markers_determine_the_prediction_type_of_every_family(
    build_model, name, markers, zero_snr
):
    """Also in the config that a conversion writes."""
    file = make_checkpoint(build_model, name, **markers)
    weights = identify_weights(file)
    config = read_config(weights)[1]
    assert yaml.safe_load(find_config_text(file, None)) == config
    params = translate_config(config)["params"]
    assert params["parameterization"] == weights.prediction_type.value == "v"
    schedule = params["schedule"]["params"]
    assert schedule.get("zero_snr") == zero_snr
    assert zero_snr is not None or schedule["sigma_max"] == 90


@pytest.mark.parametrize(("channels", "name"), [(8, "InstructPix2Pix"), (4, "KOALA")])
def test_models_that_are_not_supported_are_refused_by_name(build_model, channels, name):
    file = make_checkpoint(build_model, "sd_xl_base")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    if channels == 8:
        file.state_dict[first] = torch.zeros(1).expand(320, 8, 3, 3)
    else:
        for key in [key for key in file.state_dict if ".transformer_blocks.9." in key]:
            del file.state_dict[key]
    with pytest.raises(MissingArgument, match=name):
        read_config(identify_weights(file))


def test_a_variant_sets_the_defaults(tmp_path, tiny):
    path = tmp_path / "sdxl_lightning_8step.safetensors"
    path.hardlink_to(tiny)
    assert ldm.load(tiny).defaults == Defaults(5.0, 50, "ddim", "sgm_uniform")
    assert astuple(ldm.load(path).defaults)[:4] == (1.0, 8, "euler", "trailing")
    turbo = ldm.load(path, variant="turbo")
    assert astuple(turbo.defaults)[:4] == (1.0, 8, "euler_a", "turbo")
    assert turbo.latent_size == (64, 64)
    assert turbo.provenance["variant"] == {
        "name": "turbo", "evidence": "the argument", "file": path.name,
    }  # fmt: skip
    with pytest.raises(UnknownName, match="did you mean `turbo`"):
        ldm.load(path, variant="tubro")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The checkpoint of a tiny base model."""
    path = tmp_path_factory.mktemp("xl") / "base.safetensors"
    write_family("xl", path)
    return path


def write_vae(path, tiny):
    write_checkpoint(path, select_prefix(read_checkpoint(tiny).state_dict, "first_stage_model."))
    return path


def test_the_autoencoder_stays_in_float32_in_a_float16_model(tmp_path, tiny):
    model = ldm.load(tiny, dtype=torch.float16)
    assert {p.dtype for p in model.autoencoder.parameters()} == {torch.float32}
    assert model.unet.dtype == torch.float16
    fixed = write_vae(tmp_path / "sdxl-vae-fp16-fix.safetensors", tiny)
    model = ldm.load(tiny, dtype=torch.float16, vae=fixed)
    assert {p.dtype for p in model.autoencoder.parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["vae-ft-mse-840000-ema-pruned", "sdxl_vae", "my"])
def test_another_autoencoder_does_not_change_the_scale_factor(tmp_path, tiny, name, recwarn):
    vae = write_vae(tmp_path / f"{name}.safetensors", tiny)
    assert ldm.load(tiny, vae=vae).scale_factor == 0.13025
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == name.startswith("vae-ft")
    assert all("has scale factor 0.18215 (by its name)" in message for message in messages)


def test_a_large_file_is_inspected_without_hashing_it(tiny, monkeypatch):
    monkeypatch.setattr(inspection, "MAX_SIZE_TO_HASH", 0)
    report = inspect_checkpoint(tiny)
    assert report.sha256 == ""
    assert "no published file has this size" in "\n".join(report.format_lines())
    assert (report.missing, report.unexpected) == ([], [])


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("conditioner.embedders.1.", r"no second text encoder \(`conditioner.embedders.1.`\)"),
        ("conditioner.", r"no text encoder \(`conditioner.embedders.0.`\) and no second text"),
        ("first_stage_model.", r"no autoencoder \(`first_stage_model.`\): pass one \(`vae`\)"),
    ],
)
def test_a_missing_component_is_named(build_model, prefix, message):
    model = build_model("sd_xl_base")
    state = {name: torch.zeros(()).expand(v.shape) for name, v in model.state_dict().items()}
    state = {n: v for n, v in restore_names(state).items() if not n.startswith(prefix)}
    with pytest.raises(WeightsMismatch, match=message):
        match_weights(model, rename_weights(state), "x.safetensors")


@pytest.mark.parametrize("prefixes", [("conditioner.",), ("conditioner.embedders.1.", "first_")])
def test_missing_components_are_taken_from_another_file(tmp_path, tiny, prefixes):
    file, path = read_checkpoint(tiny), tmp_path / "unet.safetensors"
    state = {n: v for n, v in file.state_dict.items() if not n.startswith(prefixes)}
    write_checkpoint(path, state, {"ldm.config": file.metadata["ldm.config"]})
    completed, original = ldm.load(path, text_encoder=tiny), ldm.load(tiny)
    expected = original.state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in completed.state_dict().items())
    target = convert(plan_conversion(path, tmp_path / "x.safetensors", text_encoder=tiny))
    converted = read_checkpoint(target).state_dict
    assert all(torch.equal(value, converted[n]) for n, value in file.state_dict.items())


def test_a_transposed_projection_is_reported():
    projection = torch.zeros(1280, 1280)
    state = {"conditioner.text_2.model.text_projection": projection}
    projection[0, 1] = 0.0218
    assert not has_transposed_projection(state)
    projection[0, 1] = -0.0037
    assert has_transposed_projection(state)


def rename_as_playground(model, state):
    name = "conditioner.embedders.1.model.text_projection"
    return {n: v for n, v in state.items() if n != name} | {f"{name}.weight": state[name].T}


def rename_as_merged(model, state):
    """Rename and change weights as programs for merges do, which leave traces of EMA weights."""
    prefix = "conditioner.embedders."
    positions = "transformer.text_model.embeddings.position_ids"
    return {n: v for n, v in state.items() if not n.endswith("logit_scale")} | {
        "denoiser.sigmas": state["denoiser.sigmas"].half(),
        f"{prefix}0.{positions}": torch.arange(77)[None].float(),
        f"{prefix}1.model.{positions}": torch.arange(77)[None],
        "model_ema.decay": torch.tensor(0.9),
    }


@SLOW  # test_load has quick tests of files of other programs
@pytest.mark.parametrize(
    "rename", [convert_to_pipeline_state, rename_as_playground, rename_as_merged]
)
def test_files_of_other_programs_are_read(tmp_path, tiny, rename):
    file, model = read_checkpoint(tiny), ldm.load(tiny)
    path = tmp_path / "other.safetensors"
    state = {name: value.contiguous() for name, value in rename(model, file.state_dict).items()}
    write_checkpoint(path, state, {"ldm.config": file.metadata["ldm.config"]})
    loaded, state = ldm.load(path).state_dict(), model.state_dict()
    differing = {name for name in state if not torch.equal(state[name], loaded[name])}
    assert differing <= {"conditioner.text_2.model.logit_scale"}


def test_a_distilled_unet_is_recognized(build_model):
    name = "model.diffusion_model.time_embedding.cond_proj.weight"
    file = make_checkpoint(build_model, "sd_xl_base", **{name: torch.zeros(320, 256)})
    weights = identify_weights(file)
    assert detect_model_variant(weights).name == "lcm-full"
    unet = translate_config(read_config(weights)[1])["params"]["unet"]
    assert unet["params"]["time_cond_proj_dim"] == 256
    assert restore_names({"unet.time_embed_cond.weight": torch.zeros(1)}).keys() == {name}
