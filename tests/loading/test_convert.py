"""Conversion from the command line: what is written, what is refused, what is left untouched."""

import json

import pytest
import torch
from lorahelp import random_adapter
from tinyfamilies import write

import ldm
from ldm.commands.convert import main
from ldm.loading.addons.lora import write_lora
from ldm.loading.config import format_yaml, parse_yaml
from ldm.loading.convert import convert, plan_conversion
from ldm.loading.diffusers.files import REST
from ldm.loading.diffusers.keys import VAE_OLD
from ldm.loading.files.checkpoint import read_checkpoint, write_checkpoint
from ldm.loading.weights import read_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def tiny(place):
    """(file, what it holds) of a tiny Stable Diffusion 2."""
    path = place / "tiny.safetensors"
    return path, write("sd2-v", path)


@pytest.fixture(scope="module")
def folder(place, tiny):
    assert main([str(tiny[0]), str(place / "folder")]) == 0
    return place / "folder"


def averages(state):
    named = {k: v for k, v in state.items() if k.startswith("model.")}
    found = {
        f"model_ema.{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in named.items()
    }
    return found | {"model_ema.decay": torch.tensor(0.9999)}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours
    )


def test_a_file_becomes_the_other_kind_and_back(tiny, tmp_path, capsys):
    path, state = tiny
    assert main([str(path), str(tmp_path / "x.ckpt")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.ckpt")
    assert main([str(tmp_path / "x.ckpt"), str(tmp_path / "y.safetensors")]) == 0
    for name in ("x.ckpt", "y.safetensors"):
        file = read_checkpoint(tmp_path / name)
        assert same(file.state, state)
        assert file.step == 7
        assert file.metadata["modelspec.prediction_type"] == "v"
        assert ldm.load(tmp_path / name).parameterization == "v"  # by the YAML inside


def test_a_folder_becomes_the_file_it_was_made_of(tiny, folder, tmp_path):
    for name in ("x.ckpt", "y.safetensors"):
        assert main([str(folder), str(tmp_path / name)]) == 0
        assert same(read_checkpoint(tmp_path / name).state, tiny[1])


def test_a_folder_loads_like_a_file(tiny, folder):
    ours, theirs = ldm.load(folder), ldm.load(tiny[0])
    assert same(ours.state_dict(), theirs.state_dict())
    assert same(ldm.load(ckpt=folder).state_dict(), theirs.state_dict())
    assert ours.provenance["checkpoint"] == str(folder)
    with pytest.raises(ValueError, match="no averaged"):
        ldm.load(folder, ema=True)


def test_what_no_computation_uses_may_lack(tiny, tmp_path, capsys):
    """Programs that write SD 2's text tower from diffusers' have no last block and projection."""
    tower = "cond_stage_model.model."
    unused = tuple(
        tower + name for name in ("transformer.resblocks.2.", "text_projection", "logit_scale")
    )
    text = read_checkpoint(tiny[0]).metadata["ldm.config"]
    state = {name: value for name, value in tiny[1].items() if not name.startswith(unused)}
    assert len(state) == len(tiny[1]) - 14
    torch.save({"state_dict": state, "ldm.config": text}, tmp_path / "short.ckpt")
    ours, whole = ldm.load(tmp_path / "short.ckpt"), ldm.load(tiny[0])
    assert torch.equal(
        *(model.condition({"txt": ["a red apple"]}).crossattn for model in (ours, whole))
    )
    assert main([str(tmp_path / "short.ckpt"), str(tmp_path / "folder")]) == 0
    assert ldm.load(tmp_path / "folder").provenance["prediction"]
    del state[tower + "transformer.resblocks.1.ln_1.weight"]
    torch.save({"state_dict": state, "ldm.config": text}, tmp_path / "short.ckpt")
    with pytest.raises(ValueError, match="1 missing, 0 unexpected"):
        ldm.load(tmp_path / "short.ckpt")


def test_half_precision_and_its_variant(tiny, tmp_path):
    assert main([str(tiny[0]), str(tmp_path / "half"), "--variant", "fp16"]) == 0
    weights = tmp_path / "half/unet/diffusion_pytorch_model.fp16.safetensors"
    assert {v.dtype for v in read_checkpoint(weights).state.values()} == {torch.float16}
    back = read_weights(tmp_path / "half").state  # the only variant there is
    name = "first_stage_model.encoder.conv_in.weight"
    assert torch.equal(back[name], tiny[1][name].half())
    with pytest.raises(FileNotFoundError, match="of variant `bf16`"):
        read_weights(tmp_path / "half", variant="bf16")
    assert main([str(tiny[0]), str(tmp_path / "b.safetensors"), "--dtype", "bfloat16"]) == 0
    state = read_checkpoint(tmp_path / "b.safetensors").state
    assert torch.equal(state[name], tiny[1][name].bfloat16())


def test_averages_are_kept_merged_or_left_out(tiny, tmp_path, capsys):
    state, both = tiny[1], tmp_path / "both.ckpt"
    text = read_checkpoint(tiny[0]).metadata["ldm.config"]
    torch.save({"state_dict": state | averages(state), "ldm.config": text}, both)
    unet = [k for k in state if k.startswith("model.")]
    for target, flags, raw, kept in (
        ("kept.safetensors", [], True, True),
        ("merged.safetensors", ["--ema"], False, False),
        ("raw.safetensors", ["--prune"], True, False),
        ("folder", [], True, False),
        ("averaged", ["--ema"], False, False),
    ):
        assert main([str(both), str(tmp_path / target), *flags]) == 0
        file = read_weights(tmp_path / target)
        assert all(torch.equal(file.state[k], state[k] + (0 if raw else 1)) for k in unet)
        assert bool(file.ema_state) == kept
        assert ("model_ema.*" in capsys.readouterr().err) == (not kept)


@pytest.mark.parametrize("target", ["merged.safetensors", "folder"])
def test_loras_are_merged_as_they_are_when_a_model_is_loaded(tiny, tmp_path, target, capsys):
    styles = [(tmp_path / f"{n}.safetensors", weight) for n, weight in ((1, 0.8), (2, -0.5))]
    model = ldm.load(tiny[0])
    for seed, (path, _) in enumerate(styles):
        write_lora(random_adapter(model, seed=seed), path, model)
    state, source = tiny[1], tmp_path / "both.ckpt"
    text = read_checkpoint(tiny[0]).metadata["ldm.config"]
    torch.save({"state_dict": state | averages(state), "ldm.config": text}, source)
    flags = [word for path, weight in styles for word in ("--lora", f"{path}:{weight}")]
    assert main([str(source), str(tmp_path / target), *flags]) == 0
    said = capsys.readouterr().err
    assert f"merged: {styles[0][0]} of weight 0.8, " in said
    assert "model_ema.*" in said
    theirs = ldm.load(tiny[0], loras=styles).state_dict()
    assert same(ldm.load(tmp_path / target).state_dict(), theirs)
    if target == "merged.safetensors":
        again = str(tmp_path / "again.safetensors")
        assert main([str(tmp_path / target), again, *flags[:2]]) == 0
        assert len(json.loads(read_checkpoint(again).metadata["ldm.loras"])) == 3
        noted = json.loads(read_checkpoint(tmp_path / target).metadata["ldm.loras"])
        assert [(lora["path"], lora["weight"]) for lora in noted] == [
            ("1.safetensors", 0.8),
            ("2.safetensors", -0.5),
        ]
    assert same(read_checkpoint(source).state, state)


def test_a_sum_is_as_fine_as_what_is_written(tiny, tmp_path):
    style, half = tmp_path / "style.safetensors", str(tmp_path / "half.safetensors")
    write_lora(random_adapter(model := ldm.load(tiny[0])), style, model)
    assert main([str(tiny[0]), half, "--dtype", "float16"]) == 0
    assert main([half, str(tmp_path / "x.ckpt"), "--dtype", "float32", "--lora", str(style)]) == 0
    theirs = ldm.load(half, loras=[(style, 1.0)]).state_dict()
    assert same(ldm.load(tmp_path / "x.ckpt").state_dict(), theirs)


def test_a_lora_for_a_part_of_a_model_or_for_none_is_refused(tiny, tmp_path, capsys):
    vae, target = tmp_path / "vae.safetensors", str(tmp_path / "x.ckpt")
    prefix = "first_stage_model."
    parts = {k.removeprefix(prefix): v for k, v in tiny[1].items() if k.startswith(prefix)}
    write_checkpoint(vae, parts)
    assert main([str(vae), target, "--lora", "style.safetensors"]) == 1
    assert "is a part of a model, LoRAs are for whole ones" in capsys.readouterr().err
    assert main([str(tiny[0]), target, "--lora", str(vae)]) == 1
    assert "is not a LoRA file" in capsys.readouterr().err
    assert not (tmp_path / "x.ckpt").exists()


def test_folders_of_training_runs(tiny, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/configs").mkdir()
    metadata = {"ldm.config": read_checkpoint(tiny[0]).metadata["ldm.config"]}
    torch.save({"state_dict": tiny[1], "global_step": 9}, tmp_path / "run/checkpoints/last.ckpt")
    (tmp_path / "run/configs/2026-01-project.yaml").write_text(metadata["ldm.config"])
    assert main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    file = read_weights(tmp_path / "out")
    assert same(file.state, tiny[1])
    assert file.step == 9


def test_an_autoencoder_alone(tmp_path, tiny):
    raw = parse_yaml(read_checkpoint(tiny[0]).metadata["ldm.config"])
    part = raw["model"]["params"]["first_stage_config"]
    (tmp_path / "whole.yaml").write_text(format_yaml(raw))
    (tmp_path / "kl.yaml").write_text(format_yaml({"model": part}))
    prefix = "first_stage_model."
    state = {k.removeprefix(prefix): v for k, v in tiny[1].items() if k.startswith(prefix)}
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}}, tmp_path / "kl.ckpt")
    for name in ("whole", "kl"):
        folder = tmp_path / name
        flags = ["--config", str(tmp_path / f"{name}.yaml")]
        assert main([str(tmp_path / "kl.ckpt"), str(folder), *flags]) == 0
        about = json.loads((folder / "config.json").read_text())
        assert about["block_out_channels"] == [32, 64]
        assert same(read_weights(folder).state, state)
        assert same(ldm.load(folder).state_dict(), state)


