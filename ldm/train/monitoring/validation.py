"""Validation: losses on held-out data, always on the same batches with the same noise.

val/loss        with the raw weights
val/loss_ema    with the EMA weights
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import nn

from ldm.data.source import Source
from ldm.train.distributed.parallel import reshard
from ldm.train.run import Run

__all__ = ["eval_mode", "validate"]

log = logging.getLogger(__name__)


def validate(run: Run) -> dict[str, float]:
    """Compute mean losses over the first batches of the held-out data.

    All processes call this, and share the batches.

    Returns:
        Losses by name, {} if no data is held out.
    """
    if run.held_out is None:
        return {}
    losses: dict[str, float] = {}
    for suffix in ("", "_ema") if run.state.ema.decay else ("",):
        with run.state.ema.apply_to(run.task.trainable, enabled=bool(suffix)):
            means = _mean_losses(run, run.held_out)
        losses |= {f"val/{name}{suffix}": value for name, value in means.items()}
    if run.ranks.is_first:
        values = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        log.info("step %d: %s", run.state.step, values)
    return losses


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Keep a module in eval mode, without gradients, within the context.

    It does not use `inference_mode`, as gathered weights of sharded models serve training again.
    """
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(module)
        for submodule in training:
            submodule.training = True


def _mean_losses(run: Run, held_out: Source) -> dict[str, float]:
    rank, world_size = run.ranks.rank, run.ranks.world_size
    batches = held_out.batches(run.batch_size, rank=rank, world_size=world_size)
    # The same on all ranks, as sharded weights are gathered for each forward pass.
    count = -(-_count_batches(run, held_out) // world_size)
    sums: dict[str, float] = {}
    with eval_mode(run.model):
        for k, batch in enumerate(islice(batches, count)):
            batch.pop("broken", None)
            index = k * world_size + rank
            generator = torch.Generator().manual_seed(run.seed * 1_000_003 + index)
            with run.autocast():
                losses = run.task.loss(batch, generator)
            for name, value in losses.items():
                if not value.ndim:
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / count
    return run.ranks.mean(sums)


def _count_batches(run: Run, held_out: Source) -> int:
    """Return the number of validation batches: that of the settings, at most one epoch."""
    limit = run.settings.callbacks.validate_batches
    epoch = held_out.batches_per_epoch(run.batch_size)
    return limit if epoch is None else max(1, min(limit, int(epoch)))
