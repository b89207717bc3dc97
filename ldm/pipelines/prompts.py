"""Parse the prompts of a task, and warn about text in them that has no effect."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ldm.diffusion.guidance import Guidance, GuidanceScale
from ldm.encoders.bert import BERTText
from ldm.encoders.text import TextEncoder
from ldm.model import LatentDiffusion
from ldm.pipelines.families import quote_name
from ldm.pipelines.sdxl import SDXLOptions
from ldm.prompts import PLAIN, ParsedPrompt, Prompt, PromptWarning, parse_prompt
from ldm.prompts.prompt import quote
from ldm.runtime.errors import ArgumentError
from ldm.runtime.warn import warn_caller

__all__ = [
    "ParsedPair", "PromptBatch", "PromptOptions", "PromptPair", "TextPair", "check_reads_prompts",
    "get_prompt_pair", "get_truncation_warning", "parse_fixed_prompt", "parse_pair", "repeat_texts",
    "warn_about_prompts",
]  # fmt: skip

MAX_QUOTED_WORDS = 4  # of a prompt, in warnings
PLACEHOLDER_STEPS = 50  # number of steps for checks of a text's syntax

TextPair = tuple[str, str]  # for the first and the second text encoder
PromptPair = tuple[str | Prompt | None, str | Prompt | None]  # None gives zeros
WeightedPair = tuple[float, PromptPair]


class PromptOptions(TypedDict, total=False):
    """Keywords for reading prompts.

    Attributes:
        syntax: Syntax of prompts and negative prompts, a name in `ldm.prompts.SYNTAXES`; by default
            "plain", in which brackets have no meaning.
        clip_skip: Layer of the text encoder whose output to use, counted from the end: 1 the last,
            2 the penultimate; the final norm follows. For Stable Diffusion 1; ignored with a
            warning by other models, which have a fixed layer.
    """

    syntax: str
    clip_skip: int


@dataclass(frozen=True)
class ParsedPair:
    """The parsed prompts of one image for the first and the second text encoder."""

    first: ParsedPrompt
    second: ParsedPrompt

    def at(self, step: int) -> tuple[WeightedPair, ...]:
        """Return (weight, prompts) of each subprompt at a step."""
        firsts = self.first.subprompts
        seconds = self.second.subprompts
        if len(seconds) == 1:
            seconds = seconds * len(firsts)
        pairs = zip(firsts, seconds, strict=True)
        return tuple((first.weight, (first.at(step), second.at(step))) for first, second in pairs)

    @property
    def switch_steps(self) -> frozenset[int]:
        """Steps after which a prompt may change."""
        return self.first.switch_steps | self.second.switch_steps


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of a batch of images, parsed unless their syntax is plain.

    Args:
        prompts: The prompts of each image.
        negative_prompts: The negative prompts of each image; empty ones are not parsed.
        guidance_texts: The parsed texts of `Guidance.texts` that are not empty, by text.
    """

    prompts: Sequence[ParsedPair | TextPair]
    negative_prompts: Sequence[ParsedPair | TextPair]
    guidance_texts: Mapping[str, ParsedPair | TextPair] = field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str],
        sdxl: SDXLOptions,
        guidance: Guidance | None,
        syntax: str,
        steps: int,
    ) -> "PromptBatch":
        """Parse the texts of a task for a run of `steps` steps.

        Args:
            negative_prompt: One for all prompts, or one for each.
            sdxl: Options with the prompts for the second text encoder.
            guidance: The guidance method; its texts are parsed as well.
        """
        n = len(prompts)
        pairs = _pair_texts(prompts, sdxl.get("prompt_2"), n, "prompt")
        negative_prompt_2 = sdxl.get("negative_prompt_2")
        negative_pairs = _pair_texts(negative_prompt, negative_prompt_2, n, "negative_prompt")
        texts = guidance.texts if guidance else ()
        return cls(
            [parse_pair(pair, syntax, steps) for pair in pairs],
            [
                parse_pair(pair, syntax, steps, is_negative=True) if any(pair) else pair
                for pair in negative_pairs
            ],
            {text: parse_fixed_prompt(text, syntax, "sld_concept") for text in texts if text},
        )

    def warn(self, model: LatentDiffusion) -> None:
        """Warn about text that the model truncates, or that the syntax reads literally."""
        texts = self.guidance_texts.values()
        warn_about_prompts(model, [*self.prompts, *self.negative_prompts, *texts])


