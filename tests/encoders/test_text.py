"""Text encoders: recorded contexts, dtypes, caches, pruned vocabularies, options."""

import pytest
import torch
from encoderhelp import CLIP_ARCH, OPEN_CLIP_ARCH, PROMPTS, assert_close, assert_contexts_close

from goldfile import load_golden
from ldm.encoders.text import CLIPText, OpenCLIPText
from ldm.encoders.towers import quick_gelu
from quick import slow_except
from recipe import fill_on_demand

POOLED = {"always_return_pooled": True, "legacy": False}
TINY_ENCODERS = [(OpenCLIPText, OPEN_CLIP_ARCH), (CLIPText, CLIP_ARCH)]
SGM_CASES = [
    "l_hidden_11", "l_hidden_11_pooled", "l_hidden_m2", "l_hidden_12", "l_hidden_0", "l_last",
    "l_last_pooled", "l_pooled", "g_penultimate_pooled", "g_last_pooled", "g_penultimate", "g_last",
    "g_penultimate_legacy", "g_last_legacy", "h_penultimate_old_class",
]  # fmt: skip


@pytest.mark.parametrize("name", ["text_openclip", "text_openclip_recipe", "text_hfclip"])
def test_contexts_equal_the_recorded_ones(name):
    assert_contexts_close(name, CLIPText if name == "text_hfclip" else OpenCLIPText)


@pytest.mark.parametrize("case", slow_except(SGM_CASES, *SGM_CASES[::2]))
def test_outputs_equal_those_of_generative_models(case):
    golden = load_golden("sdxl_text")
    info = golden.info(case)
    params = {k: v for k, v in info["params"].items() if k not in ("device", "version")}
    if case.startswith("l_"):
        encoder = CLIPText(arch=golden.meta["tiny_hf_config"], **params)
    else:
        encoder = OpenCLIPText(**params | {"arch": golden.meta["tiny_arch"]})
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    prompts = golden.meta["prompts"]
    recorded_tokens = golden.select("shared/tokens_")["clip_l" if case[0] == "l" else "open_clip"]
    assert torch.equal(encoder.tokenize(prompts), recorded_tokens)
    output, expected = encoder([prompts[k] for k in info["prompt_indices"]]), golden.outputs(case)
    if "pooled" in expected:
        assert_close(output.vector, expected["pooled"], 1e-6)
        output = output.crossattn
    assert_close(output, expected["z"], 2e-6)  # observed: 7e-7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "build", "layers"),
    [
        ("full_text_vith", OpenCLIPText, ["penultimate", "last"]),
        ("full_text_vitl_hf", CLIPText, ["last"]),
    ],
)
def test_full_size_context_equals_the_recorded_one(name, build, layers):
    golden = load_golden(name)
    with torch.device("meta"):
        encoder = build()
    weights = golden.weights(encoder.state_dict())
    if "model.logit_scale" in weights:
        weights["model.logit_scale"] = torch.zeros(())
    encoder.load_state_dict(weights, assign=True)
    tokens = encoder.tokenize(golden.meta["prompts"])
    assert torch.equal(tokens, golden.inputs("a")["tokens"])
    for layer in layers:
        encoder.layer = layer
        with torch.no_grad():
            assert_close(encoder(tokens), golden.outputs("a")[layer], 1e-4)


@pytest.mark.slow
def test_full_size_bigg_equals_the_recorded_one():
    """Takes 1.2 GB of memory."""
    golden = load_golden("sdxl_full_text_bigg")
    with torch.device("meta"):
        encoder = OpenCLIPText(**golden.meta["config"]["params"])
    fill_on_demand(encoder, golden.meta["salt"])
    tokens = encoder.tokenize(golden.meta["prompts"])
    assert torch.equal(tokens, golden.inputs("a")["tokens"])
    with torch.no_grad():
        output, expected = encoder(tokens), golden.outputs("a")
    assert_close(output.crossattn[:1], expected["penultimate_first"])  # observed: 1.7e-6
    assert_close(output.vector, expected["pooled"])  # observed: 1.9e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("build", "arch"), TINY_ENCODERS)
def test_context_has_the_dtype_of_the_weights(build, arch, dtype):
    encoder = build(arch=arch)
    context = encoder.encode(PROMPTS)
    half = encoder.to(dtype).encode(PROMPTS)
    assert half.dtype == dtype
    assert_close(half.float(), context, 0.05)


