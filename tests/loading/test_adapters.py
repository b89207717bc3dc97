"""LoRA and LyCORIS files; outputs are compared with diffusers: observed error at most 3e-6."""

import json
import re

import pytest
import torch

from ldm.encoders.text import OpenCLIPText
from ldm.loading.addons import lora_files
from ldm.loading.addons.lora import load_loras, read_weight_changes
from ldm.loading.addons.lora_files import write_lora
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.files.checkpoint import compute_short_hash, read_checkpoint, write_checkpoint
from ldm.runtime.errors import FileFormatError
from loading.lorahelp import (
    FAMILIES,
    WIDTH,
    WIDTH_2,
    are_equal,
    build_diffusers_pipeline,
    build_tiny_model,
    compute_diffusers_outputs,
    compute_outputs,
    make_random_lora,
    read_lora,
    rename_keys,
)
from nets.nethelp import read_original_shapes
from quick import slow_except

SD1 = "configs/stable-diffusion/v1-inference.yaml"
SDXL = "configs/stable-diffusion-xl/sd_xl_base.yaml"
SD2 = "configs/stable-diffusion/v2-inference.yaml"
SLOW = pytest.mark.slow


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "style"),
    [
        ("sd1", "kohya"),
        pytest.param("sdxl", "diffusers", marks=SLOW),
        pytest.param("sd2", "diffusers", marks=SLOW),
        pytest.param("sdxl", "kohya", marks=SLOW),
        pytest.param("refiner", "diffusers", marks=SLOW),
        pytest.param("sd1", "dora", marks=SLOW),
        pytest.param("sdxl", "dora", marks=SLOW),
    ],
)
def test_diffusers_computes_the_same_with_our_file(family, style, path):
    pytest.importorskip("peft")
    model = build_tiny_model(family)
    pipeline = build_diffusers_pipeline(model)
    write_lora(make_random_lora(model, alpha=2), path, model, style.replace("dora", "diffusers"))
    if style == "dora":
        add_magnitudes(path, model)
    plain = compute_outputs(model)
    pipeline.load_lora_weights(str(path))
    load_loras(model, [(path, 1.0)])
    ours, theirs = compute_outputs(model), compute_diffusers_outputs(pipeline, model)
    assert all((ours[name] - plain[name]).abs().max() > 0.1 for name in plain)
    if (text_embeds := theirs.pop("text_embeds", None)) is not None:
        theirs["vector"] = torch.cat([text_embeds, ours["vector"][:, text_embeds.shape[1] :]], 1)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)


def add_magnitudes(path, model):
    """Turn the layers of attention into DoRA, as peft writes it."""
    state = {n: v for n, v in read_checkpoint(path).state_dict.items() if "attn" in n}
    torch.manual_seed(2)
    for layer in list_lora_targets(model):
        if "attn" in layer.diffusers_name:
            magnitude = torch.rand(len(layer.target.weight)) + 0.5
            state[f"{layer.diffusers_name}.lora_magnitude_vector.weight"] = magnitude
    write_checkpoint(path, state)


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


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_layers_of_several_formats_change_their_targets_only(family, path):
    torch.manual_seed(0)
    state = {
        f"{n}.{role}": torch.randn(s) for n, roles in LYCORIS.items() for role, s in roles.items()
    }
    state["lora_unet_mid_block_resnets_1_conv1.on_input"] = torch.tensor(True)
    write_checkpoint(path, state)
    model = build_tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_loras(model, [(path, 0.5)])
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert len(changed) == 9
    assert {"unet.input_blocks.0.0.bias", "unet.input_blocks.1.0.in_layers.0.bias"} < changed
    ours = after["unet.input_blocks.0.0.weight"] - before["unet.input_blocks.0.0.weight"]
    torch.testing.assert_close(ours, 0.5 * state["lora_unet_conv_in.diff"])


