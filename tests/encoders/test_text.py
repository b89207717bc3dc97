import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from goldfile import gold
from ldm.encoders.text import CLIPText, OpenCLIPText

KEYS = Path(__file__).parents[1] / "data" / "keys"
TINY = {"embed_dim": 24, "text_cfg": {"vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}}
TINY_HF = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
PROMPTS = ["a cat", "an astronaut riding a horse, photograph"]
HIDDEN = {f"hidden_{name}": {"layer": "hidden", "layer_idx": k} for name, k in
          [("m2", -2), ("m1", -1), ("0", 0), ("1", 1)]}  # fmt: skip


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


@pytest.mark.parametrize("name", ["text_openclip", "text_openclip_recipe"])
@pytest.mark.parametrize("layer", ["penultimate", "last"])
def test_open_clip_context_equals_the_recorded_one(name, layer):
    golden = gold(name)
    encoder = OpenCLIPText(arch=golden.meta["config"]["tiny_arch"], layer=layer)
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    indices = golden.cases[0]["info"]["outputs_are_for_prompt_indices"]
    context = encoder.encode([golden.meta["prompts"][k] for k in indices])
    assert_close(context, golden.outputs("prompts")[layer])


@pytest.mark.parametrize(
    ("output", "options"), [("last", {}), ("pooled", {"layer": "pooled"}), *HIDDEN.items()]
)
def test_clip_context_equals_the_recorded_one(output, options):
    golden = gold("text_hfclip")
    encoder = CLIPText(arch=golden.meta["config"]["tiny_hf_config"], **options)
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    indices = golden.cases[0]["info"]["outputs_are_for_prompt_indices"]
    context = encoder.encode([golden.meta["prompts"][k] for k in indices])
    assert_close(context, golden.outputs("prompts")[output])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"),
    [("full_text_vith", ["penultimate", "last"]), ("full_text_vitl_hf", ["last"])],
)
def test_full_size_context_equals_the_recorded_one(name, layers):
    golden = gold(name)
    with torch.device("meta"):
        encoder = OpenCLIPText() if name == "full_text_vith" else CLIPText()
    weights = golden.weights(encoder.state_dict())
    if "model.logit_scale" in weights:
        weights["model.logit_scale"] = torch.zeros(())
    encoder.load_state_dict(weights, assign=True)
    tokens = encoder.tokenize(golden.meta["prompts"])
    assert torch.equal(tokens, golden.inputs("a")["tokens"])
    for layer in layers:
        encoder.layer = layer
        with torch.no_grad():
            context = encoder(tokens)
        assert_close(context, golden.outputs("a")[layer], 1e-4)


@pytest.mark.parametrize(
    ("build", "keys", "parameters"),
    [
        (OpenCLIPText, "text_openclip_vith", 354_032_641),
        (CLIPText, "text_clip_vitl", 123_060_480),
    ],
)
def test_full_size_keys_equal_the_published_ones(build, keys, parameters):
    with torch.device("meta"):
        encoder = build()
    names = Counter()
    for key, value in encoder.state_dict().items():
        name = re.sub(r"\.(resblocks|layers)\.\d+\.", r".\1.*.", key)
        names[f"{name} {'x'.join(map(str, value.shape))}".rstrip()] += 1
    listed = [line.split(" ", 1) for line in (KEYS / f"{keys}.txt").read_text().splitlines()]
    assert names == {name: int(count) for count, name in listed}
    assert sum(p.numel() for p in encoder.parameters()) == parameters


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_context_equals_open_clip(quick):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from open_clip.model import CLIPTextCfg, _build_text_tower
    theirs = _build_text_tower(24, CLIPTextCfg(**TINY["text_cfg"]), quick_gelu=quick).eval()
    theirs.output_tokens = True
    ours = OpenCLIPText(arch=TINY | {"quick_gelu": quick})
    state = {f"model.{key}": value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state | {"model.logit_scale": torch.zeros(())})
    tokens = ours.tokenize(PROMPTS)
    assert_close(ours(tokens), theirs(tokens)[1], 2e-6)


def test_clip_context_equals_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTextConfig, CLIPTextModel
    theirs = CLIPTextModel(CLIPTextConfig(**TINY_HF, vocab_size=49408, eos_token_id=49407)).eval()
    ours = CLIPText(arch=TINY_HF)
    names = {
        re.sub(r"^(text_model\.)?", "transformer.text_model.", k): k for k in theirs.state_dict()
    }
    state = theirs.state_dict()
    ours.load_state_dict({name: state[k] for name, k in names.items() if "position_ids" not in k})
    tokens = ours.tokenize(PROMPTS)
    expected = theirs(tokens, output_hidden_states=True)
    assert_close(ours(tokens), expected.last_hidden_state, 2e-6)
    ours.layer = "pooled"
    assert_close(ours(tokens)[:, 0], expected.pooler_output, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [OpenCLIPText, CLIPText])
def test_context_has_the_dtype_of_the_weights(build, dtype):
    encoder = build(arch=TINY if build is OpenCLIPText else TINY_HF)
    context = encoder.encode(PROMPTS)
    half = encoder.to(dtype).encode(PROMPTS)
    assert half.dtype == dtype
    assert_close(half.float(), context, 0.05)


def test_texts_and_tokens_give_the_same_context():
    encoder = OpenCLIPText(arch=TINY)
    assert torch.equal(encoder(PROMPTS), encoder(encoder.tokenize(PROMPTS)))
    assert torch.equal(encoder.encode("a cat"), encoder(["a cat"]))


def test_later_words_do_not_change_earlier_vectors():
    context = OpenCLIPText(arch=TINY).encode(["a cat", "a cat on a mat"])
    assert_close(context[0, :3], context[1, :3])
    assert not torch.allclose(context[0, 3], context[1, 3])


@pytest.mark.parametrize("build", [OpenCLIPText, CLIPText])
def test_gradient_reaches_every_parameter_that_is_used(build):
    encoder = build(arch=TINY if build is OpenCLIPText else TINY_HF, freeze=False)
    encoder.encode(PROMPTS).square().mean().backward()
    silent = {name for name, p in encoder.named_parameters() if p.grad is None}
    unused = {"model.text_projection", "model.logit_scale"} if build is OpenCLIPText else set()
    assert silent == unused


def test_freezing_is_the_default():
    assert not any(p.requires_grad for p in OpenCLIPText(arch=TINY).parameters())


def test_a_compact_vocabulary_gives_the_same_context_for_known_words():
    full = OpenCLIPText(arch=TINY)
    ids = full.tokenize(PROMPTS).unique()
    compact = OpenCLIPText(arch=TINY, compact_vocab=len(ids) + 1)
    state = full.state_dict()
    table = state["model.token_embedding.weight"]
    rows = torch.cat([torch.zeros(1, table.shape[1]), table[ids]])
    compact.load_state_dict(state | {"model.token_embedding.weight": rows, "token_ids": ids})
    assert torch.equal(compact.encode(PROMPTS), full.encode(PROMPTS))


def test_unknown_words_of_a_compact_vocabulary_share_one_vector():
    encoder = OpenCLIPText(arch=TINY, compact_vocab=4)
    encoder.token_ids.copy_(torch.tensor([0, 49406, 49407]))
    assert torch.equal(encoder.encode("cat"), encoder.encode("dog"))
    assert not torch.equal(encoder.encode("cat"), encoder.encode(""))


def test_a_bare_text_config_is_an_architecture():
    bare = OpenCLIPText(arch=TINY["text_cfg"]).state_dict()
    assert bare["model.text_projection"].shape == (32, 32)
    assert bare["model.token_embedding.weight"].shape == (49408, 32)


def test_published_base_models_have_their_own_size():
    with torch.device("meta"):
        encoder = CLIPText(version="openai/clip-vit-base-patch32")
    assert encoder.transformer["text_model"].final_layer_norm.weight.shape == (512,)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (OpenCLIPText, {"arch": "ViT-Z"}, "unknown arch `ViT-Z`, did you mean"),
        (OpenCLIPText, {"arch": {"widht": 8}}, "unknown text_cfg key `widht`"),
        (OpenCLIPText, {"arch": TINY, "layer": "pooled"}, "unknown layer `pooled`"),
        (CLIPText, {"arch": {"hidden": 8}}, "unknown arch key `hidden`"),
        (CLIPText, {"arch": {"hidden_act": "relu"}}, "unknown hidden_act `relu`"),
        (CLIPText, {"arch": TINY_HF, "layer": "hidden"}, "from -4 to 3, got `None`"),
        (CLIPText, {"arch": TINY_HF, "layer": "hidden", "layer_idx": 4}, "got `4`"),
    ],
)
def test_a_wrong_option_is_named(build, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(**options)
