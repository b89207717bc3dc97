"""`ldm.modules.encoders.modules` of the original, as third-party code uses it."""

import json
import types

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from encoders import encoderhelp
from encoders.encoderhelp import CLIP_ARCH, OPEN_CLIP_ARCH, PROMPTS, assert_close
from goldfile import load_golden
from ldm.compat import encoders
from ldm.compat.encoders import (
    ClassEmbedder,
    ClipImageEmbedder,
    CLIPTextModel,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPImageEmbedder,
)


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIPEmbedder(arch=CLIP_ARCH, layer="hidden", layer_idx=-2)


@pytest.fixture(scope="module")
def openclip():
    return FrozenOpenCLIPEmbedder(OmegaConf.create(OPEN_CLIP_ARCH), layer="penultimate")


class DoubledEmbedding(nn.Module):
    """Replaces a token embedding, as web UIs do; it has no attribute `weight`."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, ids):
        return 2 * self.wrapped(ids)


def test_contexts_equal_the_recorded_ones():
    """Observed: 6e-7."""
    encoderhelp.assert_contexts_close("text_openclip_recipe", FrozenOpenCLIPEmbedder, 2e-6)
    encoderhelp.assert_contexts_close("text_hfclip", FrozenCLIPEmbedder, 2e-6)


def test_image_embeddings_equal_the_recorded_ones():
    golden = load_golden("image_embedder")
    encoder = FrozenOpenCLIPImageEmbedder(golden.meta["tiny_arch"], "none", "cpu")
    encoder.blur = "narrow"  # recorded with a later kornia
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    image, expected = golden.inputs("img0_96x96")["image"], golden.outputs("img0_96x96")
    assert_close(encoder.preprocess(image)[:, :, ::4, ::4], expected["pre"], 1e-6)
    assert_close(encoder(image), expected["emb"], 2e-6)  # observed: 3e-7
    golden = load_golden("image_embedder_openai")
    vision = {"layers": 2, "width": 64, "patch_size": 56}
    text = {"vocab_size": 200, "width": 32, "heads": 1, "layers": 2}
    encoder = ClipImageEmbedder({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    assert_close(encoder(golden.inputs("a")["image"]), golden.outputs("a")["emb"], 2e-6)


def test_class_embedding_equals_the_recorded_one():
    golden = load_golden("misc_cond")
    state, inputs = golden.select("state_dict/class_embedder/"), golden.inputs("class_embedder")
    expected, info = golden.outputs("class_embedder"), golden.info("class_embedder")
    encoder = ClassEmbedder(*reversed(state["embedding.weight"].shape), ucg_rate=info["ucg_rate"])
    encoder.load_state_dict(state)
    assert torch.equal(encoder(inputs, disable_dropout=True), expected["plain"])
    torch.manual_seed(info["seed"])
    assert torch.equal(encoder(inputs), expected["dropped"])
    unconditional = encoder.get_unconditional_conditioning(len(expected["uc_class"]))
    assert torch.equal(unconditional["class"], expected["uc_class"])


def test_replaced_token_embeddings_are_used_by_both_encoders(clip, openclip):
    embeddings = clip.transformer.text_model.embeddings
    ids = clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")["input_ids"]
    for encoder, owner in ((clip, embeddings), (openclip, openclip.model)):
        expected, old = encoder.encode(PROMPTS), owner.token_embedding
        positions = embeddings(ids) - embeddings.token_embedding(ids)
        owner.token_embedding = DoubledEmbedding(old)
        assert not torch.allclose(encoder.encode(PROMPTS), expected)
        if encoder is clip:
            assert_close(embeddings(ids), positions + 2 * old(ids), 1e-6)
        owner.token_embedding = old
        assert torch.equal(encoder.encode(PROMPTS), expected)


def test_an_embedding_manager_gets_token_ids_and_their_embeddings(clip, openclip):
    """Textual inversion with open_clip; `test_embedding_manager` trains one with CLIP."""
    (token,) = clip.tokenizer("horse", add_special_tokens=False)["input_ids"]
    vector = nn.Parameter(openclip.model.token_embedding.weight[token].detach().clone())

    def insert(ids, vectors):
        return torch.where((ids == token)[..., None], vector, vectors)

    context = openclip.encode(["a horse"], embedding_manager=insert)
    assert torch.equal(context, openclip.encode(["a horse"]))
    context.square().mean().backward()
    assert vector.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in openclip.parameters())


def test_forward_and_class_attributes_are_replaced_on_built_encoders(clip, monkeypatch):
    """The replacement encodes three chunks and returns an earlier layer, as in ControlNet."""

    def forward(self, text):
        ids = self.tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        chunks = [[start, *(prompt + 225 * [end])[i : i + 75], end]
                  for prompt in ids for i in (0, 75, 150)]  # fmt: skip
        tokens = torch.tensor(chunks, dtype=torch.int32).to(self.device)
        outputs = self.transformer(input_ids=tokens, output_hidden_states=-self.clip_skip)
        z = outputs.hidden_states[-self.clip_skip]
        z = self.transformer.text_model.final_layer_norm(z)
        return z.reshape(len(text), 3 * 77, -1)

    monkeypatch.setattr(encoders.FrozenCLIPEmbedder, "forward", forward)
    monkeypatch.setattr(encoders.FrozenCLIPEmbedder, "clip_skip", 2, raising=False)
    context = clip.encode(["a cat", 80 * "dog "])
    assert context.shape == (2, 231, 32)
    assert not torch.equal(context[0, 77:154], context[1, 77:154])  # the 76th dog is read
    monkeypatch.undo()
    norm = clip.transformer.text_model.final_layer_norm
    assert_close(context[:1, :77], norm(clip.encode(["a cat"])), 1e-6)


def test_layers_are_those_of_torch(clip, openclip):
    classes = {type(layer) for layer in clip.transformer.text_model.encoder.layers.modules()}
    assert {nn.Linear, nn.LayerNorm} <= classes
    linear = [m for m in (*clip.modules(), *openclip.modules()) if isinstance(m, nn.Linear)]
    assert {type(m) for m in linear} <= {
        nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear  # of MultiheadAttention
    }  # fmt: skip
    blocks = openclip.model.transformer.resblocks
    assert {type(block.attn) for block in blocks} == {nn.MultiheadAttention}
    assert type(clip.transformer.text_model.embeddings.token_embedding) is nn.Embedding
    assert type(openclip.model.token_embedding) is nn.Embedding
    assert not hasattr(clip, "model")


@pytest.mark.parametrize(
    ("build", "config"), [(FrozenCLIPEmbedder, CLIP_ARCH), (FrozenOpenCLIPEmbedder, OPEN_CLIP_ARCH)]
)
def test_an_encoder_built_on_the_meta_device_is_filled_and_halved(build, config):
    full = build(arch=config)
    state = full.state_dict()
    expected = full.encode(PROMPTS)
    with torch.device("meta"):
        empty = build(arch=config)
    if build is FrozenCLIPEmbedder:  # as in older checkpoints
        state["transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    empty.load_state_dict(state, assign=True)
    empty.device = "cuda"  # has no effect: the device is that of the weights
    assert empty.device == torch.device("cpu")
    assert torch.equal(empty.encode(PROMPTS), expected)
    half = empty.half().encode(PROMPTS)
    assert half.dtype == torch.float16
    assert_close(half.float(), expected, 0.02)


def test_the_text_model_equals_that_of_transformers(clip):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(**clip.transformer.config.__dict__, eos_token_id=49407)
    oracle = transformers.CLIPTextModel(config).eval()
    state = clip.transformer.state_dict()
    if not any(name.startswith("text_model.") for name in oracle.state_dict()):
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    oracle.load_state_dict(state)
    batch = clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    positions = torch.arange(batch.input_ids.shape[1])[None]
    options = {"output_hidden_states": True, "attention_mask": batch.attention_mask}
    expected = oracle(batch.input_ids, position_ids=positions, **options)
    for kwargs in ({}, {"position_ids": positions}):
        outputs = clip.transformer(input_ids=batch.input_ids.int(), **options, **kwargs)
        assert_close(outputs.last_hidden_state, expected.last_hidden_state, 2e-6)
        assert_close(outputs.pooler_output, expected.pooler_output, 2e-6)
        assert len(outputs.hidden_states) == len(expected.hidden_states) == 4
        for a, b in zip(outputs.hidden_states, expected.hidden_states, strict=True):
            assert_close(a, b, 2e-6)


def test_the_tokenizer_takes_new_tokens():
    encoder = FrozenCLIPEmbedder(arch=CLIP_ARCH)
    tokenizer, model = encoder.tokenizer, encoder.transformer
    assert len(tokenizer) == len(tokenizer.get_vocab()) == 49408
    assert tokenizer.get_vocab()[",</w>"] == 267
    assert tokenizer.add_tokens(["<new1>", "cat</w>"]) == 1
    assert tokenizer.convert_tokens_to_ids(["<new1>", "cat</w>"]) == [49408, 2368]
    assert tokenizer("a <new1> cat", add_special_tokens=False).input_ids == [320, 49408, 2368]
    old = model.get_input_embeddings().weight
    new = model.resize_token_embeddings(len(tokenizer)).weight
    assert new.shape == (49409, 32)
    assert torch.equal(new[:-1], old)
    assert encoder.encode(["<new1>"]).shape == (1, 77, 32)


def test_loaders_are_looked_up_when_an_encoder_is_built(monkeypatch):
    """Web UIs replace them to build encoders without weights."""
    import open_clip

    build, names = open_clip.create_model_and_transforms, []

    def create(name, pretrained=None, **kwargs):
        names.append(name)
        text_cfg = OPEN_CLIP_ARCH["text_cfg"]
        kwargs |= {"vision_cfg": encoders.UNUSED_VISION_CONFIG, "text_cfg": text_cfg}
        return build(name, pretrained=None, **kwargs)

    old = CLIPTextModel.from_pretrained

    def from_pretrained(name, *args, **kwargs):
        names.append(name)
        return old(None, *args, config=CLIP_ARCH, state_dict={}, **kwargs)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    monkeypatch.setattr(encoders.CLIPTextModel, "from_pretrained", from_pretrained)
    for build_encoder in (FrozenOpenCLIPEmbedder, FrozenCLIPEmbedder):
        assert build_encoder().encode(["a"]).shape == (1, 77, 32)
    assert names == ["ViT-H-14", "openai/clip-vit-large-patch14"]


def test_blocks_of_open_clip_take_the_sequence_first(openclip):
    """Third-party code that calls each block expects this order; a batch of 77 fits both orders."""
    import open_clip

    prompts = [f"number {k}" for k in range(77)]
    tokens = open_clip.tokenize(prompts)
    model, shapes = openclip.model, []
    x = (model.token_embedding(tokens) + model.positional_embedding).permute(1, 0, 2)
    for block in model.transformer.resblocks[:-1]:
        x = block(x, attn_mask=model.attn_mask)
    expected = model.ln_final(x.permute(1, 0, 2))
    assert_close(openclip.encode_with_transformer(tokens), expected, 1e-6)
    assert_close(openclip.encode(prompts[:1]), expected[:1], 2e-6)

    def text_transformer_forward(self, x, attn_mask=None):
        shapes.append(x.shape)
        return x

    openclip.text_transformer_forward = types.MethodType(text_transformer_forward, openclip)
    openclip.encode(["a", "b"])
    del openclip.text_transformer_forward
    assert shapes == [(77, 2, 32)]


def test_weights_are_read_from_local_files(tmp_path, clip, openclip):
    config = {"text_config": {**CLIP_ARCH, "dropout": 0.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    save_file(openclip.model.state_dict(), path)
    loaded = FrozenOpenCLIPEmbedder(OPEN_CLIP_ARCH, str(path), layer="penultimate")
    assert torch.equal(loaded.encode(PROMPTS), openclip.encode(PROMPTS))
    for prefix in ("", "text_model."):  # the names of transformers 4 and 5
        state = clip.transformer.state_dict()
        save_file({name.removeprefix(prefix): value for name, value in state.items()}, path)
        loaded = FrozenCLIPEmbedder(str(tmp_path), layer="hidden", layer_idx=-2)
        assert torch.equal(loaded.encode(PROMPTS), clip.encode(PROMPTS))