def parse_pair(
    pair: TextPair, syntax: str, steps: int = PLACEHOLDER_STEPS, *, is_negative: bool = False
) -> ParsedPair | TextPair:
    """Parse the prompts of one image for a run of `steps` steps; plain ones stay as they are.

    Raises:
        ArgumentError: See `ldm.prompts.parse_prompt`; or AND splits the two prompts into different
            numbers of subprompts.
    """
    if syntax == PLAIN:
        return pair
    first, second = (parse_prompt(text, syntax, steps, is_negative=is_negative) for text in pair)
    if len(second.subprompts) not in (1, len(first.subprompts)):
        counts = f"{len(first.subprompts)} subprompts, prompt_2 into {len(second.subprompts)}"
        raise ArgumentError(f"AND splits the prompt into {counts}", "prompt_2")
    return ParsedPair(first, second)


def parse_fixed_prompt(text: str, syntax: str, name: str) -> ParsedPair | TextPair:
    """Parse a text, other than the prompt of an image, that is the same at all steps.

    Args:
        name: Name of the argument.

    Raises:
        ArgumentError: See `ldm.prompts.parse_prompt`; or it changes from step to step, or has AND.
    """
    try:
        pair = parse_pair((text, text), syntax)
    except ArgumentError as error:
        error.argument = name
        raise
    if isinstance(pair, ParsedPair) and (pair.switch_steps or len(pair.at(0)) > 1):
        raise ArgumentError(
            f"{name} is the same at all steps, it takes no schedules, alternation or AND: "
            f"{quote(text)}",
            name,
        )
    return pair


def get_prompt_pair(fixed: ParsedPair | TextPair) -> PromptPair:
    """Return the prompts for the two text encoders, of a result of `parse_fixed_prompt`."""
    return fixed.at(0)[0][1] if isinstance(fixed, ParsedPair) else fixed


def repeat_texts(texts: str | Sequence[str], n: int, argument: str) -> list[str]:
    """Return n texts; raise ArgumentError for another number of them.

    Args:
        texts: One for all, or n.
        argument: Name of the argument that `texts` comes from, for errors.
    """
    texts = [texts] * n if isinstance(texts, str) else list(texts)
    if len(texts) != n:
        name = argument.removesuffix("_2").replace("_", " ") + "s"
        raise ArgumentError(f"{len(texts)} {name} were given for {n} images", argument)
    return texts


def check_reads_prompts(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str],
    scale: GuidanceScale | None,
) -> None:
    """Refuse guidance, and warn of prompts, for a model that reads no prompts."""
    if model.conditioner.text is not None:
        return
    if scale not in (None, 1):
        message = f"{quote_name(model)} reads no prompts, so that guidance needs scale 1"
        raise ArgumentError(f"{message}, got {scale}", "scale")
    if any([*prompts, *negative_prompt]):
        warn_caller(f"{quote_name(model)} reads no prompts: ignored")


def _pair_texts(
    texts: str | Sequence[str], second: str | Sequence[str] | None, n: int, argument: str
) -> list[TextPair]:
    firsts = repeat_texts(texts, n, argument)
    seconds = firsts if second is None else repeat_texts(second, n, f"{argument}_2")
    return list(zip(firsts, seconds, strict=True))


def get_truncation_warning(model: LatentDiffusion, texts: Iterable[str]) -> str | None:
    """Return a warning about the first text that plain syntax truncates, else None."""
    conditioner = model.conditioner
    encoders: list[TextEncoder | BERTText] = [
        *conditioner.find_all(TextEncoder), *conditioner.find_all(BERTText)
    ]  # fmt: skip
    for encoder in encoders:
        for text in texts:
            if truncated := encoder.find_truncated_text(text):
                limit, words = encoder.length - 2, " ".join(truncated.split()[:MAX_QUOTED_WORDS])
                return f"a prompt is longer than {limit} tokens: `{words} …` is left out"
    return None


def warn_about_prompts(model: LatentDiffusion, prompts: Sequence[ParsedPair | TextPair]) -> None:
    """Warn about text that the model truncates, or that the syntax reads literally."""
    plain = [text for pair in prompts if isinstance(pair, tuple) for text in pair if text]
    messages = [get_truncation_warning(model, dict.fromkeys(plain))]
    for pair in prompts:
        if isinstance(pair, ParsedPair):
            messages += [*pair.first.warnings, *pair.second.warnings]
    for message in dict.fromkeys(filter(None, messages)):
        warn_caller(message, PromptWarning)