def fails(capsys, *words):
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_another_autoencoder_takes_the_place_of_the_models_own(tiny, tmp_path, capsys):
    """Such as one whose decoder was trained on: alone in its file, or within a whole model."""
    path, state = tiny
    start = "first_stage_model."
    other = {k.removeprefix(start): v + 1 for k, v in state.items() if k.startswith(start)}
    write_checkpoint(tmp_path / "vae.ckpt", {n: v.half() for n, v in other.items()})
    assert main([str(path), str(tmp_path / "x.ckpt"), "--vae", str(tmp_path / "vae.ckpt")]) == 0
    found = read_checkpoint(tmp_path / "x.ckpt").state
    assert same(found, state | {start + n: v.half().float() for n, v in other.items()})
    assert ldm.load(tmp_path / "x.ckpt").autoencoder is not None
    again = tmp_path / "y.safetensors"
    assert main([str(path), str(again), "--vae", str(tmp_path / "x.ckpt")]) == 0
    assert same(read_checkpoint(again).state, found)
    write_checkpoint(tmp_path / "no.ckpt", {"decoder.conv_in.bias": torch.ones(1)})
    assert main([str(path), str(tmp_path / "z.ckpt"), "--vae", str(tmp_path / "no.ckpt")]) == 1
    assert "does not fit" in capsys.readouterr().err


