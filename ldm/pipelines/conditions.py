"""Encode the prompts and other inputs of a task as conditions of a model.

texts --PromptBatch--> parsed prompts of each image --ConditionInputs--> EncodedConds

An encoded condition is a Cond, ScheduledCond or Composition.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.conditioning import AnyCond, Composition, Cond, ScheduledCond
from ldm.diffusion.guidance import Guidance, GuidanceScale
from ldm.model import LatentDiffusion
from ldm.pipelines.families import quote_name
from ldm.pipelines.finite import check_finite
from ldm.pipelines.prompts import ParsedPair, PromptBatch, PromptPair, WeightedPair, get_prompt_pair
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling_options import get_default_scale, needs_uncond
from ldm.pipelines.sdxl import MicroConditions, SDXLOptions, get_micro_conditions
from ldm.runtime.warn import warn_caller

__all__ = ["ConditionInputs", "EncodedConds", "encode_prompts", "encode_scheduled_prompts"]

# (prompts, index of the image of each) -> condition, a row for each prompt
EncodeFunction = Callable[[Sequence[PromptPair], Sequence[int]], Cond]


class EncodedConds(NamedTuple):
    """The encoded conditions of one model.

    Attributes:
        uncond: The condition of the negative prompts; None = the run has no guidance.
        extra_conds: The conditions of `Guidance.texts`, in order; () without guidance.
    """

    cond: AnyCond
    uncond: Cond | ScheduledCond | None = None
    extra_conds: Sequence[Cond] = ()


@dataclass(frozen=True)
class ConditionInputs:
    """Inputs of the conditions of one run, which each of its models encodes.

    Args:
        inputs: Values of batch keys besides text, a row per image.
        unconditional_inputs: The inputs that differ for the unconditional prediction.
        sdxl: Micro-conditions, second prompts and refiner of SDXL.
        size: (height, width) of the images in pixels.
        scale: Guidance scale; None = the default of each model.
        guidance: The guidance method; None = classifier-free guidance.
        sampler: A name in SAMPLERS; None = the default of each model.
    """

    prompts: PromptBatch
    inputs: Mapping[str, object]
    unconditional_inputs: Mapping[str, object]
    sdxl: SDXLOptions
    size: tuple[int, int]
    scale: GuidanceScale | None = None
    guidance: Guidance | None = None
    sampler: str | None = None

    def encode(
        self, model: LatentDiffusion, quirks: Quirks, *, after_base: bool = False
    ) -> EncodedConds:
        """Encode prompts, negative prompts and the texts of the guidance method for a model.

        Args:
            after_base: Whether the model is a refiner that continues the run of a base model.
        """
        micro_conds, negative_micro_conds = get_micro_conditions(
            model, self.sdxl, self.size, quirks
        )
        inputs = {key: value for key, value in self.inputs.items() if key in model.conditioner.keys}
        encode = partial(_encode_with_inputs, model, inputs, micro_conds)
        cond = encode_scheduled_prompts(self.prompts.prompts, encode)
        if not self._needs_uncond(model, cond):
            return EncodedConds(cond)

        text_encoder = model.conditioner.text
        # None gives zeros as output of the text encoder, for models that are trained with them.
        empty = None if text_encoder is not None and text_encoder.null is None else ""
        ignores_negative = quirks.ignores_negative(after_base=after_base)
        negatives = [
            (empty, empty) if ignores_negative or is_empty_pair(pair) else pair
            for pair in self.prompts.negative_prompts
        ]
        negative_inputs = {**inputs, **self.unconditional_inputs}
        encode_negative = partial(_encode_with_inputs, model, negative_inputs, negative_micro_conds)
        uncond = encode_scheduled_prompts(negatives, encode_negative)
        assert not isinstance(uncond, Composition)  # negative prompts have no AND

        n, texts = len(self.prompts.prompts), self.prompts.guidance_texts
        extra_conds = [
            encode_prompts(model, [get_prompt_pair(texts[text])] * n, inputs, micro_conds)
            if text
            else encode_negative([(empty, empty)] * n, range(n))
            for text in (self.guidance.texts if self.guidance else ())
        ]
        return EncodedConds(cond, uncond, extra_conds)

    def _needs_uncond(self, model: LatentDiffusion, cond: AnyCond) -> bool:
        """Return whether a run also predicts from negative prompts; warn if they are ignored."""
        if model.guidance_embed_dim is not None:
            if not all(map(is_empty_pair, self.prompts.negative_prompts)):
                warn_caller(f"{quote_name(model)} does not read a negative prompt: ignored")
            return False
        scale = get_default_scale(model, self.sampler) if self.scale is None else self.scale
        return needs_uncond(model, self.sampler, scale) or has_composition(cond)


def is_empty_pair(pair: ParsedPair | PromptPair) -> bool:
    """Return whether both prompts of a pair are empty; parsed ones count as not empty."""
    return not isinstance(pair, ParsedPair) and not any(pair)


def has_composition(cond: AnyCond) -> bool:
    """Return whether a condition is or contains a Composition, whose sum needs `uncond`."""
    if isinstance(cond, ScheduledCond):
        return any(has_composition(entry) for _, entry in cond.entries)
    return isinstance(cond, Composition)


def encode_scheduled_prompts(
    prompts: Sequence[ParsedPair | PromptPair], encode: EncodeFunction
) -> AnyCond:
    """Encode the prompts of a batch, once for each change during the run.

    Returns:
        A ScheduledCond if any prompt changes; a Composition, or one in each entry, if prompts have
        AND or weights.
    """
    parsed = [pair for pair in prompts if isinstance(pair, ParsedPair)]
    switch_steps = sorted({step for pair in parsed for step in pair.switch_steps})
    conds: dict[tuple[tuple[WeightedPair, ...], ...], Cond | Composition] = {}
    entries: list[tuple[int, Cond | Composition]] = []
    for last_step in [*switch_steps, switch_steps[-1] + 1 if switch_steps else 0]:
        current = tuple(
            pair.at(last_step) if isinstance(pair, ParsedPair) else ((1.0, pair),)
            for pair in prompts
        )
        if current not in conds:
            conds[current] = _encode_weighted_prompts(current, encode)
        if entries and entries[-1][1] is conds[current]:
            entries.pop()
        entries.append((last_step, conds[current]))
    return entries[0][1] if len(entries) == 1 else ScheduledCond(tuple(entries))


def _encode_weighted_prompts(
    weighted_prompts: Sequence[Sequence[WeightedPair]], encode: EncodeFunction
) -> Cond | Composition:
    """Encode the prompts of a step, one or several for each image."""
    indices = [index for index, pairs in enumerate(weighted_prompts) for _ in pairs]
    weights = [weight for pairs in weighted_prompts for weight, _ in pairs]
    cond = encode([pair for pairs in weighted_prompts for _, pair in pairs], indices)
    if len(indices) == len(weighted_prompts) and set(weights) == {1.0}:
        return cond
    return Composition(cond, torch.tensor(indices), torch.tensor(weights), len(weighted_prompts))


def _encode_with_inputs(
    model: LatentDiffusion,
    inputs: Mapping[str, object],
    micro_conds: MicroConditions,
    prompts: Sequence[PromptPair],
    image_indices: Sequence[int],
) -> Cond:
    """Encode prompts, each with the inputs of its image."""
    selected = {key: _select_rows(value, image_indices) for key, value in inputs.items()}
    return check_finite(encode_prompts(model, prompts, selected, micro_conds), "the text encoder")


def _select_rows(value: object, indices: Sequence[int]) -> object:
    """Return rows of a tensor or list, possibly repeated; other values as they are."""
    if isinstance(value, Tensor):
        is_unchanged = list(indices) == list(range(len(value)))  # then no copy is needed
        return value if is_unchanged else value[list(indices)]
    return [value[index] for index in indices] if isinstance(value, list) else value


def encode_prompts(
    model: LatentDiffusion,
    prompts: Sequence[PromptPair],
    inputs: Mapping[str, object],
    micro_conds: MicroConditions | None = None,
) -> Cond:
    """Encode prompts and inputs as a condition, a row per prompt; equal prompts are encoded once.

    Args:
        inputs: Values of other batch keys, a row per prompt.
        micro_conds: SDXL's micro-conditions, the same for all rows; None = the model reads none.
    """
    distinct = list(dict.fromkeys(prompts))
    repeated = {key: [value] * len(distinct) for key, value in (micro_conds or {}).items()}
    batch = {"txt": [first for first, _ in distinct], **repeated, **inputs}
    if any(first != second for first, second in distinct):
        batch["txt_2"] = [second for _, second in distinct]
    cond = model.condition(batch)
    if len(distinct) == len(prompts):
        return cond
    # The inputs have a row per prompt already; outputs of texts and micro-conditions are repeated.
    row_indices = torch.tensor([distinct.index(prompt) for prompt in prompts])
    tensors = cond.tensors()
    for name in ("crossattn", "vector") if micro_conds else ("crossattn",):
        if name in tensors:
            tensors[name] = tensors[name][row_indices.to(tensors[name].device)]
    return Cond(**tensors)
