"""Textual inversion; the oracle is transformers' tower with as many more rows."""

import pytest
import torch
from lorahelp import KINDS, WIDTH, their_parts, tiny_model
from torch import nn

from ldm.encoders.text import OpenCLIPText
from ldm.loading.addons.embeddings import load_embeddings, read_embeddings, write_embeddings
from ldm.loading.files.checkpoint import write_checkpoint

VECTORS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_with_rows_for_the_word(kind, tmp_path):
    model = tiny_model(kind)
    _, theirs = their_parts(model, kind)
    write_embeddings(tmp_path / "x.safetensors", {"<cat>": VECTORS, "sks": VECTORS[:1] - 1})
    load_embeddings(model, [tmp_path / "x.safetensors"])
    tower = theirs.text_model if hasattr(theirs, "text_model") else theirs
    table = tower.embeddings.token_embedding
    rows = torch.cat([table.weight.data, VECTORS, VECTORS[:1] - 1])
    tower.embeddings.token_embedding = nn.Embedding.from_pretrained(rows)
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
    words = {path.stem: VECTORS}  # where the file does not name its token
    content = content if name != "two.pt" else content["string_to_param"]
    if "<" in str(content.keys()):
        words = {word: vectors.reshape(-1, WIDTH) for word, vectors in content.items()}
    state = read_embeddings(path)
    assert state.keys() == words.keys()
    assert all(torch.equal(state[word], vectors) for word, vectors in words.items())


def test_what_does_not_fit_is_refused_and_skipped_in_a_folder(tmp_path, caplog):
    model = tiny_model()
    write_embeddings(tmp_path / "wide.safetensors", {"<wide>": torch.zeros(2, 768)})
    write_embeddings(tmp_path / "xl.safetensors", {"clip_l": VECTORS, "clip_g": VECTORS})
    write_embeddings(tmp_path / "lora.safetensors", {"x": torch.zeros(2, 2, 1, 1)})
    write_embeddings(tmp_path / "none.safetensors", {"<none>": VECTORS[:0]})
    write_embeddings(tmp_path / "nan.safetensors", {"<nan>": VECTORS * torch.nan})
    write_embeddings(tmp_path / "people/fits.safetensors", {"<Fits>": VECTORS})
    write_embeddings(tmp_path / ".hidden/x.safetensors", {"<hidden>": VECTORS})
    for name, message in (
        (
            "wide",
            r"`<wide>` has vectors of width 768 \(Stable Diffusion 1\), the text tower takes",
        ),
        ("xl", "two text towers: it is made for SDXL"),
        ("none", "`<none>` has no vectors"),
        ("nan", "the vectors of `<nan>` are not finite"),
        ("lora", "is not a textual inversion: it holds 1 other tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            load_embeddings(model, [tmp_path / f"{name}.safetensors"])
    load_embeddings(model, [tmp_path])
    assert list(model.conditioner.text.added_embeddings) == ["<fits>"]
    assert len(model.provenance["embeddings"]) == 1
    assert caplog.text.count("skipped: ") == 5
    del model.conditioner.text
    with pytest.raises(ValueError, match="no text tower"):
        load_embeddings(model, [tmp_path])


def test_a_reduced_vocabulary_learns_words_too():
    arch = {"width": WIDTH, "heads": 3, "layers": 1, "context_length": 12}
    text = OpenCLIPText(arch=arch, compact_vocab=8)
    text.token_ids.copy_(torch.arange(7) + 320)
    plain = text(["a b c"])
    text.added_embeddings = {"cat": text.model.token_embedding.weight[:1].detach() * 0}
    assert torch.equal(text(["a b c"]), plain)
    assert not torch.equal(text(["a cat c"]), text(["a zebra c"]))
    assert text.state_dict().keys() == OpenCLIPText(arch=arch, compact_vocab=8).state_dict().keys()
