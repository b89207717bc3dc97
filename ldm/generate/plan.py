"""Plan a run: which images, in which batches, with which seeds."""

import logging
from dataclasses import dataclass

from ldm.generate.prompt_file import PromptLine, read_prompt_file
from ldm.generate.request import Request
from ldm.runtime.errors import ArgumentError
from ldm.runtime.ranks import rank_and_world_size

__all__ = ["Batch", "Job", "plan_batches"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One image to make.

    Args:
        index: position in the run, from 0, for any number of processes.
        seed: of all its noise.
        start_seed: of its start noise (shared under `fixed_code`).
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    start_seed: int


Batch = list[Job]


def plan_batches(request: Request) -> list[Batch]:
    """The batches of this process.

    A run is `n_iter` iterations over the lines of the file, each line `repeat` times (or over
    `n_samples` times the prompt), in batches of `n_samples` that do not span iterations. Image k
    has seed + k; if a line has its own seed, its r-th image has that seed + r.

    Raises:
        ArgumentError: a mistake in the prompt file, or legacy `noise` with several processes.
    """
    prompts, output = request.prompts, request.output
    is_sequential = "noise" in request.sampling.legacy
    # Of a folder, processes share the input images instead.
    rank, world_size = (0, 1) if request.inputs.is_folder else rank_and_world_size()
    if world_size > 1 and is_sequential:
        raise ArgumentError(
            "legacy `noise` draws for one image after the other: run a single process", "legacy"
        )
    lines = [PromptLine(prompts.prompt)] * output.n_samples
    if prompts.from_file is not None:
        lines = [
            line for line in read_prompt_file(prompts.from_file) for _ in range(prompts.repeat)
        ]
    if is_sequential and any(line.seed is not None for line in lines):
        raise ArgumentError("legacy `noise` has one seed for the run, not one per line", "legacy")
    batches: list[Batch] = []
    for iteration in range(output.n_iter):
        for first in range(0, len(lines), output.n_samples):
            positions = range(first, min(first + output.n_samples, len(lines)))
            batches.append([_make_job(request, lines, iteration, k) for k in positions])
    own = batches[rank::world_size]
    if world_size > 1:
        log.info("process %d of %d: %d of %d batches", rank, world_size, len(own), len(batches))
    return own


def _make_job(request: Request, lines: list[PromptLine], iteration: int, position: int) -> Job:
    line, sampling, prompts = lines[position], request.sampling, request.prompts
    index = iteration * len(lines) + position
    seed = start_seed = sampling.seed + index
    if line.seed is not None:
        seed = start_seed = line.seed + iteration * prompts.repeat + position % prompts.repeat
    if sampling.fixed_code:
        start_seed = sampling.seed + position % request.output.n_samples
    negative_prompt = line.negative_prompt
    if negative_prompt is None:
        negative_prompt = prompts.negative_prompt
    return Job(index, line.prompt, negative_prompt, seed, start_seed)
