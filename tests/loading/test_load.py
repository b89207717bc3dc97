"""Loading models: all formats of files give the same model, and errors name the cause."""

import json
import re
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

import ldm
from ldm.loading import families
from ldm.loading.build import build_on_meta
from ldm.loading.config import instantiate, read_yaml
from ldm.loading.convert import plan_conversion
from ldm.loading.diffusers.files import read_folder
from ldm.loading.families import detect_family, probe_prediction_type
from ldm.loading.files.checkpoint import (
    CONFIG_KEY,
    Checkpoint,
    compute_short_hash,
    read_checkpoint,
    release_pages,
    to_ema_name,
    write_checkpoint,
)
from ldm.loading.load import save_model
from ldm.loading.matching import match_weights
from ldm.loading.model_config import asks_for_ema, choose_config
from ldm.loading.published import read_published_files
from ldm.loading.weight_names import rename_weights, restore_names, select_prefix
from ldm.loading.weights import identify_weights
from ldm.runtime.errors import ArgumentError, ConfigError, FileFormatError, MissingArgument
from loading import tinyfamilies
from loading.lorahelp import are_equal, rename_keys


@pytest.fixture
def tiny_file(tmp_path, tiny_state):
    path = tmp_path / "tiny.safetensors"
    write_checkpoint(path, tiny_state)
    return path


def has_weights(model, state):
    return are_equal(model.state_dict(), rename_weights(state))


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
ATTENTION_NAMES = ["q", "k", "v", "proj_out", "norm"]
OTHER_NAMES = {
    "attention of diffusers": ["to_q", "to_k", "to_v", "to_out.0", "group_norm"],
    "attention of old diffusers": ["query", "key", "value", "proj_attn", "group_norm"],
}


