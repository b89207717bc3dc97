"""Chunks: how the tokens of a long prompt are divided among runs of a text encoder.

    sections of pieces -> sections of units -> chunks of at most 75 tokens -> ids, weights (77,)

A unit is never split: a token, the vectors of a textual inversion, or (ComfyUI) a word.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from ldm.encoders import tokenizer
from ldm.prompts.prompt import Piece, Section, Text
from ldm.runtime.errors import ArgumentError

__all__ = ["COMMA_ID", "Chunk", "Splitter", "Unit", "split_at_commas"]

COMMA_ID = 267  # of `,</w>`
MAX_BACKTRACK = 20  # tokens after the last comma that may move to the next chunk (A1111)
INVERSION_ID = -1  # stands for all ids of textual inversions, which are negative
MAX_WORD_TOKENS = 7  # words with more tokens are split (ComfyUI)


@dataclass(frozen=True)
class Unit:
    """Tokens that stay together."""

    ids: tuple[int, ...]
    weight: float = 1.0
    piece_index: int = 0  # of their piece in the text, for compel's weighting


Chunk = list[Unit]


@dataclass(frozen=True)
class Splitter:
    """Splits texts into chunks for one text encoder."""

    variant: tokenizer.Variant
    added: tokenizer.AddedTokens  # of textual inversions
    length: int  # of a chunk with its BOS and EOS tokens, 77

    def split(self, text: Text, syntax: str) -> list[Chunk]:
        """Split a text into chunks of at most `length` - 2 tokens, by the rules of its syntax."""
        chunk_size = self.length - 2
        sections: list[Chunk] = []
        piece_count = 0
        for section in text:
            sections.append(list(self._make_units(section, piece_count, syntax)))
            piece_count += len(section)
        units = [unit for section in sections for unit in section]
        longest = max((len(unit.ids) for unit in units), default=0)
        if longest > chunk_size:
            raise ArgumentError(
                f"a textual inversion of {longest} vectors does not fit into {chunk_size} tokens"
            )
        if syntax.startswith("a1111"):
            return split_at_commas(sections, chunk_size)
        if syntax == "compel":
            return _split_at_sentences(units, chunk_size)
        return _fill_chunks(units, chunk_size)

    def to_ids(self, chunk: Chunk) -> list[int]:
        """Return the token ids of a chunk, with BOS token, EOS token and padding."""
        ids = [tokenizer.BOS_ID, *(i for unit in chunk for i in unit.ids), tokenizer.EOS_ID]
        return ids + [self.variant.pad_id] * (self.length - len(ids))

    def get_token_weights(self, chunk: Chunk) -> list[float]:
        """Return the weights of a chunk's tokens, (length,)."""
        weights = [1.0, *(unit.weight for unit in chunk for _ in unit.ids)]
        return weights + [1.0] * (self.length - len(weights))

    def get_piece_indices(self, chunk: Chunk) -> list[int]:
        """Return the index of the piece of each token, (length,); -1 for special tokens."""
        indices = [-1, *(unit.piece_index for unit in chunk for _ in unit.ids)]
        return indices + [-1] * (self.length - len(indices))

    def _make_units(self, section: Section, first_piece: int, syntax: str) -> Iterator[Unit]:
        """Yield the units of a section, whose pieces are counted from `first_piece`."""
        inversions = {ids[0]: tuple(ids) for ids in self.added.values() if ids}
        is_comfy = syntax == "comfy"
        for index, piece in enumerate(section, first_piece):
            for word in _split_comfy_words(piece, self.added) if is_comfy else [piece.text]:
                ids = tokenizer.encode(word, self.variant, self.added)
                if is_comfy and 0 < len(ids) <= MAX_WORD_TOKENS and min(ids) >= 0:
                    yield Unit(tuple(ids), piece.weight, index)
                    continue
                position = 0
                while position < len(ids):
                    unit_ids = inversions.get(ids[position], (ids[position],))
                    yield Unit(unit_ids, piece.weight, index)
                    position += len(unit_ids)


def _split_comfy_words(piece: Piece, added: tokenizer.AddedTokens) -> list[str]:
    """Split at whitespace outside textual inversions, and drop `embedding:` before them."""
    names = [re.escape(name) for name in sorted(added, key=len, reverse=True)]
    text = piece.text
    if names:
        text = re.sub(rf"\bembedding:(?={'|'.join(names)})", "", text, flags=re.IGNORECASE)
    names_with_spaces = [name for name in names if " " in name]
    return re.findall("|".join([*names_with_spaces, r"\S+"]), text, re.IGNORECASE)


def split_at_commas(sections: Sequence[Chunk], chunk_size: int = 75) -> list[Chunk]:
    """Fill chunks as A1111 does: a chunk that overflows soon after a comma ends with that comma.

    Args:
        sections: The units between BREAKs; each section starts a new chunk.
    """
    chunks: list[Chunk] = []
    for index, section in enumerate(sections):
        chunk: Chunk = []
        comma = None  # index of the chunk's last comma, in units
        for unit in section:
            if _count_tokens(chunk) + len(unit.ids) > chunk_size:
                is_word = unit.ids[0] >= 0 and unit.ids[0] != COMMA_ID
                if comma is not None and is_word and _count_tokens(chunk[comma:]) <= MAX_BACKTRACK:
                    chunks.append(chunk[: comma + 1])
                    chunk = chunk[comma + 1 :]
                else:
                    chunks.append(chunk)
                    chunk = []
                comma = None
            if unit.ids == (COMMA_ID,):
                comma = len(chunk)
            chunk.append(unit)
        is_last = index == len(sections) - 1
        if chunk or not is_last or not chunks:
            chunks.append(chunk)
    return chunks


def _fill_chunks(units: Sequence[Unit], chunk_size: int) -> list[Chunk]:
    chunks: list[Chunk] = [[]]
    for unit in units:
        if _count_tokens(chunks[-1]) + len(unit.ids) > chunk_size:
            chunks.append([])
        chunks[-1].append(unit)
    return chunks


def _split_at_sentences(units: Sequence[Unit], chunk_size: int) -> list[Chunk]:
    """Split as compel: after the last period that fits, else the last `,`, `;` or `:`, or word."""
    chunks: list[Chunk] = []
    remaining = list(units)
    while _count_tokens(remaining) > chunk_size:
        fit_count = bisect_right(list(accumulate(len(unit.ids) for unit in remaining)), chunk_size)
        last_ids = [max(unit.ids[-1], INVERSION_ID) for unit in remaining[:fit_count]]
        ends = (
            end
            for split_ids in _load_split_ids()
            for end in range(fit_count, 0, -1)
            if last_ids[end - 1] in split_ids
        )
        end = next(ends, fit_count)
        chunks.append(remaining[:end])
        remaining = remaining[end:]
    return [*chunks, remaining] if remaining or not chunks else chunks


@cache
def _load_split_ids() -> tuple[frozenset[int], ...]:
    """Return sets of token ids after which to split, the preferred set first."""
    ids, _ = tokenizer.load_vocabulary()
    period, *separators = (ids[symbol + "</w>"] for symbol in ".,;:")
    word_ends = (i for symbol, i in ids.items() if symbol.endswith("</w>"))
    return (
        frozenset([period]),
        frozenset([period, *separators]),
        frozenset([*word_ends, INVERSION_ID]),
    )


def _count_tokens(units: Sequence[Unit]) -> int:
    return sum(len(unit.ids) for unit in units)
