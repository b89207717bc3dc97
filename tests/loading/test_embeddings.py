"""Textual inversion, compared with transformers' text encoder with added tokens."""

import base64
import json

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from ldm.encoders.text import OpenCLIPText, TextEncoder
from ldm.loading.addons.embeddings import load_embeddings, read_embeddings, write_embeddings
from ldm.loading.files.checkpoint import read_checkpoint, write_checkpoint
from loading.lorahelp import (
    MICRO_CONDITIONS,
    WIDTH,
    WIDTH_2,
    build_diffusers_pipeline,
    build_tiny_model,
    build_transformers_tokenizer,
    build_transformers_tower,
)

VECTORS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_transformers_computes_the_same_with_added_embeddings(family, tmp_path):
    model = build_tiny_model(family)
    theirs = build_transformers_tower(model.conditioner.text)
    write_embeddings(tmp_path / "x.safetensors", {"<cat>": VECTORS, "sks": VECTORS[:1] - 1})
    load_embeddings(model, [tmp_path / "x.safetensors"])
    tower = theirs.text_model if hasattr(theirs, "text_model") else theirs
    table = tower.embeddings.token_embedding
    weight = torch.cat([table.weight.data, VECTORS, VECTORS[:1] - 1])
    tower.embeddings.token_embedding = nn.Embedding.from_pretrained(weight)
    text = model.conditioner.text
    tokens = text.tokenize(["a <CAT> and a sks, by sks", "no sksses"])
    assert (tokens[0] < 0).sum() == 5
    assert (tokens[1] >= 0).all()
    with torch.no_grad():
        expected = theirs(torch.where(tokens < 0, 49407 - tokens, tokens)).last_hidden_state
        context = text(tokens)
        plain = text(["a and a, by", ""])
    torch.testing.assert_close(context, expected, rtol=0, atol=5e-6)
    assert (context[0] - plain[0]).abs().max() > 0.1


FORMATS = {
    "word.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "x"},
    "old.pt": {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS.clone())}),
    },
    "kohya.safetensors": {"emb_params": VECTORS},
    "one.bin": {"<one>": VECTORS[0]},
    "many.safetensors": {"<many>": VECTORS, "<more>": VECTORS[:2]},
    "two.pt": {"string_to_param": {"<x>": VECTORS[:1], "<y>": VECTORS}},
    "shared.safetensors": {"clip_l": VECTORS},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(name, tmp_path):
    path, content = tmp_path / name, FORMATS[name]
    if path.suffix == ".safetensors":
        write_checkpoint(path, content)
    else:
        torch.save(content, path)
    expected = {path.stem: VECTORS}  # if the file does not name its token
    content = content if name != "two.pt" else content["string_to_param"]
    if "<" in str(content.keys()):
        expected = {token: value.reshape(-1, WIDTH) for token, value in content.items()}
    embeddings = read_embeddings(path)
    assert embeddings.keys() == expected.keys()
    assert all(torch.equal(*embeddings[token], value) for token, value in expected.items())


INVALID_TOKENS = {  # tokens and message of the error, by name of the file
    "wide": ({"<wide>": torch.zeros(2, 768)}, r"`<wide>` has vectors of width 768 \(Stable Diff"),
    "xl": ({"clip_l": VECTORS, "clip_g": torch.ones(3, 1280)}, r"`xl` .* 1280 \(SDXL\).* takes 24"),
    "odd": ({"clip_l": VECTORS, "clip_g": VECTORS[:2]}, "`odd` has 3 vectors for CLIP-L and 2 for"),
    "none": ({"<none>": VECTORS[:0]}, "`<none>` has no vectors"),
    "nameless": ({" ": VECTORS}, "nameless.safetensors`: one of its tokens has no name"),
    "nan": ({"<nan>": VECTORS * torch.nan}, "the vectors of `<nan>` are not finite"),
    "lora": ({"x": torch.zeros(2, 2, 1, 1)}, "is not a textual inversion: its tensors are not"),
}


def test_embeddings_that_do_not_fit_are_refused_or_skipped_in_a_folder(tmp_path, caplog):
    model = build_tiny_model()
    for name, (tokens, message) in INVALID_TOKENS.items():
        write_embeddings(tmp_path / f"{name}.safetensors", tokens)
        with pytest.raises(ValueError, match=message):
            load_embeddings(model, [tmp_path / f"{name}.safetensors"])
    write_embeddings(tmp_path / "people/fits.safetensors", {"<Fits>": VECTORS})
    (tmp_path / "people/loop").symlink_to(tmp_path, target_is_directory=True)
    write_embeddings(tmp_path / ".hidden/x.safetensors", {"<hidden>": VECTORS})
    load_embeddings(model, [tmp_path])
    assert list(model.conditioner.text.added_embeddings) == ["<fits>"]
    assert len(model.provenance["embeddings"]) == 1
    assert caplog.text.count("skipped: ") == len(INVALID_TOKENS)
    del model.conditioner.text
    with pytest.raises(ValueError, match="no text encoder: embeddings"):
        load_embeddings(model, [tmp_path])


# For the two text encoders of SDXL.
SDXL_VECTORS = [
    torch.randn(2, width, generator=torch.Generator().manual_seed(1)) for width in (WIDTH, WIDTH_2)
]


