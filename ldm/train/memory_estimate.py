"""--dry-run: the whole config of a run, and an estimate of the memory of each of its processes.

Weights, optimizer state and EMA are computed from parameter counts. For activations, a training
step runs on fake tensors, which have shapes and lifetimes but no memory: the estimate is their peak
total. Encoding of images is measured separately, as it precedes the step.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.encoders.text import TextEncoder
from ldm.loading.build import build_on_meta
from ldm.loading.config import format_yaml
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import Autoencoder
from ldm.pipelines.memory import run_on_zeros
from ldm.runtime.memory import PeakMemoryMode, make_fake
from ldm.train.batches.images import build_transform
from ldm.train.build import build_task, set_gradient_checkpointing
from ldm.train.config.settings import Settings
from ldm.train.tasks.adaptation import AdaptationTask
from ldm.train.tasks.autoencoder import AdversarialTask
from ldm.train.tasks.task import Task

__all__ = ["TrainingMemory", "describe_run", "estimate_training_memory"]

# Bytes of optimizer state for each trainable parameter.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.0, "muon": 4.0, "adafactor": 0.1}


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one process of a run, in bytes, and numbers of parameters.

    Args:
        num_parameters: Number of parameters of all networks.
        num_trainable: Number of trainable parameters.
        optimizer_temporaries: Temporary memory of an optimizer step, after activations are freed.
    """

    num_parameters: int
    num_trainable: int
    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    optimizer_temporaries: int

    @property
    def total(self) -> int:
        """Peak memory of a training step."""
        persistent = self.weights + self.gradients + self.optimizer + self.ema
        return persistent + max(self.activations, self.optimizer_temporaries)


def describe_run(settings: Settings, *, world_size: int = 1) -> Iterator[str]:
    """Yield the config with all defaults, the memory of a run, and overrides that reduce it."""
    yield format_yaml(settings.to_config())
    yield from settings.messages
    cache: dict[Any, int] = {}
    memory = estimate_training_memory(settings, world_size, cache)
    trainable, parameters = memory.num_trainable / 1e6, memory.num_parameters / 1e6
    batch_size, accumulation = settings.loader.batch_size, settings.trainer.accumulate_grad_batches
    yield f"parameters  {trainable:.2f} M trainable, {max(0, parameters - trainable):.2f} M frozen"
    yield f"batch       {batch_size} x {accumulation} accumulated x {world_size} ranks"
    yield f"memory      about {_format_bytes(memory.total)} per process"
    bytes_by_name = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "EMA": memory.ema,
        "activations": memory.activations,
    }
    for name, num_bytes in bytes_by_name.items():
        yield f"  {name:11} {_format_bytes(num_bytes)}"
    yield "  plus PyTorch's own overhead (about 0.2 GiB on a CPU, 0.5 GiB on a GPU)"
    for override, changed in _iter_savings(settings, world_size):
        saved = memory.total - estimate_training_memory(changed, world_size, cache).total
        if saved > 0.01 * memory.total:
            yield f"saves {_format_bytes(saved):>9}  {override}"


def estimate_training_memory(
    settings: Settings, world_size: int = 1, cache: dict[Any, int] | None = None
) -> TrainingMemory:
    """Estimate the memory of one process of a run.

    Args:
        cache: Bytes of activations by what they depend on, extended in place, as measuring is slow;
            None = no cache.
    """
    trainer, optimizer = settings.trainer, settings.optimizer
    task = _build_task_on_meta(settings)
    ema_parameters = [p for p in task.trainable.parameters() if p.requires_grad]
    trainable = list(ema_parameters)
    if task.discriminator is not None:
        trainable += task.discriminator.parameters()
    num_trainable = sum(p.numel() for p in trainable)
    num_parameters = sum(
        p.numel() for p in {p for net in _list_networks(task) for p in net.parameters()}
    )
    # Weights, gradients and EMA are float32, 4 bytes each; each process holds a fraction of
    # them for trainable parameters.
    fraction = _get_shard_fraction(settings, world_size)
    shard_bytes = int(4 * num_trainable * fraction)
    optimizer_bytes = OPTIMIZER_BYTES[optimizer.name] * num_trainable
    if optimizer.name == "muon":  # vectors are updated by AdamW: 4 more bytes, for a second moment
        optimizer_bytes += 4 * sum(p.numel() for p in trainable if p.ndim < 2)
    has_ema = bool(optimizer.ema_decay) and trainer.ema_device is None
    cache = {} if cache is None else cache
    key = (settings.loader.batch_size, trainer.precision, trainer.gradient_checkpointing)
    if key not in cache:
        cache[key] = _measure_activations(task, settings)
    return TrainingMemory(
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        weights=4 * (num_parameters - num_trainable) + shard_bytes,
        gradients=shard_bytes,
        optimizer=int(optimizer_bytes * fraction),
        ema=int(4 * sum(p.numel() for p in ema_parameters) * fraction) if has_ema else 0,
        activations=cache[key],
        optimizer_temporaries=shard_bytes if optimizer.name.startswith("adamw") else 0,
    )


