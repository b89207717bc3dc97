"""Checks of a run before its first image: prompts, LoRAs and steps, alone and with the model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ldm.encoders.text import TextEncoder
from ldm.encoders.tokenizer import has_weight_syntax
from ldm.generate.load import explain_few_steps, explain_start
from ldm.generate.lora_tags import remove_tags
from ldm.generate.plan import Batch, LineOptions, line_options, looks_dynamic
from ldm.generate.request import Request
from ldm.generate.tasks import PreparedTask
from ldm.loading.addons.lora import read_changes
from ldm.model import LatentDiffusion
from ldm.pipelines.common import check_clip_skip
from ldm.pipelines.prompts import QUOTED_WORDS, StepPrompts, find_lost_text, parse_constant
from ldm.prompts import PLAIN, parse_prompt

__all__ = [
    "check_loras", "check_prompts", "find_few_steps_warnings", "find_model_warnings",
]  # fmt: skip


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


def find_few_steps_warnings(
    tasks: Mapping[LineOptions, PreparedTask], batches: Sequence[Batch]
) -> list[str]:
    """Return warnings about steps and scales that do not suit models for few steps.

    Called before weights are read.

    Args:
        tasks: the tasks of a run, see `run_request`.
    """
    warnings = []
    for options, loras in dict.fromkeys((line_options(batch), batch[0].loras) for batch in batches):
        request = tasks[options].request
        choice = replace(request.model, lora=loras)
        warnings.append(explain_few_steps(replace(request, model=choice)))
    return list(dict.fromkeys(filter(None, warnings)))


def check_loras(model: LatentDiffusion, batches: Sequence[Batch]) -> None:
    """Raise what a LoRA of a later image would, where images have their own, before the first."""
    choices = dict.fromkeys(batch[0].loras for batch in batches)
    if len(choices) > 1:
        for file, weight in dict.fromkeys(lora for loras in choices for lora in loras):
            read_changes(file, model, weight)


def find_model_warnings(
    tasks: Mapping[LineOptions, PreparedTask], batches: Sequence[Batch], model: LatentDiffusion
) -> list[str]:
    """Return warnings about prompts and options that do not suit the model.

    Raises:
        ArgumentError: there are not as many layers as clip skip needs.
    """
    requests = [prepared.request for prepared in tasks.values()]
    skip = max(request.sampling.clip_skip for request in requests)
    warnings = [
        *_find_prompt_warnings(batches, requests[0], model),
        check_clip_skip(model, skip),
        *(explain_start(request, model) for request in requests),
    ]
    return list(dict.fromkeys(filter(None, warnings)))


def _find_prompt_warnings(
    batches: Sequence[Batch], request: Request, model: LatentDiffusion
) -> list[str | None]:
    """Return warnings about prompts that are too long, or whose syntax is read as plain text."""
    if not model.conditioner.find_all(TextEncoder):
        return []
    warnings: list[str | None] = []
    negatives = (job.negative_prompt for batch in batches for job in batch)
    if tagged := next((text for text in negatives if remove_tags(text) != text), None):
        warnings.append(f"a LoRA in a negative prompt is read as plain text: `{tagged}`")
    expands = request.prompts.dynamic_prompts or request.prompts.wildcards is not None
    prompts = (job.prompt for batch in batches for job in batch)
    dynamic = next(filter(looks_dynamic, prompts), None)
    if dynamic is not None and not expands:
        warnings.append(f"dynamic prompts are off: `{dynamic}` is read as plain text")
    if request.prompts.syntax != PLAIN:
        return warnings
    constants = _constant_texts(request).values()
    texts = list(dict.fromkeys([*constants, *_prompts(batches), *_negative_prompts(batches)]))
    warnings.append(find_lost_text(model, texts))
    if weighted := next(filter(has_weight_syntax, texts), None):
        words = " ".join(weighted.split()[:QUOTED_WORDS])
        warnings.append(f"A1111's syntax for weights is read as plain text: `{words} …`")
    return warnings


def _prompts(batches: Sequence[Batch]) -> list[str]:
    """Return the different prompts of both text encoders that are not empty."""
    texts = (text for batch in batches for job in batch for text in (job.prompt, job.prompt_2))
    return list(dict.fromkeys(filter(None, texts)))


def _negative_prompts(batches: Sequence[Batch]) -> list[str]:
    """Return the different negative prompts of both text encoders that are not empty."""
    pairs = ((job.negative_prompt, job.negative_prompt_2) for batch in batches for job in batch)
    return list(dict.fromkeys(text for pair in pairs for text in pair if text))


def _constant_texts(request: Request) -> dict[str, str]:
    """Return the texts that hold for the whole run, by option."""
    values = request.get_values()
    names = ("sld_concept", "source_prompt")
    return {name: str(values[name]) for name in names if values.get(name)}
