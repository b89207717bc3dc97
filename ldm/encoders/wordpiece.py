"""The WordPiece tokenizer of BERT (uncased), which latent-diffusion's text encoder uses.

The vocabulary, `bert_vocab.txt`, is that of Google's bert-base-uncased (Apache License 2.0).

Wu et al. 2016 (arXiv:1609.08144); Devlin et al. 2018 (arXiv:1810.04805).
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PAD_ID", "VOCAB_SIZE", "encode", "find_truncated_text", "tokenize"]

VOCAB_SIZE = 30522
PAD_ID, UNK_ID, CLS_ID, SEP_ID = 0, 100, 101, 102
SPECIAL_TOKENS = re.compile(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])")
MAX_WORD_LENGTH = 100  # longer words are unknown
# First and last code points of the blocks of CJK ideographs, each of which is a word.
CJK_BLOCKS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def tokenize(texts: Sequence[str], length: int = 77) -> Tensor:
    """Convert texts to token ids (B, length) int64: [CLS], word pieces, [SEP], padding.

    Longer texts are truncated, and still end with [SEP].
    """
    rows = []
    for text in texts:
        ids = [CLS_ID, *encode(text)[: length - 2], SEP_ID]
        rows.append(ids + [PAD_ID] * (length - len(ids)))
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), length)


def encode(text: str) -> list[int]:
    """Convert one text to the ids of its word pieces."""
    return [token_id for word in _split_words(text) for token_id in _encode_word(word)]


def find_truncated_text(text: str, length: int = 77) -> str:
    """Return the end of a text that `tokenize` drops, from the first incomplete word on."""
    if len(encode(text)) <= length - 2:
        return ""
    words = list(re.finditer(r"\S+", text))
    first = bisect_right(words, length - 2, key=lambda word: len(encode(text[: word.end()])))
    return text[words[first].start() :]


def _split_words(text: str) -> Iterator[str]:
    """Yield special tokens as they are, and lower-case words and punctuation without accents."""
    for piece in SPECIAL_TOKENS.split(text):
        if SPECIAL_TOKENS.fullmatch(piece):
            yield piece
            continue
        # Each character alone: a final capital sigma becomes that within words, as in the original.
        cleaned = "".join(_clean(char).lower() for char in piece)
        decomposed = unicodedata.normalize("NFD", cleaned)
        letters = (char for char in decomposed if unicodedata.category(char) != "Mn")
        spaced = "".join(f" {char} " if _is_punctuation(char) else char for char in letters)
        yield from spaced.split()


def _clean(char: str) -> str:
    """Return a blank for white space, "" for a control or private character; set off ideographs."""
    if char in "\t\n\r" or unicodedata.category(char) == "Zs":
        return " "
    if char == "\ufffd" or unicodedata.category(char) in ("Cc", "Cf", "Co"):
        return ""
    is_ideograph = any(first <= ord(char) <= last for first, last in CJK_BLOCKS)
    return f" {char} " if is_ideograph else char


def _is_punctuation(char: str) -> bool:
    is_ascii_symbol = char.isascii() and char.isprintable() and not (char.isalnum() or char == " ")
    return is_ascii_symbol or unicodedata.category(char).startswith("P")


@lru_cache(maxsize=1 << 16)
def _encode_word(word: str) -> tuple[int, ...]:
    """Convert a word to ids: the longest piece of the vocabulary first, from left to right."""
    vocabulary = _load_vocabulary()
    if len(word) > MAX_WORD_LENGTH:
        return (UNK_ID,)
    ids: list[int] = []
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if prefix + word[start:end] in vocabulary), None)
        if end is None:
            return (UNK_ID,)
        ids.append(vocabulary[prefix + word[start:end]])
        start = end
    return tuple(ids)


@cache
def _load_vocabulary() -> dict[str, int]:
    path = Path(__file__).with_name("bert_vocab.txt")
    lines = path.read_text(encoding="utf-8").split("\n")
    return {token: index for index, token in enumerate(lines[:VOCAB_SIZE])}
