"""--dry-run: what a run would be, and the memory that each of its processes would need.

Weights, optimizer and average are counted. Activations are found by running a training step of the
network on fake tensors, which have shapes and lifetimes but no numbers: their largest sum is the
answer, for any size of model, without its memory. Pictures are encoded before that, by themselves.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.loading.build import build_on_meta
from ldm.loading.config import format_yaml
from ldm.loading.legacy import translate_config
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.train.config.schema import Trainer
from ldm.train.config.settings import Settings
from ldm.train.tasks.adaptation import Adaptation
from ldm.train.tasks.autoencoder import Adversarial, build_autoencoder_task
from ldm.train.tasks.diffusion import Diffusion
from ldm.train.tasks.task import Task

__all__ = ["Memory", "describe", "estimate"]

TOKENS = 77
TORCH = "torch (about 0.2 GiB on a CPU, 0.5 GiB on a GPU)"
SIDE = 512  # pixels, if the data does not say
# Bytes that an optimizer keeps per trained number.
OPTIMIZERS = {"adamw": 8.0, "adamw8bit": 2.0, "muon": 4.0, "adafactor": 0.1}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process; `parameters`, `trained`: numbers in the model, and those trained.

    step: what the optimizer needs for a moment, when the activations are gone.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    step: int

    @property
    def total(self) -> int:
        """At the moment when most is needed."""
        kept = self.weights + self.gradients + self.optimizer + self.average
        return kept + max(self.activations, self.step)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and live; `peak` is the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view makes nothing
        for storage in _storages(made):
            if storage._cdata not in given:
                self._see(storage)
        return made

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def describe(settings: Settings, *, processes: int = 1) -> Iterator[str]:
    """Lines: the config with everything filled in, the memory, and what would lower it."""
    yield format_yaml(settings.to_config())
    yield from settings.notes
    known: dict[Any, int] = {}
    memory = estimate(settings, processes, known)
    frozen = memory.parameters - memory.trained
    yield f"parameters  {memory.trained / 1e6:.2f} M trained, {max(0, frozen) / 1e6:.2f} M frozen"
    batch = settings.data.batch_size
    parts = settings.trainer.accumulate_grad_batches
    yield f"batch       {batch} x {parts} accumulated x {processes} processes"
    yield f"memory      about {_size(memory.total)} per process"
    for name in ("weights", "gradients", "optimizer", "average", "activations"):
        yield f"  {name:<11} {_size(getattr(memory, name))}"
    yield f"  beside what {TORCH} takes for itself"
    for switch, other in _switches(settings, processes, known):
        saved = memory.total - other.total
        if saved > 0.01 * memory.total:
            yield f"saves {_size(saved):>9}  {switch}"


def estimate(
    settings: Settings,
    processes: int = 1,
    known: dict[Any, int] | None = None,
) -> Memory:
    """The memory of one process of a run.

    known: activations of runs that were looked at before, which is what takes time.
    """
    trainer, optimizer = settings.trainer, settings.optimizer
    task = _task(settings)
    averaged = [p for p in task.trainable.parameters() if p.requires_grad]
    trained = [*averaged, *(p for part in _discriminators(task) for p in part.parameters())]
    count = sum(p.numel() for p in trained)
    own = {id(p): p.numel() for part in _parts(task) for p in part.parameters()}
    share = _share(trainer, processes)
    bytes_ = OPTIMIZERS.get(optimizer.name, 8.0)
    if optimizer.name == "muon":  # what is no matrix has two moments
        bytes_ += 4 * sum(p.numel() for p in trained if p.ndim < 2) / max(1, count)
    is_averaged = bool(optimizer.ema_decay) and trainer.ema_device is None
    whole, known = 4 * sum(own.values()), {} if known is None else known
    key = (settings.data.batch_size, trainer.precision, trainer.checkpoint_gradients)
    if key not in known:
        known[key] = _activations(task, settings)
    return Memory(
        parameters=sum(own.values()),
        trained=count,
        weights=whole - 4 * count + int(4 * count * share),
        gradients=int(4 * count * share),
        optimizer=int(bytes_ * count * share),
        average=int(4 * sum(p.numel() for p in averaged) * share) if is_averaged else 0,
        activations=known[key],
        step=int(4 * count * share) if optimizer.name.startswith("adamw") else 0,
    )


def _switches(
    settings: Settings, processes: int, known: dict[Any, int]
) -> Iterator[tuple[str, Memory]]:
    """Settings that need less memory, and what would be needed then."""
    trainer, batch = settings.trainer, settings.data.batch_size
    changes: list[tuple[str, dict[str, Any]]] = [
        ("trainer.precision=bf16-mixed", {"trainer": {"precision": "bf16-mixed"}}),
        ("trainer.checkpoint_gradients=true", {"trainer": {"checkpoint_gradients": True}}),
        ("trainer.ema_device=cpu", {"trainer": {"ema_device": "cpu"}}),
        ("optimizer.name=adamw8bit", {"optimizer": {"name": "adamw8bit"}}),
    ]
    is_whole = not settings.model.target.endswith("AutoencoderKL")
    if processes > 1 and is_whole and trainer.strategy not in ("fsdp", "hsdp"):
        changes.append(("trainer.strategy=fsdp", {"trainer": {"strategy": "fsdp"}}))
    for name, change in changes:
        yield f"lightning.{name}", estimate(settings.change(**change), processes, known)
    if batch > 1:
        parts = 2 * trainer.accumulate_grad_batches
        name = (
            f"data.params.batch_size={batch // 2} lightning.trainer.accumulate_grad_batches={parts}"
        )
        halved = settings.change(
            trainer={"accumulate_grad_batches": parts}, data={"batch_size": batch // 2}
        )
        yield name, estimate(halved, processes, known)


def _task(settings: Settings) -> Task:
    """The task of a run with a model that has no memory; .model, .trained."""
    spec = translate_config(settings.raw["model"], where="model")
    checkpointed = settings.trainer.checkpoint_gradients
    if checkpointed is not None and "unet" in spec["params"]:
        spec["params"]["unet"]["params"]["use_checkpoint"] = checkpointed
    model = build_on_meta(spec, where="model")
    if isinstance(model, LatentDiffusion):
        task = Diffusion(model)
        lora, inversion = settings.lora, settings.textual_inversion
        if not (lora or inversion):
            return task
        with torch.device("meta"):
            return Adaptation(
                task,
                lora.model_dump() if lora else {},
                inversion.model_dump() if inversion else {},
            )
    if isinstance(model, AutoencoderKL):
        with torch.device("meta"):
            return _reconstructing(model, settings)
    raise ValueError(f"`{type(model).__name__}` cannot be trained, only whole models can")


def _reconstructing(model: AutoencoderKL, settings: Settings) -> Task:
    """The task of an autoencoder, at a step when its discriminator counts."""
    task = build_autoencoder_task(
        model, settings.model.params, settings.objective, load_weights=False
    )
    task.step = sys.maxsize
    return task


def _discriminators(task: Task) -> list[nn.Module]:
    """The network that is trained against the model, if there is one."""
    return [] if task.discriminator is None else [task.discriminator]


def _parts(task: Task) -> list[nn.Module]:
    """All networks of a task."""
    parts = [task.model, task.trainable, *_discriminators(task)]
    if isinstance(task, Adversarial) and task.perceptual is not None:
        parts.append(task.perceptual)
    return parts


def _activations(task: Task, settings: Settings) -> int:
    """Bytes at the peak of a training step, beyond weights and their gradients."""
    batch, side = settings.data.batch_size, _side(settings.raw["data"]["params"])
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.bfloat16}  # as large as each other
    dtype = dtypes.get(settings.trainer.precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (task.model, task.trainable):
            _fake(module)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            image = torch.zeros(batch, 3, side, side)
            if isinstance(task.model, AutoencoderKL):
                task, batch_ = _reconstructing(task.model, settings), {"jpg": image}
                chance = torch.Generator()
                peaks = [_peak(lambda: task.loss(batch_, chance)["loss"], task.trainable)]
                for discriminator in _discriminators(task):
                    peaks.append(
                        _peak(
                            lambda: task.discriminator_loss(batch_, chance)["loss"], discriminator
                        )
                    )
                return max(peaks)
            model = task.model
            peaks = [_peak(lambda: _forward(model, batch, side), task.trainable)]
            if not settings.raw["data"]["params"].get("latents"):
                with torch.no_grad(), Live() as live:
                    model.autoencoder.encode(image)
                peaks.append(live.peak)
            return max(peaks)


def _forward(model: LatentDiffusion, batch: int, side: int) -> Tensor:
    """One pass of the UNet over what its family reads."""
    state = {f"unet.{name}": value for name, value in model.unet.state_dict().items()}
    x = torch.zeros(
        batch, state["unet.input_blocks.0.0.weight"].shape[1], *[side // model.downscale] * 2
    )
    key = next((name for name in state if name.endswith("attn2.to_k.weight")), None)
    context = torch.zeros(batch, TOKENS, state[key].shape[1]) if key else None
    y = None
    if "unet.label_emb.0.0.weight" in state:
        y = torch.zeros(batch, state["unet.label_emb.0.0.weight"].shape[1])
    elif "unet.label_emb.weight" in state:
        y = torch.zeros(batch, dtype=torch.long)
    made: Tensor = model.unet(x, torch.zeros(batch, dtype=torch.long), context=context, y=y)
    return made


def _peak(forward: Callable[[], Tensor], trained: nn.Module) -> int:
    """Of the bytes that live during a forward and backward pass, without the gradients."""
    for p in trained.parameters():  # there, as for the second of several accumulated batches
        p.grad = torch.empty_like(p) if p.requires_grad else None
    with Live() as live:
        made = forward()
        if made.requires_grad:
            made.float().square().mean().backward()
    return live.peak


def _fake(module: nn.Module) -> None:
    """Replaces tensors on the meta device by fake ones of the CPU, where autocast works."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and p.is_meta:
                twin = nn.Parameter(torch.empty(p.shape), requires_grad=p.requires_grad)
                part._parameters[name] = twin
        for name, value in part._buffers.items():
            if value is not None and value.is_meta:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _share(trainer: Trainer, processes: int) -> float:
    """The part of what is trained that a process holds."""
    split = {"fsdp": processes, "hsdp": trainer.shard or processes}
    return 1 / split.get(trainer.strategy, 1)


def _side(params: Mapping[str, Any]) -> int:
    """Pixels along a picture of the data, as we or the original say it."""
    train = params.get("train") or {}
    places = [train, train.get("params") or {}, train.get("transform") or {}]
    size = next((place["size"] for place in places if "size" in place), SIDE)
    return int(max(size) if isinstance(size, list) else size)


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
