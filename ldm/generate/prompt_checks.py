"""Check the prompts of a run: their syntax, and what a model would read otherwise than meant."""

from collections.abc import Sequence

from ldm.encoders.text import TextEncoder
from ldm.encoders.tokenizer import has_weight_syntax
from ldm.generate.lora_tags import remove_tags
from ldm.generate.plan import Batch, looks_dynamic
from ldm.generate.request import Request
from ldm.model import LatentDiffusion
from ldm.pipelines.prompts import QUOTED_WORDS, StepPrompts, find_lost_text, parse_constant
from ldm.prompts import PLAIN, parse_prompt

__all__ = ["check_prompts", "find_prompt_warnings"]


def check_prompts(batches: Sequence[Batch], request: Request) -> list[str]:
    """Return warnings about parts of prompts that look like syntax, but are read literally.

    Raises:
        ArgumentError: a prompt is invalid in the syntax.
    """
    syntax = request.prompts.syntax
    if syntax == PLAIN:
        return []
    parsed = [parse_prompt(text, syntax) for text in _prompts(batches)]
    parsed += [parse_prompt(text, syntax, is_negative=True) for text in _negative_prompts(batches)]
    for name, text in _constant_texts(request).items():
        constant = parse_constant(text, syntax, name)
        assert isinstance(constant, StepPrompts)
        parsed.append(constant.first)
    return list(dict.fromkeys(note for prompt in parsed for note in prompt.notes))


def find_prompt_warnings(
    batches: Sequence[Batch], request: Request, model: LatentDiffusion
) -> list[str]:
    """Return warnings about prompts that are too long, or whose syntax is read as plain text."""
    if not model.conditioner.find_all(TextEncoder):
        return []
    warnings: list[str] = []
    negatives = (spec.negative_prompt for batch in batches for spec in batch)
    if tagged := next((text for text in negatives if remove_tags(text) != text), None):
        warnings.append(f"a LoRA in a negative prompt is read as plain text: `{tagged}`")
    expands = request.prompts.dynamic_prompts or request.prompts.wildcards is not None
    prompts = (spec.prompt for batch in batches for spec in batch)
    dynamic = next(filter(looks_dynamic, prompts), None)
    if dynamic is not None and not expands:
        warnings.append(f"dynamic prompts are off: `{dynamic}` is read as plain text")
    if request.prompts.syntax != PLAIN:
        return warnings
    constants = _constant_texts(request).values()
    texts = list(dict.fromkeys([*constants, *_prompts(batches), *_negative_prompts(batches)]))
    if lost := find_lost_text(model, texts):
        warnings.append(lost)
    if weighted := next(filter(has_weight_syntax, texts), None):
        words = " ".join(weighted.split()[:QUOTED_WORDS])
        warnings.append(f"A1111's syntax for weights is read as plain text: `{words} …`")
    return warnings


def _prompts(batches: Sequence[Batch]) -> list[str]:
    """Return the different prompts of both text encoders that are not empty."""
    texts = (text for batch in batches for spec in batch for text in (spec.prompt, spec.prompt_2))
    return list(dict.fromkeys(filter(None, texts)))


def _negative_prompts(batches: Sequence[Batch]) -> list[str]:
    """Return the different negative prompts of both text encoders that are not empty."""
    pairs = ((spec.negative_prompt, spec.negative_prompt_2) for batch in batches for spec in batch)
    return list(dict.fromkeys(text for pair in pairs for text in pair if text))


def _constant_texts(request: Request) -> dict[str, str]:
    """Return the texts that hold for the whole run, by option."""
    values = request.get_values()
    names = ("sld_concept", "source_prompt")
    return {name: str(values[name]) for name in names if values.get(name)}
