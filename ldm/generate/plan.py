"""Plan: which images a run makes, in which batches, and with which seeds."""

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
        index: place in the run, from 0, the same however many processes share the run.
        seed: of all its noise.
        start_seed: of the noise it starts from (`fixed_code` shares it).
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    start_seed: int


Batch = list[Job]


def plan_batches(request: Request) -> list[Batch]:
    """This process' share of the run, as batches.

    The run is `n_iter` times all lines of the file, each `repeat` times (or `n_samples` times the
    prompt), in batches of `n_samples` that do not reach across iterations. Image k has seed + k;
    where a line has a seed of its own, its r-th image has that seed + r.

    Raises:
        ArgumentError: a mistake in the prompt file, or a sequential run shared by processes.
    """
    prompts, output = request.prompts, request.output
    is_sequential = "noise" in request.sampling.legacy
    # The images of a folder are shared among processes instead.
    rank, world_size = (0, 1) if request.inputs.is_folder else rank_and_world_size()
    if world_size > 1 and is_sequential:
        raise ArgumentError(
            "legacy `noise` draws one image after the other: run a single process", "legacy"
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
            places = range(first, min(first + output.n_samples, len(lines)))
            batches.append([_job(request, lines, iteration, place) for place in places])
    mine = batches[rank::world_size]
    if world_size > 1:
        log.info("process %d of %d: %d of %d batches", rank, world_size, len(mine), len(batches))
    return mine


def _job(request: Request, lines: list[PromptLine], iteration: int, place: int) -> Job:
    line, sampling, repeat = lines[place], request.sampling, request.prompts.repeat
    index = iteration * len(lines) + place
    seed = sampling.seed + index
    if line.seed is not None:
        seed = line.seed + iteration * repeat + place % repeat
    negative = request.prompts.negative_prompt
    fixed = sampling.seed + place % request.output.n_samples
    return Job(
        index=index,
        prompt=line.prompt,
        negative_prompt=negative if line.negative_prompt is None else line.negative_prompt,
        seed=seed,
        start_seed=fixed if sampling.fixed_code else seed,
    )
