"""Parse the prompts of a call, and encode them for the steps that they are used in."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from ldm.conditioning import AnyCond, Composition, Cond, ScheduledCond
from ldm.encoders.text import TextEncoder
from ldm.model import LatentDiffusion
from ldm.prompts import PLAIN, ParsedPrompt, Prompt, PromptWarning, parse_prompt
from ldm.prompts.prompt import quote
from ldm.runtime.errors import ArgumentError

__all__ = [
    "PromptOptions", "PromptPair", "StepPrompts", "encode_steps",
    "find_lost_text", "has_composition", "pair_of", "parse_constant", "parse_pair",
    "warn_about_prompts",
]  # fmt: skip

QUOTED_WORDS = 4  # of a prompt, in warnings

TextPair = tuple[str | None, str | None]  # for the first and the second text encoder
PromptPair = tuple[str | Prompt | None, str | Prompt | None]
Weighted = tuple[float, PromptPair]


class PromptOptions(TypedDict, total=False):
    """Keywords for reading prompts.

    Attributes:
        syntax: Syntax of prompts and negative prompts, a name in `ldm.prompts.SYNTAXES`; by default
            "plain", in which brackets have no meaning.
        clip_skip: Layer of the text encoder to use, counted from the end: 1 the last, 2 the last
            but one, before the final norm. For Stable Diffusion 1; ignored with a warning by other
            models, which have a fixed layer.
    """

    syntax: str
    clip_skip: int


@dataclass(frozen=True)
class StepPrompts:
    """The prompts of one image, which may change from step to step."""

    first: ParsedPrompt  # for the first text encoder
    second: ParsedPrompt  # for the second one

    def at(self, step: int) -> tuple[Weighted, ...]:
        """Return (weight, prompts) of a step, one for each prompt of a composition."""
        ones = self.first.compositions
        twos = self.second.compositions
        if len(twos) == 1:
            twos = twos * len(ones)
        pairs = zip(ones, twos, strict=True)
        return tuple((one.weight, (one.at(step), two.at(step))) for one, two in pairs)

    @property
    def last_steps(self) -> frozenset[int]:
        return self.first.last_steps | self.second.last_steps


def parse_pair(
    pair: TextPair, syntax: str, steps: int, *, is_negative: bool = False
) -> StepPrompts | TextPair:
    """Parse the prompts of one image for a run of `steps` steps; plain ones stay as they are.

    Raises:
        ArgumentError: See `ldm.prompts.parse_prompt`; or AND splits the two prompts into different
            numbers of parts.
    """
    if syntax == PLAIN:
        return pair
    first, second = (
        parse_prompt(text or "", syntax, steps, is_negative=is_negative) for text in pair
    )
    if len(second.compositions) not in (1, len(first.compositions)):
        counts = f"{len(first.compositions)} parts, prompt_2 {len(second.compositions)}"
        raise ArgumentError(f"AND splits the prompt into {counts}", "prompt_2")
    return StepPrompts(first, second)


def parse_constant(text: str, syntax: str, name: str) -> StepPrompts | TextPair:
    """Parse a text that is not a prompt of an image, and holds for the whole run.

    Args:
        name: Of the argument.

    Raises:
        ArgumentError: See `ldm.prompts.parse_prompt`; or it changes from step to step, or has AND.
    """
    try:
        pair = parse_pair((text, text), syntax, steps=50)
    except ArgumentError as error:
        error.argument = name
        raise
    if isinstance(pair, StepPrompts) and (pair.last_steps or len(pair.at(0)) > 1):
        raise ArgumentError(
            f"{name} holds for the whole run, it takes no schedules, alternation or AND: "
            f"{quote(text)}",
            name,
        )
    return pair


def pair_of(constant: StepPrompts | TextPair) -> PromptPair:
    """Return the two texts of `parse_constant`."""
    return constant.at(0)[0][1] if isinstance(constant, StepPrompts) else constant


def encode_steps(
    prompts: Sequence[StepPrompts | PromptPair],
    encode: Callable[[Sequence[PromptPair], Sequence[int]], Cond],
) -> AnyCond:
    """Encode the prompts of a batch, once for each change during the run.

    Args:
        prompts: One for each image.
        encode: (prompts, index of the image of each) -> condition, a row for each prompt.
    """
    ends = sorted({step for one in _changing(prompts) for step in one.last_steps})
    conds: dict[tuple[tuple[Weighted, ...], ...], Cond | Composition] = {}
    entries: list[tuple[int, Cond | Composition]] = []
    for end in [*ends, ends[-1] + 1 if ends else 0]:
        current = tuple(
            one.at(end) if isinstance(one, StepPrompts) else ((1.0, one),) for one in prompts
        )
        if current not in conds:
            conds[current] = _encode_compositions(current, encode)
        if entries and entries[-1][1] is conds[current]:
            entries.pop()
        entries.append((end, conds[current]))
    return entries[0][1] if len(entries) == 1 else ScheduledCond(tuple(entries))


def _changing(prompts: Iterable[StepPrompts | PromptPair]) -> Iterator[StepPrompts]:
    return (one for one in prompts if isinstance(one, StepPrompts))


def _encode_compositions(
    prompts: Sequence[Sequence[Weighted]],
    encode: Callable[[Sequence[PromptPair], Sequence[int]], Cond],
) -> Cond | Composition:
    numbers = [number for number, parts in enumerate(prompts) for _ in parts]
    weights = [weight for parts in prompts for weight, _ in parts]
    cond = encode([pair for parts in prompts for _, pair in parts], numbers)
    if len(numbers) == len(prompts) and set(weights) == {1.0}:
        return cond
    return Composition(cond, torch.tensor(numbers), torch.tensor(weights), len(prompts))


def has_composition(cond: AnyCond) -> bool:
    """Return whether a condition is a composition, which always needs the unconditional one."""
    if isinstance(cond, ScheduledCond):
        return any(has_composition(entry) for _, entry in cond.entries)
    return isinstance(cond, Composition)


def find_lost_text(model: LatentDiffusion, texts: Iterable[str]) -> str | None:
    """Return a warning about the first text that plain syntax truncates, else None."""
    for encoder in model.conditioner.find_all(TextEncoder):
        for text in texts:
            if lost := encoder.find_truncated_text(text):
                limit, words = encoder.length - 2, " ".join(lost.split()[:QUOTED_WORDS])
                return f"a prompt is longer than {limit} tokens: `{words} …` is left out"
    return None


def warn_about_prompts(
    model: LatentDiffusion, prompts: Sequence[StepPrompts | TextPair], stacklevel: int
) -> None:
    """Warn about text that is truncated, or that the syntax reads in a surprising way."""
    plain = [text for one in prompts if not isinstance(one, StepPrompts) for text in one if text]
    messages = [find_lost_text(model, dict.fromkeys(plain))]
    for one in _changing(prompts):
        messages += [*one.first.notes, *one.second.notes]
    for message in dict.fromkeys(filter(None, messages)):
        warnings.warn(message, PromptWarning, stacklevel=stacklevel + 1)