def test_nothing_is_replaced_unasked(tiny, folder, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    assert "exists" in fails(capsys, tiny[0], tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    assert "is not replaced" in fails(capsys, tiny[0], tmp_path / "mine", "--force")
    assert (tmp_path / "mine/thesis.txt").read_text() == "mine"
    before = {path.name for path in folder.parent.iterdir()}
    assert main([str(tiny[0]), str(folder), "--force"]) == 0
    assert {path.name for path in folder.parent.iterdir()} == before  # nothing aside is left
    assert main([str(tiny[0]), str(tmp_path / "x.safetensors"), "--force"]) == 0


def test_a_crash_leaves_nothing(tiny, tmp_path, monkeypatch):
    what = plan_conversion(tiny[0], tmp_path / "out")

    def crash(size):
        raise KeyboardInterrupt

    for target in ("out", "out.ckpt", "out.safetensors"):
        what = plan_conversion(tiny[0], tmp_path / target)
        with pytest.raises(KeyboardInterrupt):
            convert(what, progress=crash)
    assert list(tmp_path.iterdir()) == []


def test_a_rest_of_another_model_is_left_out(tiny, folder, tmp_path, caplog):
    assert main([str(tiny[0]), str(tmp_path / "x")]) == 0
    path = tmp_path / "x/scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace("v_prediction", "epsilon"))
    file = read_weights(tmp_path / "x")
    assert "is of another model" in caplog.text
    assert parse_yaml(file.metadata["ldm.config"])["model"]["params"]["parameterization"] == "eps"
    last = [k for k in file.state if ".resblocks.2." in k]
    assert last
    assert not any(file.state[k].any() for k in last)  # what is not used is zero


def test_folders_of_other_versions_are_read(tiny, tmp_path):
    """Pickles, shards, attention by its old words, text without prefix, configs full of trifles."""
    assert main([str(tiny[0]), str(tmp_path / "old")]) == 0
    place = tmp_path / "old"
    vae = place / "vae/diffusion_pytorch_model.safetensors"
    state = read_checkpoint(vae).state
    for new, old in VAE_OLD.items():
        state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
    torch.save(state, vae.with_suffix(".bin"))
    text = place / "text_encoder/model.safetensors"
    state = {k.removeprefix("text_model."): v for k, v in read_checkpoint(text).state.items()}
    write_checkpoint(text, state | {"embeddings.position_ids": torch.arange(77)[None]})
    about = json.loads((place / "text_encoder/config.json").read_text())
    about |= {"length_penalty": 1.0, "top_k": 50, "id2label": {"0": "x"}}
    (place / "text_encoder/config.json").write_text(json.dumps(about))
    unet = place / "unet/diffusion_pytorch_model.safetensors"
    names = list(state := read_checkpoint(unet).state)
    shards = {f"part-{i}.safetensors": names[i::2] for i in range(2)}
    for name, part in shards.items():
        write_checkpoint(unet.with_name(name), {k: state[k] for k in part})
    where = {k: name for name, part in shards.items() for k in part}
    unet.with_name(f"{unet.name}.index.json").write_text(json.dumps({"weight_map": where}))
    for path in (vae, unet):
        path.unlink()
    assert same(read_weights(place).state, tiny[1])


def test_mistakes_are_said_in_one_line(tiny, folder, tmp_path, capsys):
    assert "no checkpoint" in fails(capsys, tmp_path / "none.ckpt", tmp_path / "x")
    assert "neither a diffusers folder" in fails(capsys, tmp_path, tmp_path / "x")
    assert main([str(folder), str(tmp_path / "copy")]) == 0
    unet = tmp_path / "copy/unet/config.json"
    text = unet.read_text()
    unet.write_text(text.replace('"dropout": 0.0', '"addition_embed_type": "text_time"'))
    (tmp_path / "copy" / REST).unlink()
    error = fails(capsys, tmp_path / "copy", tmp_path / "x.safetensors")
    assert "unet/config.json: `addition_embed_type: text_time` is not supported" in error
    unet.write_text(text.replace('"cross_attention_dim": 32', '"cross_attention_dim": 48'))
    error = fails(capsys, tmp_path / "copy", tmp_path / "x.safetensors")
    assert "does not fit its own configs" in error
    unet.write_text("{")
    assert "is damaged" in fails(capsys, tmp_path / "copy", tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "odd.ckpt")
    assert "of no known family" in fails(capsys, tmp_path / "odd.ckpt", tmp_path / "x")
    assert not (tmp_path / "x").exists()
