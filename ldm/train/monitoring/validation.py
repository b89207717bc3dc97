"""The loss on pictures that are not trained on: the same ones, noised alike, whenever it is asked.

val/loss        the weights as they are
val/loss_ema    their average
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from ldm.train.distributed.parallel import reshard

__all__ = ["paused", "validate"]

log = logging.getLogger(__name__)


def validate(run: Any, *, averaged: bool = True) -> dict[str, float]:
    """Means of all losses over the first batches of `run.held_out`; {} if nothing is held out.

    run: a `Run`; all its processes call this and share the batches.
    averaged: with the averaged weights too.
    """
    if run.held_out is None:
        return {}
    found = {f"val/{name}": value for name, value in _means(run).items()}
    if averaged and run.state.ema.decay:
        with run.state.ema.applied(run.task.trained):
            found |= {f"val/{name}_ema": value for name, value in _means(run).items()}
    if run.ranks.is_first:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        log.info("step %d: %s", run.state.step, figures)
    return found


@contextmanager
def paused(module: nn.Module) -> Iterator[None]:
    """Inside, a module is evaluated and has no gradients; afterwards each part is as it was."""
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        # Not inference_mode: gathered weights of split models are used for training again.
        with torch.no_grad():
            yield
    finally:
        reshard(module)
        for part in trained:
            part.training = True


def _means(run: Any) -> dict[str, float]:
    """Chance in a batch is that of its number, so noise and timesteps are always the same."""
    ranks, size = run.ranks, run.batch_size
    batches = run.held_out.batches(size, rank=ranks.rank, world_size=ranks.world)
    count = -(-_batches(run) // ranks.world)  # alike on all, as their forward passes must be
    sums: dict[str, float] = {}
    with paused(run.model):
        for place, batch in enumerate(islice(batches, count)):
            batch.pop("broken", None)
            number = place * ranks.world + ranks.rank
            generator = torch.Generator().manual_seed(run.seed * 1_000_003 + number)
            with run.precision():
                losses = run.task.loss(batch, generator)
            for name, value in losses.items():
                if not value.ndim:
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / count
    means: dict[str, float] = ranks.mean(sums)
    return means


def _batches(run: Any) -> int:
    """As many as the settings say, but nothing twice."""
    wanted = int(run.settings.callbacks.validate_batches)
    batches = run.held_out.batches_per_epoch(run.batch_size)
    return wanted if batches is None else max(1, min(wanted, int(batches)))
