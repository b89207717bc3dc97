"""Tokenizers of OpenAI's CLIP and of OpenCLIP."""

import warnings

import pytest
import torch

from goldfile import load_golden
from ldm.encoders.tokenizer import (
    CLIP,
    OPEN_CLIP,
    encode,
    find_truncated_text,
    has_weight_syntax,
    tokenize,
)

# Recorded from the slow CLIPTokenizer of transformers 4.30.2 with ftfy 6.3.1.
SLOW_TOKENIZER_IDS = [
    ("a < b &amp; c", [320, 283, 321, 261, 6259, 282, 322]),
    ("a &amp; b", [320, 261, 321]),
    ("\"<|endoftext|>'s", [257, 49407, 568]),
    ("&amp; <|startoftext|>é", [261, 49406, 4166]),
    ("<|STARTOFTEXT|> Ã©", [49406, 4166]),
    ("ﬁne Ⅳ x²", [3797, 158, 227, 367, 343, 41175]),
    ("<start_of_text> <|endoftext|> &lt;", [283, 1572, 318, 539, 318, 4160, 285, 49407, 283]),
]
UNUSUAL_TEXTS = [
    "a < b &amp;amp; c",
    "<|startoftext|>it's<END_OF_TEXT>",
    "l’été à 12:30 – ½ ﬁn, naïve café",
    "\x00zero\u200bwidth\u00a0\u3000 \x85 \u2028 ſ'ſ İstanbul",
    "हिन्दी ٣ ﷺ 👩‍🚀 ❤️ １２ＡＢ ǅ",
    "a" * 300,
    "word " * 100,
]


@pytest.mark.parametrize(("name", "variant"), [("open_clip", OPEN_CLIP), ("hf_slow_ftfy", CLIP)])
def test_ids_equal_the_recorded_ones(name, variant):
    golden = load_golden("tokenizer")
    ids = tokenize(golden.meta["prompts"], variant)
    assert torch.equal(ids, golden.outputs("ids")[name])


@pytest.mark.parametrize(("text", "ids"), SLOW_TOKENIZER_IDS)
def test_sd1_ids_of_unusual_texts_equal_the_slow_tokenizer(text, ids):
    assert encode(text, CLIP) == ids


def test_sd2_ids_of_unusual_texts_equal_open_clip():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from open_clip.tokenizer import SimpleTokenizer
    assert torch.equal(tokenize(UNUSUAL_TEXTS, OPEN_CLIP), SimpleTokenizer()(UNUSUAL_TEXTS))


def test_added_tokens_are_whole_words_of_any_case():
    added = {"cat": [-1, -2], "cat toy": [-3]}
    assert encode("a CAT toy, cats, a cat", CLIP, added) == [
        320, -3, 267, 3989, 267, 320, -1, -2
    ]  # fmt: skip


def test_padding_is_zero_for_sd2_and_the_end_token_for_sd1():
    assert tokenize(["cat"], OPEN_CLIP, 5).tolist() == [[49406, 2368, 49407, 0, 0]]
    assert tokenize(["cat"], CLIP, 5).tolist() == [[49406, 2368, 49407, 49407, 49407]]


def test_a_long_text_keeps_its_beginning_and_an_end_token():
    ids = tokenize(["photo " * 100], OPEN_CLIP)
    assert ids.shape == (1, 77)
    assert ids[0, -1] == 49407
    assert torch.equal(ids[:, :-1], tokenize(["photo " * 75], OPEN_CLIP)[:, :-1])
    assert tokenize([], CLIP).shape == (0, 77)


@pytest.mark.parametrize(
    ("prompt", "truncated"),
    [
        ("photo " * 75, ""),
        ("photo " * 74 + "photo, a dog", ", a dog"),
        ("photo " * 74 + "<Cat-Toy> dog", "dog"),
        ("photo " * 74 + "犬" * 9, "犬" * 9),
    ],
)
def test_a_long_prompt_is_truncated_at_its_first_incomplete_word(prompt, truncated):
    assert find_truncated_text(prompt, CLIP, added={"<cat-toy>": [-1]}) == truncated


@pytest.mark.parametrize(
    ("prompt", "has_weights"),
    [
        ("a (cat:1.3)", True),
        ("(a (red: .5) cat:1.2)", True),
        (r"(style \(medium\):1.2)", True),
        ("((cat))", True),
        ("[[cat]]", True),
        ("a cat (asleep) at 8:30", False),
        (r"\(cat:1.3\)", False),
        ("[cat] :((", False),
    ],
)
def test_the_syntax_for_weights_is_recognized(prompt, has_weights):
    assert has_weight_syntax(prompt) == has_weights
