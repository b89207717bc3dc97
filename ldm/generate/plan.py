"""Plan a run: divide its images, with their seeds, prompts and options, into batches.

Prompts are first expanded (`wildcards`), then LoRA tags are extracted from them (`lora_tags`).
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.diffusion.names import SAMPLERS
from ldm.generate.groups import Prompts
from ldm.generate.lora_tags import Loras, add_tagged_loras, list_local_loras, split_tags
from ldm.generate.options import Value
from ldm.generate.prompt_file import PromptLine, read_prompt_file
from ldm.generate.request import Request
from ldm.runtime.errors import ArgumentError
from ldm.runtime.ranks import get_rank_and_world_size

if TYPE_CHECKING:
    from ldm.generate.wildcards import DynamicPrompts

__all__ = ["Batch", "ImageSpec", "LineOptions", "has_dynamic_syntax", "plan_batches"]

SEED_RANGE = 1 << 64  # of torch's generators; seeds are reduced modulo this

DYNAMIC_PATTERN = re.compile(r"\{[^{}|]*\|[^{}]*\}|__[\w/*-]+__")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSpec:
    """One image to generate.

    Args:
        index: Index in the run, over all processes.
        seed: Seed of the noise between steps, and of dynamic prompts.
        initial_noise_seed: Seed of the initial noise; `fixed_code` repeats it in each batch.
        prompt_2, negative_prompt_2: Prompts of the second text encoder; None = those of the first.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    initial_noise_seed: int
    prompt_2: str | None = None
    negative_prompt_2: str | None = None


LineOptions = tuple[tuple[str, Value], ...]  # (name, value) of options set by a line, hashable


@dataclass(frozen=True)
class Batch:
    """Images to generate at once.

    Args:
        line_options: Options set by the line of the prompt file that the images come from.
        loras: Files and weights of the LoRAs of all these images.
    """

    images: Sequence[ImageSpec]
    line_options: LineOptions = ()
    loras: Loras = ()

    def __len__(self) -> int:
        return len(self.images)


def plan_batches(
    request: Request, list_loras: Callable[[], Mapping[str, str]] | None = None
) -> list[Batch]:
    """Return the batches of this process.

    Each of `n_iter` iterations has every line of the prompt file `repeat` times, or the prompt
    `n_samples` times. Consecutive images of an iteration with the same options and LoRAs are
    divided into batches of `n_samples`; a sampler with adaptive steps has batches of one image,
    since its result depends on the batch. Image k of the run has the seed `seed` + k. If its line
    sets seeds, the images of the line have these, then the numbers after the last one.

    Args:
        list_loras: Returns the LoRA files that prompts may name; None = `list_local_loras`.
    Raises:
        ArgumentError: A mistake in the prompt file or in a prompt, or options that legacy `noise`
            or a guidance method does not allow.
        MissingFile: The folder of LoRAs or wildcards does not exist.
    """
    # The images of an input folder are already divided among the processes.
    rank, world_size = (0, 1) if request.inputs.is_folder else get_rank_and_world_size()
    lines = _read_lines(request)
    if "noise" in request.sampling.legacy:
        _check_legacy_noise(request, lines, world_size)
    planner = _Planner(request, list_loras)
    batches: list[Batch] = []
    for iteration in range(request.output.n_iter):
        for group in planner.group_images(lines, iteration):
            options = dict(group.line_options)
            _check_perp_neg(group.images, options.get("perp_neg", request.sampling.perp_neg))
            sampler = options.get("sampler", request.sampling.sampler)
            is_adaptive = sampler in SAMPLERS and SAMPLERS[sampler].is_adaptive
            batch_size = 1 if is_adaptive else request.output.n_samples
            for start in range(0, len(group), batch_size):
                images = group.images[start : start + batch_size]
                batches.append(replace(group, images=images))
    if "noise" in request.sampling.legacy and len({batch.loras for batch in batches}) > 1:
        raise ArgumentError("legacy `noise` needs the same LoRAs for all images", "legacy")
    # Each process plans all batches: index and seed do not depend on the number of processes.
    batches_of_rank = batches[rank::world_size]
    if world_size > 1:
        counts = len(batches_of_rank), len(batches)
        log.info("rank %d of %d processes: %d of %d batches", rank, world_size, *counts)
    return batches_of_rank


def has_dynamic_syntax(prompt: str) -> bool:
    """Return whether a prompt seems to contain the syntax of dynamic prompts, such as {a|b}."""
    return DYNAMIC_PATTERN.search(prompt) is not None


