"""Parse a text by the name of its syntax."""

from collections.abc import Callable

from ldm.prompts import a1111, comfy, compel
from ldm.prompts.prompt import ParsedPrompt
from ldm.runtime.errors import ArgumentError, check_name

__all__ = ["PLAIN", "SYNTAXES", "check_syntax", "parse_prompt"]

PLAIN = "plain"
PARSERS: dict[str, Callable[[str, int, bool], ParsedPrompt]] = {
    "a1111": lambda text, steps, is_negative: a1111.parse(text, steps, composes=not is_negative),
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
    """Parse a text for a run of so many steps.

    Args:
        syntax: A name in SYNTAXES but "plain", whose texts stay strings.
        is_negative: Whether it is a negative prompt, in which a1111 has no AND.

    Raises:
        ArgumentError: Brackets that are not closed, or values that the syntax does not take.
    """
    check_syntax(syntax)
    try:
        return PARSERS[syntax](text, steps, is_negative)
    except ArgumentError as error:
        error.argument = "negative_prompt" if is_negative else "prompt"
        raise
    except RecursionError as error:
        raise ArgumentError("brackets are nested too deeply in a prompt", "prompt") from error
