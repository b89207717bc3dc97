"""LoRA files; the oracle is diffusers with peft. Measured there: at most 3e-6 apart."""

import json

import pytest
import torch
from lorahelp import KINDS, PROMPTS, WIDTH, outputs, random_adapter, their_parts, tiny_model

from ldm.loading.addons import lora
from ldm.loading.addons.lora import kohya_name, load_loras, lora_targets, read_lora, write_lora
from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.files.checkpoint import file_hash, read_checkpoint, write_checkpoint
from ldm.loading.legacy import translate_config
from ldm.nets.lora import merge_loras

SD1 = "configs/stable-diffusion/v1-inference.yaml"
SD2 = "configs/stable-diffusion/v2-inference.yaml"


@pytest.fixture(params=KINDS)
def model(request):
    return tiny_model(request.param)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "style"), [("sd1", "kohya"), ("sd2", "diffusers")])
def test_diffusers_computes_the_same_with_our_file(kind, style, tmp_path):
    pytest.importorskip("peft")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    model, file = tiny_model(kind), tmp_path / "x.safetensors"
    unet, text = their_parts(model, kind)
    write_lora(random_adapter(model, alpha=2), file, model, style)
    plain = outputs(model)
    state, alphas = Loader.lora_state_dict(str(file))
    Loader.load_lora_into_unet(state, alphas, unet)
    Loader.load_lora_into_text_encoder(state, alphas, text)
    load_loras(model, [(file, 1.0)])
    prediction, context = outputs(model)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = text(model.conditioner.text.tokenize(PROMPTS)).last_hidden_state
        torch.testing.assert_close(context, expected, rtol=0, atol=1e-5)
        expected = unet(x, torch.tensor([1, 400, 999]), context).sample
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)
    assert all(
        (new - old).abs().max() > 0.1 for new, old in zip((prediction, context), plain, strict=True)
    )


@pytest.mark.parametrize(("yaml", "text"), [(SD1, 12 * 6), (SD2, 23 * 6)])
def test_published_models_have_the_layers_that_kohya_trains(yaml, text):
    model = build_on_meta(translate_config(read_yaml(yaml)))
    names = [kohya_name(name) for name in lora_targets(model)]
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


def test_other_spellings_are_understood(tmp_path):
    model = tiny_model()
    write_lora(random_adapter(model), tmp_path / "x.safetensors", model, "diffusers")
    ours = read_lora(tmp_path / "x.safetensors", model).state_dict()
    state = read_checkpoint(tmp_path / "x.safetensors").state
    for part, old, new in SPELLINGS:
        renamed = {k.replace(old, new) if k.startswith(part) else k: v for k, v in state.items()}
        assert renamed.keys() != state.keys()
        write_checkpoint(tmp_path / "other.safetensors", renamed)
        assert same(read_lora(tmp_path / "other.safetensors", model).state_dict(), ours), new


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


def test_words_in_a_file_are_taught_and_layers_of_rank_zero_change_nothing(tmp_path):
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


def test_words_that_do_not_fit_are_named_and_left_out(tmp_path, caplog):
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


def test_alpha_is_found_in_notes(tmp_path):
    model = tiny_model()
    write_lora(random_adapter(model), tmp_path / "x.safetensors", model, "diffusers")
    state = read_checkpoint(tmp_path / "x.safetensors").state
    notes = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 12}}
    write_checkpoint(tmp_path / "y.safetensors", state, {lora.METADATA: json.dumps(notes)})
    adapter = read_lora(tmp_path / "y.safetensors", model)
    assert adapter["lora_unet_conv_in"].alpha == 6
    assert adapter["lora_unet_mid_block_attentions_0_proj_in"].alpha == 12
    assert adapter["lora_te_text_model_encoder_layers_0_mlp_fc1"].alpha == 3  # its rank
    notes = {"unet.use_dora": True}
    write_checkpoint(tmp_path / "z.safetensors", state, {lora.METADATA: json.dumps(notes)})
    with pytest.raises(ValueError, match="LoRA with `use_dora` is not supported"):
        read_lora(tmp_path / "z.safetensors", model)