def make_contents(model, state):
    """Make the content of files with the same weights, as other programs write them."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    without_schedule = {k: v for k, v in state.items() if k.startswith(("model.", "first", "cond"))}
    tensor = torch.ones(1)
    flat = {n: v.flatten(1) if ".attn_1." in n and v.dim() == 4 else v for n, v in state.items()}
    more_tokens = {
        n: torch.cat([v, v[:2]]) if n.endswith("token_embedding.weight") else v
        for n, v in state.items()
    }
    unused = {n: v for n, v in state.items() if re.search("resblocks.1|_projection|_scale", n)}
    renamed = {}
    for name, names in OTHER_NAMES.items():
        pairs = zip(ATTENTION_NAMES, names, strict=True)
        rules = ((rf"(attn_1)\.{ours}\.", rf"\1.{theirs}.") for ours, theirs in pairs)
        renamed[name] = rename_keys(state, *rules)
    return renamed | {
        "compiled": rename_keys(state, ("^", "_orig_mod.")),
        "compiled UNet": rename_keys(state, (f"^{UNET}", f"{UNET}_orig_mod.")),
        "FSDP": rename_keys(state, (r"(block\.\d+)\.", r"\1._fsdp_wrapped_module.")),
        "parallel and compiled": rename_keys(state, ("^", "module._orig_mod.")),
        "within another module": rename_keys(state, ("^", "model.")),
        "prefixes twice": rename_keys(state, (f"^({UNET}|{VAE})", r"\1\1")),
        "without model.": rename_keys(state, (f"^{UNET}", "diffusion_model.")),
        "nested": {"state_dict": {"state_dict": state}, "epoch": 1},
        "home-made": {"model": state, "optimizer": {"state": {0: {"exp_avg": tensor}}}},
        "flat kernels": flat,
        "pipeline": tinyfamilies.convert_to_pipeline_state(model, state) | unused,
        "added tokens": more_tokens,
        "networks of forks": state
        | {
            "embedding_manager.string_to_param_dict.*": tensor,
            "control_model.input_hint_block.0.weight": tensor,
        },
        "lightning": {"state_dict": state, "global_step": 3, "epoch": 1},
        "bare": state,
        "without schedule": without_schedule,
        "half": half,
        "parallel": {f"module.{k}": v for k, v in state.items()},
        "with loss": {**state, "first_stage_model.loss.logvar": torch.zeros(())},
        "with logvar": {**state, "logvar": torch.zeros(1000)},
        "with mask": {**state, "cond_stage_model.model.attn_mask": torch.zeros(77, 77)},
        "with counters": {**state, "model_ema.num_updates": torch.tensor(3)},
    }


@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])
def test_files_of_all_programs_give_the_same_model(
    tmp_path, tiny_yaml, tiny_state, is_legacy, caplog
):
    model = build_on_meta(read_yaml(tiny_yaml))
    path = tmp_path / "x.ckpt"
    rounded = {n: v.half().float() if v.is_floating_point() else v for n, v in tiny_state.items()}
    for name, content in make_contents(model, tiny_state).items():
        if is_legacy and name not in ("lightning", "half"):
            continue
        caplog.clear()
        torch.save(content, path, _use_new_zipfile_serialization=not is_legacy)
        expected = rounded if name == "half" else tiny_state
        state = match_weights(model, identify_weights(read_checkpoint(path)).state_dict, path)
        ours = rename_weights(expected)
        assert state.keys() == ours.keys(), name
        assert all(torch.equal(value, ours[key].to(value.dtype)) for key, value in state.items())
        warned = {"networks of forks": "embedding_manager", "added tokens": "2 added tokens"}
        assert warned.get(name, "") in caplog.text
        assert bool(caplog.text) == (name in warned), caplog.text


def test_a_loaded_model_runs_and_names_its_files(tiny_yaml, tiny_file):
    model = ldm.load(tiny_yaml, tiny_file)
    assert not model.training
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    cond = model.condition({"txt": ["an apple", ""]})
    z = model.denoiser(torch.randn(2, 4, 8, 8), torch.ones(2), cond)
    assert model.decode(z).shape == (2, 3, 16, 16)
    provenance = model.provenance
    assert provenance["config"] == str(tiny_yaml)
    assert provenance["checkpoint"] == str(tiny_file)
    assert "data" in provenance["skipped"]
    assert any("scheduler_config" in name for name in provenance["skipped"])
    assert any("ckpt_path" in name for name in provenance["skipped"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_cast_once(tiny_yaml, tiny_file, tiny_state, dtype):
    model = ldm.load(tiny_yaml, tiny_file, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    name = "first_stage_model.encoder.conv_in.weight"
    assert torch.equal(model.autoencoder.encoder.conv_in.weight, tiny_state[name].to(dtype))


def test_released_pages_are_read_again_on_access(tmp_path, tiny_state):
    """Also if two names share one storage."""
    state = dict(tiny_state)
    state["cond_stage_model.model.token_embedding.weight"] = shared = torch.randn(49408, 16)
    torch.save({**state, "again": shared}, tmp_path / "x.ckpt")
    file = read_checkpoint(tmp_path / "x.ckpt")
    release_pages(file.state_dict["again"])
    assert torch.equal(file.state_dict["again"], shared)


def test_releasing_pages_keeps_weights_that_are_computed_from_a_folder(convert_family):
    """OpenCLIP has one matrix for query, key and value, which is in no file of the folder."""
    _, expected, folder = convert_family("sd2")
    file = read_folder(folder)
    assert file.memory_mapped
    for name, value in file.state_dict.items():
        release_pages(value)
        assert torch.equal(value, expected[name]), name


def test_a_saved_model_loads_with_the_same_weights(tmp_path, tiny_yaml, tiny_file, tiny_state):
    model = ldm.load(tiny_yaml, tiny_file)
    for suffix in (".ckpt", ".safetensors"):
        path = tmp_path / f"saved{suffix}"
        save_model(model, path, {"global_step": 7, CONFIG_KEY: tiny_yaml.read_text()})
        assert read_checkpoint(path).state_dict.keys() == tiny_state.keys()
        assert has_weights(ldm.load(tiny_yaml, path), tiny_state)
    loaded = ldm.load(ckpt=tmp_path / "saved.safetensors")
    assert has_weights(loaded, tiny_state)
    assert loaded.provenance["step"] == 7


def test_training_a_loaded_model_does_not_change_its_file(tiny_yaml, tiny_file):
    model = ldm.load(tiny_yaml, tiny_file)
    before = tiny_file.read_bytes()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert tiny_file.read_bytes() == before


def make_ema_state(state):
    return {to_ema_name(k): v + 1 for k, v in state.items() if k.startswith("model.")}


def test_ema_weights_are_loaded_if_asked_for(tmp_path, tiny_yaml, tiny_state):
    ema_weights = make_ema_state(tiny_state)
    torch.save(tiny_state | ema_weights, tmp_path / "x.ckpt")
    raw = ldm.load(tiny_yaml, tmp_path / "x.ckpt").state_dict()
    ema = ldm.load(tiny_yaml, tmp_path / "x.ckpt", ema=True).state_dict()
    for name, value in raw.items():
        assert torch.equal(ema[name], value + 1 if name.startswith("unet.") else value)
    rest = {k: v for k, v in tiny_state.items() if not k.startswith("model.")}
    compiled = {
        n.replace("diffusion_model", "diffusion_model_orig_mod"): v for n, v in ema_weights.items()
    }
    torch.save(rest | compiled, tmp_path / "y.ckpt")
    with pytest.raises(ValueError, match="contains only EMA weights") as caught:
        ldm.load(tiny_yaml, tmp_path / "y.ckpt")
    assert caught.value.argument == "ema"
    assert are_equal(ldm.load(tiny_yaml, tmp_path / "y.ckpt", ema=True).state_dict(), ema)


@pytest.mark.parametrize("is_embedded", [False, True])
@pytest.mark.parametrize(
    ("use_ema", "ema", "expected"),
    [
        ("use_ema: true", None, True),
        ("use_ema: false", None, False),
        ("", None, True),  # the default of the original's class
        ("use_ema: true", False, False),
        ("use_ema: false", True, True),
    ],
)
def test_the_config_determines_whether_ema_weights_are_used(
    tmp_path, tiny_yaml, tiny_state, use_ema, ema, expected, is_embedded, caplog
):
    text = tiny_yaml.read_text().replace("use_ema: false", use_ema)
    (tmp_path / "x.yaml").write_text(text)
    metadata = {CONFIG_KEY: text} if is_embedded else {}
    config = None if is_embedded else tmp_path / "x.yaml"
    write_checkpoint(tmp_path / "x.safetensors", tiny_state | make_ema_state(tiny_state), metadata)
    model = ldm.load(config, tmp_path / "x.safetensors", ema=ema)
    assert model.provenance["ema"] == expected
    name = "model.diffusion_model.out.2.bias"
    assert torch.equal(model.unet.out[2].bias, tiny_state[name] + expected)
    # The config may ask for EMA weights that the file does not have (Runway's inpainting model).
    raw_state = tiny_state | {"model_ema.num_updates": torch.tensor(3)}
    write_checkpoint(tmp_path / "raw.safetensors", raw_state, metadata)
    if not ema:
        caplog.set_level("INFO", "ldm.loading.load")
        assert not ldm.load(config, tmp_path / "raw.safetensors", ema=ema).provenance["ema"]
        assert "raw.safetensors` has counters of an EMA but not its weights" in caplog.text


def test_shipped_configs_use_raw_weights():
    """No config that is selected for a file asks for EMA weights."""
    for path in Path("configs").glob("s*/*.yaml"):
        assert not asks_for_ema(read_yaml(path)), path


@pytest.mark.parametrize("entry", ["ema_state_dict", "ema"])
def test_ema_weights_may_be_another_entry_of_the_file(tmp_path, tiny_yaml, tiny_state, entry):
    ema_state = {f"module.{n}": v + 1 for n, v in tiny_state.items() if n.startswith("model.")}
    torch.save({"state_dict": tiny_state, entry: ema_state}, tmp_path / "x.ckpt")
    # Files of the original, which `use_ema` is for, have no such entry.
    model = ldm.load(tiny_yaml, tmp_path / "x.ckpt", overrides="model.params.use_ema=true")
    assert has_weights(model, tiny_state)
    expected = tiny_state | {n.removeprefix("module."): v for n, v in ema_state.items()}
    assert has_weights(ldm.load(tiny_yaml, tmp_path / "x.ckpt", ema=True), expected)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"model.diffusion_model.out.2.bias": torch.ones(4).char()},
         r"out\.2\.bias of torch\.int8"),
        ({"model.diffusion_model.out.2.scale_weight": torch.ones(())}, "the weights are quantized"),
        ({"model.diffusion_model.out.2.bias": torch.ones(4) * 1j}, "nested, sparse or complex"),
    ],
)  # fmt: skip
def test_quantized_and_complex_weights_are_refused(
    tmp_path, tiny_yaml, tiny_state, weight, message
):
    torch.save(tiny_state | weight, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        ldm.load(tiny_yaml, tmp_path / "x.ckpt")


def test_the_error_for_a_pruned_vocabulary_has_a_hint(tmp_path, tiny_yaml, tiny_state):
    torch.save(tiny_state, tmp_path / "x.ckpt")
    pruned = "model.params.cond_stage_config.params.compact_vocab=64"
    with pytest.raises(ValueError, match="hint: the config has a compact vocabulary"):
        ldm.load(tiny_yaml, tmp_path / "x.ckpt", overrides=[pruned])


@pytest.mark.parametrize("section", ["model", "model.params.unet_config"])
def test_an_unused_override_is_refused(tiny_yaml, tiny_file, section):
    message = f"tiny.yaml: unknown override `{section}.param`, did you mean `{section}.params`"
    with pytest.raises(ArgumentError, match=re.escape(message)) as caught:
        ldm.load(tiny_yaml, tiny_file, overrides=[f"{section}.param.x=1"])
    assert caught.value.argument == "overrides"


def test_the_family_of_a_file_with_only_ema_weights_is_recognized(tmp_path, tiny_yaml):
    unet = "model.params.unet_config.params.context_dim=768"
    model = instantiate(read_yaml(tiny_yaml, [unet]))
    state = restore_names(model.state_dict())
    rest = {name: value for name, value in state.items() if not name.startswith("model.")}
    torch.save(rest | make_ema_state(state), tmp_path / "ema.ckpt")
    overrides = [unet, "model.params.parameterization=v"]
    with pytest.warns(UserWarning, match="predicts eps, the config says v: .*Stable Diffusion 1"):
        ldm.load(tiny_yaml, tmp_path / "ema.ckpt", ema=True, overrides=overrides)


@pytest.mark.parametrize("name", [
    "scale_factor", "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
])  # fmt: skip
def test_tensors_of_invalid_shapes_are_refused(tmp_path, tiny_yaml, tiny_state, name):
    write_checkpoint(tmp_path / "x.ckpt", tiny_state | {name: torch.ones(3)})
    with pytest.raises(FileFormatError, match=r"x\.ckpt`.* invalid "):
        ldm.load(tiny_yaml, tmp_path / "x.ckpt")


def test_missing_and_unexpected_names_are_counted(tmp_path, tiny_yaml, tiny_state):
    state = {k: v for k, v in tiny_state.items() if "attn1.to_q" not in k}
    state |= {f"extra.{i}": torch.ones(1) for i in range(12)}
    state["first_stage_model.quant_conv.bias"] = torch.ones(3)
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="does not fit tiny.yaml") as caught:
        ldm.load(tiny_yaml, tmp_path / "x.ckpt")
    text = str(caught.value)
    assert "12 unexpected, 1 mismatched" in text
    assert "attn1.to_q.weight" in text
    assert "extra.9, …" in text
    assert "extra.10" not in text
    assert "first_stage_model.quant_conv.bias (3,), expected (8,)" in text


def test_embeddings_may_be_a_single_path(tmp_path, tiny_yaml, tiny_state):
    torch.save(tiny_state, tmp_path / "x.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        ldm.load(tiny_yaml, tmp_path / "x.ckpt", embeddings=str(tmp_path / "nothing.pt"))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_another_noise_schedule_in_the_file_is_warned_of(tmp_path, tiny_yaml, tiny_state, dtype):
    state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in tiny_state.items()}
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="its noise schedule differs"):
        ldm.load(tiny_yaml, tmp_path / "x.ckpt", overrides="model.params.linear_end=0.02")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ldm.load(tiny_yaml, tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("name", "family"),
    [("clip_stats", "unCLIP model"), ("midas", "depth model"), ("base", "x2 latent upscaler")],
)
def test_options_of_another_family_are_refused(tmp_path, tiny_yaml, tiny_state, name, family):
    torch.save(tiny_state, tmp_path / "x.ckpt")
    with pytest.raises(ArgumentError, match=f"is not an? {family}, it takes no {name}"):
        ldm.load(tiny_yaml, tmp_path / "x.ckpt", **{name: "absent.pt"})


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, tiny_yaml, tiny_state):
    (tmp_path / "checkpoints").mkdir()
    torch.save(tiny_state, tmp_path / "checkpoints/last.ckpt")
    monkeypatch.chdir(tmp_path)
    ldm.load(tiny_yaml, ".")
    with pytest.raises(FileNotFoundError, match="the path of a checkpoint is empty"):
        ldm.load(tiny_yaml, "")


def test_a_weight_too_large_for_half_precision_is_named_once(tmp_path, tiny_yaml, tiny_state):
    name = "model.diffusion_model.out.2.bias"
    state = {k: v.clone() for k, v in tiny_state.items()}
    state[name].view(-1)[0] = -1e6
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="`unet.out.2.bias` has values too large") as caught:
        ldm.load(tiny_yaml, tmp_path / "x.ckpt", dtype=torch.float16)
    assert len(caught) == 1
    ldm.load(tiny_yaml, tmp_path / "x.ckpt", dtype=torch.bfloat16)  # warnings are errors
    state[name].view(-1)[0] = -torch.inf
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    ldm.load(tiny_yaml, tmp_path / "x.ckpt", dtype=torch.float16)


def test_a_scale_measured_in_training_is_used(tmp_path, tiny_yaml, tiny_state):
    torch.save({**tiny_state, "scale_factor": torch.tensor(0.5)}, tmp_path / "x.ckpt")
    assert ldm.load(tiny_yaml, tmp_path / "x.ckpt").scale_factor == 0.5


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("lora_unet_x.lora_down.weight", "a LoRA, which is merged"),
        ("string_to_param.*", "a textual inversion, which is added"),
        ("control_model.x", "a ControlNet, which is not supported"),
        ("lora_controlnet", "a ControlNet, which is not supported"),
        ("lllite_unet_middle_block_1.up.0.weight", "a ControlNet, which is not supported"),
        ("input_blocks.0.0.weight", "only a UNet"),
        ("first_stage_model.quantize.embed.weight", "a model with a VQ autoencoder of Gumbel"),
        ("encoder.down.0.block.0.conv1.weight", "only an autoencoder, which replaces a model's"),
        ("encoder.down_blocks.0.resnets.0.norm1.weight", "only an autoencoder, which replaces"),
        ("down_blocks.0.resnets.0.norm1.weight", "a component of a diffusers folder"),
        ("encoder.conv_in.weight", r"has no weights .*, `cond_stage_model\.\*`"),
    ],
)
def test_the_type_of_another_file_is_reported(tmp_path, tiny_yaml, name, description):
    torch.save({name: torch.ones(1, 1)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=f"hint: the file (is )?{description}"):
        ldm.load(tiny_yaml, tmp_path / "x.ckpt")
    if not description.startswith("has"):
        with pytest.raises(ValueError, match=f"x.ckpt` is {description}"):
            ldm.load(ckpt=tmp_path / "x.ckpt")


@pytest.fixture
def vae_yaml(tmp_path, tiny_yaml):
    config = read_yaml(tiny_yaml)["model"]["params"]["first_stage_config"]
    (tmp_path / "kl.yaml").write_text(json.dumps({"model": config}))
    return tmp_path / "kl.yaml"


def test_an_autoencoder_is_loaded_from_its_own_file_or_that_of_a_model(
    tmp_path, vae_yaml, tiny_state
):
    state = select_prefix(tiny_state, VAE)
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}}, tmp_path / "kl.ckpt")
    assert has_weights(ldm.load(vae_yaml, tmp_path / "kl.ckpt"), state)
    torch.save(tiny_state, tmp_path / "whole.ckpt")
    assert has_weights(ldm.load(vae_yaml, tmp_path / "whole.ckpt"), state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loras", [("missing.safetensors", 1.0)]), ("embeddings", "missing.pt"), ("variant", "lcm"),
        ("vae", "missing.ckpt"), ("text_encoder", "missing.ckpt"), ("offload", True),
    ],
)  # fmt: skip
def test_options_of_whole_models_are_refused_for_an_autoencoder(vae_yaml, tiny_file, name, value):
    with pytest.raises(ArgumentError, match=f"one component only: {name} needs") as caught:
        ldm.load(vae_yaml, tiny_file, device="meta", **{name: value})
    assert caught.value.argument == name


def test_the_x4_upscalers_autoencoder_stays_in_float32(tmp_path):
    state = tinyfamilies.write_family("x4", tmp_path / "x4.safetensors")
    model = ldm.load(ckpt=tmp_path / "x4.safetensors", dtype=torch.float16)
    weight = model.autoencoder.decoder.conv_in.weight
    assert torch.equal(weight, state["first_stage_model.decoder.conv_in.weight"])
    assert model.unet.out[2].weight.dtype == torch.float16
    with pytest.raises(ArgumentError, match="no few-step models of the family of .* is not lcm"):
        ldm.load(ckpt=tmp_path / "x4.safetensors", variant="lcm")


@pytest.mark.parametrize(
    ("family", "prefix"), [("x4", "low_scale_model."), ("unclip-h", "noise_augmentor.")]
)
def test_tables_of_an_encoders_noise_schedule_may_be_missing(tmp_path, family, prefix):
    """Programs that convert files often leave out noise schedules."""
    path = tmp_path / "x.safetensors"
    state = tinyfamilies.write_family(family, path)
    metadata = read_checkpoint(path).metadata
    rest = {name: value for name, value in state.items() if not name.startswith(prefix)}
    write_checkpoint(path, rest, metadata)
    assert len(rest) == len(state) - 8
    assert has_weights(ldm.load(ckpt=path), state)


def test_errors_for_missing_files_name_the_argument(tiny_yaml, tiny_file):
    with pytest.raises(ValueError, match="no weights") as caught:
        ldm.load(tiny_yaml)
    assert caught.value.argument == "ckpt"
    with pytest.raises(FileNotFoundError, match="no file `nope.yaml`") as caught:
        ldm.load("nope.yaml")
    assert caught.value.argument == "config"
    with pytest.raises(ValueError, match="is unknown\nhint: pass its config") as caught:
        ldm.load(ckpt=tiny_file)
    assert caught.value.argument == "config"


def test_an_invalid_config_in_a_file_is_refused(tmp_path, tiny_state):
    write_checkpoint(tmp_path / "x.ckpt", tiny_state, {CONFIG_KEY: "model: 3"})
    with pytest.raises(ConfigError, match=r"^ldm\.config: model: `target` is missing$"):
        ldm.load(ckpt=tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=r"^config: model: `target` is missing$"):
        plan_conversion(tmp_path / "x.ckpt", tmp_path / "y.ckpt")
    embedding = {"model.diffusion_model.time_embedding.cond_proj.weight": torch.ones(32, 256)}
    config = {CONFIG_KEY: "model: {target: x, params: {}}"}
    write_checkpoint(tmp_path / "x.ckpt", tiny_state | embedding, config)
    with pytest.raises(ConfigError, match=r"^ldm\.config: invalid parameters: KeyError"):
        ldm.load(ckpt=tmp_path / "x.ckpt")


def test_the_autoencoder_of_another_file_is_used(tmp_path, tiny_yaml, tiny_file, tiny_state):
    path = tmp_path / "vae.ckpt"
    other = {name: value + 1 for name, value in tiny_state.items() if name.startswith(VAE)}
    write_checkpoint(path, select_prefix(other, VAE))
    model = ldm.load(tiny_yaml, tiny_file, vae=path)
    assert has_weights(model, tiny_state | other)
    assert model.provenance["vae"] == {"path": str(path), "hash": compute_short_hash(path)}
    save_model(model, tmp_path / "whole.safetensors")
    model = ldm.load(tiny_yaml, tiny_file, vae=tmp_path / "whole.safetensors")
    assert has_weights(model, tiny_state | other)
    partial = {name: value for name, value in tiny_state.items() if name not in other}
    write_checkpoint(tmp_path / "partial.ckpt", partial)
    assert has_weights(ldm.load(tiny_yaml, tmp_path / "partial.ckpt", vae=path), tiny_state | other)
    write_checkpoint(path, {"encoder.down.0.block.0.conv1.weight": torch.ones(3)})
    message = r"vae.ckpt` does not fit .*tiny.safetensors`: .* 1 mism"
    with pytest.raises(ValueError, match=message) as caught:
        ldm.load(tiny_yaml, tiny_file, vae=path)
    assert "hint" not in str(caught.value)  # "is only an autoencoder" would be no help


@pytest.mark.parametrize("value", ["abc", "null", "0", "inf"])
def test_an_invalid_scale_factor_of_another_file_is_refused(
    tmp_path, tiny_yaml, tiny_file, tiny_state, value
):
    path = tmp_path / "vae.safetensors"
    write_checkpoint(path, select_prefix(tiny_state, VAE), {"ldm.scale_factor": value})
    message = f"^`{re.escape(str(path))}`: the scale factor `{value}` .* positive number$"
    with pytest.raises(FileFormatError, match=message):
        ldm.load(tiny_yaml, tiny_file, vae=path)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("loras", "x.safetensors", "(file, weight) pairs"),
    ("loras", [Path("x.safetensors")], "(file, weight) pairs"),
    ("dtype", "float16", "got 'float16'"), ("dtype", torch.int8, "got torch.int8"),
    ("dtype", torch.float8_e5m2, "of 16 bits or more"), ("loras", [(3, 1.0)], "such as"),
    ("loras", None, "must be (file, weight) pairs"), ("embeddings", None, "or a list, got None"),
    ("device", "foo", "`foo` is not available here"), ("device", None, "choose one such as cpu"),
    ("config", 3, "must be a path, got 3"), ("ckpt", 3, "must be a path, got 3"),
    ("vae", [], "must be a path, got []"), ("embeddings", [3], "or a list, got 3"),
    ("overrides", [3], "or a list, got 3"), ("allow", [3], "or a list, got 3"),
])  # fmt: skip
def test_arguments_of_a_wrong_type_are_refused(tiny_yaml, tiny_file, name, value, message):
    with pytest.raises(ValueError, match=f"{name}.* {re.escape(message)}") as caught:
        ldm.load(**{"config": tiny_yaml, "ckpt": tiny_file, name: value})
    assert "\n" not in str(caught.value)
    assert caught.value.argument == name


def test_loading_imports_no_heavy_package_and_opens_no_connection(tiny_yaml, tiny_file):
    code = f"""
