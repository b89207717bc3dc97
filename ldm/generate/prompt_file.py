"""Prompt files: one prompt per line, which may end in options of its own."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ldm.runtime.errors import ArgumentError
from ldm.runtime.files import read_text

__all__ = ["PromptLine", "read_prompt_file"]

TEXTS = ("negative_prompt", "prompt_2", "negative_prompt_2")
LINE_OPTION = re.compile(r"(?:^|\s)--(?:seed|prompt[-_]2|negative[-_]prompt(?:[-_]2)?)(?=[\s=]|$)")


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file.

    Args:
        texts: other prompts that the line sets, by name in TEXTS.
        seed: None = not set.
    """

    prompt: str
    texts: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None


def read_prompt_file(path: Path) -> list[PromptLine]:
    """Read a prompt file; a blank line is an empty prompt.

    Raises:
        ArgumentError: a mistake, with file and line.
        FileFormatError: see `read_text`.
    """
    lines = [
        _parse_line(line, f"{path}:{number}")
        for number, line in enumerate(read_text(path).splitlines(), start=1)
    ]
    if not lines:
        raise ArgumentError(f"{path} is empty", "from_file")
    return lines


def _parse_line(text: str, where: str) -> PromptLine:
    match = LINE_OPTION.search(text)
    if match is None:
        return PromptLine(text)
    try:
        words = shlex.split(text[match.start() :])
    except ValueError as error:
        raise ArgumentError(f"{where}: {str(error).lower()} in `{text.strip()}`") from error
    options: dict[str, str] = {}
    while words:
        name, equals, value = words.pop(0).partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or key not in ("seed", *TEXTS):
            raise ArgumentError(
                f"{where}: `{name}` is not an option of a line; options are --seed N, "
                '--negative-prompt "TEXT", --prompt-2 "TEXT" and --negative-prompt-2 "TEXT"'
            )
        if not equals and not words:
            raise ArgumentError(f"{where}: {name} needs a value")
        options[key] = value if equals else words.pop(0)
    try:
        seed = int(options["seed"]) if "seed" in options else None
    except ValueError as error:
        raise ArgumentError(f"{where}: seed `{options['seed']}` is not a number") from error
    texts = {name: options[name] for name in TEXTS if name in options}
    return PromptLine(text[: match.start()], texts, seed)
