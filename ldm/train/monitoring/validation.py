"""Validation: losses on held-out data, always on the same first batches with the same noise.

val/NAME        with the raw weights; NAME is "loss" or another loss of the task
val/NAME_ema    with the EMA weights
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import nn

from ldm.data.source import BatchSource, derive_seed
from ldm.train.distributed.parallel import reshard
from ldm.train.run import Run

__all__ = ["eval_mode", "validate"]

log = logging.getLogger(__name__)


def validate(run: Run) -> dict[str, float]:
    """Compute mean losses over the first batches of the held-out data.

    Call it on all ranks: each computes a share of the batches.

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
        text = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        log.info("step %d: %s", run.state.step, text)
    return losses


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Keep a module in eval mode, without gradients, within the context; reshard it afterwards.

    `inference_mode` would make inference tensors of the gathered weights of sharded models, which
    autograd cannot use when training goes on.
    """
    training_modules = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(module)
        for submodule in training_modules:
            submodule.training = True


def _mean_losses(run: Run, held_out: BatchSource) -> dict[str, float]:
    rank, world_size = run.ranks.rank, run.ranks.world_size
    batches = held_out.batches(run.batch_size, rank=rank, world_size=world_size)
    # All ranks need the same number, or gathering sharded weights for a forward pass would hang.
    batches_per_rank = -(-_count_batches(run, held_out) // world_size)
    sums: dict[str, float] = {}
    with eval_mode(run.model):
        for k, batch in enumerate(islice(batches, batches_per_rank)):
            batch.pop("broken", None)
            seed = derive_seed(run.seed, k * world_size + rank)
            generator = torch.Generator().manual_seed(seed)
            with run.autocast():
                losses = run.task.loss(batch, generator)
            for name, value in losses.items():
                if not value.ndim:
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / batches_per_rank
    return run.ranks.mean(sums)


def _count_batches(run: Run, held_out: BatchSource) -> int:
    """Return `validate_batches`, or the batches in an epoch if they are fewer; at least 1."""
    limit = run.settings.callbacks.validate_batches
    batches_per_epoch = held_out.batches_per_epoch(run.batch_size)
    return limit if batches_per_epoch is None else max(1, min(limit, int(batches_per_epoch)))
