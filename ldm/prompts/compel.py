"""Parse the syntax of compel, which InvokeAI uses.

    word+ word-- (a b)++ "a b"1.3 (a b)1.3    weight times 1.1 per plus, 0.9 per minus, or 1.3
    ("one", "another").blend(0.7, 0.3)        sum of contexts with weights, normalized to 1
    ("one", "another").and(1, 0.5)            concatenated contexts, with weights
    cat.swap(dog, t_start=0.2, t_end=1)       cat, but dog between these fractions of the steps

With `no_normalize` as its last argument, blend does not normalize its weights. `swap` changes the
text during sampling, not attention maps. Invalid syntax is read literally, as in compel, but
brackets must be closed.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ldm.prompts.prompt import (
    ParsedPrompt,
    Part,
    Piece,
    Prompt,
    PromptSteps,
    Section,
    join_pieces,
    quote,
)
from ldm.runtime.errors import ArgumentError

__all__ = ["parse"]

PLUS_FACTOR, MINUS_FACTOR = 1.1, 0.9
SPECIAL = r'()",.+\-='  # characters of the syntax
WORD = re.compile(rf"(?:\\[{SPECIAL}]|[+-](?![\s{SPECIAL}]|$)|[^\s{SPECIAL}])+")
FREE_WORD = re.compile(r"\S+")
QUOTED = re.compile(r'"((?:\\"|[^"\n])*)"')
SIGNS = re.compile(r"\++|-+")
NUMBER = re.compile(r"\d+\.\d*|\.\d+|\d+")
OPTION = re.compile(r"\s*(?:([\w-]+)\s*=\s*)?([+-]?(?:\d+\.\d*|\.\d+)|[\w-]+)\s*")
SWAP_DEFAULTS = {"t_start": "0.2", "t_end": "1"}
LORA = re.compile(r"\b(?:use|with)Lora\s*\(")


@dataclass(frozen=True)
class Swap:
    """A text that is replaced by another one from fraction t_start to t_end of the steps."""

    original: tuple[Piece, ...]
    edited: tuple[Piece, ...]
    t_start: float
    t_end: float


Item = Piece | Swap
Items = list[Item]


def parse(text: str, steps: int) -> ParsedPrompt:
    """Parse a prompt."""
    _check_brackets(text)
    if LORA.search(text):
        raise ArgumentError(f"withLora is not supported, pass LoRAs separately: {quote(text)}")
    blends = _parse_operators(re.sub(r",(\S)", r", \1", text))
    texts = [items for blend in blends for items in blend.texts]
    swaps = [item for items in texts for item in items if isinstance(item, Swap)]
    fractions = {fraction for swap in swaps for fraction in (swap.t_start, swap.t_end)}
    first_steps = {_find_first_step(fraction, steps) for fraction in fractions}
    last_steps = [*sorted(first - 1 for first in first_steps if 0 < first < steps), steps]
    entries = [(last, _build_prompt(blends, last, steps)) for last in last_steps]
    return ParsedPrompt((PromptSteps(tuple(entries)),))


@dataclass(frozen=True)
class _Blend:
    """A `Part` before swaps are applied: the items of each text, usually of one."""

    texts: tuple[Items, ...]
    mix: tuple[float, ...] = (1.0,)
    weight: float = 1.0


def _build_prompt(blends: list[_Blend], step: int, steps: int) -> Prompt:
    parts = [
        Part(
            tuple((_build_section(items, step, steps),) for items in blend.texts),
            blend.mix,
            blend.weight,
        )
        for blend in blends
    ]
    return Prompt("compel", tuple(parts))


def _build_section(items: Items, step: int, steps: int) -> Section:
    """Return the pieces of a step: apply swaps, and join neighbors of equal weight."""
    pieces: list[Piece] = []
    for item in items:
        if isinstance(item, Piece):
            pieces.append(item)
        else:
            fractions = (item.t_start, item.t_end)
            start, end = (_find_first_step(fraction, steps) for fraction in fractions)
            pieces += item.edited if start <= step < end else item.original
    return join_pieces(pieces, " ")


def _find_first_step(fraction: float, steps: int) -> int:
    """Return the first step at or after a fraction of the steps; 1 is after all of them."""
    # Rounded, as 0.07 of 100 steps is 7.000000000000001 in floats.
    return math.ceil(round(fraction * steps, 6)) if fraction < 1 else steps + 1


def _check_brackets(text: str) -> None:
    depth = 0
    for token in re.findall(r"\\.|[()]", text):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth < 0:
            break
    if depth:
        problem = "`(` is not closed" if depth > 0 else "`)` without `(`"
        raise ArgumentError(rf"{problem} in {quote(text)}: `\(` and `\)` are plain brackets")


def _parse_operators(text: str) -> list[_Blend]:
    """Parse a whole prompt: a blend, texts joined by `and`, or a single text."""
    parser = _Parser(text)
    texts = parser.parse_list()
    parser.skip_space()
    operator = re.compile(r"\.(blend|and|add)\s*\(").match(text, parser.position)
    if texts is None or operator is None:
        return [_Blend((_Parser(text).parse_prompt(),))]
    parser.position = operator.end()
    options = parser.parse_options()
    if not parser.take(")") or text[parser.position :].strip():
        raise ArgumentError(f"a prompt must end with its .{operator[1]}(…), got {quote(text)}")
    weights = _parse_weights(options, len(texts), operator[1])
    if operator[1] != "blend":
        return [_Blend((items,), weight=w) for items, w in zip(texts, weights, strict=True)]
    if any(isinstance(item, Swap) for items in texts for item in items):
        raise ArgumentError(f"a blend cannot contain .swap(…), got {quote(text)}")
    return [_Blend(tuple(texts), tuple(weights))]


def _parse_weights(options: list[tuple[str, str]], count: int, operator: str) -> list[float]:
    """Return the weight of each text; in a blend they sum to 1, unless no_normalize is last."""
    is_normalized = operator == "blend"
    if is_normalized and options and options[-1] == ("", "no_normalize"):
        options, is_normalized = options[:-1], False
    try:
        weights = [float(value) for name, value in options if not name] or [1.0] * count
    except ValueError as error:
        raise ArgumentError(f".{operator}(…) takes numbers: {error}") from error
    if not all(map(math.isfinite, weights)):
        raise ArgumentError(f".{operator}(…) takes finite numbers, got {weights}")
    if len(weights) != count or any(name for name, _ in options):
        raise ArgumentError(f".{operator}(…) takes no numbers or one for each of {count} texts")
    total = math.fsum(weights)
    if is_normalized and not total:
        raise ArgumentError(f".{operator}(…): the weights sum to 0")
    return [weight / total for weight in weights] if is_normalized else weights


@dataclass
class _Parser:
    """Recursive descent parser of one text."""

    text: str
    position: int = 0

    def skip_space(self) -> None:
        while self.text[self.position : self.position + 1].isspace():
            self.position += 1

    def take(self, literal: str) -> bool:
        """Skip whitespace and a literal; return False, and do not move, if it is not next."""
        start = self.position
        self.skip_space()
        if self.text.startswith(literal, self.position):
            self.position += len(literal)
            return True
        self.position = start
        return False

    def match(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        return match[0]

    def try_each(self, *parsers: Callable[[], Items | None]) -> Items | None:
        """Return the result of the first parser that succeeds at this position."""
        start = self.position
        for parse in parsers:
            self.skip_space()
            items = parse()
            if items is not None:
                return items
            self.position = start
        return None

    def parse_prompt(self) -> Items:
        """Parse to the end; invalid syntax is read as text up to the next whitespace."""
        items: Items = []
        while True:
            self.skip_space()
            if self.position == len(self.text):
                return items
            parsed = self.try_each(
                self.parse_swap, self.parse_attention, self.parse_quoted, self.parse_round_bracket
            )
            if parsed is None:
                parsed = [_make_piece(self.match(FREE_WORD) or "")]
            items += parsed

    def parse_fragment(self, *more_parsers: Callable[[], Items | None]) -> Items:
        """Parse as much valid syntax as possible, and what other parsers accept."""
        items: Items = []
        while True:
            parsed = self.try_each(
                self.parse_attention, self.parse_swap, self.parse_round_bracket, self.parse_quoted,
                self.parse_word, *more_parsers,
            )  # fmt: skip
            if parsed is None:
                return items
            items += parsed

    def parse_sentence(self) -> Items:
        """Parse a fragment with commas and periods."""
        return self.parse_fragment(self.parse_comma_or_period)

    def parse_comma_or_period(self) -> Items | None:
        token = self.match(re.compile(r"[,.]"))
        return None if token is None else [_make_piece(token)]

    def parse_word(self) -> Items | None:
        word = self.match(WORD)
        return None if word is None else [_make_piece(word)]

    def parse_quoted(self) -> Items | None:
        content = self.parse_quotes()
        if content is None:
            return None
        inner = _Parser(content)
        items = inner.parse_sentence()
        inner.skip_space()
        return (items or [Piece("")]) if inner.position == len(content) else None

    def parse_quoted_prompt(self) -> Items | None:
        content = self.parse_quotes()
        return None if content is None else _Parser(content).parse_prompt()

    def parse_quotes(self) -> str | None:
        """Return the content of quotes; escaped quotes in it stay escaped."""
        token = self.match(QUOTED)
        return None if token is None else token[1:-1]

    def parse_round_bracket(self) -> Items | None:
        if not self.take("("):
            return None
        items = self.parse_sentence()
        return items if self.take(")") else None

    def parse_target(self) -> Items | None:
        """Parse the text before an operator."""
        return self.try_each(self.parse_quoted, self.parse_round_bracket, self.parse_word)

    def parse_attention(self) -> Items | None:
        """Parse a target with a weight."""
        start = self.position
        items = self.parse_target()
        if items is not None and self.take(".attend") and self.take("("):
            self.skip_space()
            weight = self.parse_weight(takes_number=True)
            return _scale(items, weight) if weight is not None and self.take(")") else None
        self.position = start
        items, takes_number = self.try_each(self.parse_quoted, self.parse_round_bracket), True
        if items is None:
            items, takes_number = self.parse_word(), False
        if items is None:
            return None
        weight = self.parse_weight(takes_number)
        return None if weight is None else _scale(items, weight)

    def parse_weight(self, takes_number: bool) -> float | None:
        if signs := self.match(SIGNS):
            return float((PLUS_FACTOR if signs[0] == "+" else MINUS_FACTOR) ** len(signs))
        number = self.match(NUMBER) if takes_number else None
        return None if number is None else float(number)

    def parse_swap(self) -> Items | None:
        """Parse `target.swap(text, t_start=…, t_end=…)`."""
        original = self.parse_target()
        if original is None or not self.take(".swap") or not self.take("("):
            return None
        edited = self.parse_fragment()
        options = self.parse_options() if self.take(",") else []
        if not self.take(")"):
            return None
        values = SWAP_DEFAULTS | dict(options)
        if unknown := values.keys() - SWAP_DEFAULTS.keys():
            name = min(unknown)
            raise ArgumentError(f".swap(…) takes t_start and t_end, not `{name}`")
        if any(isinstance(item, Swap) for item in [*original, *edited]):
            raise ArgumentError(".swap(…) cannot contain another .swap(…)")
        try:
            start, end = float(values["t_start"]), float(values["t_end"])
        except ValueError as error:
            raise ArgumentError(f".swap(…): {error}") from error
        if not 0 <= start < end <= 1:
            raise ArgumentError(
                f".swap(…) takes 0 <= t_start < t_end <= 1, got {start:g} and {end:g}"
            )
        pieces = [
            tuple(item for item in items if isinstance(item, Piece)) or (Piece(""),)
            for items in (original, edited)
        ]
        return [Swap(pieces[0], pieces[1], start, end)]

    def parse_options(self) -> list[tuple[str, str]]:
        """Parse `name=value, value, …` into (name, value); the name may be ""."""
        options: list[tuple[str, str]] = []
        while match := OPTION.match(self.text, self.position):
            options.append((match[1] or "", match[2]))
            self.position = match.end()
            if not self.take(","):
                break
        return options

    def parse_list(self) -> list[Items] | None:
        """Parse the texts of `(text, text, …)` before `.blend` and `.and`."""
        if not self.take("("):
            return None
        texts: list[Items] = []
        while True:
            items = self.try_each(self.parse_target, self.parse_quoted_prompt)
            if items is None:
                return None
            texts.append(items)
            if not self.take(","):
                return texts if self.take(")") else None


def _make_piece(text: str) -> Piece:
    return Piece(re.sub(r'\\([()"])', r"\1", text))


def _scale(items: Items, weight: float) -> Items:
    scaled: Items = []
    for item in items:
        if isinstance(item, Piece):
            scaled.append(replace(item, weight=weight * item.weight))
        else:
            original, edited = (
                tuple(replace(piece, weight=weight * piece.weight) for piece in pieces)
                for pieces in (item.original, item.edited)
            )
            scaled.append(replace(item, original=original, edited=edited))
    return scaled