def test_files_with_weights_are_merged_and_noted(model, tmp_path):
    made = [random_adapter(model, seed=seed) for seed in (1, 2)]
    files = [tmp_path / "a.safetensors", tmp_path / "b.ckpt"]
    for adapter, file in zip(made, files, strict=True):
        write_lora(adapter, file, model)
    for adapter, weight in zip(made, (0.8, -0.3), strict=True):
        adapter.scale(weight).attach()
    attached = outputs(model)
    for adapter in made:
        adapter.detach()
    load_loras(model, [(files[0], 0.8), (files[1], -0.3)])
    for ours, expected in zip(outputs(model), attached, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    noted = model.provenance["loras"]
    assert [note["weight"] for note in noted] == [0.8, -0.3]
    expected = {"path": str(files[1]), "weight": -0.3, "hash": file_hash(files[1])}
    assert expected.items() <= noted[1].items()


def test_a_file_of_another_family_is_refused_in_one_line(tmp_path):
    sd1, sd2 = tiny_model("sd1"), tiny_model("sd2")
    sd1.unet.context_dim, sd2.unet.context_dim = 768, 1024
    state = {}
    for layer in ("attn2_to_k", "attn2_to_v"):
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{layer}"
        state |= {f"{name}.lora_down.weight": torch.ones(4, 1024)}
        state |= {f"{name}.lora_up.weight": torch.ones(32, 4)}
    state |= {"lora_unet_down_blocks_3_x.lora_down.weight": torch.ones(4, 8)}
    state |= {"lora_unet_down_blocks_3_x.lora_up.weight": torch.ones(8, 4)}
    write_checkpoint(tmp_path / "x.safetensors", state)
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        load_loras(sd1, [(tmp_path / "x.safetensors", 1.0)])
    line, hint = str(caught.value).splitlines()
    assert "of its 3 layers 1 are unknown, 2 have the wrong shape: lora_unet_down_bl" in line
    assert hint.endswith("a LoRA for Stable Diffusion 2, the model is Stable Diffusion 1")
    state = {name.replace("unet_down_blocks_3_x", "te2_text"): v for name, v in state.items()}
    write_checkpoint(tmp_path / "xl.safetensors", state)
    with pytest.raises(ValueError, match="a LoRA for SDXL, the model is Stable Diffusion 2"):
        read_lora(tmp_path / "xl.safetensors", sd2)
    for layer in ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k",
                  "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"):  # fmt: skip
        write_checkpoint(tmp_path / "xl.safetensors", low_rank(layer, width=640)[0])
        with pytest.raises(ValueError, match="a LoRA for SDXL, the model is Stable Diffusion 1"):
            read_lora(tmp_path / "xl.safetensors", sd1)


def test_alpha_may_be_a_number_of_any_kind_and_nothing_is_nan(tmp_path):
    state, delta = low_rank(KOHYA)
    for alpha in (2, 2.0, torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0).half()):
        torch.save(state | {f"{KOHYA}.alpha": alpha}, tmp_path / "x.pt")
        lora = read_lora(tmp_path / "x.pt", tiny_model())
        torch.testing.assert_close(lora[KOHYA].delta(), 2 / 4 * delta)
    write_checkpoint(
        tmp_path / "x.safetensors", state | {f"{KOHYA}.alpha": torch.tensor(torch.nan)}
    )
    with pytest.raises(ValueError, match="numbers of 1 layers are not finite: `lora_unet_down_"):
        read_lora(tmp_path / "x.safetensors", tiny_model())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_conv_in.hada_w1_a"], "is of an unsupported kind: LoHa"),
        (["lora_unet_conv_in.lokr_w1"], "unsupported kind: LoKr"),
        (["lora_unet_conv_in.oft_blocks"], "unsupported kind: OFT"),
        (
            ["lora_unet_conv_in.on_input", "lora_unet_conv_in.weight"],
            r"unsupported kind: \(IA\)\^3",
        ),
        (["lora_unet_conv_in.a1.weight"], "unsupported kind: GLoRA"),
        (["lora_unet_conv_in.lora_mid.weight"], "unsupported kind: LoCon in Tucker form"),
        (["unet.conv_in.lora_magnitude_vector.weight"], "unsupported kind: DoRA"),
        (
            ["unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.bias"],
            "unsupported kind: LoRA with biases",
        ),
        (["x.modules_to_save.default.weight"], "unsupported kind: LoRA with whole layers"),
        (["model.diffusion_model.out.2.bias"], "1 of its 1 keys are not recognised"),
        (["lora_unet_conv_in.lora_down.weight"], "is missing in 1 layers: `lora_unet_conv_in`"),
        (["betas", "lora_unet_conv_in.alpha"], "1 of its 2 keys are not recognised: `betas`"),
    ],
)
def test_what_is_no_lora_is_refused(names, message, tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", {name: torch.ones(2, 2) for name in names})
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "x.safetensors", tiny_model())


def test_a_model_without_prompts_has_no_text_layers():
    model = tiny_model()
    del model.conditioner.text
    assert all(name.startswith("unet.") for name in lora_targets(model))
    assert merge_loras() is None
