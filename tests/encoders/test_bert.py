"""The text encoder of latent-diffusion and its tokenizer, as recorded from the original."""

import pytest
import torch

from goldfile import load_golden
from ldm.encoders import wordpiece
from ldm.encoders.bert import BERTText


@pytest.fixture(scope="module")
def golden():
    return load_golden("ldm_bert")


def build(golden, **params):
    encoder = BERTText(**params).eval()
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    return encoder


def test_texts_have_the_recorded_tokens(golden):
    prompts = golden.meta["prompts"]
    for prompt, ids in zip(prompts, golden.outputs("tokens")["ids"], strict=True):
        assert wordpiece.tokenize([prompt]).tolist() == [ids.tolist()], prompt


def test_unassigned_characters_are_unknown_and_private_ones_are_dropped():
    assert wordpiece.encode("a\u0378") == [wordpiece.UNK_ID]
    assert wordpiece.encode("a\ue000") == wordpiece.encode("a")
    assert wordpiece.encode("ΑΣ") == wordpiece.encode("ασ")


def test_special_tokens_are_read_in_capitals_only():
    assert wordpiece.encode("[MASK] [PAD]") == [103, 0]
    assert len(wordpiece.encode("[mask]")) == 3


@torch.no_grad()
def test_texts_are_encoded_as_recorded(golden):
    encoder = build(golden, n_embed=32, n_layer=2)
    prompts = [golden.meta["prompts"][k] for k in golden.info("encode")["prompts"]]
    golden.assert_close("encode", z=encoder(prompts))


def test_only_texts_are_dropped_in_training():
    params = {"n_embed": 8, "n_layer": 1, "vocab_size": 200}
    texts = BERTText(**params)
    assert (texts.droppable, texts.null) == (True, "")
    assert not BERTText(use_tokenizer=False, **params).droppable
    assert BERTText(null="nothing", **params).null == "nothing"


@torch.no_grad()
@pytest.mark.parametrize("case", ["tokens_in", "transformer_embedder"])
def test_token_ids_are_encoded_as_recorded(golden, case):
    params = golden.meta[f"config_{case}"]["params"]
    encoder = build(golden, **{k: v for k, v in params.items() if k != "device"})
    tokens = golden.inputs(case)["tokens"]
    golden.assert_close(case, z=encoder(tokens))
    if case == "tokens_in":
        golden.assert_close(case, z_short=encoder(tokens[:, :17]))
