"""`ldm convert`: files, folders, options, and errors."""

import json
import shutil
import warnings

import pytest
import torch

import ldm
from ldm.commands.convert import main
from ldm.loading.addons.lora_files import write_lora
from ldm.loading.config import format_yaml, parse_yaml
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.diffusers.layout import EXTRA_WEIGHTS
from ldm.loading.diffusers.locations import OLD_VAE_NAMES
from ldm.loading.files.checkpoint import read_checkpoint, to_ema_name, write_checkpoint
from ldm.loading.weight_names import select_prefix
from ldm.loading.weights import open_checkpoint
from ldm.runtime.errors import FileFormatError, WeightsMismatch
from loading.lorahelp import are_equal, make_random_lora
from loading.tinyfamilies import change_json, read_json, write_family
from quick import slow_except

VAE = "first_stage_model."
CONV_IN = "first_stage_model.encoder.conv_in.weight"
# A training run whose text encoder has a compact vocabulary.
COMPACT_VOCAB_RUN = "tests/data/written_by_0_1/logs/2026-11-29T12-00-00_tiny"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def tiny(root):
    """The checkpoint of a tiny Stable Diffusion 2."""
    write_family("sd2-v", root / "tiny.safetensors")
    return root / "tiny.safetensors"


@pytest.fixture(scope="module")
def state(tiny):
    return read_checkpoint(tiny).state_dict


@pytest.fixture(scope="module")
def config_text(tiny):
    return read_checkpoint(tiny).metadata["ldm.config"]


@pytest.fixture(scope="module")
def folder(root, tiny):
    run_convert(tiny, root / "folder")
    return root / "folder"


@pytest.fixture
def ema_file(tmp_path, state, config_text):
    """The same checkpoint with EMA weights beside the raw ones."""
    ema = {to_ema_name(k): v + 1 for k, v in state.items() if k.startswith("model.")}
    content = state | ema | {"model_ema.decay": torch.tensor(0.9999)}
    torch.save({"state_dict": content, "ldm.config": config_text}, tmp_path / "both.ckpt")
    return tmp_path / "both.ckpt"


def run_convert(*args):
    assert main([str(arg) for arg in args]) == 0