def _iter_savings(settings: Settings, world_size: int) -> Iterator[tuple[str, Settings]]:
    """Yield overrides that may reduce memory, and the settings with each."""
    trainer, batch_size = settings.trainer, settings.loader.batch_size
    changes: list[tuple[str, str, str | bool]] = [
        ("trainer", "precision", "bf16-mixed"),
        ("trainer", "gradient_checkpointing", True),
        ("optimizer", "name", "adamw8bit"),
    ]
    if trainer.strategy not in ("fsdp", "hsdp"):
        changes.append(("trainer", "ema_device", "cpu"))  # which FSDP does not support
        if world_size > 1 and settings.find_sharding_problem() is None:
            changes.append(("trainer", "strategy", "fsdp"))
    for section, key, value in changes:
        override = f"lightning.{section}.{key}={str(value).lower()}"
        yield override, settings.replace(**{section: {key: value}})
    if batch_size > 1:
        half, accumulation = batch_size // 2, 2 * trainer.accumulate_grad_batches
        yield (
            f"data.params.batch_size={half} "
            f"lightning.trainer.accumulate_grad_batches={accumulation}",
            settings.replace(
                loader={"batch_size": half}, trainer={"accumulate_grad_batches": accumulation}
            ),
        )


def _build_task_on_meta(settings: Settings) -> Task:
    """Build the task of a run, with its networks on the meta device."""
    model = build_on_meta(settings.config["model"], where="model")
    if settings.trainer.gradient_checkpointing is not None:
        set_gradient_checkpointing(model, settings.trainer.gradient_checkpointing)
    with torch.device("meta"):
        return build_task(model, settings, load_weights=False)


def _list_networks(task: Task) -> list[nn.Module]:
    """Return all networks of a task, including the networks of its losses."""
    perceptual = task.perceptual if isinstance(task, AdversarialTask) else None
    networks = (task.model, task.trainable, task.discriminator, perceptual)
    return [network for network in networks if network is not None]


def _measure_activations(task: Task, settings: Settings) -> int:
    """Return the bytes at the peak of a training step, beyond weights and their gradients."""
    batch_size = settings.loader.batch_size
    size = build_transform(settings.data.train["transform"]).image_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (task.model, task.trainable):
            make_fake(module)
        if isinstance(task, AdaptationTask) and task.token:
            task.attach_vectors()
        # bfloat16 stands in for float16, which has the same size but is not supported everywhere.
        is_mixed = settings.trainer.precision != "32"
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            image = torch.zeros(batch_size, 3, size, size)
            if isinstance(task.model, Autoencoder):
                # Build the networks of the losses again, from fake tensors.
                task = build_task(task.model, settings, load_weights=False)
                task.step = sys.maxsize  # past the start of the discriminator
                return _measure_autoencoder(task, image)
            model = task.model
            peaks = [_measure_peak(lambda: _run_model(model, batch_size, size), task.trainable)]
            if not settings.data.latents:
                with torch.no_grad(), PeakMemoryMode() as mode:
                    model.autoencoder.encode(image)
                peaks.append(mode.peak)
            return max(peaks)


def _run_model(model: LatentDiffusion, batch_size: int, size: int) -> Tensor:
    """Run the text encoders and the UNet; return a scalar that depends on all trained outputs."""
    outputs: list[Tensor] = []
    for encoder in model.conditioner.find_all(TextEncoder):
        output = encoder.encode_tokens(torch.zeros(batch_size, encoder.length, dtype=torch.long))
        outputs += [output] if isinstance(output, Tensor) else output.tensors().values()
    outputs = [output for output in outputs if output.requires_grad]
    side = size // model.downscale_factor
    outputs.append(
        run_on_zeros(model.unet, batch_size, (side, side), is_context_trained=bool(outputs))
    )
    return torch.stack([output.float().square().mean() for output in outputs]).sum()


def _measure_autoencoder(task: Task, image: Tensor) -> int:
    """Return the peak bytes of the steps of an autoencoder and of its discriminator."""
    batch, generator = {"jpg": image}, torch.Generator()
    peaks = [_measure_peak(lambda: task.loss(batch, generator)["loss"], task.trainable)]
    if task.discriminator is not None:
        loss = task.discriminator_loss
        peaks.append(_measure_peak(lambda: loss(batch, generator)["loss"], task.discriminator))
    return max(peaks)


def _measure_peak(forward: Callable[[], Tensor], trainable: nn.Module) -> int:
    """Return the peak bytes of a forward and a backward pass, without the gradients."""
    for p in trainable.parameters():  # as for the second of several accumulated batches
        p.grad = torch.empty_like(p) if p.requires_grad else None
    mode = PeakMemoryMode()
    with mode:
        output = forward()
        if output.requires_grad:
            output.backward()
    return mode.peak


def _get_shard_fraction(settings: Settings, world_size: int) -> float:
    """Return the fraction of the trainable parameters that each process holds."""
    if settings.trainer.strategy == "fsdp":
        return 1 / world_size
    if settings.trainer.strategy == "hsdp":
        return 1 / (settings.trainer.shard_size or world_size)
    return 1.0


def _format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
