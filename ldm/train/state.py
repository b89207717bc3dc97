"""The state of a run: everything needed to resume it, as named tensors and numbers.

    weights and buffers, optimizers, EMA; step, batches consumed, seconds trained

There is no random state, as data order, noise and dropout are functions of the seed and the index
of the batch: a run resumes exactly, on any number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.loading.weight_names import select_prefix
from ldm.train.optim.ema import EMA
from ldm.train.optim.optimizers import STATE_KEYS
from ldm.train.tasks.task import LossFunction

__all__ = ["LossScale", "State", "TensorSpecs", "TrainedNetwork"]

TensorSpecs = Mapping[str, tuple[torch.Size, torch.dtype]]  # (shape, dtype) by name


@dataclass(eq=False)
class TrainedNetwork:
    """A module, its optimizer, and its loss.

    Args:
        loss: With several processes a DistributedDataParallel module.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: LossFunction

    def get_weights(self) -> dict[str, Tensor]:
        """Return trainable parameters and all buffers; frozen parameters are not saved."""
        frozen = {name for name, p in self.module.named_parameters() if not p.requires_grad}
        state = self.module.state_dict()
        return {name: value for name, value in state.items() if name not in frozen}

    def get_optimizer_state(self) -> dict[str, Tensor]:
        """Return the tensors in the optimizer's state, by "PARAMETER.KEY"."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        return {
            f"{names[id(p)]}.{key}": torch.as_tensor(value)
            for p, values in self.optimizer.state.items()
            for key, value in values.items()
        }

    def allocate_optimizer_state(self, specs: TensorSpecs) -> dict[str, Tensor]:
        """Allocate the tensors of an optimizer's state, sharded like the parameters.

        Tensors of other parameters, or of another optimizer, are left out.
        """
        parameters = dict(self.module.named_parameters())
        state_keys = STATE_KEYS[type(self.optimizer).__name__]
        state: dict[str, Tensor] = {}
        for name, (shape, dtype) in specs.items():
            parameter_name, _, key = name.rpartition(".")
            if parameter_name not in parameters or key not in state_keys:
                continue
            p = parameters[parameter_name]
            if shape == p.shape:
                state[name] = torch.zeros_like(p, dtype=dtype)
            else:  # a step count, or Adafactor's rows and columns
                state[name] = torch.zeros(shape, dtype=dtype)
        return state

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `get_optimizer_state` returned; parameters without an entry are unchanged."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        state = self.optimizer.state_dict()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, p in enumerate(parameters):
            if values := select_prefix(tensors, f"{names[id(p)]}."):
                state["state"][index] = values
        self.optimizer.load_state_dict(state)


class LossScale:
    """Dynamic scale of the loss in float16, so that small gradients do not underflow.

    It is halved when gradients overflow, and doubled after GROWTH_INTERVAL steps without overflow
    (arXiv:1710.03740). Without `enabled` it stays 1.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 65536.0 if enabled else 1.0
        self.finite_steps = 0

    @property
    def is_adapting(self) -> bool:
        """Whether a smaller scale may prevent overflow."""
        return self.enabled and self.value >= 1

    def update(self, is_finite: bool) -> None:
        if not self.enabled:
            return
        self.finite_steps = self.finite_steps + 1 if is_finite else 0
        if not is_finite:
            self.value /= 2
        elif self.finite_steps % self.GROWTH_INTERVAL == 0:
            self.value *= 2


@dataclass(eq=False)
class State:
    """The resumable state of a run.

    Args:
        batches_per_step: Number of batches of all processes, accumulated ones included.
        batch_size: Samples per batch, the unit of `batches_consumed`.
        batches_consumed: Number of batches that all processes together have consumed.
        seconds: Training time in seconds, including that before the run was resumed.
        scale_factor: Scale factor of latents, measured by `scale_by_std`; None = the config's.
        skipped_steps: Number of steps whose gradients were not finite.
        consecutive_skips: Number of steps skipped since the last update; not saved.
        is_consistent: False while weights are being updated; not saved.
        is_saved: Whether this state is on disk; not saved.
    """

    model: TrainedNetwork
    ema: EMA
    discriminator: TrainedNetwork | None
    loss_scale: LossScale
    batches_per_step: int
    batch_size: int
    step: int = 0
    batches_consumed: int = 0
    seconds: float = 0.0
    scale_factor: float | None = None
    skipped_steps: int = 0
    consecutive_skips: int = 0
    is_consistent: bool = True
    is_saved: bool = False

    @property
    def networks(self) -> dict[str, TrainedNetwork]:
        """The trained networks, by their names in state files."""
        networks = {"model": self.model}
        if self.discriminator is not None:
            networks["rival"] = self.discriminator  # as version 0.1 called it
        return networks

    def get_numbers(self) -> dict[str, float]:
        """Return all numbers under their names in state files, most of them of version 0.1."""
        measured = {} if self.scale_factor is None else {"scale_factor": self.scale_factor}
        return {
            **measured,
            "step": self.step,
            "position": self.batches_consumed,
            "parts": self.batches_per_step,
            "batch_size": self.batch_size,
            "seconds": self.seconds,
            "skipped": self.skipped_steps,
            "scale": self.loss_scale.value,
            "steady": self.loss_scale.finite_steps,
            "averaged": self.ema.num_updates,
        }

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        self.step = int(numbers["step"])
        self.batches_consumed = int(numbers["position"])
        self.batches_per_step = int(numbers["parts"])
        self.batch_size = int(numbers.get("batch_size", self.batch_size))
        self.seconds = numbers["seconds"]
        self.skipped_steps = int(numbers["skipped"])
        self.loss_scale.value = numbers["scale"]
        self.loss_scale.finite_steps = int(numbers["steady"])
        self.ema.num_updates = int(numbers["averaged"])
        self.scale_factor = numbers.get("scale_factor", self.scale_factor)

    def get_tensors(self) -> dict[str, Tensor]:
        """Return all tensors: "average.…" (EMA), "NETWORK.weights.…", "NETWORK.optimizer.…"."""
        tensors = self._get_weights_and_ema()
        for name, network in self.networks.items():
            tensors |= _add_prefix(network.get_optimizer_state(), f"{name}.optimizer.")
        return tensors

    def get_tensors_to_load(self, specs: TensorSpecs) -> dict[str, Tensor]:
        """Return tensors to read a saved state into; optimizer states are allocated."""
        tensors = self._get_weights_and_ema()
        for name, network in self.networks.items():
            prefix = f"{name}.optimizer."
            empty = network.allocate_optimizer_state(select_prefix(specs, prefix))
            tensors |= _add_prefix(empty, prefix)
        return tensors

    def load_optimizers(self, tensors: Mapping[str, Tensor]) -> None:
        for name, network in self.networks.items():
            network.load_optimizer_state(select_prefix(tensors, f"{name}.optimizer."))

    def has_finite_tensors(self) -> bool:
        """Return whether weights, EMA and optimizer states of this process are finite."""
        tensors = list(self.ema.shadow.values())
        for network in self.networks.values():
            tensors += [p for p in network.module.parameters() if p.requires_grad]
            tensors += network.get_optimizer_state().values()
        shards = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
        return all(bool(x.detach().isfinite().all()) for x in shards if x.is_floating_point())

    def _get_weights_and_ema(self) -> dict[str, Tensor]:
        tensors = _add_prefix(self.ema.shadow, "average.")
        for name, network in self.networks.items():
            tensors |= _add_prefix(network.get_weights(), f"{name}.weights.")
        return tensors


def _add_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}
