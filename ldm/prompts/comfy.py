"""Parse the syntax of ComfyUI: (x) for weight 1.1, (x:1.3) for 1.3; nothing else.

A number replaces the weights of the brackets around it; brackets without a number multiply.
"""

import re

from ldm.prompts.prompt import ParsedPrompt, Part, Piece, Prompt, PromptSteps, join_pieces, quote
from ldm.runtime.errors import ArgumentError

__all__ = ["parse", "parse_weights"]

ROUND_BRACKET_FACTOR = 1.1
TOKENS = re.compile(r"\\[()]|[()]|[^\\()]+|\\")
WEIGHT = re.compile(r"(.+):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$", re.DOTALL)


def parse(text: str) -> ParsedPrompt:
    """Parse a prompt."""
    section = join_pieces(parse_weights(text))
    prompt = Prompt("comfy", (Part(((section,),)),))
    return ParsedPrompt((PromptSteps(((0, prompt),)),))


def parse_weights(text: str, weight: float = 1.0) -> list[Piece]:
    r"""Parse brackets into pieces with weights; `\(` and `\)` are plain brackets."""
    pieces: list[Piece] = []
    for group, is_bracketed in _split_groups(text):
        if not is_bracketed:
            pieces.append(Piece(re.sub(r"\\([()])", r"\1", group), weight))
        elif match := WEIGHT.match(group):
            pieces += parse_weights(match[1], float(match[2]))
        else:
            pieces += parse_weights(group, weight * ROUND_BRACKET_FACTOR)
    return [piece for piece in pieces if piece.text]


def _split_groups(text: str) -> list[tuple[str, bool]]:
    """Split a text into (text, whether it was in brackets), without these brackets."""
    groups: list[tuple[str, bool]] = []
    depth, current = 0, ""
    for token in TOKENS.findall(text):
        if token == "(":
            depth += 1
            if depth == 1:
                groups.append((current, False))
                current = ""
                continue
        elif token == ")":
            depth -= 1
            if depth == 0:
                groups.append((current, True))
                current = ""
                continue
            if depth < 0:
                raise ArgumentError(rf"`)` without `(` in {quote(text)}: `\)` is a plain bracket")
        current += token
    if depth:
        raise ArgumentError(rf"`(` is not closed in {quote(text)}: `\(` is a plain bracket")
    return [*groups, (current, False)]
