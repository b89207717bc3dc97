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


def validate(run: Run, num_batches: int | None = None) -> dict[str, float]:
    """Compute mean losses over the first batches of the validation data; all ranks call this.

    Args:
        num_batches: None = `lightning.callbacks.validate_batches`.
    Returns:
        Losses by name; {} without validation data.
    """
    if run.validation_source is None:
        return {}
    losses: dict[str, float] = {}
    for suffix in ("", "_ema") if run.state.ema.decay else ("",):
        with run.state.ema.apply_to(run.task.trainable, enabled=bool(suffix)):
            count = num_batches or run.settings.callbacks.validate_batches
            means = _compute_mean_losses(run, run.validation_source, count)
        losses |= {f"val/{name}{suffix}": value for name, value in means.items()}
    return losses


def _compute_mean_losses(run: Run, source: BatchSource, num_batches: int) -> dict[str, float]:
    rank, world_size = run.ranks.rank, run.ranks.world_size
    batches = source.iter_batches(run.batch_size, rank=rank, world_size=world_size)
    batches_per_epoch = source.get_batches_per_epoch(run.batch_size)
    if batches_per_epoch is not None:
        num_batches = max(1, min(num_batches, int(batches_per_epoch)))
    # All ranks need the same number: a forward pass gathers sharded weights from all.
    batches_per_rank = -(-num_batches // world_size)
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
    return run.ranks.all_reduce_mean(sums)
