"""Plan a run: its images, their batches, seeds, prompts and own options.

Prompts are first expanded (`wildcards`), then LoRA tags are extracted from them (`lora_tags`).
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.diffusion.names import SAMPLERS
from ldm.generate.groups import Prompts
from ldm.generate.lora_tags import Loras, find_loras, list_loras, split_tags
from ldm.generate.options import Value
from ldm.generate.prompt_file import PromptLine, read_prompt_file
from ldm.generate.request import Request
from ldm.runtime.errors import ArgumentError
from ldm.runtime.ranks import rank_and_world_size

if TYPE_CHECKING:
    from ldm.generate.wildcards import DynamicPrompts

__all__ = ["Batch", "Job", "LineOptions", "line_options", "looks_dynamic", "plan_batches"]

SEEDS = 1 << 64  # seeds are reduced modulo this, the range of torch's generator

DYNAMIC = re.compile(r"\{[^{}|]*\|[^{}]*\}|__[\w/*-]+__")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One image to make.

    Args:
        index: position in the run, from 0, counted over all processes.
        seed: seed of its noise.
        start_seed: seed of its initial noise (shared with `fixed_code`).
        prompt_2, negative_prompt_2: for the second text encoder; None = the same prompts.
        values: options set by its line of the prompt file, the same for a whole batch.
        loras: files and weights of its LoRAs, the same for a whole batch.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    start_seed: int
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    values: Mapping[str, Value] = field(default_factory=dict)
    loras: Loras = ()


Batch = list[Job]
LineOptions = tuple[tuple[str, Value], ...]  # (name, value) of options set by a line, hashable


def plan_batches(
    request: Request, list_files: Callable[[], Mapping[str, str]] | None = None
) -> list[Batch]:
    """Return the batches of this process.

    A run is `n_iter` iterations over the lines of the prompt file, each line `repeat` times (or
    over `n_samples` times the prompt), in batches of `n_samples` images that have the same
    iteration, options and LoRAs; of one image where the sampler adapts to the batch. Image k has
    seed + k; if its line has a seed, the r-th image of the line has that seed + r.

    Args:
        list_files: returns the LoRA files that prompts may name; None = `list_loras`.
    Raises:
        ArgumentError: a mistake in the prompt file or in a prompt, or options that legacy `noise`
            or a guidance method does not allow.
        MissingFile: the folder of LoRAs or wildcards does not exist.
    """
    # With a folder of inputs, its images are divided among the processes, not the batches.
    rank, world_size = (0, 1) if request.inputs.is_folder else rank_and_world_size()
    lines = _prompt_lines(request)
    if "noise" in request.sampling.legacy:
        _check_legacy_noise(request, lines, world_size)
    planner = _Planner(request, list_files)
    batches: list[Batch] = []
    for iteration in range(request.output.n_iter):
        jobs = planner.make_jobs(lines, iteration)
        _check_negative_prompts(request, jobs)
        for _, group in groupby(jobs, key=lambda job: (job.values, job.loras)):
            alike = list(group)
            sampler = alike[0].values.get("sampler", request.sampling.sampler)
            is_alone = sampler in SAMPLERS and SAMPLERS[sampler].adapts_steps
            size = 1 if is_alone else request.output.n_samples
            batches += [alike[first : first + size] for first in range(0, len(alike), size)]
    # Each process plans the whole run, so that index and seed do not depend on their number.
    own = batches[rank::world_size]
    if world_size > 1:
        log.info("process %d of %d: %d of %d batches", rank, world_size, len(own), len(batches))
    return own


def line_options(batch: Batch) -> LineOptions:
    """Return the options that the line of a batch sets; () = none."""
    return tuple(batch[0].values.items())


def looks_dynamic(prompt: str) -> bool:
    """Return whether a prompt seems to contain dynamic prompts, such as {a|b}."""
    return DYNAMIC.search(prompt) is not None


def _prompt_lines(request: Request) -> list[PromptLine]:
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


def _check_negative_prompts(request: Request, jobs: Sequence[Job]) -> None:
    for job in jobs:
        weight = job.values.get("perp_neg", request.sampling.perp_neg)
        if weight is not None and not job.negative_prompt and not job.negative_prompt_2:
            message = f"perp_neg needs a negative prompt: `{job.prompt}` has none"
            raise ArgumentError(message, "perp_neg")


def _check_legacy_noise(request: Request, lines: list[PromptLine], world_size: int) -> None:
    message = None
    if world_size > 1:
        message = "draws noise for images in sequence: run a single process"
    elif any(line.seeds for line in lines):
        message = "allows only one seed for the run, not one per line"
    elif any(line.values for line in lines):
        message = "needs the same options for all lines"
    if message is not None:
        raise ArgumentError(f"legacy `noise` {message}", "legacy")
    if request.task.noise_from_numpy and not 0 <= request.sampling.seed < 1 << 32:
        raise ArgumentError("legacy `noise` takes seeds 0 … 4294967295 here", "seed")


def _load_dynamic_prompts(prompts: Prompts) -> "DynamicPrompts | None":
    if not prompts.dynamic_prompts and prompts.wildcards is None:
        return None
    from ldm.generate.wildcards import DynamicPrompts  # whose package takes 0.3 s

    return DynamicPrompts(prompts.wildcards)


class _Planner:
    """Makes the jobs of a run from its prompt lines."""

    def __init__(
        self, request: Request, list_files: Callable[[], Mapping[str, str]] | None
    ) -> None:
        prompts = request.prompts
        self.request = request
        self.list_files = cache(list_files or (lambda: list_loras(request.model)))
        self.dynamic = _load_dynamic_prompts(prompts)

    def make_jobs(self, lines: Sequence[PromptLine], iteration: int) -> list[Job]:
        """Return the jobs of one iteration over the lines."""
        repeat = 1 if self.request.prompts.from_file is None else self.request.prompts.repeat
        total = repeat * sum(line.count for line in lines)
        jobs: list[Job] = []
        for line in lines:
            count = repeat * line.count
            for k in range(count):
                index = iteration * total + len(jobs)
                seed = self.request.sampling.seed + index
                if line.seeds:
                    nth = iteration * count + k
                    last = len(line.seeds) - 1
                    seed = line.seeds[min(nth, last)] + max(nth - last, 0)
                jobs.append(self._make_job(line, index, len(jobs), seed % SEEDS))
        return jobs

    def _make_job(self, line: PromptLine, index: int, position: int, seed: int) -> Job:
        request = self.request
        start_seed = seed
        if request.sampling.fixed_code:
            start_seed = request.sampling.seed + position % request.output.n_samples
        given: dict[str, str | None] = {
            "prompt": line.prompt,
            "negative_prompt": request.prompts.negative_prompt,
            "prompt_2": request.sdxl.prompt_2,
            "negative_prompt_2": request.sdxl.negative_prompt_2,
            **line.texts,
        }
        texts = {
            name: text if text is None or self.dynamic is None else self.dynamic.expand(text, seed)
            for name, text in given.items()
        }
        prompt = texts["prompt"] or ""
        loras = find_loras(prompt, request.model.lora, self.list_files)
        return Job(
            index,
            split_tags(prompt)[0],
            texts["negative_prompt"] or "",
            seed,
            start_seed % SEEDS,
            texts["prompt_2"],
            texts["negative_prompt_2"],
            line.values,
            loras,
        )
