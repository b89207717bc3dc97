"""Validation: losses on held-out data, always on the same first batches with the same noise.

val/NAME        with the raw weights; NAME is "loss" or another loss of the task
val/NAME_ema    with the EMA weights
"""

from itertools import islice

import torch

from ldm.data.source import BatchSource, derive_seed
from ldm.train.distributed.parallel import eval_mode
from ldm.train.run import Run

__all__ = ["validate"]


def validate(run: Run, batches: int | None = None) -> dict[str, float]:
    """Compute mean losses over the first batches of the held-out data; all ranks call this.

    Args:
        batches: Number of batches; None = `lightning.callbacks.validate_batches`.
    Returns:
        Losses by name, {} if no data is held out.
    """
    if run.validation_source is None:
        return {}
    losses: dict[str, float] = {}
    for suffix in ("", "_ema") if run.state.ema.decay else ("",):
        with run.state.ema.apply_to(run.task.trainable, enabled=bool(suffix)):
            count = batches or run.settings.callbacks.validate_batches
            means = _mean_losses(run, run.validation_source, count)
        losses |= {f"val/{name}{suffix}": value for name, value in means.items()}
    return losses


def _mean_losses(run: Run, source: BatchSource, count: int) -> dict[str, float]:
    rank, world_size = run.ranks.rank, run.ranks.world_size
    batches = source.batches(run.batch_size, rank=rank, world_size=world_size)
    batches_per_epoch = source.batches_per_epoch(run.batch_size)
    if batches_per_epoch is not None:
        count = max(1, min(count, int(batches_per_epoch)))
    # All ranks need the same number, or gathering sharded weights for a forward pass would hang.
    batches_per_rank = -(-count // world_size)
    sums: dict[str, float] = {}
    with eval_mode(run.model):
        for k, batch in enumerate(islice(batches, batches_per_rank)):
            batch.pop("unreadable", None)
            seed = derive_seed(run.seed, k * world_size + rank)
            generator = torch.Generator().manual_seed(seed)
            with run.autocast():
                losses = run.task.loss(batch, generator)
            for name, value in losses.items():
                if not value.ndim:
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / batches_per_rank
    return run.ranks.mean(sums)