import socket, sys
def refuse(*arguments, **keywords): raise AssertionError("network")
socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse
import ldm
model = ldm.load({str(tiny_yaml)!r}, {str(tiny_file)!r})
model.condition({{"txt": ["a cat"]}})  # reads the merge table of open_clip
heavy = ["torch._dynamo", "transformers", "open_clip", "lightning", "torchvision", "diffusers"]
print([name for name in heavy if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Families are recognized by the shapes of full-size models; here, tensors share one number.


@cache
def make_full_size_state(path):
    """Make weights with the shapes of a shipped config, without using memory."""
    params = read_yaml(path)["model"]["params"]
    unet = build_on_meta(params.get("unet_config") or params["unet"])
    return {f"unet.{k}": torch.zeros(1).expand(v.shape) for k, v in unet.state_dict().items()}


# test_sdxl has the others.
FAMILIES = [family for family in families.FAMILIES if family.config and not family.is_sdxl]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_families_are_recognized(family):
    tensors = {families.VAE_CONV_IN: torch.zeros(128, family.image_channels, 3, 3)}
    if family.has_vision_tower:
        tensors[families.VISION_PROJECTION] = torch.zeros(1)
    assert detect_family(make_full_size_state(family.get_config_path(None)) | tensors) is family


def test_instruct_pix2pix_is_refused_by_name():
    first = {"unet.input_blocks.0.0.weight": torch.zeros(1).expand(320, 8, 3, 3)}
    full_size = make_full_size_state("configs/stable-diffusion/v1-inference.yaml")
    state = restore_names(full_size | first)
    with pytest.raises(MissingArgument, match="looks like Stable Diffusion 1 InstructPix2Pix"):
        choose_config(identify_weights(Checkpoint(Path("x.ckpt"), "zip", state)))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sd-unclip-l", "v2-1-stable-unclip-l-inference"),
        ("sd-image-variations", "v1-image-variation-inference"),
    ],
)
def test_listed_sizes_in_half_precision_are_those_of_the_models(name, config):
    """Some published files have a part of the weights in half precision already."""
    model = build_on_meta(read_yaml(f"configs/stable-diffusion/{config}.yaml"))
    size = sum(p.numel() * 2 for p in model.parameters()) / 1e9
    assert read_published_files()[name].weights_gb == pytest.approx(size, abs=0.05)


