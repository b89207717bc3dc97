"""Read prompt files: one prompt per line, which may end in its own options.

    a fox --steps 20 --seed 7 --negative-prompt "blurry, dull"       our flags
    a fox --s 20 --d 7,8,9 --n blurry, dull --w 512 --h 768           those of kohya's scripts
    --prompt "a fox" --steps 20 --cfg_scale 7 --sampler_name "Euler a"    those of A1111

A value ends where the next option begins; quotes around it are removed.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.diffusion.names import SAMPLERS
from ldm.generate.options import (
    Option,
    Value,
    decode_option,
    options_of,
    parse_count,
    parse_integer,
)
from ldm.imaging.metadata import parse_sampler
from ldm.runtime.errors import ArgumentError, LdmError
from ldm.runtime.files import read_text

if TYPE_CHECKING:
    from ldm.generate.tasks.base import Task

__all__ = ["PromptLine", "line_options", "read_prompt_file"]

TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
COUNTS = ("n_samples", "n_iter")  # their product is the number of images of a line
# Names of kohya's scripts and of A1111, where they are not among ours -> option.
FOREIGN = {
    "n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "l": "scale", "s": "steps",
    "t": "strength", "ss": "sampler", "cfg_scale": "scale", "width": "width", "height": "height",
    "sampler_name": "sampler", "batch_size": "n_samples",
}  # fmt: skip
KOHYA_SAMPLERS = {
    "dpm_2": "dpm2", "dpm_2_a": "dpm2_a", "dpmsolver++": "dpmpp_2m", "k_lms": "lms",
    "k_euler": "euler", "k_euler_a": "euler_a", "k_dpm_2": "dpm2", "k_dpm_2_a": "dpm2_a",
}  # fmt: skip
OF_RUN = ("legacy",)  # options of sampling that apply to the whole run
WORD = re.compile(r"(?:^|\s)--([A-Za-z][\w-]*)(?=[\s=]|$)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file.

    Args:
        texts: other prompts that the line sets, by name in TEXTS.
        seeds: seeds of its first images; () = not set.
        count: number of images.
        values: other options that the line sets, by name.
    """

    prompt: str
    texts: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    count: int = 1
    values: Mapping[str, Value] = field(default_factory=dict)


def read_prompt_file(path: Path, task: "Task") -> list[PromptLine]:
    """Read a prompt file; a blank line is an empty prompt.

    Args:
        task: determines the options that lines may set.
    Raises:
        ArgumentError: a line is invalid; the message names file and line.
        FileFormatError: see `read_text`.
    """
    options, names = task.options(), line_options(task)
    lines = []
    for number, text in enumerate(read_text(path).splitlines(), start=1):
        try:
            lines.append(_parse_line(text, names, options))
        except LdmError as error:
            raise ArgumentError(f"{path}:{number}: {error}") from error
        for word in WORD.finditer(lines[-1].prompt):
            log.warning("%s:%d: `--%s` is read as text of the prompt", path, number, word[1])
    if not lines:
        raise ArgumentError(f"{path} is empty", "from_file")
    return lines


def line_options(task: "Task") -> dict[str, str]:
    """Return the options that a line may set, by the names for them, without dashes."""
    names = {text: text for text in TEXTS} | {count: count for count in COUNTS}
    groups, options = task.groups(), task.options()
    for group in ("inputs", "sampling", "sdxl"):
        for name in options_of(groups[group]) if group in groups else ():
            option, _ = options[name]
            if name not in OF_RUN and not (option.is_path or option.is_switch or option.is_list):
                names |= {_key(flag): name for flag in option.flags}
    return names


def _parse_line(
    text: str, names: Mapping[str, str], options: Mapping[str, tuple[Option, Value]]
) -> PromptLine:
    allowed = names.keys() | FOREIGN.keys()
    first = next((word for word in WORD.finditer(text) if _key(word[1]) in allowed), None)
    if first is None:
        return PromptLine(text)
    prompt, values = text[: first.start()], {}
    for flag, value in _split_options(text[first.start() :].strip()):
        name = names.get(_key(flag)) or FOREIGN.get(_key(flag))
        if name is None or name not in {*names.values()}:
            raise ArgumentError(f"`--{flag}` is not an option that a line may set")
        if not value and name not in TEXTS:
            raise ArgumentError(f"--{flag} needs a value")
        values[name] = value
    texts = {name: values.pop(name) for name in TEXTS if name in values}
    if prompt.strip() and "prompt" in texts:
        raise ArgumentError("a line with --prompt must begin with it")
    seeds = tuple(map(_parse_seed, re.split(r"[\s,]+", values.pop("seed", "")) if "seed" in values
                      else ()))  # fmt: skip
    count = max(len(seeds), 1)
    for name in COUNTS:
        count *= parse_count(values.pop(name, "1"))
    if "sampler" in values and values["sampler"] not in SAMPLERS:
        name = KOHYA_SAMPLERS.get(values["sampler"], values["sampler"])
        values |= parse_sampler({"Sampler": name}, version="ldm")
    checked = {name: decode_option(name, *options[name], value) for name, value in values.items()}
    return PromptLine(texts.pop("prompt", prompt), texts, seeds, count, checked)


def _split_options(text: str) -> list[tuple[str, str]]:
    """Split `--flag value --flag=value` into flags, without dashes, and values."""
    entries, position = [], 0
    while position < len(text):
        word = WORD.match(text, position)
        if word is None:
            name = text[position:].split()[0]
            raise ArgumentError(f"`{name}` is not an option that a line may set")
        start = word.end() + (text[word.end() :][:1] == "=")
        start += len(text[start:]) - len(text[start:].lstrip())
        if (quote := text[start : start + 1]) in ("'", '"'):
            end = re.compile(rf"{quote}(?=\s|$)").search(text, start + 1)
            if end is None:
                raise ArgumentError(f"no closing quotation in `{text}`")
            value, position = text[start + 1 : end.start()], end.end()
        else:
            following = WORD.search(text, start - 1)
            position = following.start() if following else len(text)
            value = text[start:position].strip()
        entries.append((word[1], value))
    return entries


def _key(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _parse_seed(text: str) -> int:
    try:
        return parse_integer(text)
    except ArgumentError as error:
        raise ArgumentError(f"seed `{text}` is not a number") from error
