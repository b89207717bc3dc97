"""LoRAs extracted from two models, resized, and joined."""

import pytest
import torch

from ldm.commands.extract_lora import main as extract_lora_command
from ldm.commands.merge_lora import main as merge_lora_command
from ldm.loading.addons.lora import load_loras
from ldm.loading.addons.lora_files import write_lora
from ldm.loading.addons.lora_tools import (
    RankLimits,
    build_model_for_lora,
    compute_svd,
    extract_lora,
    join_loras,
)
from ldm.loading.files.checkpoint import read_checkpoint, write_checkpoint
from ldm.loading.weight_names import restore_names, to_original_name
from ldm.nets.lora import merge_changes
from ldm.runtime.errors import LdmError
from loading.lorahelp import build_tiny_model, collect_weights, make_random_lora, read_lora
from loading.tinyfamilies import write_family
from quick import slow_except

FULL_RANK = RankLimits()
MODELSPEC_FIELDS = (
    "sai_model_spec", "implementation", "title", "resolution", "prediction_type", "date",
    "hash_sha256", "merged_from",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny models, and models tuned from them."""
    folder = tmp_path_factory.mktemp("lora_tools")
    torch.manual_seed(0)
    for family in ("sd1", "xl"):
        path = folder / f"{family}.safetensors"
        state = write_family(family, path)
        tuned = {
            name: value + 0.1 * torch.randn(value.shape) if is_tuned(name, value) else value
            for name, value in state.items()
        }
        metadata = read_checkpoint(path).metadata
        write_checkpoint(folder / f"{family}-tuned.safetensors", tuned, metadata)
    return folder


def is_tuned(name, value):
    prefixes = ("model.diffusion_model.", "cond_stage_model.", "conditioner.")
    return name.startswith(prefixes) and value.is_floating_point() and value.dim() > 1


def compute_deltas(lora):
    return {name: layer.compute_delta() for name, layer in lora.layers.items()}


@pytest.mark.parametrize("family", slow_except(["sd1", "xl"], "sd1"))
def test_a_lora_of_full_rank_turns_the_base_into_the_tuned_model(folder, family):
    tuned, base = folder / f"{family}-tuned.safetensors", folder / f"{family}.safetensors"
    result = extract_lora(tuned, base, FULL_RANK, conv_limits=FULL_RANK, clamp_quantile=1)
    assert result.retained_fraction == pytest.approx(1)
    assert all("embedding" in name or "projection" in name for name in result.other_weights)
    merge_changes(result.lora.layers.values())
    target = read_checkpoint(tuned).state_dict
    left_out = {to_original_name(name, sgm=family == "xl") for name in result.other_weights}
    for name, value in restore_names(result.model.state_dict()).items():
        if is_tuned(name, value) and name not in left_out:
            torch.testing.assert_close(value, target[name], rtol=0, atol=2e-6)  # observed: 4e-7


def test_extraction_equals_that_of_kohya(folder):
    paths = folder / "sd1-tuned.safetensors", folder / "sd1.safetensors"
    result = extract_lora(*paths, RankLimits(rank=4))
    assert not any("resnets" in name and "conv1" in name for name in result.lora.layers)
    assert 0.1 < result.retained_fraction < 0.5
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    weight = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    tuned, base = (read_checkpoint(path).state_dict for path in paths)
    u, s, v = torch.linalg.svd(tuned[weight] - base[weight])
    up, down = u[:, :4] * s[:4], v[:4]
    layer = result.lora.layers[name]
    unclamped = extract_lora(*paths, RankLimits(rank=4), clamp_quantile=1)
    assert result.retained_fraction < unclamped.retained_fraction  # which counts the clamp
    signs = (layer.lora_down.weight * down).sum(1).sign()  # which an SVD does not determine
    up, down = up * signs, down * signs[:, None]
    limit = torch.cat([up.flatten(), down.flatten()]).quantile(0.99)
    torch.testing.assert_close(layer.lora_up.weight, up.clamp(-limit, limit), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.lora_down.weight, down.clamp(-limit, limit), rtol=0, atol=1e-5)
    assert float(layer.alpha) == layer.rank == 4


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"rank": 2}, 2),
        ({"rank": 9}, 4),
        ({"sum_fraction": 0.7}, 2),
        ({"square_fraction": 0.9}, 3),
        ({"square_fraction": 1.0}, 4),
        ({"ratio": 2}, 3),
        ({"rank": 2, "ratio": 2}, 2),
    ],
)
def test_limits_determine_the_rank(limits, count):
    assert RankLimits(**limits).count_kept(torch.tensor([4.0, 3.0, 2.0, 1.0])) == count
    assert RankLimits(**limits).count_kept(torch.empty(0)) == 0  # a LyCORIS layer of zeros


@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_a_matrix_of_lower_rank_is_decomposed(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], 3).double() @ torch.randn(3, shape[1]).double()
    u, values, v = compute_svd(matrix)
    torch.testing.assert_close(u * values @ v, matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=0, atol=1e-6)


CONV, LINEAR = "lora_unet_mid_block_resnets_0_conv1", "lora_unet_mid_block_attentions_0_proj_in"
NORM, TEXT = "lora_unet_conv_norm_out", "lora_te_text_model_encoder_layers_0_mlp_fc1"
LOHA = {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 64)}
LOKR = {"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16), "alpha": ()}
TUCKER = {"lora_up": (64, 3, 1, 1), "lora_mid": (3, 3, 3, 3), "lora_down": (3, 64, 1, 1)}
ADAPTERS = {  # shapes of tensors, layer, rank of the sum
    "LoHa": ({**LOHA, "alpha": ()}, LINEAR, 4),
    "LoKr": (LOKR, LINEAR, 8),
    "Tucker LoCon": ({f"{name}.weight": size for name, size in TUCKER.items()}, CONV, 3),
    "full difference": ({"diff": (64, 64, 3, 3), "diff_b": (64,)}, CONV, 64),
    "norm": ({"w_norm": (32,), "b_norm": (32,)}, NORM, 0),
    "text tower": ({"diff": (96, 24), "diff_b": (96,)}, TEXT, 24),
}


def write_lycoris(path, *adapter_types):
    torch.manual_seed(3)
    state = {}
    for adapter_type in adapter_types:
        tensors, layer, _ = ADAPTERS[adapter_type]
        state |= {f"{layer}.{role}": torch.randn(shape) / 4 for role, shape in tensors.items()}
    write_checkpoint(path, state)


@pytest.mark.parametrize("adapter_type", slow_except(ADAPTERS, "full difference"))
def test_additions_of_lycoris_are_joined_exactly_with_a_lora(adapter_type, tmp_path):
    """The LoRA has the rank of the sum."""
    model, paths = build_tiny_model("sd1"), [tmp_path / f"{name}.safetensors" for name in "abc"]
    write_lycoris(paths[0], adapter_type)
    write_lora(make_random_lora(model, alpha=1), paths[1], model)
    converted = join_loras([(paths[0], 1.0)], model)
    _, layer, rank = ADAPTERS[adapter_type]
    assert {n: lora.rank for n, lora in converted.lora.layers.items()} == (
        {layer: rank} if rank else {}
    )
    files = [(paths[0], "0.5:-0.8"), (paths[1], 0.3)]
    joined = join_loras(files, model)
    write_lora(joined.lora, paths[2], model, other_tensors=joined.other_tensors)
    expected = build_tiny_model("sd1")
    load_loras(model, [(paths[2], 1.0)])
    load_loras(expected, files)
    torch.testing.assert_close(collect_weights(model), collect_weights(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("adapter_type", slow_except(["LoHa", "plain LoRA"], "LoHa"))
def test_a_resized_lora_is_the_best_approximation_of_its_rank(adapter_type, tmp_path):
    model, file = build_tiny_model("sd1"), tmp_path / "x.safetensors"
    if adapter_type == "LoHa":
        write_lycoris(file, adapter_type, "norm")
    else:
        write_lora(make_random_lora(model, rank=6, alpha=3), file, model)
    full = compute_deltas(join_loras([(file, 1.0)], model).lora)
    resized = join_loras([(file, 1.0)], model, RankLimits(rank=2))
    retained = total = total_rank = 0
    for name, delta in compute_deltas(resized.lora).items():
        u, s, v = torch.linalg.svd(full[name].flatten(1), full_matrices=False)
        torch.testing.assert_close(delta.flatten(1), u[:, :2] * s[:2] @ v[:2], rtol=0, atol=1e-5)
        retained, total = retained + s[:2].square().sum(), total + s.square().sum()
        total_rank += int((s > 1e-4 * s[0]).sum())
    assert resized.lora.layers.keys() == full.keys()
    assert resized.total_rank == total_rank
    assert resized.retained_fraction == pytest.approx(float(retained / total), rel=1e-4)
    norms = {f"{NORM}.w_norm", f"{NORM}.b_norm"} if adapter_type == "LoHa" else set()
    assert resized.other_tensors.keys() == norms


@pytest.mark.parametrize(
    "tensors",
    [
        {"oft_blocks": (8, 8, 8)},
        {"weight": (64, 1), "on_input": ()},
        {"diff": (64, 64, 3, 3), "dora_scale": (64, 1, 1, 1)},
    ],
)
def test_a_lora_that_scales_or_rotates_weights_is_not_joined(tensors, tmp_path):
    file = tmp_path / "x.safetensors"
    write_checkpoint(file, {f"{CONV}.{role}": torch.ones(shape) for role, shape in tensors.items()})
    with pytest.raises(LdmError, match="scales or rotates weights .* which a LoRA cannot do"):
        join_loras([(file, 1.0)], build_tiny_model("sd1"))


def test_textual_inversions_are_kept_in_a_joined_file(tmp_path):
    model = build_tiny_model("sd1")
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    write_lycoris(source, "LoHa")
    bundle = {"bundle_emb.cat.emb_params": torch.ones(2, 24)}
    write_checkpoint(source, read_checkpoint(source).state_dict | bundle)
    joined = join_loras([(source, 1.0)], model)
    write_lora(joined.lora, target, model, other_tensors=joined.other_tensors)
    load_loras(model, [(target, 1.0)])
    assert torch.equal(model.conditioner.text.added_embeddings["cat"], torch.ones(2, 24))


def test_joined_loras_have_the_sum_of_their_deltas(tmp_path):
    model = build_tiny_model("sd1")
    loras = [make_random_lora(model, rank=rank, seed=rank, alpha=1) for rank in (2, 3)]
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 1)]
    for lora, path in zip(loras, paths, strict=True):
        write_lora(lora, path, model)
    joined = join_loras(zip(paths, (0.8, "-0.5:2"), strict=True), model)
    assert {layer.rank for layer in joined.lora.layers.values()} == {5}
    first, second = map(compute_deltas, loras)
    for name, delta in compute_deltas(joined.lora).items():
        weight = 2 if name.startswith("lora_unet_") else -0.5
        torch.testing.assert_close(
            delta, 0.8 * first[name] + weight * second[name], rtol=0, atol=1e-6
        )


def test_the_files_of_the_commands_name_their_sources(folder, tmp_path, capsys):
    tuned, base = (str(folder / f"sd1{end}.safetensors") for end in ("-tuned", ""))
    style, joined = str(tmp_path / "style.safetensors"), str(tmp_path / "joined.safetensors")
    assert extract_lora_command([tuned, base, style, "--rank", "8", "--conv-rank", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{style}\n"
    assert "95 layers, " in printed.err
    assert "2 other weights differ, not in the LoRA: conditioner.text" in printed.err
    arguments = [f"{style}:0.5", style, joined, "--keep-squares", "0.8", "--model", base]
    assert merge_lora_command(arguments) == 0
    assert "of the squared singular values" in capsys.readouterr().err
    metadata = read_checkpoint(joined).metadata
    assert {f"modelspec.{name}" for name in MODELSPEC_FIELDS} <= metadata.keys()
    assert metadata["modelspec.merged_from"] == "style.safetensors, style.safetensors"
    assert metadata["ss_network_dim"] == "Dynamic"
    assert merge_lora_command(arguments) == 1
    assert "exists" in capsys.readouterr().err
    for flag, value in (("--rank", "0"), ("--keep-sum", "2"), ("--ratio", "0.5")):
        assert merge_lora_command([style, f"{joined}.safetensors", flag, value]) == 1
        assert capsys.readouterr().err.endswith(f" ({flag})\n")


def test_the_family_of_a_file_is_recognized(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    state = {f"{name}.lora_down.weight": torch.ones(2, 768)}
    state[f"{name}.lora_up.weight"] = torch.ones(320, 2)
    write_checkpoint(tmp_path / "x.safetensors", state)
    model = build_model_for_lora(tmp_path / "x.safetensors")
    assert list(read_lora(tmp_path / "x.safetensors", model).layers) == [name]


def test_models_of_two_families_are_refused(folder):
    with pytest.raises(LdmError, match="sd1.safetensors` does not fit .*xl.safetensors`"):
        extract_lora(folder / "sd1.safetensors", folder / "xl.safetensors", FULL_RANK)
    with pytest.raises(LdmError, match="no layer of .* differs"):
        extract_lora(folder / "sd1.safetensors", folder / "sd1.safetensors", FULL_RANK)