@pytest.mark.parametrize(("build", "arch"), TINY_ENCODERS)
def test_texts_and_tokens_give_the_same_context(build, arch):
    encoder = build(arch=arch)
    assert torch.equal(encoder(PROMPTS), encoder(encoder.tokenize(PROMPTS)))
    assert torch.equal(encoder.encode("a cat"), encoder(["a cat"]))


def test_an_encoder_that_returns_a_mask_does_not_use_a_cache_without_masks():
    encoder = CLIPText(arch=CLIP_ARCH, always_return_pooled=True, always_return_mask=True)
    encoder.cache = {"a cat": {"context": torch.zeros(77, 32), "pooled": torch.zeros(32)}}
    assert encoder(["a cat"]).context_mask.sum() == 4  # start, two words, end


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (OpenCLIPText, {"arch": OPEN_CLIP_ARCH, "layer": "last"}),
        (OpenCLIPText, {"arch": OPEN_CLIP_ARCH, "layer": "penultimate"}),
        (OpenCLIPText, {"arch": OPEN_CLIP_ARCH, "layer": "penultimate", "legacy": False}),
        (OpenCLIPText, {"arch": OPEN_CLIP_ARCH, "layer": "penultimate", **POOLED}),
        (CLIPText, {"arch": CLIP_ARCH}),
    ],
)
def test_all_parameters_but_the_unused_get_a_gradient(build, options):
    encoder = build(**options, freeze=False)
    tensors = encoder.condition(PROMPTS).tensors().values()
    sum(tensor.square().mean() for tensor in tensors).backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is None) == name.startswith(encoder.unused_weights)
    assert not any(parameter.requires_grad for parameter in build(**options).parameters())


def test_a_pruned_vocabulary_gives_the_same_context_for_its_tokens():
    full = OpenCLIPText(arch=OPEN_CLIP_ARCH)
    ids = full.tokenize(PROMPTS).unique()
    pruned = OpenCLIPText(arch=OPEN_CLIP_ARCH, compact_vocab=len(ids) + 1)
    state = full.state_dict()
    weight = state["model.token_embedding.weight"]
    pruned_weight = torch.cat([torch.zeros(1, weight.shape[1]), weight[ids]])
    state |= {"model.token_embedding.weight": pruned_weight, "token_ids": ids}
    pruned.load_state_dict(state)
    assert torch.equal(pruned.encode(PROMPTS), full.encode(PROMPTS))
    assert torch.equal(pruned.get_token_embeddings("a cat"), full.get_token_embeddings("a cat"))
    assert torch.equal(pruned.encode("dog"), pruned.encode("mat"))  # all others share row 0
    assert not torch.equal(pruned.encode("dog"), pruned.encode(""))


def test_sizes_and_activation_come_from_the_config():
    bare = OpenCLIPText(arch=OPEN_CLIP_ARCH["text_cfg"], version="openai")
    assert bare.model.text_projection.shape == (32, 32)
    assert bare.model.blocks[0].activation is quick_gelu
    with torch.device("meta"):
        encoder = CLIPText(version="openai/clip-vit-base-patch32")
    assert encoder.width == 512


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (OpenCLIPText, {"arch": "ViT-Z"}, "unknown arch `ViT-Z`"),
        (OpenCLIPText, {"arch": {"widht": 8}}, "unknown text_cfg key `widht`, did you mean"),
        (OpenCLIPText, {"arch": OPEN_CLIP_ARCH, "layer": "pooled"},
         "choose one of last, penultimate"),
        (OpenCLIPText, {"arch": OPEN_CLIP_ARCH, "always_return_pooled": True},
         "needs `legacy: false`"),
        (CLIPText, {"arch": {"hidden": 8}}, "unknown arch key `hidden`"),
        (CLIPText, {"arch": {"hidden_act": "relu"}}, "unknown hidden_act `relu`"),
        (OpenCLIPText, {"arch": {"text_cfg": {"heads": 5}}}, "512 cannot be divided into 5 heads"),
        (CLIPText, {"arch": {"num_attention_heads": 0}}, "768 cannot be divided into 0 heads"),
        (CLIPText, {"arch": CLIP_ARCH, "layer": "hidden"}, "from -4 to 3, got `None`"),
        (CLIPText, {"arch": CLIP_ARCH, "layer": "hidden", "layer_idx": 4}, "got `4`"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(build, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(**options)