@pytest.mark.parametrize(("config", "num_text_layers"), [(SD1, 12 * 6), (SD2, 23 * 6)])
def test_published_models_have_as_many_lora_targets_as_in_kohya(config, num_text_layers):
    model = build_on_meta(read_yaml(config))
    names = [layer.kohya_name for layer in list_lora_targets(model)]
    assert len(set(names)) == len(names)
    text_prefix = "lora_te_text_model_encoder_layers_"
    assert sum(name.startswith(text_prefix) for name in names) == num_text_layers
    attentions = [name for name in names if "_attentions_" in name]
    assert len(attentions) == 192
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj" in attentions
    assert "lora_te_text_model_encoder_layers_11_self_attn_out_proj" in names


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", slow_except(FAMILIES, "sd1"))
def test_a_written_lora_is_read_back_bit_for_bit(family, style, path):
    model = build_tiny_model(family)
    lora = make_random_lora(model, alpha=1.5)  # half the rank: a power of two is exact
    write_lora(lora, path, model, style)
    loaded = read_lora(path, model)
    assert style == "diffusers" or are_equal(loaded.state_dict(), lora.state_dict())
    assert all(
        torch.equal(loaded[name].compute_delta(), lora[name].compute_delta()) for name in lora
    )


REPLACEMENTS = [
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


def test_names_in_files_of_other_programs_are_read(path):
    model = build_tiny_model()
    write_lora(make_random_lora(model), path, model, "diffusers")
    state = read_checkpoint(path).state_dict
    state = {name: v for name, v in state.items() if "conv_in" in name or ".0." in name}
    write_checkpoint(path, state)
    ours = read_lora(path, model).state_dict()
    for prefix, old, new in REPLACEMENTS:
        renamed = {k.replace(old, new) if k.startswith(prefix) else k: v for k, v in state.items()}
        assert renamed.keys() != state.keys()
        write_checkpoint(path, renamed)
        assert are_equal(read_lora(path, model).state_dict(), ours), new


TEXT_1, TEXT_2 = r"^text_encoder\.", r"^text_encoder_2\."
DOWN_UP = [(r"lora_A\.", "lora_down."), (r"lora_B\.", "lora_up.")]
SDXL_NAMING_STYLES = {
    "kohya with diffusers' blocks": [  # such as LCM-LoRA
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


@pytest.mark.parametrize("style", slow_except(SDXL_NAMING_STYLES, "kohya with diffusers' blocks"))
def test_names_in_sdxl_files_of_other_programs_are_read(style, path):
    model = build_tiny_model("sdxl")
    write_lora(make_random_lora(model), path, model, "diffusers")
    ours = read_lora(path, model).state_dict()
    state = read_checkpoint(path).state_dict
    renamed = rename_keys(state, *SDXL_NAMING_STYLES[style])
    assert renamed.keys() != state.keys()
    write_checkpoint(path, renamed)
    assert are_equal(read_lora(path, model).state_dict(), ours)


@pytest.mark.parametrize(
    "prefix", slow_except(["lora_te_", "lora_te1_", "lora_te2_", "text_encoder."], "text_encoder.")
)
def test_prefixes_of_text_encoders_are_read_for_that_of_the_refiner(prefix, path):
    model = build_tiny_model("refiner")
    lora = make_random_lora(model)
    write_lora(lora, path, model)
    write_checkpoint(path, rename_keys(read_checkpoint(path).state_dict, ("^lora_te_", prefix)))
    assert are_equal(read_lora(path, model).state_dict(), lora.state_dict())


def test_diffusers_names_take_precedence_over_original_names(path, caplog):
    model = build_tiny_model("sdxl")
    write_lora(make_random_lora(model, seed=1), path, model, "diffusers")
    state = read_checkpoint(path).state_dict
    removed = {name for name in state if name.startswith("unet.up_blocks")}
    expected = read_lora(path, model)
    write_lora(make_random_lora(model, seed=2), path, model)
    original_state = read_checkpoint(path).state_dict
    blocks = {n: v for n, v in original_state.items() if "put_blocks" in n or "middle" in n}
    for first, second in ((state, blocks), (blocks, state)):
        merged = {n: v for n, v in (first | second).items() if n not in removed}
        write_checkpoint(path, merged)
        for name, layer in read_lora(path, model).items():
            original_up = original_state[f"{name}.lora_up.weight"]
            is_original = torch.equal(layer.lora_up.weight, original_up)
            assert is_original == ("output_blocks" in name), name
            assert is_original or torch.equal(layer.compute_delta(), expected[name].compute_delta())
    assert "layers twice: their tensors under original names are ignored" in caplog.text


def test_a_lora_of_the_base_model_fits_an_inpainting_model(path):
    base, model = build_tiny_model("sd1"), build_tiny_model("sd1", in_channels=9)
    lora = make_random_lora(base)
    write_lora(lora, path, base)
    before = model.unet.state_dict()["input_blocks.0.0.weight"].clone()
    load_loras(model, [(path, 1.0)])
    delta = model.unet.state_dict()["input_blocks.0.0.weight"] - before
    expected = lora["lora_unet_conv_in"].compute_delta()
    torch.testing.assert_close(delta[:, :4], expected, rtol=0, atol=1e-6)
    assert not delta[:, 4:].any()


BIG_G_PREFIX = "conditioner.embedders.1.model.transformer.resblocks."
BIG_G_LAYERS = {
    "attn.in_proj_weight": ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj"),
    "attn.out_proj.weight": ("self_attn_out_proj",),
    "mlp.c_fc.weight": ("mlp_fc1",),
    "mlp.c_proj.weight": ("mlp_fc2",),
}


def list_sdxl_layers_of_kohya():
    """List {name in kohya's files: shape of the weight}, from the names in a checkpoint."""
    layers = {}
    for key, shape in read_original_shapes("sd_xl_base").items():
        name = key.removesuffix(".weight").replace(".", "_")
        if "norm" in key or key.endswith("bias"):
            continue
        if re.search(r"diffusion_model.*(transformer_blocks|\.proj_)", key):
            layers[name.replace("model_diffusion_model", "lora_unet")] = shape
        elif re.match(r"conditioner\.embedders\.0\..*(self_attn|mlp)", key):
            layers[name.replace("conditioner_embedders_0_transformer", "lora_te1")] = shape
        elif key.startswith(BIG_G_PREFIX):
            block, _, weight = key.removeprefix(BIG_G_PREFIX).partition(".")
            for layer in BIG_G_LAYERS.get(weight, ()):
                rows = shape[0] // len(BIG_G_LAYERS[weight])
                layers[f"lora_te2_text_model_encoder_layers_{block}_{layer}"] = [rows, shape[1]]
    return layers


def test_all_layers_that_kohya_trains_in_sdxl_are_read(path):
    layers = list_sdxl_layers_of_kohya()
    counts = {prefix: sum(prefix in name for name in layers) for prefix in ("unet", "te1", "te2")}
    assert counts == {"unet": 722, "te1": 72, "te2": 192}
    state = {}
    for name, (rows, columns) in layers.items():
        state[f"{name}.lora_down.weight"] = torch.zeros(1, columns)
        state[f"{name}.lora_up.weight"] = torch.zeros(rows, 1)
        state[f"{name}.alpha"] = torch.tensor(1.0)
    assert len(state) == 2958
    write_checkpoint(path, state)
    model = build_on_meta(read_yaml(SDXL))
    assert read_lora(path, model).keys() == layers.keys()


ORIGINAL_NAME = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
KOHYA_NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def make_low_rank(layer, down="lora_down", up="lora_up", rank=4, width=32):
    """Make the two matrices for a layer, and their product."""
    torch.manual_seed(0)
    a, b = torch.randn(rank, width), torch.randn(width, rank)
    return {f"{layer}.{down}.weight": a, f"{layer}.{up}.weight": b}, b @ a


def test_layers_may_have_the_names_of_the_original(path):
    model = build_tiny_model("sd1")
    for layer in (
        KOHYA_NAME,
        f"lora_unet_{ORIGINAL_NAME.replace('.', '_')}",
        f"diffusion_model.{ORIGINAL_NAME}",
        f"model.diffusion_model.{ORIGINAL_NAME}",
        f"base_model.model.{ORIGINAL_NAME}",
        ORIGINAL_NAME,
    ):
        state, delta = make_low_rank(layer)
        write_checkpoint(path, state | {f"{layer}.alpha": torch.tensor(2.0)})
        ((name, lora_layer),) = read_lora(path, model).layers.items()
        assert name == KOHYA_NAME
        torch.testing.assert_close(lora_layer.compute_delta(), 2 / 4 * delta)


@pytest.mark.parametrize(
    "name",
    ["lora_te2_text_projection", "text_encoder_2.text_projection", "lora_te_text_projection"],
)
def test_the_text_projection_may_be_changed(path, name):
    """It is stored transposed, as (width, embed_dim)."""
    model = build_tiny_model("refiner" if "te_" in name else "sdxl")
    tower = model.conditioner.find_all(OpenCLIPText)[-1].model
    before = tower.text_projection.clone()
    state, delta = make_low_rank(name, width=len(before))
    state[f"{name}.alpha"] = torch.tensor(2.0)
    write_checkpoint(path, state)
    load_loras(model, [(path, 0.5)])
    torch.testing.assert_close(tower.text_projection, before + 0.5 * 2 / 4 * delta.T)


def test_a_folder_of_peft_has_a_file_for_each_component(tmp_path):
    """Alpha is in the config beside each file; rsLoRA divides it by the square root of the rank."""
    block = "transformer_blocks.0.attn1.to_q"
    text = "text_model.encoder.layers.0.self_attn.out_proj"
    deltas, model = {}, build_tiny_model("sdxl")
    for component, prefix, layer, width in (
        ("unet", "lora_unet_input_blocks_4_1_", f"down_blocks.1.attentions.0.{block}", 64),
        ("text_encoder", "lora_te1_", text, WIDTH),
        ("text_encoder_2", "lora_te2_", text, WIDTH_2),
    ):
        state, delta = make_low_rank(f"base_model.model.{layer}", "lora_A", "lora_B", width=width)
        write_checkpoint(tmp_path / component / "adapter_model.safetensors", state)
        config = {"r": 4, "lora_alpha": 8, "use_rslora": component == "unet"}
        (tmp_path / component / "adapter_config.json").write_text(json.dumps(config))
        name = prefix + (block if component == "unet" else text).replace(".", "_")
        deltas[name] = 8 / (2 if component == "unet" else 4) * delta
    lora = read_lora(tmp_path, model)
    torch.testing.assert_close(
        {n: layer.compute_delta() for n, layer in lora.layers.items()}, deltas
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="contains no `pytorch_lora_weights` or `adapter"):
        read_lora(tmp_path / "empty", model)


DIFFUSERS_NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({r".*attn1\.to_(q|k)": 2, "to_q": 3}, 2),
        ({"^down_blocks.*to_q": 2}, 2),
        ({"q": 2, "0.attentions.0.transformer_blocks.0.attn1.to_": 2}, 8),  # parts of words
    ],
)
def test_patterns_of_alpha_match_names_as_in_peft(patterns, alpha, tmp_path):
    """Regular expressions for the end of a name; the first that matches counts."""
    state, delta = make_low_rank(f"base_model.model.{DIFFUSERS_NAME}", "lora_A", "lora_B")
    write_checkpoint(tmp_path / "adapter_model.safetensors", state)
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (layer,) = read_lora(tmp_path, build_tiny_model()).layers.values()
    torch.testing.assert_close(layer.compute_delta(), alpha / 4 * delta)


def test_lokr_of_full_matrices_is_scaled_as_in_peft(tmp_path):
    """By alpha / r if there is a config; lycoris-lora writes none and does not scale them."""
    factors = torch.randn(4, 4), torch.randn(8, 8)
    names = (f"base_model.model.{DIFFUSERS_NAME}.lokr_w{number}" for number in (1, 2))
    state = dict(zip(names, factors, strict=True))
    write_checkpoint(tmp_path / "adapter_model.safetensors", state)
    for config, scale in (({}, 1), ({"r": 4, "alpha": 8}, 2), (PATTERNS, 8)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        ((_, delta),) = read_weight_changes(tmp_path, build_tiny_model())
        torch.testing.assert_close(delta.compute_delta(), scale * torch.kron(*factors))


PATTERNS = {"r": 4, "alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn1.to_q": 16}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": [8]}, "alpha in its metadata or `adapter_config.json` is damaged"),
        ({"lora_alpha": 8, "alpha_pattern": {"(": 1}},
         "or `adapter_config.json` is damaged: missi"),
        ({"lora_alpha": 8, "init_lora_weights": "pissa_niter_4"},
         "from `pissa_niter_4`, which also cha"),
    ],
)  # fmt: skip
def test_a_config_of_peft_that_cannot_be_applied_is_refused(config, message, tmp_path):
    state, _ = make_low_rank(f"base_model.model.{DIFFUSERS_NAME}", "lora_A", "lora_B")
    write_checkpoint(tmp_path / "adapter_model.safetensors", state)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match=message):
        read_lora(tmp_path, build_tiny_model())