def test_a_second_token_of_sdxl_in_a_file_is_refused(tmp_path):
    for first in (SDXL_VECTORS, VECTORS):
        with pytest.raises(ValueError, match="only one token of SDXL, got `<one>`, `<two>`: write"):
            write_embeddings(tmp_path / "x.safetensors", {"<one>": first, "<two>": SDXL_VECTORS})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # beside the towers of transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["one file", "pickle", "two files"])
def test_diffusers_computes_the_same_for_a_token_of_sdxl(layout, tmp_path):
    model = build_tiny_model("sdxl")
    pipeline = build_diffusers_pipeline(model)
    pipeline.tokenizer = build_transformers_tokenizer(model.conditioner.text, tmp_path / "1")
    pipeline.tokenizer_2 = build_transformers_tokenizer(model.conditioner.text_2, tmp_path / "2")
    paths = [tmp_path / "cat.safetensors"]
    if layout == "one file":
        write_embeddings(paths[0], {"sks": SDXL_VECTORS}, model=model)
        architecture = read_checkpoint(paths[0]).metadata["modelspec.architecture"]
        assert architecture == "stable-diffusion-xl-v1-base/textual-inversion"
    elif layout == "pickle":
        paths = [tmp_path / "sks.pt"]  # which names the token
        torch.save(dict(zip(("clip_l", "clip_g"), SDXL_VECTORS, strict=True)), paths[0])
    else:
        paths.append(tmp_path / "cat_2.safetensors")
        for path, vectors in zip(paths, SDXL_VECTORS, strict=True):
            write_embeddings(path, {"sks": vectors})
    states = [read_checkpoint(path).state_dict for path in paths]
    for key, suffix, vectors in (("clip_l", "", states[0]), ("clip_g", "_2", states[-1])):
        pipeline.load_textual_inversion(
            vectors if layout == "two files" else vectors[key],
            token="sks",
            text_encoder=getattr(pipeline, f"text_encoder{suffix}"),
            tokenizer=getattr(pipeline, f"tokenizer{suffix}"),
        )
    load_embeddings(model, paths)
    prompt = "a sks and a dog, by sks"
    expected = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, device="cpu")
    sizes = {key: value[:1] for key, value in MICRO_CONDITIONS.items()}
    cond = model.condition({"txt": [prompt], **sizes})
    plain = model.condition({"txt": ["a cat and a dog, by cat"], **sizes})
    torch.testing.assert_close(cond.crossattn, expected[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(cond.vector[:, :WIDTH_2], expected[2], rtol=0, atol=5e-6)
    assert (cond.crossattn - plain.crossattn).abs().max() > 0.1


def test_a_token_for_only_one_text_encoder_is_warned_of(tmp_path, caplog):
    model = build_tiny_model("sdxl")
    clip_l, clip_g = SDXL_VECTORS
    tokens = {"sd1": {"<sd1>": clip_l}, "both": {"<both>": SDXL_VECTORS}, "g": {"clip_g": clip_g}}
    paths = [tmp_path / f"{name}.safetensors" for name in tokens]
    for path in paths:
        write_embeddings(path, tokens[path.stem])
    load_embeddings(model, paths)
    added = [list(e.added_embeddings) for e in model.conditioner.find_all(TextEncoder)]
    assert added == [["<sd1>", "<both>"], ["<both>", "g"]]
    assert "`<sd1>` has vectors for the text encoder of width 24 only" in caplog.text
    assert "`g` has vectors for the text encoder of width 32 only" in caplog.text
    assert "<both>" not in caplog.text
    write_embeddings(paths[0], {"<sd2>": torch.ones(1, 1024)})
    with pytest.raises(ValueError, match=r"1024 \(Stable Diffusion 2\);.* takes 24 or 32"):
        load_embeddings(model, paths)


def test_tokens_are_added_to_a_compact_vocabulary():
    arch = {"width": WIDTH, "heads": 3, "layers": 1, "context_length": 12}
    text = OpenCLIPText(arch=arch, compact_vocab=8)
    text.token_ids.copy_(torch.arange(7) + 320)
    plain = text(["a b c"])
    text.added_embeddings = {"cat": text.model.token_embedding.weight[:1].detach() * 0}
    assert torch.equal(text(["a b c"]), plain)
    assert not torch.equal(text(["a cat c"]), text(["a zebra c"]))
    assert text.state_dict().keys() == OpenCLIPText(arch=arch, compact_vocab=8).state_dict().keys()


def test_embeddings_inside_images_are_read(tmp_path):
    """A1111 writes JSON in base64 into a text chunk of a PNG."""
    model = build_tiny_model()
    vectors = [[float(k)] * WIDTH for k in range(2)]
    content = {"string_to_param": {"*": {"TORCHTENSOR": vectors}}, "name": "cat-style"}
    chunks = PngInfo()
    chunks.add_text("sd-ti-embedding", base64.b64encode(json.dumps(content).encode()).decode())
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=chunks)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.preview.png")
    load_embeddings(model, [tmp_path])
    assert model.conditioner.text.added_embeddings["cat-style"].tolist() == vectors
    with pytest.raises(ValueError, match="is an image without a textual inversion"):
        load_embeddings(model, [tmp_path / "x.preview.png"])
