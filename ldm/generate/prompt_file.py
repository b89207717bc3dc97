"""Prompt files: one prompt per line, which may end in options of its own."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ldm.runtime.errors import ArgumentError
from ldm.runtime.files import read_text

__all__ = ["PromptLine", "read_prompt_file"]

LINE_OPTION = re.compile(r"(?:^|\s)--(?:seed|negative[-_]prompt)(?=[\s=]|$)")


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file; None = not set by the line."""

    prompt: str
    negative_prompt: str | None = None
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
        if not name.startswith("--") or key not in ("seed", "negative_prompt"):
            raise ArgumentError(
                f"{where}: `{name}` is not an option of a line; options are "
                '--seed N and --negative-prompt "TEXT"'
            )
        if not equals and not words:
            raise ArgumentError(f"{where}: {name} needs a value")
        options[key] = value if equals else words.pop(0)
    try:
        seed = int(options["seed"]) if "seed" in options else None
    except ValueError as error:
        raise ArgumentError(f"{where}: seed `{options['seed']}` is not a number") from error
    return PromptLine(text[: match.start()], options.get("negative_prompt"), seed)