EPS_BIAS, V_BIAS = torch.full((320,), 0.05), torch.linspace(-0.5, 0.5, 320)
EPS_BIAS[::2] *= -1


@pytest.mark.parametrize(
    ("step", "bias", "metadata", "expected", "is_disputed"),
    [
        (875000, EPS_BIAS, {}, "eps", False),
        (110000, V_BIAS, {}, "v", False),
        (None, EPS_BIAS, {}, "eps", False),
        (None, V_BIAS, {}, "v", False),
        (110000, EPS_BIAS, {}, "v", True),
        (875000, V_BIAS, {}, "eps", True),
        (875000, EPS_BIAS, {"v_pred": ""}, "v", True),
        (None, V_BIAS, {"modelspec.prediction_type": "v"}, "v", False),
        (None, EPS_BIAS, {"modelspec.prediction_type": "epsilon"}, "eps", False),
        (None, EPS_BIAS, {"modelspec.prediction_type": "x0"}, "x0", True),
    ],
)
def test_several_methods_detect_the_prediction_type(step, bias, metadata, expected, is_disputed):
    full_size = make_full_size_state("configs/stable-diffusion/v2-inference.yaml")
    state = restore_names(full_size | {families.NORM_BIAS: bias})
    weights = identify_weights(Checkpoint(Path("x.ckpt"), "zip", state, step, metadata=metadata))
    prediction = weights.prediction_type
    assert (prediction.value, prediction.is_disputed) == (expected, is_disputed)
    assert prediction.num_results == sum(v is not None for v in (step, bias)) + bool(metadata)
    name = "v2-inference-v" if expected == "v" else "v2-inference"
    assert choose_config(weights) == f"configs/stable-diffusion/{name}.yaml"


def test_the_probe_distinguishes_v_from_eps():
    class Scale(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(factor))

        def forward(self, x, t, context):
            return self.factor * x

    unknown = families.DetectedPredictionType(None)
    assert probe_prediction_type(Scale(-2.0), unknown).value == "v"
    assert probe_prediction_type(Scale(1.0), unknown).value == "eps"
    for overflow in ("nan", "inf", "-inf"):
        assert probe_prediction_type(Scale(float(overflow)), unknown).value is None


def test_a_contradiction_between_config_and_weights_is_warned_of(tmp_path, tiny_yaml, tiny_state):
    write_checkpoint(tmp_path / "v.ckpt", tiny_state, {"modelspec.prediction_type": "v"})
    with pytest.warns(UserWarning, match="predicts v, the config says eps: .*marker"):
        ldm.load(tiny_yaml, tmp_path / "v.ckpt")
