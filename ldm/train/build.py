"""What a run consists of, made from its config: a task, and the players that are trained for it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.train.config.settings import Settings
from ldm.train.distributed import parallel
from ldm.train.distributed.parallel import Ranks
from ldm.train.optim import optimizers
from ldm.train.optim.ema import EMA
from ldm.train.state import Player, State
from ldm.train.tasks import autoencoder, diffusion
from ldm.train.tasks.adaptation import Adaptation
from ldm.train.tasks.diffusion import Diffusion

__all__ = ["state", "task"]


def task(model: nn.Module, params: Mapping[str, Any], settings: Settings) -> Any:
    """What `model` is trained for: to denoise, to learn something small, or to reconstruct.

    params: of the model, as in its config. settings: of the run.
    """
    options, lora, inversion = settings.objective, settings.lora, settings.textual_inversion
    if isinstance(model, LatentDiffusion):
        whole = Diffusion(model, **diffusion.options(params, options))
        if not (lora or inversion):
            return whole
        return Adaptation(
            whole, lora.model_dump() if lora else {}, inversion.model_dump() if inversion else {}
        )
    if isinstance(model, AutoencoderKL):
        return autoencoder.task(model, params, options)
    raise ValueError(f"`{type(model).__name__}` cannot be trained, only whole models can")


def state(task: Any, settings: Settings, ranks: Ranks, device: torch.device) -> State:
    """Optimizers, average, and the processes' shares in them, at the beginning of a run."""
    trainer, optimizer = settings.trainer, settings.optimizer
    options = {"name": optimizer.name, **optimizer.options}
    if optimizer.name == "adamw" and hasattr(task, "betas"):
        options.setdefault("betas", task.betas)
    module = task.trained
    if trainer.strategy in ("fsdp", "hsdp") and ranks.world > 1:
        if not isinstance(task, Diffusion):
            raise ValueError(f"strategy `{trainer.strategy}` is for whole models, use `ddp`")
        if trainer.channels_last or trainer.ema_device == "cpu":
            raise ValueError("`channels_last` and `ema_device: cpu` do not go with fsdp and hsdp")
        parallel.split(module, ranks.world, trainer.strategy, trainer.shard, device.type)
    players = {"model": _player(module, task.loss, ranks, options)}
    if getattr(task, "rival", None) is not None:
        players["rival"] = _player(task.rival, task.rival_loss, ranks, options)
    average = EMA(module, optimizer.ema_decay, torch.device("cpu") if trainer.ema_device else None)
    parts = ranks.world * trainer.accumulate_grad_batches
    return State(players, average, parts=parts, is_half=trainer.precision == "16-mixed")


def _player(module: nn.Module, loss: Any, ranks: Ranks, options: Mapping[str, Any]) -> Player:
    if ranks.world > 1 and not parallel.is_split(module):
        replica = parallel.Replica(module, loss)
        loss = DistributedDataParallel(  # text towers have weights that no context needs
            replica, gradient_as_bucket_view=True, find_unused_parameters=True
        )
    return Player(module, optimizers.make(module, 0.0, **options), loss)