def get_error(capsys, *args):
    assert main([str(arg) for arg in args]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def have_equal_weights(ours, theirs):
    return are_equal(ours.state_dict(), theirs.state_dict())


def test_a_file_is_converted_between_ckpt_and_safetensors(tiny, state, tmp_path, capsys):
    run_convert(tiny, tmp_path / "x.ckpt")
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.ckpt")
    run_convert(tmp_path / "x.ckpt", tmp_path / "y.safetensors")
    for name in ("x.ckpt", "y.safetensors"):
        file = read_checkpoint(tmp_path / name)
        assert are_equal(file.state_dict, state)
        assert file.step == 7
        assert file.metadata["modelspec.prediction_type"] == "v"
        assert ldm.load(tmp_path / name).parameterization == "v"  # by the YAML inside


def test_a_folder_loads_like_its_file_and_converts_back_to_it(tiny, state, folder, tmp_path):
    for name in ("x.ckpt", "y.safetensors"):
        run_convert(folder, tmp_path / name)
        assert are_equal(read_checkpoint(tmp_path / name).state_dict, state)
    ours, theirs = ldm.load(folder), ldm.load(tiny)
    assert have_equal_weights(ours, theirs)
    assert have_equal_weights(ldm.load(ckpt=folder), theirs)
    assert ours.provenance["checkpoint"] == str(folder)
    with pytest.raises(ValueError, match="no EMA weights"):
        ldm.load(folder, ema=True)


def test_an_ignored_timestep_spacing_is_warned_of(folder, tmp_path, caplog):
    other = shutil.copytree(folder, tmp_path / "folder")
    (other / EXTRA_WEIGHTS).unlink()
    change_json(other / "scheduler/scheduler_config.json", use_karras_sigmas=True)
    ldm.load(folder)
    assert "spacing" not in caplog.text
    ldm.load(other)
    assert "its timestep spacing is ignored, select it by the scheduler `karras`" in caplog.text


def test_unused_weights_may_be_missing(tiny, state, config_text, tmp_path):
    """Programs that convert SD 2's text tower from diffusers leave out its last block."""
    tower, short = "cond_stage_model.model.", tmp_path / "short.ckpt"
    unused = ("transformer.resblocks.2.", "text_projection", "logit_scale")
    unused = tuple(tower + name for name in unused)
    partial = {name: value for name, value in state.items() if not name.startswith(unused)}
    assert len(partial) == len(state) - 14
    torch.save({"state_dict": partial, "ldm.config": config_text}, short)
    models = ldm.load(short), ldm.load(tiny)
    assert torch.equal(*(m.condition({"txt": ["a red apple"]}).crossattn for m in models))
    run_convert(short, tmp_path / "folder")
    assert ldm.load(tmp_path / "folder").provenance["prediction"]
    del partial[tower + "transformer.resblocks.1.ln_1.weight"]
    torch.save({"state_dict": partial, "ldm.config": config_text}, short)
    with pytest.raises(ValueError, match="1 missing, 0 unexpected"):
        ldm.load(short)


def test_half_precision_is_written_and_read_as_a_variant(tiny, state, tmp_path):
    half = tmp_path / "half"
    run_convert(tiny, half, "--variant", "fp16")
    weights = read_checkpoint(half / "unet/diffusion_pytorch_model.fp16.safetensors").state_dict
    assert {v.dtype for v in weights.values()} == {torch.float16}
    back = open_checkpoint(half).state_dict  # the only variant there is
    assert torch.equal(back[CONV_IN], state[CONV_IN].half())
    with pytest.raises(FileNotFoundError, match="of variant `bf16`"):
        open_checkpoint(half, file_variant="bf16")
    run_convert(tiny, tmp_path / "b.safetensors", "--dtype", "bfloat16")
    weights = read_checkpoint(tmp_path / "b.safetensors").state_dict
    assert torch.equal(weights[CONV_IN], state[CONV_IN].bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about the schedule, which was rounded
        ldm.load(tmp_path / "b.safetensors")


@pytest.mark.parametrize("ending", slow_except(["ckpt", "safetensors"], "safetensors"))
def test_weights_too_large_for_float16_are_named(state, config_text, tmp_path, capsys, ending):
    large = {name: value.clone() for name, value in state.items()}
    for name in (CONV_IN, "model.diffusion_model.out.2.bias"):
        large[name].view(-1)[0] = -1e6
    large["cond_stage_model.model.attn_mask"] = torch.tensor([-torch.inf])  # is not reported
    torch.save({"state_dict": large, "ldm.config": config_text}, tmp_path / "x.ckpt")
    target = tmp_path / f"half.{ending}"
    error = get_error(capsys, tmp_path / "x.ckpt", target, "--dtype", "float16")
    assert "2 tensors have values too large for torch.float16: `" in error
    assert CONV_IN in error
    assert "model.diffusion_model.out.2.bias" in error
    assert list(tmp_path.iterdir()) == [tmp_path / "x.ckpt"]
    run_convert(tmp_path / "x.ckpt", target, "--dtype", "bfloat16")


@pytest.mark.parametrize(
    ("target", "flags", "is_raw", "keeps_ema"),
    [
        ("both.safetensors", [], True, True),
        ("merged.safetensors", ["--ema"], False, False),
        pytest.param("folder", [], True, False, marks=pytest.mark.slow),
        pytest.param("raw.safetensors", ["--prune"], True, False, marks=pytest.mark.slow),
        pytest.param("averaged", ["--ema"], False, False, marks=pytest.mark.slow),
    ],
)
def test_ema_weights_are_kept_used_or_left_out(
    ema_file, state, tmp_path, capsys, target, flags, is_raw, keeps_ema
):
    run_convert(ema_file, tmp_path / target, *flags)
    file = open_checkpoint(tmp_path / target)
    unet = [k for k in state if k.startswith("model.")]
    assert all(torch.equal(file.state_dict[k], state[k] + (not is_raw)) for k in unet)
    assert bool(file.ema_state_dict) == keeps_ema
    if "--ema" in flags:  # also where the file has no raw weights
        file = read_checkpoint(ema_file)
        partial = {k: v for k, v in file.state_dict.items() if k not in unet}
        ema = {"state_dict": partial | file.ema_state_dict, **file.metadata}
        torch.save(ema, tmp_path / "ema.ckpt")
        run_convert(tmp_path / "ema.ckpt", tmp_path / target, *flags, "--force")
        converted = open_checkpoint(tmp_path / target).state_dict
        assert all(torch.equal(converted[k], state[k] + 1) for k in unet)
    assert ("model_ema.*" in capsys.readouterr().err) == (not keeps_ema)


@pytest.mark.parametrize("use_ema", [True, False])
def test_ema_weights_left_out_against_the_config_are_reported(
    ema_file, config_text, tmp_path, use_ema
):
    (tmp_path / "model.yaml").write_text(
        config_text.replace("use_ema: false", f"use_ema: {use_ema}")
    )
    target, yaml = tmp_path / "x.safetensors", tmp_path / "model.yaml"
    line = plan_conversion(ema_file, target, config=yaml, prune=True).summary[-1]
    assert ("though the config asks for them" in line) == use_ema
    line = plan_conversion(ema_file, target, config=yaml, ema=True).summary[-1]
    assert line.endswith("replaced the raw weights")


@pytest.mark.parametrize(
    "target", slow_except(["merged.safetensors", "folder"], "merged.safetensors")
)
def test_loras_are_merged_as_when_a_model_is_loaded(tiny, ema_file, tmp_path, target, capsys):
    loras = [(tmp_path / f"{n}.safetensors", weight) for n, weight in ((1, 0.8), (2, -0.5))]
    model = ldm.load(tiny)
    for seed, (path, _) in enumerate(loras):
        write_lora(make_random_lora(model, seed=seed), path, model)
    flags = [arg for path, weight in loras for arg in ("--lora", f"{path}:{weight}")]
    before = ema_file.read_bytes()
    run_convert(ema_file, tmp_path / target, *flags)
    messages = capsys.readouterr().err
    assert f"merged: {loras[0][0]} of weight 0.8, " in messages
    assert "model_ema.*" in messages
    assert have_equal_weights(ldm.load(tmp_path / target), ldm.load(tiny, loras=loras))
    if target == "merged.safetensors":
        run_convert(tmp_path / target, tmp_path / "again.safetensors", *flags[:2])
        metadata = read_checkpoint(tmp_path / "again.safetensors").metadata
        assert metadata["modelspec.merged_from"] == "merged.safetensors, 1.safetensors"
        merged = [(lora["path"], lora["weight"]) for lora in json.loads(metadata["ldm.loras"])]
        assert merged == [("1.safetensors", 0.8), ("2.safetensors", -0.5), ("1.safetensors", 0.8)]
    assert ema_file.read_bytes() == before


@pytest.mark.slow
def test_a_lora_is_merged_into_both_text_encoders_of_sdxl(tmp_path):
    xl, style, merged = (tmp_path / f"{name}.safetensors" for name in ("xl", "style", "merged"))
    write_family("xl", xl)
    write_lora(make_random_lora(model := ldm.load(xl)), style, model)
    run_convert(xl, merged, "--lora", style)
    assert have_equal_weights(ldm.load(merged), ldm.load(xl, loras=[(style, 1.0)]))


@pytest.mark.slow
def test_loras_are_merged_in_the_precision_that_is_written(tiny, tmp_path):
    style, half = tmp_path / "style.safetensors", tmp_path / "half.safetensors"
    write_lora(make_random_lora(model := ldm.load(tiny)), style, model)
    run_convert(tiny, half, "--dtype", "float16")
    run_convert(half, tmp_path / "x.ckpt", "--dtype", "float32", "--lora", style)
    assert have_equal_weights(ldm.load(tmp_path / "x.ckpt"), ldm.load(half, loras=[(style, 1.0)]))


def test_files_that_cannot_be_merged_as_loras_are_refused(tiny, state, tmp_path, capsys):
    vae, target = tmp_path / "vae.safetensors", tmp_path / "x.ckpt"
    write_checkpoint(vae, select_prefix(state, VAE))
    error = get_error(capsys, vae, target, "--lora", "style.safetensors")
    assert "is not a whole model: LoRAs cannot be merged" in error
    assert "is not a LoRA file" in get_error(capsys, tiny, target, "--lora", vae)
    assert not target.exists()


def test_the_folder_of_a_training_run_is_converted(state, config_text, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/configs").mkdir()
    torch.save({"state_dict": state, "global_step": 9}, tmp_path / "run/checkpoints/last.ckpt")
    (tmp_path / "run/configs/2026-01-project.yaml").write_text(config_text)
    run_convert(tmp_path / "run", tmp_path / "out")
    file = open_checkpoint(tmp_path / "out")
    assert are_equal(file.state_dict, state)
    assert file.step == 9


@pytest.mark.parametrize("is_whole_config", [True, False])
def test_an_autoencoder_alone_is_converted_both_ways(tmp_path, state, config_text, is_whole_config):
    config = parse_yaml(config_text)
    if not is_whole_config:
        config = {"model": config["model"]["params"]["first_stage_config"]}
    (tmp_path / "kl.yaml").write_text(format_yaml(config))
    content = select_prefix(state, VAE) | {"loss.logvar": torch.zeros(())}
    torch.save({"state_dict": content}, tmp_path / "kl.ckpt")
    run_convert(tmp_path / "kl.ckpt", tmp_path / "kl", "--config", tmp_path / "kl.yaml")
    weights = tmp_path / "kl/diffusion_pytorch_model.safetensors"
    run_convert(weights, tmp_path / "original.ckpt", "--config", tmp_path / "kl.yaml")
    assert are_equal(
        read_checkpoint(tmp_path / "original.ckpt").state_dict, select_prefix(state, VAE)
    )
    written = read_json(tmp_path / "kl/config.json")
    assert written["block_out_channels"] == [32, 64]
    assert are_equal(open_checkpoint(tmp_path / "kl").state_dict, select_prefix(state, VAE))
    assert are_equal(ldm.load(tmp_path / "kl").state_dict(), select_prefix(state, VAE))


def test_the_autoencoder_of_the_model_is_replaced(tiny, state, config_text, tmp_path, capsys):
    """From a file of its own, or from that of a whole model."""
    vae, x, y = (tmp_path / name for name in ("vae.ckpt", "x.ckpt", "y.safetensors"))
    other = {name: (value + 1).half() for name, value in select_prefix(state, VAE).items()}
    write_checkpoint(vae, other)
    run_convert(tiny, x, "--vae", vae)
    expected = state | {VAE + name: value.float() for name, value in other.items()}
    assert are_equal(read_checkpoint(x).state_dict, expected)
    assert ldm.load(x).autoencoder is not None
    run_convert(tiny, y, "--vae", x)
    assert are_equal(read_checkpoint(y).state_dict, expected)
    partial = {name: value for name, value in expected.items() if not name.startswith(VAE)}
    torch.save({"state_dict": partial, "ldm.config": config_text}, tmp_path / "partial.ckpt")
    run_convert(tmp_path / "partial.ckpt", tmp_path / "z.ckpt", "--vae", x)
    assert are_equal(read_checkpoint(tmp_path / "z.ckpt").state_dict, expected)
    run_convert(x, tmp_path / "folder")
    weights = tmp_path / "folder/vae/diffusion_pytorch_model.safetensors"
    run_convert(tiny, tmp_path / "z.ckpt", "--vae", weights, "--force")
    assert are_equal(read_checkpoint(tmp_path / "z.ckpt").state_dict, expected)
    (tmp_path / "z.ckpt").unlink()
    write_checkpoint(tmp_path / "no.ckpt", {"decoder.conv_in.bias": torch.ones(1)})
    error = get_error(capsys, tiny, tmp_path / "z.ckpt", "--vae", tmp_path / "no.ckpt")
    assert "does not fit" in error


def test_given_clip_statistics_are_written_to_the_file(tmp_path):
    source, stats = tmp_path / "x.ckpt", tmp_path / "stats.th"
    state = write_family("unclip-l", source)
    file, names = read_checkpoint(source), ("noise_augmentor.data_mean", "noise_augmentor.data_std")
    torch.save([state[name] for name in names], stats)
    write_checkpoint(source, {n: v for n, v in state.items() if n not in names}, file.metadata)
    run_convert(source, tmp_path / "y.safetensors", "--clip-stats", stats)
    written = read_checkpoint(tmp_path / "y.safetensors").state_dict
    assert all(torch.equal(written[name].flatten(), state[name]) for name in names)


def test_missing_clip_statistics_of_a_folder_are_reported(tmp_path):
    write_family("unclip-l", tmp_path / "x.ckpt")
    run_convert(tmp_path / "x.ckpt", tmp_path / "y")
    path = tmp_path / "y/image_normalizer/diffusion_pytorch_model.safetensors"
    write_checkpoint(path, {"mean": torch.ones(1)})
    with pytest.raises(FileFormatError, match="image_normalizer` has invalid statistics: .*'std'"):
        open_checkpoint(tmp_path / "y")


def test_a_missing_token_embedding_of_a_folder_is_reported(tmp_path):
    run_convert(COMPACT_VOCAB_RUN, tmp_path / "x")
    path = tmp_path / "x/text_encoder/model.safetensors"
    state = read_checkpoint(path).state_dict
    write_checkpoint(path, {n: v.clone() for n, v in state.items() if "token_embedding" not in n})
    with pytest.raises(WeightsMismatch, match="\nmissing: .*token_embedding.weight"):
        open_checkpoint(tmp_path / "x")


def test_files_are_replaced_only_with_force(tiny, folder, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    assert "replaces it (--force)" in get_error(capsys, tiny, tmp_path / "x.safetensors")
    with pytest.raises(FileExistsError) as caught:
        convert(plan_conversion(tiny, tmp_path / "x.safetensors"))
    assert caught.value.argument == "force"
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    assert "is not replaced" in get_error(capsys, tiny, tmp_path / "mine", "--force")
    assert (tmp_path / "mine/thesis.txt").read_text() == "mine"
    before = {path.name for path in folder.parent.iterdir()}
    run_convert(tiny, folder, "--force")
    assert {path.name for path in folder.parent.iterdir()} == before  # no temporary file is left
    run_convert(tiny, tmp_path / "x.safetensors", "--force")


@pytest.mark.parametrize(
    "target", slow_except(["out", "out.ckpt", "out.safetensors"], "out", "out.ckpt")
)
def test_an_interrupted_conversion_leaves_no_files(tiny, tmp_path, target):
    def interrupt(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan_conversion(tiny, tmp_path / target), progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_extra_weights_of_another_model_are_left_out(tiny, tmp_path, caplog):
    run_convert(tiny, tmp_path / "x")
    change_json(tmp_path / "x/scheduler/scheduler_config.json", prediction_type="epsilon")
    file = open_checkpoint(tmp_path / "x")
    assert "belongs to another model" in caplog.text
    assert parse_yaml(file.metadata["ldm.config"])["model"]["params"]["parameterization"] == "eps"
    last = [value for name, value in file.state_dict.items() if ".resblocks.2." in name]
    assert last
    assert not any(value.any() for value in last)  # unused weights are zero


def test_folders_of_older_versions_are_read(tiny, state, tmp_path):
    """Pickles, shards, former names of attention, no `text_model.`, unused keys in configs."""
    copy = tmp_path / "old"
    run_convert(tiny, copy)
    vae = copy / "vae/diffusion_pytorch_model.safetensors"
    content = read_checkpoint(vae).state_dict
    for name, former in OLD_VAE_NAMES.items():
        content = {k.replace(f".{name}.", f".{former}."): v for k, v in content.items()}
    torch.save(content, vae.with_suffix(".bin"))
    text_encoder = copy / "text_encoder/model.safetensors"
    content = read_checkpoint(text_encoder).state_dict
    content = {k.removeprefix("text_model."): v for k, v in content.items()}
    write_checkpoint(text_encoder, content | {"embeddings.position_ids": torch.arange(77)[None]})
    unused_keys = {"length_penalty": 1.0, "top_k": 50, "id2label": {"0": "x"}}
    change_json(copy / "text_encoder/config.json", **unused_keys)
    unet = copy / "unet/diffusion_pytorch_model.safetensors"
    content, weight_map = read_checkpoint(unet).state_dict, {}
    for i in range(2):
        name, names = f"part-{i}.safetensors", list(content)[i::2]
        write_checkpoint(unet.with_name(name), {k: content[k] for k in names})
        weight_map |= dict.fromkeys(names, name)
    index = unet.with_name(f"{unet.name}.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    vae.unlink()
    unet.unlink()
    assert are_equal(open_checkpoint(copy).state_dict, state)
    index.unlink()
    for i in range(2):
        shard = unet.with_name(f"part-{i}.safetensors")
        shard.rename(unet.with_stem(f"{unet.stem}-0000{i}-of-00002"))
    assert are_equal(open_checkpoint(copy).state_dict, state)
    for shard in (copy / "unet").glob("*-of-*"):
        shard.unlink()
    with pytest.raises(FileNotFoundError, match="no weights in `.*unet`, only config.json"):
        open_checkpoint(copy)


@pytest.mark.parametrize("suffix", slow_except([".fp16.safetensors", ".fp16.bin"], ".fp16.bin"))
def test_a_variant_is_selected_in_either_format(folder, state, tmp_path, suffix):
    copy = shutil.copytree(folder, tmp_path / "x")
    for path in copy.glob("*/*.safetensors"):
        content = read_checkpoint(path).state_dict
        stem = "pytorch_model" if suffix == ".fp16.bin" and path.stem == "model" else path.stem
        if suffix == ".fp16.bin":
            torch.save(content, path.with_name(stem + suffix))
        else:
            write_checkpoint(path.with_name(stem + suffix), content)
        for variant in ("non_ema", "bf16"):
            (path.parent / f"{stem}.{variant}{suffix[5:]}").touch()
        path.unlink()
    assert are_equal(open_checkpoint(copy).state_dict, state)


def test_sizes_in_the_configs_of_a_folder_may_be_lists(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "x")
    (copy / EXTRA_WEIGHTS).unlink()
    config = read_json(copy / "unet/config.json")
    lists = {key: [config[key]] * 2 for key in ("layers_per_block", "cross_attention_dim")}
    lists |= {"sample_size": [8, 16], "transformer_layers_per_block": [1, 1]}
    change_json(copy / "unet/config.json", **lists)
    model = ldm.load(copy)
    assert model.latent_size == (8, 16)
    assert ldm.txt2img(model, ["a cat"], steps=1).shape == (1, 3, 16, 32)
    run_convert(copy, tmp_path / "y")
    assert read_json(tmp_path / "y/unet/config.json")["sample_size"] == [8, 16]


TOKEN_FILES = {
    "added_tokens.json": {"<cat>": 49408, "<cat>_1": 49409},
    "tokenizer_config.json": {
        "added_tokens_decoder": {"49408": {"content": "<cat>"}, "49409": {"content": "<cat>_1"}}
    },
    "tokenizer.json": {
        "added_tokens": [{"id": 49408, "content": "<cat>"}, {"id": 49409, "content": "<cat>_1"}]
    },
}


def test_added_tokens_of_a_folder_are_read(folder, state, tmp_path, capsys, caplog):
    copy = shutil.copytree(folder, tmp_path / "x")
    path = copy / "text_encoder/model.safetensors"
    content, name = read_checkpoint(path).state_dict, "text_model.embeddings.token_embedding.weight"
    vectors = torch.randn(2, content[name].shape[1])
    content[name] = torch.cat([content[name], vectors])
    path.unlink()
    write_checkpoint(path, content)
    change_json(copy / "text_encoder/config.json", vocab_size=49410)
    assert are_equal(open_checkpoint(copy).state_dict, state)
    assert "has 2 rows without a token" in caplog.text
    for file, tokens in TOKEN_FILES.items():
        edited = tmp_path / file
        shutil.copytree(copy, edited)
        if file != "tokenizer_config.json":
            (edited / "tokenizer" / file).write_text("{}")
        change_json(edited / "tokenizer" / file, **tokens)
        embeddings = {t: v for t, (v,) in open_checkpoint(edited).added_tokens.items()}
        assert are_equal(embeddings, {"<cat>": vectors, "<cat>_1": vectors[1:]}), file
    assert are_equal(ldm.load(edited).conditioner.text.added_embeddings, embeddings)
    run_convert(edited, tmp_path / "y.ckpt")
    errors = capsys.readouterr().err
    assert "added tokens are not written, load them as embeddings: `<cat>`" in errors


@pytest.mark.slow
def test_added_tokens_of_both_tokenizers_of_sdxl_are_read(tmp_path):
    write_family("xl", tmp_path / "xl.safetensors")
    run_convert(tmp_path / "xl.safetensors", copy := tmp_path / "folder")
    name = "text_model.embeddings.token_embedding.weight"
    for suffix in ("", "_2"):
        path = copy / f"text_encoder{suffix}/model.safetensors"
        content = read_checkpoint(path).state_dict
        content[name] = torch.cat([content[name], content[name][:2]])
        path.unlink()
        write_checkpoint(path, content)
        change_json(copy / f"text_encoder{suffix}/config.json", vocab_size=49410)
        added_tokens = copy / f"tokenizer{suffix}/added_tokens.json"
        added_tokens.write_text(json.dumps(TOKEN_FILES["added_tokens.json"]))
    conditioner = ldm.load(copy).conditioner
    for encoder in (conditioner.text, conditioner.text_2):
        assert torch.equal(encoder.added_embeddings["<cat>"], encoder.embedding_table[:2])


def test_errors_are_reported_in_one_line(folder, tmp_path, capsys):
    copy, target = tmp_path / "copy", tmp_path / "x"
    assert "no checkpoint" in get_error(capsys, tmp_path / "none.ckpt", target)
    for flag in ("--lora", "--vae", "--text-encoder"):
        error = get_error(capsys, folder, target, flag, "none.ckpt")
        assert f"no checkpoint `none.ckpt` ({flag})" in error
    error = get_error(capsys, folder, target, "--clip-stats", "stats.th")
    assert "is not an unCLIP model, it takes no clip_stats (--clip-stats)" in error
    assert "a folder in none" in get_error(capsys, folder, tmp_path / "x.bin")
    assert "neither a diffusers folder" in get_error(capsys, tmp_path, target)
    run_convert(folder, copy)
    unet = copy / "unet/config.json"
    text = unet.read_text()
    (copy / EXTRA_WEIGHTS).unlink()
    for old, new, message in (
        (
            '"dropout": 0.0',
            '"addition_embed_type": "text_image"',
            "unet/config.json: `addition_embed_type: text_image` is not supported",
        ),
        ('cross_attention_dim": 32', 'cross_attention_dim": 48', "does not fit its own configs"),
        ('"in_channels"', '"_in_channels"', "has an invalid config: KeyError: 'in_channels'"),
        (text, "{", "is damaged"),
    ):
        unet.write_text(text.replace(old, new))
        assert message in get_error(capsys, copy, tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "odd.ckpt")
    error = get_error(capsys, tmp_path / "odd.ckpt", target)
    assert f"the family of `{tmp_path / 'odd.ckpt'}` is unknown" in error
    torch.save({"first_stage_model.quantize.embed.weight": torch.ones(1)}, tmp_path / "odd.ckpt")
    error = get_error(capsys, tmp_path / "odd.ckpt", target)
    assert "odd.ckpt` is a model with a VQ autoencoder of Gumbel-softmax, which" in error
    assert not target.exists()