def test_damaged_metadata_and_quantized_weights_are_refused(path):
    state, _ = make_low_rank(KOHYA_NAME)
    for text in ("{", "[]"):
        write_checkpoint(path, state, {lora_files.ADAPTER_METADATA_KEY: text})
        with pytest.raises(FileFormatError, match="alpha in its metadata or .* is damaged"):
            read_lora(path, build_tiny_model())
    write_checkpoint(path, {name: value.to(torch.int8) for name, value in state.items()})
    with pytest.raises(FileFormatError, match="quantized LoRAs are not supported"):
        read_lora(path, build_tiny_model())


def test_bundled_embeddings_are_added_and_a_layer_of_rank_0_changes_nothing(path):
    state = make_low_rank(KOHYA_NAME, rank=0)[0] | {f"{KOHYA_NAME}.alpha": torch.tensor(0.0)}
    embeddings = {"cat.v1": torch.randn(2, WIDTH), "dog": torch.randn(1, WIDTH)}
    state["bundle_emb.cat.v1.string_to_param.*"] = embeddings["cat.v1"]
    state["bundle_emb.dog.emb_params"] = embeddings["dog"]
    write_checkpoint(path, state)
    model = build_tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_loras(model, [(path, 1.0)])
    assert are_equal(model.state_dict(), before)
    assert are_equal(model.conditioner.text.added_embeddings, embeddings)


