"""Prompt syntaxes: parse a text into pieces with weights, chunks and a schedule over the steps.

    plain     the text itself, as in the original programs
    a1111     (emphasis:1.3), [less], BREAK, AND, [from:to:when], [one|another]
    comfy     (emphasis:1.3)
    compel    emphasis+, (emphasis)1.3, ("one", "another").blend(0.7, 0.3), .and(), a.swap(b)

Each syntax is a module of pure functions; text encoders encode a `Prompt` as a context.
"""

from ldm.prompts.prompt import ParsedPrompt, Part, Piece, Prompt, PromptSteps, PromptWarning
from ldm.prompts.syntax import PLAIN, SYNTAXES, check_syntax, parse_prompt

__all__ = [
    "PLAIN", "SYNTAXES", "ParsedPrompt", "Part", "Piece", "Prompt", "PromptSteps", "PromptWarning",
    "check_syntax", "parse_prompt",
]  # fmt: skip
