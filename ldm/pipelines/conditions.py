"""Encode the prompts of a call, and its other inputs, as conditions of a model.

texts --CallPrompts--> parsed, by image --Conditions--> Cond, ScheduledCond or Composition
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.conditioning import AnyCond, Composition, Cond, ScheduledCond
from ldm.diffusion.guidance import Guidance, Scale
from ldm.diffusion.names import SAMPLERS
from ldm.model import LatentDiffusion
from ldm.pipelines.families import file_name
from ldm.pipelines.finite import check_finite
from ldm.pipelines.prompts import CallPrompts, PromptPair, StepPrompts, WeightedPair, get_pair
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling_options import default_scale
from ldm.pipelines.sdxl import SDXLOptions, Sizes, size_conditions
from ldm.runtime.warn import warn_caller

__all__ = ["Conditions", "ModelConds", "encode_prompts", "encode_steps"]

# (prompts, index of the image of each) -> condition, a row for each prompt
Encode = Callable[[Sequence[PromptPair], Sequence[int]], Cond]


class ModelConds(NamedTuple):
    """The encoded conditions of one model.

    Attributes:
        cond: Of the prompts.
        uncond: Of the negative prompts; None = the run has no guidance.
        guidance_conds: Of `Guidance.texts`, in their order; [] without guidance.
    """

    cond: AnyCond
    uncond: Cond | ScheduledCond | None = None
    guidance_conds: Sequence[Cond] = ()


@dataclass(frozen=True)
class Conditions:
    """What the models of a call are conditioned on, before each encodes it.

    Args:
        prompts: The texts of the call.
        inputs: Values of batch keys besides text, a row per image.
        unconditional_inputs: Those that differ for the unconditional prediction.
        options: Sizes and scores of SDXL.
        size: (height, width) of the images in pixels.
        scale: Guidance scale; None = the default of each model.
        guidance: The guidance method; None = classifier-free guidance.
        sampler: A name in SAMPLERS; None = the default of each model.
    """

    prompts: CallPrompts
    inputs: Mapping[str, object]
    unconditional_inputs: Mapping[str, object]
    options: SDXLOptions
    size: tuple[int, int]
    scale: Scale | None = None
    guidance: Guidance | None = None
    sampler: str | None = None

    def encode(
        self, model: LatentDiffusion, quirks: Quirks, *, after_base: bool = False
    ) -> ModelConds:
        """Encode prompts, negative prompts and texts of guidance, as the model reads them.

        Args:
            after_base: Whether the model is a refiner that continues the run of a base model.
        """
        sizes, negative_sizes = size_conditions(model, self.options, self.size, quirks)
        inputs = {k: value for k, value in self.inputs.items() if k in model.conditioner.keys}
        cond = encode_steps(self.prompts.prompts, partial(_encode_rows, model, inputs, sizes))
        if not self._has_guidance(model, cond):
            return ModelConds(cond)

        text_encoder = model.conditioner.text
        null = None if text_encoder is not None and text_encoder.null is None else ""
        ignores_negative = quirks.ignores_negative(after_base=after_base)
        negatives = [
            (null, null) if ignores_negative or is_empty(pair) else pair
            for pair in self.prompts.negatives
        ]
        null_inputs = {**inputs, **self.unconditional_inputs}
        encode_null = partial(_encode_rows, model, null_inputs, negative_sizes)
        uncond = encode_steps(negatives, encode_null)
        assert not isinstance(uncond, Composition)  # negative prompts have no AND

        n = len(self.prompts.prompts)
        guidance_conds = [
            encode_prompts(model, [get_pair(self.prompts.guidance_texts[text])] * n, inputs, sizes)
            if text
            else encode_null([(null, null)] * n, range(n))
            for text in (self.guidance.texts if self.guidance else ())
        ]
        return ModelConds(cond, uncond, guidance_conds)

    def _has_guidance(self, model: LatentDiffusion, cond: AnyCond) -> bool:
        """Return whether a run of the model needs an unconditional condition."""
        if model.guidance_embed_dim is not None:
            if not all(map(is_empty, self.prompts.negatives)):
                warn_caller(f"{file_name(model)} does not read a negative prompt: ignored")
            return False
        scale = default_scale(model, self.sampler) if self.scale is None else self.scale
        takes_uncond = SAMPLERS[self.sampler or model.defaults.sampler].takes_uncond
        return scale != 1 or takes_uncond or has_composition(cond)


def is_empty(prompts: StepPrompts | PromptPair) -> bool:
    """Return whether the texts for both text encoders are empty; parsed ones never are."""
    return not isinstance(prompts, StepPrompts) and not any(prompts)


def has_composition(cond: AnyCond) -> bool:
    """Return whether a condition is a composition, which always needs the unconditional one."""
    if isinstance(cond, ScheduledCond):
        return any(has_composition(entry) for _, entry in cond.entries)
    return isinstance(cond, Composition)


def encode_steps(prompts: Sequence[StepPrompts | PromptPair], encode: Encode) -> AnyCond:
    """Encode the prompts of a batch, once for each change during the run.

    Args:
        prompts: One for each image.
    """
    changing = [pair for pair in prompts if isinstance(pair, StepPrompts)]
    ends = sorted({step for pair in changing for step in pair.last_steps})
    conds: dict[tuple[tuple[WeightedPair, ...], ...], Cond | Composition] = {}
    entries: list[tuple[int, Cond | Composition]] = []
    for end in [*ends, ends[-1] + 1 if ends else 0]:
        current = tuple(
            pair.at(end) if isinstance(pair, StepPrompts) else ((1.0, pair),) for pair in prompts
        )
        if current not in conds:
            conds[current] = _encode_compositions(current, encode)
        if entries and entries[-1][1] is conds[current]:
            entries.pop()
        entries.append((end, conds[current]))
    return entries[0][1] if len(entries) == 1 else ScheduledCond(tuple(entries))


def _encode_compositions(
    compositions: Sequence[Sequence[WeightedPair]], encode: Encode
) -> Cond | Composition:
    """Encode the prompts of a step, one or several for each image."""
    indices = [index for index, pairs in enumerate(compositions) for _ in pairs]
    weights = [weight for pairs in compositions for weight, _ in pairs]
    cond = encode([pair for pairs in compositions for _, pair in pairs], indices)
    if len(indices) == len(compositions) and set(weights) == {1.0}:
        return cond
    return Composition(cond, torch.tensor(indices), torch.tensor(weights), len(compositions))


def _encode_rows(
    model: LatentDiffusion,
    inputs: Mapping[str, object],
    sizes: Sizes,
    prompts: Sequence[PromptPair],
    images: Sequence[int],
) -> Cond:
    """Encode prompts, each with the inputs of its image.

    Args:
        inputs: Values by batch key, a row per image.
        images: Index of the image of each prompt.
    """
    rows = {key: _select(value, images) for key, value in inputs.items()}
    return check_finite(encode_prompts(model, prompts, rows, sizes), "the text encoder")


def _select(value: object, indices: Sequence[int]) -> object:
    """Return rows of a tensor or list, possibly repeated; other values as they are."""
    if isinstance(value, Tensor):
        is_unchanged = list(indices) == list(range(len(value)))  # then no copy is needed
        return value if is_unchanged else value[list(indices)]
    return [value[index] for index in indices] if isinstance(value, list) else value


def encode_prompts(
    model: LatentDiffusion,
    prompts: Sequence[PromptPair],
    inputs: Mapping[str, object],
    sizes: Sizes | None = None,
) -> Cond:
    """Encode prompts and inputs as a condition, a row per prompt; equal prompts are encoded once.

    Args:
        inputs: Values of other batch keys, a row per prompt.
        sizes: Values of SDXL's batch keys, the same for all rows; None = the model reads none.
    """
    distinct = list(dict.fromkeys(prompts))
    repeated_sizes = {key: [value] * len(distinct) for key, value in (sizes or {}).items()}
    batch = {"txt": [first for first, _ in distinct], **repeated_sizes, **inputs}
    if any(first != second for first, second in distinct):
        batch["txt_2"] = [second for _, second in distinct]
    cond = model.condition(batch)
    if len(distinct) == len(prompts):
        return cond
    # Rows of the inputs are per prompt already; those of texts and sizes are repeated here.
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
    slots = cond.tensors()
    for name in ("crossattn", "vector") if sizes else ("crossattn",):
        if name in slots:
            slots[name] = slots[name][rows.to(slots[name].device)]
    return Cond(**slots)