def test_bundled_embeddings_that_do_not_fit_are_skipped_with_a_warning(path, caplog):
    state, delta = make_low_rank(KOHYA_NAME)
    state["bundle_emb.cat.emb_params"] = torch.ones(1, 768)
    write_checkpoint(path, state)
    model = build_tiny_model()
    before = model.unet.state_dict()[f"{ORIGINAL_NAME}.weight"].clone()
    load_loras(model, [(path, 1.0)])
    assert "textual inversions of the LoRA are skipped: " in caplog.text
    after = model.unet.state_dict()[f"{ORIGINAL_NAME}.weight"]
    torch.testing.assert_close(after, before + delta, rtol=0, atol=1e-6)


def test_a_lora_that_overflows_float16_weights_is_refused(path):
    write_checkpoint(path, make_low_rank(KOHYA_NAME)[0])
    with pytest.raises(ValueError, match="too large for torch.float16") as caught:
        load_loras(build_tiny_model().half(), [(path, 1e9)])
    assert caught.value.argument == "loras"


def test_alpha_is_read_from_metadata(path):
    model = build_tiny_model()
    write_lora(make_random_lora(model), path, model, "diffusers")
    alphas = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 12}}
    metadata = {lora_files.ADAPTER_METADATA_KEY: json.dumps(alphas)}
    write_checkpoint(path, read_checkpoint(path).state_dict, metadata)
    lora = read_lora(path, model)
    assert lora["lora_unet_conv_in"].alpha == 6
    assert lora["lora_unet_mid_block_attentions_0_proj_in"].alpha == 12
    assert lora["lora_te_text_model_encoder_layers_0_mlp_fc1"].alpha == 3  # its rank


