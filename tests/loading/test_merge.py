"""Merges of checkpoints: merged and unchanged weights, metadata, errors."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.commands.merge import main
from ldm.loading.convert import convert
from ldm.loading.files.checkpoint import read_checkpoint, to_ema_name, write_checkpoint
from ldm.loading.merge import plan_merge
from ldm.runtime.errors import LdmError
from loading.tinyfamilies import write_family

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {"sd1": "cond_stage_model.", "xl": "conditioner.embedders."}
INPUT_CONV = f"{UNET}input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SD 1, another, their base, an inpainting model, SD 2 and SDXL."""
    folder = tmp_path_factory.mktemp("merge")
    for family in ("sd1", "sd1-inpainting", "sd2", "sd2-v", "xl"):
        write_family(family, folder / f"{family}.safetensors")
    for name, family, seed in (("b", "sd1", 1), ("c", "sd1", 2), ("xl-b", "xl", 3)):
        file = read_checkpoint(folder / f"{family}.safetensors")
        torch.manual_seed(seed)
        state = {n: add_noise(v) if v.dim() else v for n, v in file.state_dict.items()}
        metadata = file.metadata | {"modelspec.license": "MIT", "modelspec.title": name}
        write_checkpoint(folder / f"{name}.safetensors", state, metadata)
    save_file({"quantize.embed.weight": torch.ones(1)}, folder / "vq.safetensors")
    return folder


def add_noise(value):
    return value + 0.1 * torch.randn(value.shape) if value.is_floating_point() else value + 1


def read_state(folder, name):
    return read_checkpoint(folder / f"{name}.safetensors").state_dict


def merge(folder, target, a, b, c=None, **options):
    """Merge models by name; return the resulting checkpoint."""
    paths = [folder / f"{name}.safetensors" for name in (a, b, c) if name]
    plan = plan_merge(*paths[:2], target, subtract=paths[2] if c else None, **options)
    return read_checkpoint(convert(plan))


@pytest.mark.parametrize(
    ("a", "b"), [("sd1", "b"), pytest.param("xl", "xl-b", marks=pytest.mark.slow)]
)
def test_unet_and_text_encoders_are_merged_and_other_weights_stay(folder, a, b, tmp_path):
    ours, theirs = read_state(folder, a), read_state(folder, b)
    file = merge(folder, tmp_path / "x.safetensors", a, b, weight=0.3)
    assert file.state_dict.keys() == ours.keys()
    for name, value in file.state_dict.items():
        expected = ours[name]
        if name.startswith((UNET, TEXT[a])) and expected.is_floating_point():
            expected = 0.7 * ours[name] + 0.3 * theirs[name]
            assert not (expected.dim() and expected.equal(ours[name]))
        assert torch.equal(value, expected), name


def test_adding_a_difference_keeps_the_additional_channels_of_inpainting(folder, tmp_path):
    a, b, c = (read_state(folder, name) for name in ("sd1-inpainting", "b", "c"))
    options = {"weight": 0.8, "merge_vae": True, "dtype": torch.float16}
    file = merge(folder, tmp_path / "x.ckpt", "sd1-inpainting", "b", "c", **options)
    weight = file.state_dict[INPUT_CONV]
    assert torch.equal(weight[:, 4:], a[INPUT_CONV][:, 4:].half())
    expected = a[INPUT_CONV][:, :4] + 0.8 * (b[INPUT_CONV] - c[INPUT_CONV])
    assert torch.equal(weight[:, :4], expected.half())
    for name in (f"{UNET}out.2.weight", f"{VAE}decoder.conv_in.weight"):
        assert torch.equal(file.state_dict[name], (a[name] + 0.8 * (b[name] - c[name])).half())
    assert torch.equal(file.state_dict["alphas_cumprod"], a["alphas_cumprod"].half())


def test_channels_that_the_subtracted_model_does_not_have_are_kept(folder, tmp_path):
    a, c = (read_state(folder, name)[INPUT_CONV] for name in ("sd1-inpainting", "c"))
    file = merge(folder, tmp_path / "x.ckpt", "sd1-inpainting", "sd1-inpainting", "c")
    assert torch.equal(
        file.state_dict[INPUT_CONV], torch.cat([a[:, :4] + (a[:, :4] - c), a[:, 4:]], 1)
    )


