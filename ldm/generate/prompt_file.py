"""Read prompt files: one prompt per line, which may end in its own options.

    a fox --steps 20 --seed 7 --negative-prompt "blurry, dull"            flags of the task
    a fox --s 20 --d 7,8,9 --n blurry, dull --w 512 --h 768               kohya's sd-scripts
    --prompt "a fox" --steps 20 --cfg_scale 7 --sampler_name "Euler a"    A1111

A value ends where the next option begins; quotes around it are removed.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.diffusion.names import SAMPLERS
from ldm.generate.option_parsers import parse_count
from ldm.generate.options import Option, Value, decode_option, get_options
from ldm.imaging.metadata import parse_sampler
from ldm.runtime.errors import ArgumentError, LdmError, errors_about
from ldm.runtime.files import read_text

if TYPE_CHECKING:
    from ldm.generate.tasks.base import Task

__all__ = ["PromptLine", "has_options", "read_prompt_file"]

PROMPT_OPTIONS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
COUNT_OPTIONS = ("n_samples", "n_iter")  # their product is the number of images of a line
# Options by their names in kohya's scripts and A1111, where those are not flags of ours.
ALIASES = {
    "n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "l": "scale", "s": "steps",
    "t": "strength", "ss": "sampler", "cfg_scale": "scale", "width": "width", "height": "height",
    "sampler_name": "sampler", "batch_size": "n_samples",
}  # fmt: skip
KOHYA_SAMPLERS = {
    "dpm_2": "dpm2", "dpm_2_a": "dpm2_a", "dpmsolver++": "dpmpp_2m", "k_lms": "lms",
    "k_euler": "euler", "k_euler_a": "euler_a", "k_dpm_2": "dpm2", "k_dpm_2_a": "dpm2_a",
}  # fmt: skip
FORBIDDEN_OPTIONS = ("legacy",)  # sampling options that a line may not set
FLAG_PATTERN = re.compile(r"(?:^|\s)--([A-Za-z][\w-]*)(?=[\s=]|$)")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptLine:
    """One line of a prompt file.

    Args:
        other_prompts: Other prompts that the line sets, by name in PROMPT_OPTIONS.
        seeds: Seeds of its first images; () = not set.
        count: Number of images, without `--repeat`.
        values: Values of the other options that the line sets, by name.
    """

    prompt: str
    other_prompts: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    count: int = 1
    values: Mapping[str, Value] = field(default_factory=dict)


def read_prompt_file(path: Path, task: "Task") -> list[PromptLine]:
    """Read a prompt file; a blank line is an empty prompt.

    Args:
        task: Determines the options that lines may set.
    Raises:
        ArgumentError: A line is invalid; the message names file and line.
        MissingFile, FileFormatError: See `read_text`.
    """
    with errors_about("from_file"):
        content = read_text(path)
    options, name_by_flag = task.options, _list_allowed_options(task)
    lines = []
    for line_number, text in enumerate(content.splitlines(), start=1):
        try:
            lines.append(_parse_line(text, name_by_flag, options))
        except LdmError as error:
            raise ArgumentError(f"{path}:{line_number}: {error}") from error
        for match in FLAG_PATTERN.finditer(lines[-1].prompt):
            log.warning("%s:%d: `--%s` is read as text of the prompt", path, line_number, match[1])
    if not lines:
        raise ArgumentError(f"{path} is empty", "from_file")
    return lines


def has_options(text: str, task: "Task") -> bool:
    """Return whether a line of a prompt file sets options."""
    return _find_first_option(text, _list_allowed_options(task)) is not None


def _find_first_option(text: str, name_by_flag: Mapping[str, str]) -> re.Match[str] | None:
    allowed = name_by_flag.keys() | ALIASES.keys()
    return next(
        (flag for flag in FLAG_PATTERN.finditer(text) if _normalize(flag[1]) in allowed), None
    )


def _list_allowed_options(task: "Task") -> dict[str, str]:
    """Return the names of the options that a line may set, by normalized flag."""
    name_by_flag = {name: name for name in (*PROMPT_OPTIONS, *COUNT_OPTIONS)}
    groups, options = task.groups, task.options
    for group in ("inputs", "sampling", "sdxl"):
        for name in get_options(groups[group]) if group in groups else ():
            option = options[name]
            is_single_value = not (option.is_path or option.is_switch or option.is_list)
            if is_single_value and name not in FORBIDDEN_OPTIONS:
                name_by_flag |= {_normalize(flag): name for flag in option.flags}
    return name_by_flag


def _parse_line(
    text: str, name_by_flag: Mapping[str, str], options: Mapping[str, Option]
) -> PromptLine:
    first = _find_first_option(text, name_by_flag)
    if first is None:
        return PromptLine(text)
    prompt, values = text[: first.start()], {}
    for flag, value in _split_options(text[first.start() :].strip()):
        name = name_by_flag.get(_normalize(flag)) or ALIASES.get(_normalize(flag))
        if name is None or name not in {*name_by_flag.values()}:
            raise ArgumentError(f"`--{flag}` is not an option that a line may set")
        if not value and name not in PROMPT_OPTIONS:
            raise ArgumentError(f"--{flag} needs a value")
        values[name] = value
    prompts = {name: values.pop(name) for name in PROMPT_OPTIONS if name in values}
    if prompt.strip() and "prompt" in prompts:
        raise ArgumentError("there is text before --prompt")
    seeds: tuple[int, ...] = ()
    if "seed" in values:
        seed_texts = re.split(r"[\s,]+", values.pop("seed"))
        seeds = tuple(decode_option("seed", options["seed"], text) for text in seed_texts)
    count = max(len(seeds), 1)
    for name in COUNT_OPTIONS:
        count *= parse_count(values.pop(name, "1"))
    if "sampler" in values and values["sampler"] not in SAMPLERS:
        name = KOHYA_SAMPLERS.get(values["sampler"], values["sampler"])
        # Without the schedulers that A1111 takes by default for some samplers.
        values |= parse_sampler({"Sampler": name}, version="ldm")
    decoded = {name: decode_option(name, options[name], value) for name, value in values.items()}
    return PromptLine(prompts.pop("prompt", prompt), prompts, seeds, count, decoded)


def _split_options(text: str) -> list[tuple[str, str]]:
    """Split `--flag value --flag=value` into (flag without dashes, value)."""
    options, position = [], 0
    while position < len(text):
        match = FLAG_PATTERN.match(text, position)
        if match is None:
            name = text[position:].split()[0]
            raise ArgumentError(f"`{name}` is not an option that a line may set")
        start = match.end() + (text[match.end() :][:1] == "=")
        start += len(text[start:]) - len(text[start:].lstrip())
        if (quote := text[start : start + 1]) in ("'", '"'):
            end = re.compile(rf"{quote}(?=\s|$)").search(text, start + 1)
            if end is None:
                raise ArgumentError(f"missing closing quote in `{text}`")
            value, position = text[start + 1 : end.start()], end.end()
        else:
            next_flag = FLAG_PATTERN.search(text, start - 1)
            position = next_flag.start() if next_flag else len(text)
            value = text[start:position].strip()
        options.append((match[1], value))
    return options


def _normalize(flag: str) -> str:
    """Return a flag without leading dashes, with underscores."""
    return flag.lstrip("-").replace("-", "_")
