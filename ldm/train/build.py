"""Configure the model of a run, and build its task and initial state from its settings."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import Autoencoder
from ldm.nets.blocks import CheckpointedLayer
from ldm.runtime.errors import check_names
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.train.config.schema import CriterionOptions, TrainerOptions, list_keys
from ldm.train.config.settings import Settings
from ldm.train.distributed.parallel import LossModule, Ranks, is_sharded, shard
from ldm.train.optim.ema import EMA
from ldm.train.optim.optimizers import make_optimizer
from ldm.train.state import LossScale, State, TrainedNetwork
from ldm.train.tasks.adaptation import AdaptationTask
from ldm.train.tasks.autoencoder import build_autoencoder_task
from ldm.train.tasks.criterion import Criterion
from ldm.train.tasks.diffusion import DiffusionTask
from ldm.train.tasks.task import LossFunction, Task

__all__ = [
    "build_diffusion_task", "build_state", "build_task", "collect_diffusion_options",
    "configure_model", "set_gradient_checkpointing",
]  # fmt: skip


def configure_model(model: nn.Module, trainer: TrainerOptions) -> None:
    """Apply the settings that affect time and memory of a step, but not its result.

    `gradient_checkpointing`: see `set_gradient_checkpointing`; None = as the model's config says.
    `channels_last`: memory format of convolutions, faster on tensor cores, a bit slower on CPUs.
    `compile`: torch.compile of the UNet, or of the whole autoencoder; the first step at each image
    size then takes a minute.
    """
    if trainer.gradient_checkpointing is not None:
        set_gradient_checkpointing(model, trainer.gradient_checkpointing)
    if trainer.channels_last:
        model.to(memory_format=torch.channels_last)
    if trainer.compile:
        network = model.unet if isinstance(model, LatentDiffusion) else model
        network.compile()


def set_gradient_checkpointing(model: nn.Module, enabled: bool = True) -> int:
    """Switch gradient checkpointing of all layers on or off; gradients are the same.

    Chen et al. 2016 (arXiv:1604.06174).

    Returns:
        The number of layers that support it.
    """
    layers = [module for module in model.modules() if isinstance(module, CheckpointedLayer)]
    for layer in layers:
        layer.use_checkpoint = enabled
    return len(layers)


def build_task(model: nn.Module, settings: Settings, *, load_weights: bool = True) -> Task:
    """Build the task that the settings select: diffusion, adaptation or autoencoder.

    Args:
        load_weights: Whether to load the networks of the losses; False = random weights.
    Raises:
        ValueError: The model cannot be trained, or the settings are invalid for it.
    """
    params = settings.model.params
    autoencoder = model.autoencoder if isinstance(model, LatentDiffusion) else model
    if isinstance(autoencoder, Autoencoder) and autoencoder.in_channels != 3:
        raise ValueError(
            f"the model encodes {autoencoder.in_channels} channels (LDM3D: color and depth), so it "
            "cannot be trained: images of the data have 3"
        )
    if isinstance(model, Autoencoder):
        return build_autoencoder_task(model, params, settings.objective, load_weights=load_weights)
    if not isinstance(model, LatentDiffusion):
        raise ValueError(
            f"`{type(model).__name__}` cannot be trained, only LatentDiffusion and autoencoders"
        )
    dropout = settings.objective.get("conditioning_dropout_prob")
    if isinstance(dropout, Mapping):
        keys = sorted(model.conditioner.keys)
        check_names("condition", dropout, keys, "lightning.objective.conditioning_dropout_prob")
    task = build_diffusion_task(model, **collect_diffusion_options(params, settings.objective))
    lora, inversion = settings.lora, settings.textual_inversion
    if lora is None and inversion is None:
        return task
    return AdaptationTask(
        task, lora.model_dump() if lora else None, inversion.model_dump() if inversion else None
    )


def build_diffusion_task(model: LatentDiffusion, **options: Any) -> DiffusionTask:
    """Build the task; `options` are keyword arguments of `DiffusionTask` and `Criterion`."""
    kwargs = {f.name: options.pop(f.name) for f in fields(Criterion) if f.name in options}
    return DiffusionTask(model, criterion_options=kwargs, **options)


def collect_diffusion_options(params: JsonMapping, objective: JsonMapping) -> JsonObject:
    """Collect the keywords of `build_diffusion_task` from a config.

    Args:
        params: `model.params`, with the original's keys; `ucg_training`, `embedding_dropout` and
            the `ucg_rate` of embedders set `conditioning_dropout_prob`.
        objective: `lightning.objective`, which takes precedence.
    """
    options = {
        key: params[key] for key in list_keys(CriterionOptions) if params.get(key) is not None
    }
    options |= objective
    probabilities = {key: entry["p"] for key, entry in (params.get("ucg_training") or {}).items()}
    # The original's image-embedding models drop half of the embeddings by default.
    default_dropout = 0.5 if "embedder_config" in params else 0.0
    if dropout := params.get("embedding_dropout", default_dropout):
        probabilities["embedding"] = dropout
    if probabilities:
        overrides = objective.get("conditioning_dropout_prob")
        if not isinstance(overrides, Mapping):
            overrides = {} if overrides is None else {"txt": overrides}
        options["conditioning_dropout_prob"] = {"txt": 0.1, **probabilities, **overrides}
    conditioner = (params.get("conditioner_config") or {}).get("params") or {}
    if any(embedder.get("ucg_rate") for embedder in conditioner.get("emb_models") or []):
        options.setdefault("conditioning_dropout_prob", None)
    return options


def build_state(task: Task, settings: Settings, ranks: Ranks, device: torch.device) -> State:
    """Build the initial optimizers and EMA; with FSDP, shard the weights in place first."""
    trainer, optimizer = settings.trainer, settings.optimizer
    if trainer.strategy in ("fsdp", "hsdp") and ranks.world_size > 1:
        shard(task.trainable, ranks.world_size, trainer.strategy, trainer.shard_size, device.type)
    options = {"name": optimizer.name, **optimizer.options}
    if optimizer.name == "adamw" and task.betas is not None:
        options.setdefault("betas", task.betas)
    model = _build_trained_network(task.trainable, task.loss, ranks, options)
    discriminator = None
    if task.discriminator is not None:
        discriminator = _build_trained_network(
            task.discriminator, task.discriminator_loss, ranks, options
        )
    ema_device = torch.device("cpu") if trainer.ema_device else None
    return State(
        model,
        EMA(task.trainable, optimizer.ema_decay, ema_device),
        discriminator,
        LossScale(enabled=trainer.precision == "16-mixed"),
        batches_per_step=ranks.world_size * trainer.accumulate_grad_batches,
        batch_size=settings.loader.batch_size,
    )


def _build_trained_network(
    module: nn.Module, loss: LossFunction, ranks: Ranks, options: Mapping[str, Any]
) -> TrainedNetwork:
    if ranks.world_size > 1 and not is_sharded(module):
        # Some weights, such as CLIP's `logit_scale`, are not used by the loss.
        loss = DistributedDataParallel(
            LossModule(module, loss), gradient_as_bucket_view=True, find_unused_parameters=True
        )
    # The learning rate is set before each step.
    return TrainedNetwork(module, make_optimizer(module, 0.0, **options), loss)
