"""Parse a prompt in a syntax chosen by name."""

from collections.abc import Callable
from functools import partial

from ldm.prompts import a1111, comfy, compel
from ldm.prompts.prompt import ParsedPrompt
from ldm.runtime.errors import ArgumentError, check_name

__all__ = ["PLAIN", "SYNTAXES", "check_syntax", "parse_prompt"]

PLAIN = "plain"
PARSERS: dict[str, Callable[[str, int, bool], ParsedPrompt]] = {
    **{syntax: partial(a1111.parse, syntax=syntax) for syntax in a1111.EMPHASIS_MODES},
    "comfy": lambda text, steps, is_negative: comfy.parse(text),
    "compel": lambda text, steps, is_negative: compel.parse(text, steps),
}
SYNTAXES = (PLAIN, *PARSERS)


def check_syntax(syntax: str) -> None:
    """Raise UnknownName for a name that is not in SYNTAXES."""
    check_name("syntax", syntax, SYNTAXES, argument="syntax")


def parse_prompt(
    text: str, syntax: str, steps: int = 50, *, is_negative: bool = False
) -> ParsedPrompt:
    """Parse a prompt.

    Args:
        syntax: A name in SYNTAXES other than "plain", which is not parsed.
        steps: Number of steps of the run, for schedules.
        is_negative: Whether it is a negative prompt, in which a1111's AND is a plain word.

    Raises:
        ArgumentError: Brackets are not closed, or an operator has invalid arguments.
    """
    check_syntax(syntax)
    try:
        return PARSERS[syntax](text, steps, is_negative)
    except ArgumentError as error:
        error.argument = "negative_prompt" if is_negative else "prompt"
        raise
    except RecursionError as error:
        raise ArgumentError("brackets are nested too deeply in a prompt", "prompt") from error