def test_loras_are_recorded_with_weight_and_hash(tmp_path):
    model, paths = build_tiny_model("sd1"), [tmp_path / "a.safetensors", tmp_path / "b.ckpt"]
    for path in paths:
        write_lora(make_random_lora(model), path, model)
    load_loras(model, [(paths[0], 0.8), (paths[1], -0.3)])
    first, second = model.provenance["loras"]
    expected = {"path": str(paths[1]), "weight": -0.3, "hash": compute_short_hash(paths[1])}
    assert expected.items() <= second.items()
    assert first["weight"] == 0.8


def test_a_file_names_its_base_model(path):
    model = build_tiny_model("refiner")
    write_lora(make_random_lora(model, rank=4, alpha=2), path, model)
    expected = {
        "modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora",
        "ss_base_model_version": "sdxl_refiner_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
    }
    assert expected.items() <= read_checkpoint(path).metadata.items()


SD1_LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
SDXL_LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"


@pytest.mark.parametrize(
    ("family", "context", "layer", "width", "theirs", "ours"),
    [
        ("sd1", 768, SD1_LAYER, 1024, "Stable Diffusion 2", "Stable Diffusion 1"),
        ("sd1", 768, SDXL_LAYER, 2048, "Stable Diffusion XL", "Stable Diffusion 1"),
        ("sd2", 1024, "lora_te2_text", 64, "Stable Diffusion XL", "Stable Diffusion 2"),
        ("sd1", 768, f"{SDXL_LAYER[:-8]}1.to_k", 640, "Stable Diffusion XL", "Stable Diffusion 1"),
        ("sdxl", 2048, SD1_LAYER, 768, "Stable Diffusion 1", "Stable Diffusion XL"),
        ("sdxl", 2048, SDXL_LAYER, 1280, "Stable Diffusion XL refiner", "Stable Diffusion XL"),
        ("refiner", 1280, SDXL_LAYER, 2048, "Stable Diffusion XL", "Stable Diffusion XL refiner"),
    ],
)
def test_a_file_of_another_family_is_refused_in_one_line(
    family, context, layer, width, theirs, ours, path
):
    model = build_tiny_model(family)
    model.unet.context_dim = context
    write_checkpoint(path, make_low_rank(layer, width=width)[0])
    with pytest.raises(ValueError, match="is a LoRA for") as caught:
        load_loras(model, [(path, 1.0)])
    assert str(caught.value) == (
        f"`{path}` is a LoRA for {theirs}, the model is {ours}: use a LoRA that was trained for "
        f"{ours}"
    )


