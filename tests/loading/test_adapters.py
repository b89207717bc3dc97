"""LoRA files, compared with diffusers and peft; observed error: at most 3e-6."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from lorahelp import (
    KINDS,
    WIDTH,
    WIDTH_2,
    outputs,
    random_adapter,
    their_outputs,
    their_pipeline,
    tiny_model,
)

from ldm.encoders.text import OpenCLIPText
from ldm.loading.addons import lora_files
from ldm.loading.addons.lora import load_loras, read_lora
from ldm.loading.addons.lora_files import write_lora
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.files.checkpoint import compute_short_hash, read_checkpoint, write_checkpoint
from ldm.loading.legacy import translate_config
from quick import some

SD1 = "configs/stable-diffusion/v1-inference.yaml"
SDXL = "configs/stable-diffusion-xl/sd_xl_base.yaml"
SD2 = "configs/stable-diffusion/v2-inference.yaml"
SLOW = pytest.mark.slow


@pytest.fixture(params=some(KINDS, "sd1"))
def model(request):
    return tiny_model(request.param)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "style"),
    [
        ("sd1", "kohya"),
        pytest.param("sdxl", "diffusers", marks=SLOW),
        pytest.param("sd2", "diffusers", marks=SLOW),
        pytest.param("sdxl", "kohya", marks=SLOW),
        pytest.param("refiner", "diffusers", marks=SLOW),
    ],
)
def test_diffusers_computes_the_same_with_our_file(kind, style, tmp_path):
    pytest.importorskip("peft")
    model, file = tiny_model(kind), tmp_path / "x.safetensors"
    pipeline = their_pipeline(model, kind)
    write_lora(random_adapter(model, alpha=2), file, model, style)
    plain = outputs(model)
    pipeline.load_lora_weights(str(file))
    load_loras(model, [(file, 1.0)])
    ours, theirs = outputs(model), their_outputs(pipeline, model)
    assert all((ours[name] - plain[name]).abs().max() > 0.1 for name in plain)
    if (text_embeds := theirs.pop("text_embeds", None)) is not None:
        theirs["vector"] = torch.cat([text_embeds, ours["vector"][:, text_embeds.shape[1] :]], 1)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)


@SLOW  # beside the DoRA of test_lycoris_merge
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_dora_of_peft_is_that_of_diffusers(kind, tmp_path):
    pytest.importorskip("peft")
    model, file = tiny_model(kind), tmp_path / "x.safetensors"
    write_lora(random_adapter(model, alpha=2), file, model, "diffusers")
    state = read_checkpoint(file).state
    torch.manual_seed(2)
    for layer in list_lora_targets(model):
        if "attn" in layer.diffusers:
            length = torch.rand(len(layer.target.weight)) + 0.5
            state[f"{layer.diffusers}.lora_magnitude_vector.weight"] = length
    state = {n: v for n, v in state.items() if "attn" in n}
    write_checkpoint(file, state)
    pipeline, plain = their_pipeline(model, kind), outputs(model)
    pipeline.load_lora_weights(str(file))
    load_loras(model, [(file, 1.0)])
    ours, theirs = outputs(model), their_outputs(pipeline, model)
    assert (ours["unet"] - plain["unet"]).abs().max() > 0.1
    torch.testing.assert_close(ours["unet"], theirs["unet"], rtol=0, atol=1e-5)


LYCORIS = {
    "lora_unet_conv_in": {"diff": (32, 4, 3, 3), "diff_b": (32,)},
    "lora_unet_down_blocks_0_resnets_0_norm1": {"w_norm": (32,), "b_norm": (32,)},
    "lycoris_mid_block_attentions_0_proj_in": {"lokr_w1": (4, 4), "lokr_w2": (16, 16)},
    "lora_unet_mid_block_resnets_0_conv1": {"oft_blocks": (8, 8, 8)},
    "lora_unet_mid_block_resnets_1_conv1": {"weight": (64, 1), "on_input": ()},
    "lora_te_text_model_encoder_layers_0_self_attn_k_proj": {
        "hada_w1_a": (24, 2), "hada_w1_b": (2, 24), "hada_w2_a": (24, 2), "hada_w2_b": (2, 24),
    },
    "lora_te_text_model_encoder_layers_0_layer_norm1": {"w_norm": (24,)},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_every_format_changes_its_target_layers_only(kind, tmp_path):
    torch.manual_seed(0)
    state = {
        f"{n}.{role}": torch.randn(s) for n, roles in LYCORIS.items() for role, s in roles.items()
    }
    state["lora_unet_mid_block_resnets_1_conv1.on_input"] = torch.tensor(True)
    write_checkpoint(tmp_path / "x.safetensors", state)
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_loras(model, [(tmp_path / "x.safetensors", 0.5)])
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert len(changed) == 9
    assert {"unet.input_blocks.0.0.bias", "unet.input_blocks.1.0.in_layers.0.bias"} < changed
    ours = after["unet.input_blocks.0.0.weight"] - before["unet.input_blocks.0.0.weight"]
    torch.testing.assert_close(ours, 0.5 * state["lora_unet_conv_in.diff"])


@pytest.mark.parametrize(("yaml", "text"), [(SD1, 12 * 6), (SD2, 23 * 6)])
def test_published_models_have_the_layers_that_kohya_trains(yaml, text):
    model = build_on_meta(translate_config(read_yaml(yaml)))
    names = [layer.kohya for layer in list_lora_targets(model)]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("lora_te_text_model_encoder_layers_") for name in names) == text
    inside = [name for name in names if "_attentions_" in name]
    assert len(inside) == 192
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj" in inside
    assert "lora_te_text_model_encoder_layers_11_self_attn_out_proj" in names


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_a_file_comes_back_bit_for_bit(model, style, tmp_path):
    adapter = random_adapter(model, alpha=1.5)  # half the rank: a power of two is exact
    write_lora(adapter, tmp_path / "x.safetensors", model, style)
    again = read_lora(tmp_path / "x.safetensors", model)
    assert style == "diffusers" or same(again.state_dict(), adapter.state_dict())
    assert all(torch.equal(again[name].delta(), adapter[name].delta()) for name in adapter)


SPELLINGS = [
    ("unet.", ".to_q.lora_A.", ".processor.to_q_lora.down."),
    ("unet.", ".to_out.0.lora_B.", ".processor.to_out_lora.up."),
    ("unet.", ".lora_A.", ".lora.down."),
    ("unet.", "unet.", ""),
    ("unet.", "unet.", "base_model.model.unet."),
    ("unet.", ".lora_A.", ".lora_A.default."),
    ("text_encoder.", ".lora_B.", ".lora_linear_layer.up."),
    ("text_encoder.", ".text_model.", "."),
    ("text_encoder.", "text_encoder.", "base_model.model."),
    ("text_encoder.", "text_encoder.text_model.", "base_model.model."),
    ("text_encoder.", "text_encoder.", "lora_te1_"),
    ("text_encoder.", "text_encoder.", "text_encoders.clip_l.transformer."),
    ("unet.", "unet.", "base_model.model."),
    ("unet.", "unet.", "diffusion_model."),
    ("unet.", "unet.", "lycoris_unet_"),
    ("unet.", "unet.", "unet._orig_mod."),
    ("unet.", ".weight", ""),
]


def test_names_of_other_programs_are_read(tmp_path):
    model = tiny_model()
    write_lora(random_adapter(model), tmp_path / "x.safetensors", model, "diffusers")
    state = read_checkpoint(tmp_path / "x.safetensors").state
    state = {name: v for name, v in state.items() if "conv_in" in name or ".0." in name}
    write_checkpoint(tmp_path / "x.safetensors", state)
    ours = read_lora(tmp_path / "x.safetensors", model).state_dict()
    for part, old, new in SPELLINGS:
        renamed = {k.replace(old, new) if k.startswith(part) else k: v for k, v in state.items()}
        assert renamed.keys() != state.keys()
        write_checkpoint(tmp_path / "other.safetensors", renamed)
        assert same(read_lora(tmp_path / "other.safetensors", model).state_dict(), ours), new


def rename_keys(state, *rules):
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


TEXT_1, TEXT_2 = r"^text_encoder\.", r"^text_encoder_2\."
DOWN_UP = [(r"lora_A\.", "lora_down."), (r"lora_B\.", "lora_up.")]
XL_SPELLINGS = {
    "kohya with diffusers' blocks": [  # LCM-LoRA
        (TEXT_1, "lora_te1_"),
        (TEXT_2, "lora_te2_"),
        (r"^unet\.", "lora_unet_"),
        (r"\.(?=.*\.lora)", "_"),
        *DOWN_UP,
    ],
    "old diffusers": [
        (r"(attn\d)\.(to_[qkv]|to_out)(?:\.0)?\.lora_A", r"\1.processor.\2_lora.down"),
        (r"(attn\d)\.(to_[qkv]|to_out)(?:\.0)?\.lora_B", r"\1.processor.\2_lora.up"),
        (r"self_attn\.([qkv]|out)_proj\.lora_A", r"self_attn.to_\1_lora.down"),
        (r"self_attn\.([qkv]|out)_proj\.lora_B", r"self_attn.to_\1_lora.up"),
        (r"(mlp.*)\.lora_A", r"\1.lora_linear_layer.down"),
        (r"(mlp.*)\.lora_B", r"\1.lora_linear_layer.up"),
    ],
    "ComfyUI": [
        (TEXT_1, "text_encoders.clip_l.transformer."),
        (TEXT_2, "text_encoders.clip_g.transformer."),
    ],
}


@pytest.mark.parametrize("spelling", some(XL_SPELLINGS, "kohya with diffusers' blocks"))
def test_names_of_sdxl_loras_are_read(spelling, tmp_path):
    model, file = tiny_model("sdxl"), tmp_path / "x.safetensors"
    write_lora(random_adapter(model), file, model, "diffusers")
    ours = read_lora(file, model).state_dict()
    state = read_checkpoint(file).state
    other = rename_keys(state, *XL_SPELLINGS[spelling])
    assert other.keys() != state.keys()
    write_checkpoint(file, other)
    assert same(read_lora(file, model).state_dict(), ours)


def test_folders_of_peft_tell_the_text_encoders_apart(tmp_path):
    layer = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    for network, width in (("text_encoder", WIDTH), ("text_encoder_2", WIDTH_2)):
        state = {f"{layer}.lora_A.weight": torch.zeros(1, width)}
        state[f"{layer}.lora_B.weight"] = torch.zeros(4 * width, 1)
        write_checkpoint(tmp_path / network / "adapter_model.safetensors", state)
    names = {f"lora_te{n}_text_model_encoder_layers_0_mlp_fc1" for n in (1, 2)}
    assert set(read_lora(tmp_path, tiny_model("sdxl"))) == names


@pytest.mark.parametrize(
    "prefix",
    some(["lora_te_", "lora_te1_", "lora_te2_", "text_encoder."], "text_encoder."),
)
def test_the_refiner_has_one_text_encoder_by_any_name(prefix, tmp_path):
    model, file = tiny_model("refiner"), tmp_path / "x.safetensors"
    adapter = random_adapter(model)
    write_lora(adapter, file, model)
    write_checkpoint(file, rename_keys(read_checkpoint(file).state, ("^lora_te_", prefix)))
    assert same(read_lora(file, model).state_dict(), adapter.state_dict())


def test_layers_that_are_there_twice_are_those_with_the_names_of_diffusers(tmp_path, caplog):
    model, file = tiny_model("sdxl"), tmp_path / "x.safetensors"
    write_lora(random_adapter(model, seed=1), file, model, "diffusers")
    state = read_checkpoint(file).state
    removed = {name for name in state if name.startswith("unet.up_blocks")}
    expected = read_lora(file, model)
    write_lora(random_adapter(model, seed=2), file, model)
    originals = read_checkpoint(file).state
    blocks = {n: v for n, v in originals.items() if "put_blocks" in n or "middle" in n}
    for first, second in ((state, blocks), (blocks, state)):
        both = {n: v for n, v in (first | second).items() if n not in removed}
        write_checkpoint(file, both)
        for name, layer in read_lora(file, model).items():
            up = originals[f"{name}.lora_up.weight"]
            is_other = torch.equal(layer.lora_up.weight, up)
            assert is_other == ("output_blocks" in name), name
            assert is_other or torch.equal(layer.delta(), expected[name].delta())
    assert "layers twice: those with the original's names are left out" in caplog.text


@pytest.mark.parametrize("kind", some(["sd1", "sdxl"], "sd1"))
def test_a_lora_of_the_base_model_fits_an_inpainting_model(kind, tmp_path):
    base, file = tiny_model(kind), tmp_path / "x.safetensors"
    adapter = random_adapter(base)
    write_lora(adapter, file, base)
    model = tiny_model(kind, in_channels=9)
    before = model.unet.state_dict()["input_blocks.0.0.weight"].clone()
    load_loras(model, [(file, 1.0)])
    delta = model.unet.state_dict()["input_blocks.0.0.weight"] - before
    name = next(
        layer.kohya for layer in list_lora_targets(base) if layer.original == "input_blocks.0.0"
    )
    torch.testing.assert_close(delta[:, :4], adapter[name].delta(), rtol=0, atol=1e-6)
    assert not delta[:, 4:].any()


BIG_G = "conditioner.embedders.1.model.transformer.resblocks."
BIG_G_LAYERS = {
    "attn.in_proj_weight": ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj"),
    "attn.out_proj.weight": ("self_attn_out_proj",),
    "mlp.c_fc.weight": ("mlp_fc1",),
    "mlp.c_proj.weight": ("mlp_fc2",),
}


def sdxl_layers_of_kohya():
    """{name in kohya's files: shape of the weight}, from the names in a checkpoint."""
    layers = {}
    text = gzip.decompress(Path("tests/data/keys/sd_xl_base.txt.gz").read_bytes()).decode()
    for line in text.splitlines():
        key, size, _ = line.split()
        shape = [int(n) for n in size.split("x") if n != "-"]
        flat = key.removesuffix(".weight").replace(".", "_")
        if "norm" in key or key.endswith("bias"):
            continue
        if re.search(r"diffusion_model.*(transformer_blocks|\.proj_)", key):
            layers[flat.replace("model_diffusion_model", "lora_unet")] = shape
        elif re.match(r"conditioner\.embedders\.0\..*(self_attn|mlp)", key):
            layers[flat.replace("conditioner_embedders_0_transformer", "lora_te1")] = shape
        elif key.startswith(BIG_G):
            block, _, end = key.removeprefix(BIG_G).partition(".")
            for layer in BIG_G_LAYERS.get(end, ()):
                rows = shape[0] // len(BIG_G_LAYERS[end])
                layers[f"lora_te2_text_model_encoder_layers_{block}_{layer}"] = [rows, shape[1]]
    return layers


def test_all_layers_that_kohya_trains_in_sdxl_are_read(tmp_path):
    layers = sdxl_layers_of_kohya()
    counts = {prefix: sum(prefix in name for name in layers) for prefix in ("unet", "te1", "te2")}
    assert counts == {"unet": 722, "te1": 72, "te2": 192}
    state = {}
    for name, (rows, columns) in layers.items():
        state[f"{name}.lora_down.weight"] = torch.zeros(1, columns)
        state[f"{name}.lora_up.weight"] = torch.zeros(rows, 1)
        state[f"{name}.alpha"] = torch.tensor(1.0)
    assert len(state) == 2958
    write_checkpoint(tmp_path / "x.safetensors", state)
    model = build_on_meta(translate_config(read_yaml(SDXL)))
    assert read_lora(tmp_path / "x.safetensors", model).keys() == layers.keys()


ORIGINAL = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def low_rank(layer, down="lora_down", up="lora_up", rank=4, width=32):
    """The two matrices for a layer, and what they add to it where alpha is their rank."""
    torch.manual_seed(0)
    a, b = torch.randn(rank, width), torch.randn(width, rank)
    return {f"{layer}.{down}.weight": a, f"{layer}.{up}.weight": b}, b @ a


def test_layers_may_have_the_names_of_the_original(tmp_path):
    model = tiny_model("sd1")
    for layer in (
        KOHYA,
        f"lora_unet_{ORIGINAL.replace('.', '_')}",
        f"diffusion_model.{ORIGINAL}",
        f"model.diffusion_model.{ORIGINAL}",
        f"base_model.model.{ORIGINAL}",
        ORIGINAL,
    ):
        state, delta = low_rank(layer)
        state[f"{layer}.alpha"] = torch.tensor(2.0)
        write_checkpoint(tmp_path / "x.safetensors", state)
        before = {name: value.clone() for name, value in model.unet.state_dict().items()}
        load_loras(model, [(tmp_path / "x.safetensors", 1.0)])
        before[f"{ORIGINAL}.weight"] += 2 / 4 * delta
        weights = model.unet.state_dict()
        assert all(torch.allclose(weights[n], v, atol=1e-6) for n, v in before.items()), layer


@pytest.mark.parametrize(
    "name",
    ["lora_te2_text_projection", "text_encoder_2.text_projection", "lora_te_text_projection"],
)
def test_the_projection_of_the_pooled_output_may_be_changed(tmp_path, name):
    """It is stored transposed: (width, embed_dim)."""
    model = tiny_model("refiner" if "te_" in name else "sdxl")
    tower = model.conditioner.find_all(OpenCLIPText)[-1].model
    before = tower.text_projection.clone()
    state, delta = low_rank(name, width=len(before))
    state[f"{name}.alpha"] = torch.tensor(2.0)
    write_checkpoint(tmp_path / "x.safetensors", state)
    load_loras(model, [(tmp_path / "x.safetensors", 0.5)])
    torch.testing.assert_close(tower.text_projection, before + 0.5 * 2 / 4 * delta.T)


def test_a_folder_of_peft_is_merged_into_both_towers(tmp_path):
    """Alpha is in the config beside each file; rsLoRA divides it by the root of the rank."""
    text = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    parts = {"text_encoder": (text, WIDTH)}
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    parts["unet"] = (f"base_model.model.{layer}", 32)
    deltas = {}
    for name, (key, width) in parts.items():
        state, deltas[name] = low_rank(key, "lora_A", "lora_B", width=width)
        write_checkpoint(tmp_path / name / "adapter_model.safetensors", state)
        about = {"r": 4, "lora_alpha": 8, "use_rslora": name == "unet"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(about))
    model = tiny_model()
    lora = read_lora(tmp_path, model)
    torch.testing.assert_close(lora[KOHYA].delta(), 8 / 2 * deltas["unet"])
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    torch.testing.assert_close(lora[name].delta(), 8 / 4 * deltas["text_encoder"])
    assert len(lora) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no `pytorch_lora_weights` or `adapter_mo"):
        read_lora(tmp_path / "empty", model)


def test_bundled_embeddings_are_added_and_layers_of_rank_zero_change_nothing(tmp_path):
    state = low_rank(KOHYA, rank=0)[0] | {f"{KOHYA}.alpha": torch.tensor(0.0)}
    words = {"cat.v1": torch.randn(2, WIDTH), "dog": torch.randn(1, WIDTH)}
    state["bundle_emb.cat.v1.string_to_param.*"] = words["cat.v1"]
    state["bundle_emb.dog.emb_params"] = words["dog"]
    write_checkpoint(tmp_path / "x.safetensors", state)
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_loras(model, [(tmp_path / "x.safetensors", 1.0)])
    assert same(model.state_dict(), before)
    assert same(model.conditioner.text.added_embeddings, words)


def test_bundled_embeddings_that_do_not_fit_are_skipped_with_a_warning(tmp_path, caplog):
    state, delta = low_rank(KOHYA)
    state["bundle_emb.cat.emb_params"] = torch.ones(1, 768)
    write_checkpoint(tmp_path / "x.safetensors", state)
    model = tiny_model()
    before = model.unet.state_dict()[f"{ORIGINAL}.weight"].clone()
    load_loras(model, [(tmp_path / "x.safetensors", 1.0)])
    assert "textual inversions of the LoRA are skipped: " in caplog.text
    after = model.unet.state_dict()[f"{ORIGINAL}.weight"]
    torch.testing.assert_close(after, before + delta, rtol=0, atol=1e-6)


def test_a_sum_too_large_for_the_weights_is_refused(tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", low_rank(KOHYA)[0])
    with pytest.raises(ValueError, match="too large for torch.float16") as caught:
        load_loras(tiny_model().half(), [(tmp_path / "x.safetensors", 1e9)])
    assert caught.value.argument == "loras"


def test_alpha_is_read_from_metadata(tmp_path):
    model = tiny_model()
    write_lora(random_adapter(model), tmp_path / "x.safetensors", model, "diffusers")
    state = read_checkpoint(tmp_path / "x.safetensors").state
    notes = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 12}}
    write_checkpoint(
        tmp_path / "y.safetensors", state, {lora_files.ALPHA_METADATA: json.dumps(notes)}
    )
    adapter = read_lora(tmp_path / "y.safetensors", model)
    assert adapter["lora_unet_conv_in"].alpha == 6
    assert adapter["lora_unet_mid_block_attentions_0_proj_in"].alpha == 12
    assert adapter["lora_te_text_model_encoder_layers_0_mlp_fc1"].alpha == 3  # its rank


def test_files_with_weights_are_merged_and_recorded(model, tmp_path):
    adapters = [random_adapter(model, seed=seed) for seed in (1, 2)]
    files = [tmp_path / "a.safetensors", tmp_path / "b.ckpt"]
    for adapter, file in zip(adapters, files, strict=True):
        write_lora(adapter, file, model)
    for adapter, weight in zip(adapters, (0.8, -0.3), strict=True):
        for layer in adapter.layers.values():
            layer.strength = weight
        adapter.attach()
    attached = outputs(model)
    for adapter in adapters:
        adapter.detach()
    load_loras(model, [(files[0], 0.8), (files[1], -0.3)])
    for name, ours in outputs(model).items():
        torch.testing.assert_close(ours, attached[name], rtol=0, atol=2e-5)
    noted = model.provenance["loras"]
    assert [note["weight"] for note in noted] == [0.8, -0.3]
    expected = {"path": str(files[1]), "weight": -0.3, "hash": compute_short_hash(files[1])}
    assert expected.items() <= noted[1].items()


@pytest.mark.parametrize(
    ("kind", "architecture", "version"),
    [
        ("sdxl", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
        ("refiner", "stable-diffusion-xl-v1-refiner/lora", "sdxl_refiner_v1-0"),
    ],
)
def test_files_name_their_base_model(kind, architecture, version, tmp_path):
    model = tiny_model(kind)
    write_lora(random_adapter(model, rank=4, alpha=2), tmp_path / "x.safetensors", model)
    notes = {
        "modelspec.architecture": architecture,
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
    }
    assert notes.items() <= read_checkpoint(tmp_path / "x.safetensors").metadata.items()


SD1_KEYS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
SDXL_KEYS = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"


@pytest.mark.parametrize(
    ("kind", "context", "layer", "width", "theirs", "ours"),
    [
        ("sd1", 768, SD1_KEYS, 1024, "Stable Diffusion 2", "Stable Diffusion 1"),
        ("sd1", 768, SDXL_KEYS, 2048, "Stable Diffusion XL", "Stable Diffusion 1"),
        ("sd2", 1024, "lora_te2_text", 64, "Stable Diffusion XL", "Stable Diffusion 2"),
        ("sd1", 768, f"{SDXL_KEYS[:-8]}1.to_k", 640, "Stable Diffusion XL", "Stable Diffusion 1"),
        ("sdxl", 2048, SD1_KEYS, 768, "Stable Diffusion 1", "Stable Diffusion XL"),
        ("sdxl", 2048, SDXL_KEYS, 1280, "Stable Diffusion XL refiner", "Stable Diffusion XL"),
        ("refiner", 1280, SDXL_KEYS, 2048, "Stable Diffusion XL", "Stable Diffusion XL refiner"),
    ],
)
def test_a_file_of_another_family_is_refused_in_one_line(
    kind, context, layer, width, theirs, ours, tmp_path
):
    file, model = tmp_path / "x.safetensors", tiny_model(kind)
    model.unet.context_dim = context
    write_checkpoint(file, low_rank(layer, width=width)[0])
    with pytest.raises(ValueError, match="is a LoRA for") as caught:
        load_loras(model, [(file, 1.0)])
    assert str(caught.value) == (
        f"`{file}` is a LoRA for {theirs}, the model is {ours}: use a LoRA that was trained for "
        f"{ours}"
    )


def test_a_file_of_an_unknown_family_is_refused_in_one_line(tmp_path):
    state = low_rank("lora_unet_down_blocks_3_x")[0] | low_rank("lora_unet_conv_in")[0]
    write_checkpoint(tmp_path / "x.safetensors", state)
    with pytest.raises(ValueError, match="1 of its 2 layers unknown, 1 of another shape"):
        read_lora(tmp_path / "x.safetensors", tiny_model())


def test_alpha_may_have_any_numeric_type_and_nothing_is_nan(tmp_path):
    state, delta = low_rank(KOHYA)
    for alpha in (2, 2.0, torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0).half()):
        torch.save(state | {f"{KOHYA}.alpha": alpha}, tmp_path / "x.pt")
        lora = read_lora(tmp_path / "x.pt", tiny_model())
        torch.testing.assert_close(lora[KOHYA].delta(), 2 / 4 * delta)
    write_checkpoint(
        tmp_path / "x.safetensors", state | {f"{KOHYA}.alpha": torch.tensor(torch.nan)}
    )
    with pytest.raises(ValueError, match="NaN or infinity in 1 of its 1 layers: `lora_unet_down_"):
        read_lora(tmp_path / "x.safetensors", tiny_model())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["lora_unet_conv_in.hada_w1_a"],
            "1 layer is incomplete: `lora_unet_conv_in` has only `h",
        ),
        (["lora_unet_conv_in.on_input"], "has only `on_input`"),
        (["lora_unet_conv_in.lora_mid.weight"], "has only `mid`"),
        (["unet.conv_in.lora_magnitude_vector.weight"], "has only `magnitude`"),
        (["lora_unet_conv_in.oft_diag"], "unsupported kind: OFT of another form"),
        (
            ["unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.bias"],
            "unsupported kind: LoRA with biases",
        ),
        (["x.modules_to_save.default.weight"], "unsupported kind: LoRA with whole layers"),
        (
            ["model.diffusion_model.out.2.bias"],
            "is not a LoRA file: 1 of its 1 keys is not recognised",
        ),
        (
            ["lora_unet_conv_in.lora_down.weight"],
            "1 layer is incomplete: `lora_unet_conv_in` has only",
        ),
        (
            ["betas", "lora_unet_conv_in.alpha"],
            "unsupported kind of LoRA: 1 of its 2 keys is not recognised: `betas`",
        ),
    ],
)
def test_what_is_no_lora_is_refused(names, message, tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", {name: torch.ones(2, 2) for name in names})
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "x.safetensors", tiny_model())


def test_a_model_without_prompts_has_no_text_layers():
    model = tiny_model()
    del model.conditioner.text
    assert all(layer.diffusers.startswith("unet.") for layer in list_lora_targets(model))
