"""Parse the syntax of AUTOMATIC1111's web UI, in its order: AND, schedules, emphasis.

a AND b :0.5      two subprompts, whose guidance is summed with weights
[a:b:w] [b:w]     a, or nothing, until step w (or fraction w of the steps), then b
[a::w]            a until then, then nothing
[a|b|c]           alternate between a, b and c each step
(x) (x:1.3) [x]   weight 1.1, 1.3, 1/1.1
BREAK             start a new chunk of tokens

There is one syntax for each value of A1111's setting "Emphasis".
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ldm.prompts.prompt import (
    ParsedPrompt,
    Part,
    Piece,
    Prompt,
    PromptSteps,
    Text,
    join_pieces,
    quote,
)

__all__ = ["EMPHASIS_MODES", "expand_schedule", "parse", "parse_emphasis", "split_subprompts"]

# Syntax -> value of A1111's setting "Emphasis".
EMPHASIS_MODES = {
    "a1111": "Original",  # weights scale the context, then the mean of each chunk is restored
    "a1111_no_norm": "No norm",  # weights scale the context
    "a1111_ignore": "Ignore",  # weights have no effect
    "a1111_none": "None",  # brackets are plain text
}

ROUND_BRACKET_FACTOR, SQUARE_BRACKET_FACTOR = 1.1, 1 / 1.1
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
EMPHASIS = re.compile(rf"\\[()\[\]\\]|\\|\(|\[|:\s*(?P<weight>{NUMBER})\s*\)|\)|\]|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
SUBPROMPT_WEIGHT = re.compile(rf"\s*:\s*({NUMBER})\s*$")
SWITCH_STEP = re.compile(rf"\s*({NUMBER})\s*\]")
PLAIN_TEXT = re.compile(r"(?:[^\\\[\]():|]|\\.)+", re.DOTALL)


def parse(text: str, steps: int, is_negative: bool, *, syntax: str) -> ParsedPrompt:
    """Parse a prompt.

    Args:
        steps: Number of steps of the run, for schedules.
        is_negative: Whether it is a negative prompt, in which AND is a plain word.
        syntax: A key of EMPHASIS_MODES.
    """
    subprompts, warnings = [], []
    for subprompt, weight in [(text, 1.0)] if is_negative else split_subprompts(text):
        entries, new_warnings = expand_schedule(subprompt, steps)
        prompts = ((last, _build_prompt(entry, syntax)) for last, entry in entries)
        subprompts.append(PromptSteps(tuple(prompts), weight))
        warnings += new_warnings
    return ParsedPrompt(tuple(subprompts), tuple(warnings))


def _build_prompt(text: str, syntax: str) -> Prompt:
    sections = ((Piece(text),),) if syntax == "a1111_none" else parse_emphasis(text)
    if syntax == "a1111_ignore":  # pieces stay separate, to be tokenized as in the other syntaxes
        sections = tuple(tuple(replace(p, weight=1.0) for p in section) for section in sections)
    return Prompt(syntax, (Part((sections,)),))


def split_subprompts(text: str) -> list[tuple[str, float]]:
    """Split a text at AND into (subprompt, weight); a text without AND has weight 1."""
    subprompts = re.split(r"\bAND\b", text)
    if len(subprompts) == 1:
        return [(text, 1.0)]
    weighted = []
    for subprompt in subprompts:
        match = SUBPROMPT_WEIGHT.search(subprompt)
        item = (subprompt[: match.start()], float(match[1])) if match else (subprompt, 1.0)
        weighted.append(item)
    return weighted


def parse_emphasis(text: str) -> Text:
    """Parse brackets into sections, separated by BREAK, of pieces with weights."""
    # None stands for BREAK.
    pieces: list[tuple[str | None, float]] = []
    open_round_brackets: list[int] = []  # index of the first piece in each open bracket
    open_square_brackets: list[int] = []

    def multiply_weights(first: int, factor: float) -> None:
        pieces[first:] = [(piece, weight * factor) for piece, weight in pieces[first:]]

    for match in EMPHASIS.finditer(text):
        token = match[0]
        if token == "(":
            open_round_brackets.append(len(pieces))
        elif token == "[":
            open_square_brackets.append(len(pieces))
        elif match["weight"] is not None and open_round_brackets:
            multiply_weights(open_round_brackets.pop(), float(match["weight"]))
        elif token == ")" and open_round_brackets:
            multiply_weights(open_round_brackets.pop(), ROUND_BRACKET_FACTOR)
        elif token == "]" and open_square_brackets:
            multiply_weights(open_square_brackets.pop(), SQUARE_BRACKET_FACTOR)
        elif token.startswith("\\") and len(token) == 2:
            pieces.append((token[1], 1.0))
        else:
            for index, section in enumerate(BREAK.split(token)):
                if index:
                    pieces.append((None, 1.0))
                pieces.append((section, 1.0))
    for first in open_round_brackets:
        multiply_weights(first, ROUND_BRACKET_FACTOR)
    for first in open_square_brackets:
        multiply_weights(first, SQUARE_BRACKET_FACTOR)
    sections: list[list[Piece]] = [[]]
    for piece, weight in pieces:
        if piece is None:
            sections.append([])
        elif piece:
            sections[-1].append(Piece(piece, weight))
    return tuple(map(join_pieces, sections))


Node = Callable[[int], str]  # step, counted from 1 -> text


@dataclass
class _ScheduleParser:
    """Recursive descent parser of one text; collects the steps after which the text may change."""

    text: str
    steps: int
    position: int = 0
    switch_steps: set[int] = field(default_factory=set)
    literal_brackets: list[str] = field(default_factory=list)

    def parse_all(self) -> Node | None:
        """Parse the whole text; return None if it has a `|` outside of brackets."""
        nodes: list[Node] = []
        while self.position < len(self.text):
            nodes.append(self.parse_sequence())
            if self.position == len(self.text):
                break
            if self.next_char in "|\\":
                return None
            if self.next_char == "[":
                self.record_literal_bracket()
            nodes.append(_make_constant(self.next_char))  # a bracket or colon without meaning here
            self.position += 1
        return _concatenate(nodes)

    @property
    def next_char(self) -> str:
        return self.text[self.position : self.position + 1]

    def parse_sequence(self) -> Node:
        """Parse up to a character that does not start a text or bracket."""
        nodes: list[Node] = []
        while self.position < len(self.text):
            if plain := PLAIN_TEXT.match(self.text, self.position):
                nodes.append(_make_constant(plain[0]))
                self.position = plain.end()
                continue
            start, switch_steps = self.position, set(self.switch_steps)
            parsers = {"(": self.parse_round_bracket, "[": self.parse_square_bracket}
            node = parsers[self.next_char]() if self.next_char in parsers else None
            if node is None:
                self.position, self.switch_steps = start, switch_steps
                break
            nodes.append(node)
        return _concatenate(nodes)

    def take(self, char: str) -> bool:
        """Skip a character; return False if it is not next."""
        is_next = self.next_char == char
        self.position += is_next
        return is_next

    def parse_round_bracket(self) -> Node | None:
        self.take("(")
        nodes = [_make_constant("("), self.parse_sequence()]
        if self.take(":"):
            nodes += [_make_constant(":"), self.parse_sequence()]
        return _concatenate([*nodes, _make_constant(")")]) if self.take(")") else None

    def parse_square_bracket(self) -> Node | None:
        """Parse a schedule, alternatives, or `[less]`, which `parse_emphasis` will read."""
        self.take("[")
        first = self.parse_sequence()
        if self.take("]"):
            return _concatenate([_make_constant("["), first, _make_constant("]")])
        if self.next_char == "|":
            return self.parse_alternatives(first)
        if not self.take(":"):
            return None
        if switch := SWITCH_STEP.match(self.text, self.position):
            return self.make_switch(_make_constant(""), first, switch)
        second = self.parse_sequence()
        if self.take(":") and (switch := SWITCH_STEP.match(self.text, self.position)):
            return self.make_switch(first, second, switch)
        return None

    def parse_alternatives(self, first: Node) -> Node | None:
        nodes = [first]
        while self.take("|"):
            nodes.append(self.parse_sequence())
        self.switch_steps |= set(range(1, self.steps + 1))
        return (lambda step: nodes[(step - 1) % len(nodes)](step)) if self.take("]") else None

    def make_switch(self, before: Node, after: Node, switch: re.Match[str]) -> Node:
        """Build the node of a schedule, given the match of its step and closing bracket."""
        self.position = switch.end()
        last_step = self.find_last_step(switch[1])
        if last_step >= 1:
            self.switch_steps.add(last_step)
        return lambda step: (before if step <= last_step else after)(step)

    def find_last_step(self, number: str) -> int:
        """Return the last step before a switch: a number with a dot is a fraction of the steps."""
        step = float(number) * (self.steps if "." in number else 1)
        return int(max(0, min(step, self.steps)))  # clamped first: it may be infinite

    def record_literal_bracket(self) -> None:
        """Record the bracket at this position if it looks like a schedule."""
        end, depth = self.position, 0
        for end in range(self.position, len(self.text)):
            depth += {"[": 1, "]": -1}.get(self.text[end], 0)
            if depth == 0:
                break
        group = self.text[self.position : end + 1]
        if ":" in re.sub(r"\\.|\([^()]*\)|(?<=.)\[[^][]*\]", "", group):
            self.literal_brackets.append(group)


def expand_schedule(text: str, steps: int) -> tuple[list[tuple[int, str]], list[str]]:
    """Expand schedules and alternation into (last step, text) entries, in order.

    Returns:
        The entries, and warnings about text that was read literally.
    """
    parser = _ScheduleParser(text, steps)
    node = parser.parse_all()
    if node is None:
        warning = f"a schedule is read as plain text, as `|` stands outside of [ ]: {quote(text)}"
        return [(steps, text)], [warning] if "[" in text else []
    last_steps = sorted({*parser.switch_steps, steps})
    warnings = [
        f"not a schedule, read as plain text: {quote(group)}" for group in parser.literal_brackets
    ]
    return [(last, node(last)) for last in last_steps], warnings


def _make_constant(text: str) -> Node:
    return lambda step: text


def _concatenate(nodes: list[Node]) -> Node:
    return lambda step: "".join(node(step) for node in nodes)