def test_each_block_has_its_own_weight(folder, tmp_path):
    ours, theirs = read_state(folder, "sd1"), read_state(folder, "b")
    weights = "BASE=0,IN00=0,M00=1,OUT00=0.25"
    file = merge(folder, tmp_path / "x.safetensors", "sd1", "b", block_weights=weights)
    expected = {
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": 0,
        f"{UNET}time_embed.0.weight": 0,
        f"{UNET}middle_block.0.in_layers.2.weight": 1,
        f"{UNET}output_blocks.0.0.in_layers.2.weight": 0.25,
        f"{UNET}out.2.weight": 0.5,  # the weight of blocks that are not named
    }
    for name, weight in expected.items():
        value = (1 - weight) * ours[name] + weight * theirs[name]
        assert torch.equal(file.state_dict[name], value), name


def test_ema_weights_are_merged_only_if_asked_for(folder, tmp_path):
    file = read_checkpoint(folder / "sd1.safetensors")
    ema_state_dict = {
        to_ema_name(n): v + 1 for n, v in file.state_dict.items() if n.startswith(UNET)
    }
    path, other = tmp_path / "a.safetensors", folder / "b.safetensors"
    write_checkpoint(path, file.state_dict | ema_state_dict, file.metadata)
    name, theirs = f"{UNET}out.2.weight", read_checkpoint(other).state_dict
    for ema in (False, True):
        plan = plan_merge(path, other, tmp_path / f"{ema}.ckpt", ema=ema)
        merged = read_checkpoint(convert(plan))
        assert not merged.has_ema
        expected = 0.5 * (file.state_dict[name] + ema) + 0.5 * theirs[name]
        assert torch.equal(merged.state_dict[name], expected)
    with pytest.raises(LdmError, match="no model has EMA weights"):
        plan_merge(other, other, tmp_path / "x.ckpt", ema=True)


def test_the_metadata_name_the_models_and_the_rule(folder, tmp_path, capsys):
    paths = [str(folder / f"{name}.safetensors") for name in ("sd1", "b", "c")]
    target = tmp_path / "new.safetensors"
    assert main([*paths[:2], str(target), "--subtract", paths[2], "--weight", "0.2"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{target}\n"
    assert "sd1.safetensors + w (b.safetensors - c.safetensors), w = 0.2" in printed.err
    metadata = read_checkpoint(target).metadata
    assert metadata["modelspec.merged_from"] == "sd1.safetensors, b.safetensors, c.safetensors"
    assert metadata["modelspec.title"] == "new"
    assert metadata["modelspec.license"] == "MIT"
    assert "global_step" not in metadata
    assert json.loads(metadata["ldm.merge"])["rule"] == "add difference"
    assert main(["a.ckpt", "b.ckpt", str(target)]) == 1  # before any model is opened
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ("sd1", "xl", {}, "`.*xl.safetensors` does not fit `.*sd1.safetensors`: "),
        ("sd2", "sd2-v", {}, "`.*sd2-v.safetensors` predicts v, `.*sd2.safetensors` predicts eps"),
        ("sd1", "sd1-inpainting", {}, "does not fit"),
        (
            "vq",
            "sd1",
            {},
            "vq.safetensors` is a model with a VQ autoencoder of Gumbel-softmax, which",
        ),
        ("sd1", "b", {"block_weights": "1,2"}, "2 block weights"),
        ("sd1", "b", {"weight": float("nan")}, "weight must be a finite number, got nan"),
        ("sd1", "b", {"target": "x.bin"}, "must end in .safetensors or .ckpt"),
    ],
)
def test_models_that_cannot_be_merged_are_refused(folder, a, b, options, message, tmp_path):
    target = options.pop("target", "x.safetensors")
    paths = [folder / f"{name}.safetensors" for name in (a, b)]
    with pytest.raises(LdmError, match=message) as error:
        plan_merge(*paths, tmp_path / target, **options)
    assert "\n" not in str(error.value)