def test_the_family_is_recognized_in_a_file_with_a_full_diff_of_a_norm_layer(path):
    state = make_low_rank(SDXL_LAYER, width=2048)[0] | {"lora_unet_norm.diff": torch.ones(4)}
    write_checkpoint(path, dict(sorted(state.items())))  # that of the norm comes first
    with pytest.raises(ValueError, match="is a LoRA for Stable Diffusion XL"):
        load_loras(build_tiny_model(), [(path, 1.0)])


def test_a_file_of_an_unknown_family_is_refused_in_one_line(path):
    state = make_low_rank("lora_unet_down_blocks_3_x")[0] | make_low_rank("lora_unet_conv_in")[0]
    write_checkpoint(path, state)
    with pytest.raises(ValueError, match="1 of its 2 layers unknown, 1 of another shape"):
        read_lora(path, build_tiny_model())


def test_alpha_may_have_any_numeric_type_but_not_be_nan(tmp_path, path):
    state, delta = make_low_rank(KOHYA_NAME)
    for alpha in (2, 2.0, torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0).half()):
        torch.save(state | {f"{KOHYA_NAME}.alpha": alpha}, tmp_path / "x.pt")
        lora = read_lora(tmp_path / "x.pt", build_tiny_model())
        torch.testing.assert_close(lora[KOHYA_NAME].compute_delta(), 2 / 4 * delta)
    write_checkpoint(path, state | {f"{KOHYA_NAME}.alpha": torch.tensor(torch.nan)})
    with pytest.raises(ValueError, match="NaN or infinity in 1 of its 1 layers: `lora_unet_down_"):
        read_lora(path, build_tiny_model())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_conv_in.hada_w1_a"], "1 layer is incomplete: `lora_unet_conv_in` has only"),
        (["lora_unet_conv_in.lora_down.weight"], "has only `down`"),
        (["lora_unet_conv_in.on_input"], "has only `on_input`"),
        (["lora_unet_conv_in.lora_mid.weight"], "has only `mid`"),
        (["unet.conv_in.lora_magnitude_vector.weight"], "has only `magnitude`"),
        (["lora_unet_conv_in.oft_diag"], "unsupported type: OFT in another format"),
        (["lora_controlnet"], "unsupported type: ControlNet"),
        (["unet.conv_in.lora_B.bias"], "unsupported type: LoRA with biases"),
        (["x.modules_to_save.default.weight"], "unsupported type: LoRA with fully trained layers"),
        (["out.2.bias"], "is not a LoRA file: 1 of its 1 keys is not recognized"),
        (["betas", "lora_unet_conv_in.alpha"], "type of LoRA: 1 of its 2 keys .*: `betas`"),
    ],
)
def test_a_file_that_is_not_a_lora_is_refused(names, message, path):
    write_checkpoint(path, {name: torch.ones(2, 2) for name in names})
    with pytest.raises(ValueError, match=message):
        read_lora(path, build_tiny_model())


def test_a_model_without_text_encoder_has_no_text_layers():
    model = build_tiny_model()
    del model.conditioner.text
    assert all(layer.diffusers_name.startswith("unet.") for layer in list_lora_targets(model))
