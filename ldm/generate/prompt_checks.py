"""Check the prompts of a run: their syntax, and text that is truncated or read literally."""

from collections.abc import Sequence

from ldm.encoders.tokenizer import has_weight_syntax
from ldm.generate.lora_tags import remove_tags
from ldm.generate.plan import Batch, has_dynamic_syntax
from ldm.generate.request import Request
from ldm.model import LatentDiffusion
from ldm.pipelines.prompts import (
    MAX_QUOTED_WORDS,
    ParsedPair,
    get_truncation_warning,
    parse_fixed_prompt,
)
from ldm.prompts import PLAIN, parse_prompt

__all__ = ["find_prompt_warnings", "find_syntax_warnings"]


def find_syntax_warnings(batches: Sequence[Batch], request: Request) -> list[str]:
    """Return warnings about text in prompts that looks like syntax, but is read literally.

    Raises:
        ArgumentError: A prompt is invalid in the syntax.
    """
    syntax = request.prompts.syntax
    if syntax == PLAIN:
        return []
    prompts, negatives = _list_prompts(batches)
    parsed = [parse_prompt(text, syntax) for text in prompts]
    parsed += [parse_prompt(text, syntax, is_negative=True) for text in negatives]
    for name, text in _get_fixed_prompts(request).items():
        pair = parse_fixed_prompt(text, syntax, name)
        assert isinstance(pair, ParsedPair)
        parsed.append(pair.first)
    return list(dict.fromkeys(warning for prompt in parsed for warning in prompt.warnings))


def find_prompt_warnings(
    batches: Sequence[Batch], request: Request, model: LatentDiffusion
) -> list[str]:
    """Return warnings about prompts that are too long, or whose syntax is read as plain text."""
    if "txt" not in model.conditioner.keys:
        return []
    warnings: list[str] = []
    prompts, negatives = _list_prompts(batches)
    if tagged := next((text for text in negatives if remove_tags(text) != text), None):
        warnings.append(f"a LoRA in a negative prompt is read as plain text: `{tagged}`")
    specs = (spec for batch in batches for spec in batch.images)
    second_prompts = (spec.prompt_2 for spec in specs if spec.prompt_2)
    if tagged := next((text for text in second_prompts if remove_tags(text) != text), None):
        warnings.append(f"a LoRA in the second prompt is read as plain text: `{tagged}`")
    is_dynamic = request.prompts.dynamic_prompts or request.prompts.wildcards is not None
    dynamic = next(filter(has_dynamic_syntax, [*prompts, *negatives]), None)
    if dynamic is not None and not is_dynamic:
        warnings.append(f"dynamic prompts are off: `{dynamic}` is read as plain text")
    if request.prompts.syntax != PLAIN:
        return warnings
    texts = list(dict.fromkeys([*_get_fixed_prompts(request).values(), *prompts, *negatives]))
    if warning := get_truncation_warning(model, texts):
        warnings.append(warning)
    if weighted := next(filter(has_weight_syntax, texts), None):
        words = " ".join(weighted.split()[:MAX_QUOTED_WORDS])
        warnings.append(f"A1111's syntax for weights is read as plain text: `{words} …`")
    return warnings


def _list_prompts(batches: Sequence[Batch]) -> tuple[list[str], list[str]]:
    """Return the distinct non-empty prompts and negative prompts, of both text encoders."""
    prompts, negatives = [], []
    for spec in (spec for batch in batches for spec in batch.images):
        prompts += [spec.prompt, spec.prompt_2]
        negatives += [spec.negative_prompt, spec.negative_prompt_2]
    return list(dict.fromkeys(filter(None, prompts))), list(dict.fromkeys(filter(None, negatives)))


def _get_fixed_prompts(request: Request) -> dict[str, str]:
    """Return the prompts that are the same at all steps, by option."""
    values = request.get_values()
    names = ("sld_concept", "source_prompt")
    return {name: str(values[name]) for name in names if values.get(name)}