def _read_lines(request: Request) -> list[PromptLine]:
    """Return the lines of one iteration."""
    path = request.prompts.from_file
    if path is None:
        return [PromptLine(request.prompts.prompt, count=request.output.n_samples)]
    lines = read_prompt_file(Path(path), request.task)
    for number, line in enumerate(lines, start=1):
        try:
            request.with_values(line.values)
        except ArgumentError as error:
            raise ArgumentError(f"{path}:{number}: {error}") from error
    return lines


def _check_perp_neg(images: Sequence[ImageSpec], perp_neg: float | None) -> None:
    for spec in images:
        if perp_neg is not None and not spec.negative_prompt and not spec.negative_prompt_2:
            message = f"perp_neg needs a negative prompt: `{spec.prompt}` has none"
            raise ArgumentError(message, "perp_neg")


def _check_legacy_noise(request: Request, lines: list[PromptLine], world_size: int) -> None:
    message = None
    if world_size > 1:
        message = "draws the noise of all images in sequence: run a single process"
    elif any(line.seeds for line in lines):
        message = "allows only one seed for the run, not one per line"
    elif any(line.values for line in lines):
        message = "needs the same options for all lines"
    if message is not None:
        raise ArgumentError(f"legacy `noise` {message}", "legacy")
    if request.task.uses_numpy_noise and not 0 <= request.sampling.seed < 1 << 32:
        raise ArgumentError("legacy `noise` takes seeds 0 … 4294967295 for this task", "seed")


def _load_dynamic_prompts(prompts: Prompts) -> "DynamicPrompts | None":
    if not prompts.dynamic_prompts and prompts.wildcards is None:
        return None
    from ldm.generate.wildcards import DynamicPrompts  # importing its package takes 0.3 s

    return DynamicPrompts(prompts.wildcards)


class _Planner:
    """Makes the image specs of a run from its prompt lines."""

    def __init__(
        self, request: Request, list_loras: Callable[[], Mapping[str, str]] | None
    ) -> None:
        prompts = request.prompts
        self.request = request
        self.list_loras = cache(list_loras or (lambda: list_local_loras(request.model)))
        self.dynamic_prompts = _load_dynamic_prompts(prompts)

    def group_images(self, lines: Sequence[PromptLine], iteration: int) -> list[Batch]:
        """Return the images of one iteration over the lines, grouped by line options and LoRAs."""
        repeat = 1 if self.request.prompts.from_file is None else self.request.prompts.repeat
        images_per_iteration = repeat * sum(line.count for line in lines)
        specs: list[tuple[LineOptions, Loras, ImageSpec]] = []
        for line in lines:
            count = repeat * line.count
            for k in range(count):
                index_in_iteration = len(specs)
                index = iteration * images_per_iteration + index_in_iteration
                seed = self.request.sampling.seed + index
                if line.seeds:
                    index_in_line = iteration * count + k
                    last_index = len(line.seeds) - 1
                    seed = line.seeds[min(index_in_line, last_index)]
                    seed += max(index_in_line - last_index, 0)
                spec, loras = self._make_spec(line, index, index_in_iteration, seed % SEED_RANGE)
                specs.append((tuple(line.values.items()), loras, spec))
        return [
            Batch([spec for _, _, spec in group], options, loras)
            for (options, loras), group in groupby(specs, key=lambda item: item[:2])
        ]

    def _make_spec(
        self, line: PromptLine, index: int, index_in_iteration: int, seed: int
    ) -> tuple[ImageSpec, Loras]:
        """Return an image spec, and its LoRAs: those of the run and those in its prompt."""
        request = self.request
        initial_noise_seed = seed
        if request.sampling.fixed_code:
            index_in_batch = index_in_iteration % request.output.n_samples
            initial_noise_seed = request.sampling.seed + index_in_batch
        templates: dict[str, str | None] = {
            "prompt": line.prompt,
            "negative_prompt": request.prompts.negative_prompt,
            "prompt_2": request.sdxl.prompt_2,
            "negative_prompt_2": request.sdxl.negative_prompt_2,
            **line.other_prompts,
        }
        prompts = {name: self._expand(template, seed) for name, template in templates.items()}
        prompt = prompts["prompt"] or ""
        loras = add_tagged_loras(prompt, request.model.lora, self.list_loras)
        spec = ImageSpec(
            index,
            split_tags(prompt)[0],
            prompts["negative_prompt"] or "",
            seed,
            initial_noise_seed % SEED_RANGE,
            prompts["prompt_2"],
            prompts["negative_prompt_2"],
        )
        return spec, loras

    def _expand(self, template: str | None, seed: int) -> str | None:
        if template is None or self.dynamic_prompts is None:
            return template
        return self.dynamic_prompts.expand(template, seed)
