"""CLIP's tokenizer, in the two variants that Stable Diffusion 1 and 2 were trained with.

Byte-level BPE. The merge table is read from the open_clip package, without importing it. Words
get the same ids in both variants; padding, special tokens and cleaning differ.

Sennrich et al. 2016 (arXiv:1508.07909); Radford et al. 2021 (arXiv:2103.00020).
"""

import gzip
import html
import importlib.util
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

BOS_ID, EOS_ID = 49406, 49407  # ids of the first and last token of a text
AddedTokens = Mapping[str, Sequence[int]]  # lower-case token -> its (negative) ids
NO_TOKENS: AddedTokens = MappingProxyType({})
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
# A1111's emphasis: (word:1.3), ((word)), [[word]].
WEIGHT_SYNTAX = re.compile(
    r"(?<!\\)(\((\\.|[^(\\])*:\s*[+-]?\d*\.?\d+\s*\)|\(\([^()]+\)\)|\[\[[^][]+\]\])"
)
# 49408 ids - 2 * 256 bytes - 2 special tokens; the file contains more merges than CLIP uses.
NUM_MERGES = 48894


@dataclass(frozen=True)
class Variant:
    """A variant of the tokenizer.

    Args:
        bos, eos: Texts of the tokens at the beginning and the end, which prompts may contain.
        pad_id: Id of the padding token.
        unescapes_html: Whether to also decode HTML entities in texts with "<", which ftfy keeps.
        splits_before_cleaning: Whether to split at special tokens before cleaning, not after.
    """

    bos: str
    eos: str
    pad_id: int
    unescapes_html: bool
    splits_before_cleaning: bool


OPEN_CLIP = Variant(
    "<start_of_text>", "<end_of_text>", 0, unescapes_html=True, splits_before_cleaning=False
)
CLIP = Variant(
    "<|startoftext|>", "<|endoftext|>", EOS_ID, unescapes_html=False, splits_before_cleaning=True
)


def tokenize(
    texts: Sequence[str], variant: Variant, length: int = 77, added: AddedTokens = NO_TOKENS
) -> Tensor:
    """Convert texts to token ids (B, length) int64: BOS token, words, EOS token, padding.

    Longer texts are truncated, and still end with the EOS token.
    """
    rows = []
    for text in texts:
        ids = [BOS_ID, *encode(text, variant, added)[: length - 2], EOS_ID]
        rows.append(ids + [variant.pad_id] * (length - len(ids)))
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), length)


def encode(text: str, variant: Variant, added: AddedTokens = NO_TOKENS) -> list[int]:
    """Convert one text to token ids, without BOS token, EOS token and padding."""
    if added:
        pattern = "|".join(_make_added_patterns(added))
        pieces = re.split(f"({pattern})", text, flags=re.IGNORECASE)
        encoded = (added.get(piece.lower()) or encode(piece, variant) for piece in pieces)
        return [token_id for ids in encoded for token_id in ids]
    word_pattern, special_pattern = _compile_patterns(variant)
    pieces = special_pattern.split(text) if variant.splits_before_cleaning else [text]
    words = (word for piece in pieces for word in word_pattern.findall(_clean(piece, variant)))
    return [token_id for word in words for token_id in _encode_word(word, variant)]


def find_truncated_text(
    text: str, variant: Variant, length: int = 77, added: AddedTokens = NO_TOKENS
) -> str:
    """Return the end of a text that `tokenize` drops, from the first incomplete word on."""
    if len(encode(text, variant, added)) <= length - 2:
        return ""
    pattern = "|".join([*_make_added_patterns(added), r"\w+", r"[^\w\s]+"])
    words = list(re.finditer(pattern, text, re.IGNORECASE))

    def count_tokens(word: re.Match[str]) -> int:
        return len(encode(text[: word.end()], variant, added))

    first = bisect_right(words, length - 2, key=count_tokens)
    return text[words[first].start() :]


def has_weight_syntax(prompt: str) -> bool:
    """Return whether a prompt contains A1111's syntax for weights."""
    return WEIGHT_SYNTAX.search(prompt) is not None


@cache
def load_vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Load {symbol: id} without special tokens, and {pair of symbols to merge: rank}."""
    with gzip.open(_find_merges_file(), "rt", encoding="utf-8") as file:
        next(file)  # a version line
        merges = [(a, b) for a, b in (next(file).split() for _ in range(NUM_MERGES))]
    chars = list(_map_bytes_to_chars().values())
    symbols = [*chars, *(char + "</w>" for char in chars), *(a + b for a, b in merges)]
    ids = {symbol: k for k, symbol in enumerate(symbols)}
    return ids, {pair: rank for rank, pair in enumerate(merges)}


def _make_added_patterns(added: AddedTokens) -> Iterator[str]:
    """Yield a pattern for each token, which does not match within a longer word."""
    # The longest token first, as one may be a prefix of another.
    for token in sorted(added, key=len, reverse=True):
        before = r"(?<!\w)" if token[0].isalnum() else ""
        after = r"(?!\w)" if token[-1].isalnum() else ""
        yield before + re.escape(token) + after


def _clean(text: str, variant: Variant) -> str:
    """Repair Unicode, collapse whitespace, convert to lower case."""
    import ftfy

    text = ftfy.fix_text(text)
    if variant.unescapes_html:
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


@cache
def _compile_patterns(variant: Variant) -> tuple[Any, Any]:
    """Compile the patterns of words and of special tokens (a group, so that `split` keeps them)."""
    import regex

    specials = f"{regex.escape(variant.bos)}|{regex.escape(variant.eos)}"
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    return regex.compile(f"{specials}|{words}", regex.IGNORECASE), regex.compile(f"({specials})")


@lru_cache(maxsize=1 << 16)
def _encode_word(word: str, variant: Variant) -> tuple[int, ...]:
    """Convert a word to token ids: merge its bytes, the pair of the lowest rank first."""
    if word in (variant.bos, variant.eos):
        return (BOS_ID if word == variant.bos else EOS_ID,)
    ids, ranks = load_vocabulary()
    chars = _map_bytes_to_chars()
    symbols = [chars[byte] for byte in word.encode("utf-8")]
    symbols[-1] += "</w>"  # marks the end of a word
    while len(symbols) > 1:
        pairs = set(pairwise(symbols))
        best_pair = min(pairs, key=lambda pair: ranks.get(pair, NUM_MERGES))
        if best_pair not in ranks:
            break
        symbols = _merge(symbols, best_pair)
    return tuple(ids[symbol] for symbol in symbols)


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Merge all occurrences of a pair, from left to right."""
    merged: list[str] = []
    left = None
    for symbol in symbols:
        if (left, symbol) == pair:
            merged[-1] += symbol
            left = None  # a merged symbol is not merged again in this pass
        else:
            merged.append(symbol)
            left = symbol
    return merged


@cache
def _map_bytes_to_chars() -> dict[int, str]:
    """Map each byte to the printable character that represents it, in order of ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable}
    return chars | {byte: chr(256 + k) for k, byte in enumerate(unprintable)}


def _find_merges_file() -> Path:
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / MERGES_FILE
        if path.is_file():
            return path
    raise ImportError(
        f"`{MERGES_FILE}` of the open_clip package was not found\nhint: pip install open-clip-torch"
    )
