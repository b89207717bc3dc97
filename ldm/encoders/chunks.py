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

__all__ = ["COMMA", "Chunk", "Splitter", "Unit", "split_at_commas"]

COMMA = 267  # id of `,</w>`
BACKTRACK = 20  # maximum number of tokens after the last comma to move to the next chunk (A1111)
INVERSION = -1  # in place of any (negative) id of a textual inversion
WORD_LIMIT = 8  # words of so many tokens are split (ComfyUI)


@dataclass(frozen=True)
class Unit:
    """Tokens that stay together."""

    ids: tuple[int, ...]
    weight: float = 1.0
    piece: int = 0  # index of their piece in the text, for compel's weighting


Chunk = list[Unit]


@dataclass(frozen=True)
class Splitter:
    """Splits texts into chunks for one text encoder."""

    variant: tokenizer.Variant
    added: tokenizer.AddedTokens  # tokens of textual inversions
    length: int  # length of a chunk with its start and end tokens, 77

    def split(self, text: Text, syntax: str) -> list[Chunk]:
        """Split a text into chunks of at most `length` - 2 tokens, by the rules of its syntax.

        Raises:
            ArgumentError: A textual inversion has more vectors than a chunk has tokens.
        """
        size = self.length - 2
        sections: list[Chunk] = []
        first = 0
        for section in text:
            units = list(_make_units(section, first, syntax, self.variant, self.added))
            sections.append(units)
            first += len(section)
        units = [unit for section in sections for unit in section]
        longest = max((len(unit.ids) for unit in units), default=0)
        if longest > size:
            raise ArgumentError(
                f"a textual inversion of {longest} vectors does not fit into {size} tokens"
            )
        if syntax.startswith("a1111"):
            return split_at_commas(sections, size)
        return _split_at_sentences(units, size) if syntax == "compel" else _fill(units, size)

    def to_ids(self, chunk: Chunk) -> list[int]:
        """Return the token ids of a chunk, with start token, end token and padding."""
        ids = [tokenizer.START, *(i for unit in chunk for i in unit.ids), tokenizer.END]
        return ids + [self.variant.pad] * (self.length - len(ids))

    def weights(self, chunk: Chunk) -> list[float]:
        """Return the weights of a chunk's tokens, (length,)."""
        weights = [1.0, *(unit.weight for unit in chunk for _ in unit.ids)]
        return weights + [1.0] * (self.length - len(weights))

    def pieces(self, chunk: Chunk) -> list[int]:
        """Return the index of the piece of each token, (length,); -1 for special tokens."""
        pieces = [-1, *(unit.piece for unit in chunk for _ in unit.ids)]
        return pieces + [-1] * (self.length - len(pieces))


def _make_units(
    section: Section,
    first: int,
    syntax: str,
    variant: tokenizer.Variant,
    added: tokenizer.AddedTokens,
) -> Iterator[Unit]:
    groups = {ids[0]: tuple(ids) for ids in added.values() if ids}
    for number, piece in enumerate(section, first):
        for word in _split_comfy_words(piece, added) if syntax == "comfy" else [piece.text]:
            ids = tokenizer.encode(word, variant, added)
            if syntax == "comfy" and 0 < len(ids) < WORD_LIMIT and min(ids) >= 0:
                yield Unit(tuple(ids), piece.weight, number)
                continue
            position = 0
            while position < len(ids):
                group = groups.get(ids[position], (ids[position],))
                yield Unit(group, piece.weight, number)
                position += len(group)


def _split_comfy_words(piece: Piece, added: tokenizer.AddedTokens) -> list[str]:
    """Split at white space outside textual inversions, and drop `embedding:` before them."""
    names = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
    text = piece.text
    if names:
        text = re.sub(rf"\bembedding:(?={names})", "", text, flags=re.IGNORECASE)
    spaced = [re.escape(name) for name in sorted(added, key=len, reverse=True) if " " in name]
    return re.findall("|".join([*spaced, r"\S+"]), text, re.IGNORECASE)


def split_at_commas(
    sections: Sequence[Chunk], size: int = 75, backtrack: int = BACKTRACK
) -> list[Chunk]:
    """Fill chunks; where one overflows soon after a comma, split it after that comma."""
    chunks: list[Chunk] = []
    for number, section in enumerate(sections):
        chunk: Chunk = []
        comma = None  # unit index of the last comma in the chunk
        for unit in section:
            length = _length(chunk)
            if length + len(unit.ids) > size:
                is_token = unit.ids[0] >= 0 and unit.ids[0] != COMMA
                if comma is not None and is_token and _length(chunk[comma:]) <= backtrack:
                    chunks.append(chunk[: comma + 1])
                    chunk = chunk[comma + 1 :]
                else:
                    chunks.append(chunk)
                    chunk = []
                comma = None
            if unit.ids == (COMMA,):
                comma = len(chunk)
            chunk.append(unit)
        is_last = number == len(sections) - 1
        if chunk or not is_last or not chunks:
            chunks.append(chunk)
    return chunks


def _fill(units: Sequence[Unit], size: int) -> list[Chunk]:
    chunks: list[Chunk] = [[]]
    for unit in units:
        if _length(chunks[-1]) + len(unit.ids) > size:
            chunks.append([])
        chunks[-1].append(unit)
    return chunks


def _split_at_sentences(units: Sequence[Unit], size: int) -> list[Chunk]:
    """Split after the last period that fits, else the last of `,.;:`, else a word, as compel."""
    chunks: list[Chunk] = []
    rest = list(units)
    while _length(rest) > size:
        fitting = bisect_right(list(accumulate(len(unit.ids) for unit in rest)), size)
        last_ids = [max(unit.ids[-1], INVERSION) for unit in rest[:fitting]]
        ends = (
            end
            for symbols in _split_ids()
            for end in range(fitting, 0, -1)
            if last_ids[end - 1] in symbols
        )
        end = next(ends, fitting)
        chunks.append(rest[:end])
        rest = rest[end:]
    return [*chunks, rest] if rest or not chunks else chunks


@cache
def _split_ids() -> tuple[frozenset[int], ...]:
    """Return the ids after which to split, in order of preference."""
    ids, _ = tokenizer.load_vocabulary()
    symbols = [ids[symbol + "</w>"] for symbol in ".,;:"]
    words = (number for symbol, number in ids.items() if symbol.endswith("</w>"))
    return frozenset(symbols[:1]), frozenset(symbols), frozenset([*words, INVERSION])


def _length(units: Sequence[Unit]) -> int:
    return sum(len(unit.ids) for unit in units)
