"""Parse the syntax of ComfyUI: (x) for weight 1.1, (x:1.3) for 1.3; nothing else.

A number replaces the weights of the brackets around it; brackets without a number multiply.
"""

import re

from ldm.prompts.prompt import ParsedPrompt, Part, Piece, Prompt, PromptSteps, join_pieces, quote
from ldm.runtime.errors import ArgumentError

__all__ = ["parse", "parse_weights"]

ROUND_FACTOR = 1.1
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
    for part, is_group in _split_groups(text):
        if not is_group:
            pieces.append(Piece(re.sub(r"\\([()])", r"\1", part), weight))
        elif match := WEIGHT.match(part):
            pieces += parse_weights(match[1], float(match[2]))
        else:
            pieces += parse_weights(part, weight * ROUND_FACTOR)
    return [piece for piece in pieces if piece.text]


def _split_groups(text: str) -> list[tuple[str, bool]]:
    """Split a text into (text, whether it was in brackets), without these brackets."""
    parts: list[tuple[str, bool]] = []
    depth, current = 0, ""
    for token in TOKENS.findall(text):
        if token == "(":
            depth += 1
            if depth == 1:
                parts.append((current, False))
                current = ""
                continue
        elif token == ")":
            depth -= 1
            if depth == 0:
                parts.append((current, True))
                current = ""
                continue
            if depth < 0:
                raise ArgumentError(rf"`)` without `(` in {quote(text)}: `\)` is a plain bracket")
        current += token
    if depth:
        raise ArgumentError(rf"`(` is not closed in {quote(text)}: `\(` is a plain bracket")
    return [*parts, (current, False)]
