"""Plan a run: which images, in which batches, with which seeds."""

import logging
from dataclasses import dataclass
from pathlib import Path

from ldm.generate.prompt_file import PromptLine, read_prompt_file
from ldm.generate.request import Request
from ldm.runtime.errors import ArgumentError
from ldm.runtime.ranks import rank_and_world_size

__all__ = ["Batch", "Job", "plan_batches"]

SEEDS = 1 << 64  # seeds count on modulo this, as torch's generator takes no others

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One image to make.

    Args:
        index: position in the run, from 0, for any number of processes.
        seed: of all its noise.
        start_seed: of its start noise (shared under `fixed_code`).
        prompt_2, negative_prompt_2: for the second text encoder; None = the same prompts.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    start_seed: int
    prompt_2: str | None = None
    negative_prompt_2: str | None = None


Batch = list[Job]


def plan_batches(request: Request) -> list[Batch]:
    """Return the batches of this process.

    A run is `n_iter` iterations over the lines of the file, each line `repeat` times (or over
    `n_samples` times the prompt), in batches of `n_samples` that do not span iterations. Image k
    has seed + k; if a line has its own seed, its r-th image has that seed + r.

    Raises:
        ArgumentError: a mistake in the prompt file, or what legacy `noise` does not allow.
    """
    # Of a folder, processes share the input images instead.
    rank, world_size = (0, 1) if request.inputs.is_folder else rank_and_world_size()
    lines = _prompt_lines(request)
    if "noise" in request.sampling.legacy:
        _check_legacy_noise(request, lines, world_size)
    batches: list[Batch] = []
    for iteration in range(request.output.n_iter):
        for first in range(0, len(lines), request.output.n_samples):
            positions = range(len(lines))[first : first + request.output.n_samples]
            batches.append([_make_job(request, lines, iteration, k) for k in positions])
    own = batches[rank::world_size]
    if world_size > 1:
        log.info("process %d of %d: %d of %d batches", rank, world_size, len(own), len(batches))
    return own


def _prompt_lines(request: Request) -> list[PromptLine]:
    """Return the lines of one iteration."""
    path, repeat = request.prompts.from_file, request.prompts.repeat
    if path is None:
        return [PromptLine(request.prompts.prompt)] * request.output.n_samples
    return [line for line in read_prompt_file(Path(path)) for _ in range(repeat)]


def _check_legacy_noise(request: Request, lines: list[PromptLine], world_size: int) -> None:
    message = None
    if world_size > 1:
        message = "draws for one image after the other: run a single process"
    elif any(line.seed is not None for line in lines):
        message = "has one seed for the run, not one per line"
    if message is not None:
        raise ArgumentError(f"legacy `noise` {message}", "legacy")
    if request.task.noise_from_numpy and not 0 <= request.sampling.seed < 1 << 32:
        raise ArgumentError("legacy `noise` takes seeds 0 … 4294967295 here", "seed")


def _make_job(request: Request, lines: list[PromptLine], iteration: int, position: int) -> Job:
    line, sampling, prompts = lines[position], request.sampling, request.prompts
    index = iteration * len(lines) + position
    seed = sampling.seed + index
    if line.seed is not None:
        seed = line.seed + iteration * prompts.repeat + position % prompts.repeat
    start_seed = seed
    if sampling.fixed_code:
        start_seed = sampling.seed + position % request.output.n_samples
    return Job(
        index,
        line.prompt,
        line.texts.get("negative_prompt", prompts.negative_prompt),
        seed % SEEDS,
        start_seed % SEEDS,
        line.texts.get("prompt_2", request.sdxl.prompt_2),
        line.texts.get("negative_prompt_2", request.sdxl.negative_prompt_2),
    )
