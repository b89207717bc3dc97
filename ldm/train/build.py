"""Builds the task of a run, and the state that is trained for it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.train.config.settings import Settings
from ldm.train.distributed.parallel import LossModule, Ranks, is_sharded, shard
from ldm.train.optim.ema import EMA
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.state import State, TrainedNetwork
from ldm.train.tasks.adaptation import Adaptation
from ldm.train.tasks.autoencoder import build_autoencoder_task
from ldm.train.tasks.diffusion import Diffusion, diffusion_options
from ldm.train.tasks.task import LossFunction, Task

__all__ = ["build_state", "build_task"]


def build_task(model: nn.Module, params: Mapping[str, Any], settings: Settings) -> Task:
    """Builds the task that the settings ask for: diffusion, adaptation or reconstruction.

    Args:
        params: of the model, as in its config.
    Raises:
        ValueError: the model cannot be trained, or the settings do not fit it.
    """
    if isinstance(model, AutoencoderKL):
        return build_autoencoder_task(model, params, settings.objective)
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"`{type(model).__name__}` cannot be trained, only whole models can")
    task = Diffusion(model, **diffusion_options(params, settings.objective))
    lora, inversion = settings.lora, settings.textual_inversion
    if lora is None and inversion is None:
        return task
    return Adaptation(
        task, lora.model_dump() if lora else {}, inversion.model_dump() if inversion else {}
    )


def build_state(task: Task, settings: Settings, ranks: Ranks, device: torch.device) -> State:
    """Builds optimizers and EMA at the beginning of a run; shards the weights first, if asked for.

    Raises:
        ValueError: the settings do not go together.
    """
    trainer, optimizer = settings.trainer, settings.optimizer
    if trainer.strategy in ("fsdp", "hsdp") and ranks.world_size > 1:
        if not task.is_shardable:
            raise ValueError(f"strategy `{trainer.strategy}` is for whole models, use `ddp`")
        if trainer.channels_last or trainer.ema_device == "cpu":
            raise ValueError("`channels_last` and `ema_device: cpu` do not go with fsdp and hsdp")
        shard(task.trainable, ranks.world_size, trainer.strategy, trainer.shard, device.type)
    options = {"name": optimizer.name, **optimizer.options}
    if optimizer.name == "adamw" and task.betas is not None:
        options.setdefault("betas", task.betas)
    discriminator = None
    model = _build_network(task.trainable, task.loss, ranks, options)
    if task.discriminator is not None:
        discriminator = _build_network(task.discriminator, task.discriminator_loss, ranks, options)
    ema_device = torch.device("cpu") if trainer.ema_device else None
    return State(
        model,
        EMA(task.trainable, optimizer.ema_decay, ema_device),
        discriminator=discriminator,
        batches_per_step=ranks.world_size * trainer.accumulate_grad_batches,
        is_half=trainer.precision == "16-mixed",
    )


def _build_network(
    module: nn.Module, loss: LossFunction, ranks: Ranks, options: Mapping[str, Any]
) -> TrainedNetwork:
    if ranks.world_size > 1 and not is_sharded(module):
        loss = DistributedDataParallel(  # text encoders have weights that no context depends on
            LossModule(module, loss), gradient_as_bucket_view=True, find_unused_parameters=True
        )
    return TrainedNetwork(module, make_optimizer(module, 0.0, **options), loss)
