"""LoRAs out of two models, with less rank, and joined."""

import pytest
import torch
from lorahelp import random_adapter, tiny_model
from tinyfamilies import write

from ldm.commands.extract_lora import main as extract
from ldm.commands.merge_lora import main as merge
from ldm.loading.addons.lora import read_lora, write_lora
from ldm.loading.addons.lora_tools import (
    RankRule,
    decompose,
    extract_lora,
    join_loras,
    model_of_lora,
    resize_lora,
)
from ldm.loading.files.checkpoint import read_checkpoint, write_checkpoint
from ldm.loading.weight_names import original_name, restore_names
from ldm.nets.lora import merge_changes
from ldm.runtime.errors import LdmError

FULL = RankRule()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of tiny models by family, and of models tuned from them."""
    folder = tmp_path_factory.mktemp("lora_tools")
    torch.manual_seed(0)
    for family in ("sd1", "xl"):
        path = folder / f"{family}.safetensors"
        state = write(family, path)
        tuned = {
            name: value + 0.1 * torch.randn(value.shape) if _is_tuned(name, value) else value
            for name, value in state.items()
        }
        metadata = read_checkpoint(path).metadata
        write_checkpoint(folder / f"{family}-tuned.safetensors", tuned, metadata)
    return folder


def _is_tuned(name, value):
    parts = ("model.diffusion_model.", "cond_stage_model.", "conditioner.")
    return name.startswith(parts) and value.is_floating_point() and value.dim() > 1


def deltas(lora):
    return {name: layer.delta() for name, layer in lora.layers.items()}


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_a_lora_of_full_rank_makes_the_base_the_tuned_model(files, family):
    tuned, base = files / f"{family}-tuned.safetensors", files / f"{family}.safetensors"
    result = extract_lora(tuned, base, FULL, conv_rule=FULL, clamp_quantile=1)
    assert result.retained == pytest.approx(1)
    assert all("embedding" in name or "projection" in name for name in result.left_out)
    merge_changes(result.lora.layers.values())
    target = read_checkpoint(tuned).state
    left_out = {original_name(name, engine=family == "xl") for name in result.left_out}
    for name, value in restore_names(result.model.state_dict()).items():
        if _is_tuned(name, value) and name not in left_out:
            torch.testing.assert_close(value, target[name], rtol=0, atol=2e-6)  # seen 4e-7


def test_extraction_is_kohyas_rule(files):
    base = files / "sd1.safetensors"
    result = extract_lora(files / "sd1-tuned.safetensors", base, RankRule(rank=4))
    assert not any("resnets" in name and "conv1" in name for name in result.lora.layers)
    assert 0.1 < result.retained < 0.5
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    weight = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    new, old = (read_checkpoint(files / f"sd1{end}.safetensors").state for end in ("-tuned", ""))
    u, s, v = torch.linalg.svd(new[weight] - old[weight])
    up, down = u[:, :4] * s[:4], v[:4]
    layer = result.lora.layers[name]
    unclamped = extract_lora(
        files / "sd1-tuned.safetensors", base, RankRule(rank=4), clamp_quantile=1
    )
    assert result.retained < unclamped.retained  # what the clamp takes away is told
    signs = (layer.lora_down.weight * down).sum(1).sign()  # which the SVD leaves open
    up, down = up * signs, down * signs[:, None]
    limit = torch.cat([up.flatten(), down.flatten()]).quantile(0.99)
    torch.testing.assert_close(layer.lora_up.weight, up.clamp(-limit, limit), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.lora_down.weight, down.clamp(-limit, limit), rtol=0, atol=1e-5)
    assert float(layer.alpha) == layer.rank == 4


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        ({"rank": 2}, 2),
        ({"rank": 9}, 4),
        ({"share": 0.7}, 2),
        ({"square_share": 0.9}, 3),
        ({"square_share": 1.0}, 4),
        ({"ratio": 2}, 3),
        ({"rank": 2, "ratio": 2}, 2),
    ],
)
def test_rules_of_the_rank(rule, count):
    assert RankRule(**rule).count(torch.tensor([4.0, 3.0, 2.0, 1.0])) == count


def test_a_smaller_lora_is_the_nearest_one_of_its_rank():
    lora = random_adapter(tiny_model("sd1"), rank=6, alpha=3)
    smaller, retained = resize_lora(lora, RankRule(rank=2))
    before, after = deltas(lora), deltas(smaller)
    kept = total = 0.0
    for name, delta in before.items():
        u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
        best = (u[:, :2] * s[:2] @ v[:2]).view(delta.shape)
        torch.testing.assert_close(after[name], best, rtol=0, atol=1e-5)
        kept, total = kept + float(s[:2].square().sum()), total + float(s.square().sum())
    assert retained == pytest.approx(kept / total, rel=1e-4)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
def test_a_matrix_of_lower_rank_is_decomposed(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], 3).double() @ torch.randn(3, shape[1]).double()
    u, values, v = decompose(matrix)
    torch.testing.assert_close(u * values @ v, matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=0, atol=1e-6)


def test_joined_loras_do_what_all_do(tmp_path):
    model = tiny_model("sd1")
    loras = [random_adapter(model, rank=rank, seed=rank, alpha=1) for rank in (2, 3)]
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 1)]
    for lora, path in zip(loras, paths, strict=True):
        write_lora(lora, path, model)
    joined = join_loras([(read_lora(p, model), w) for p, w in zip(paths, (0.8, -0.5), strict=True)])
    first, second = map(deltas, loras)
    for name, delta in deltas(joined).items():
        expected = 0.8 * first[name] - 0.5 * second[name]
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-6)


def test_the_commands_write_files_that_name_their_sources(files, tmp_path, capsys):
    tuned, base = (str(files / f"sd1{end}.safetensors") for end in ("-tuned", ""))
    style, joined = str(tmp_path / "style.safetensors"), str(tmp_path / "joined.safetensors")
    assert extract([tuned, base, style, "--rank", "8", "--conv-rank", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{style}\n"
    assert "95 layers, " in printed.err
    assert "2 weights differ that are not in it: conditioner.text" in printed.err
    words = [f"{style}:0.5", style, joined, "--keep-squares", "0.8", "--model", base]
    assert merge(words) == 0
    assert "of the squares" in capsys.readouterr().err
    metadata = read_checkpoint(joined).metadata
    assert metadata["modelspec.merged_from"] == "style.safetensors, style.safetensors"
    assert metadata["ss_network_dim"] == "Dynamic"
    assert merge(words) == 1
    assert "exists" in capsys.readouterr().err


def test_the_family_of_a_file_is_recognised(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    state = {f"{name}.lora_down.weight": torch.ones(2, 768)}
    state[f"{name}.lora_up.weight"] = torch.ones(320, 2)
    write_checkpoint(tmp_path / "x.safetensors", state)
    model = model_of_lora(tmp_path / "x.safetensors")
    assert list(read_lora(tmp_path / "x.safetensors", model).layers) == [name]


def test_models_of_two_families_are_refused(files):
    with pytest.raises(LdmError, match="sd1.safetensors` does not fit .*xl.safetensors`"):
        extract_lora(files / "sd1.safetensors", files / "xl.safetensors", FULL)
    with pytest.raises(LdmError, match="no layer of .* differs"):
        extract_lora(files / "sd1.safetensors", files / "sd1.safetensors", FULL)
