"""Everything that a run is, as named tensors and a few numbers.

    weights and buffers, optimizer, average (EMA); step, place in the data, seconds trained

Nothing random is in it: data order, noise and dropout are functions of the seed and of the number
of the batch, so that a run goes on exactly, on any number of processes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.train.optim.ema import EMA

__all__ = ["Player", "Scale", "State"]


class Player:
    """A module, its optimizer, and the loss that it is trained on.

    loss: (batch, generator) -> {"loss", …}. The network that makes pictures is one player, a
    discriminator would be another.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[..., Any]
    ) -> None:
        self.module, self.optimizer, self.loss = module, optimizer, loss

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters, and buffers; frozen parameters belong to nobody's state."""
        frozen = {name for name, p in self.module.named_parameters() if not p.requires_grad}
        state = self.module.state_dict()
        return {name: value for name, value in state.items() if name not in frozen}

    def moments(self) -> dict[str, Tensor]:
        """What the optimizer keeps of each parameter, as "weight.name.key"."""
        names = self._names()
        kept: dict[str, Tensor] = {}
        for p, values in self.optimizer.state.items():
            for key, value in values.items():
                kept[f"{names[id(p)]}.{key}"] = torch.as_tensor(value)
        return kept

    def empty_moments(
        self, like: Mapping[str, tuple[torch.Size, torch.dtype]]
    ) -> dict[str, Tensor]:
        """Room for `moments` of these shapes; those of a parameter's shape are split as it is."""
        parameters = dict(self.module.named_parameters())
        room: dict[str, Tensor] = {}
        for name, (shape, dtype) in like.items():
            p = parameters[name.rpartition(".")[0]]
            fits = shape == p.shape
            room[name] = (
                torch.zeros_like(p, dtype=dtype) if fits else torch.zeros(shape, dtype=dtype)
            )
        return room

    def put_moments(self, moments: Mapping[str, Tensor]) -> None:
        names = self._names()
        state = self.optimizer.state_dict()
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, p in enumerate(order):
            start = names[id(p)] + "."
            found = {k.removeprefix(start): v for k, v in moments.items() if k.startswith(start)}
            if found:
                state["state"][number] = found
        self.optimizer.load_state_dict(state)

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.module.named_parameters()}


class Scale:
    """What a loss in half precision is multiplied with, so that small gradients do not vanish.

    It halves when gradients overflow, and doubles after PATIENCE steps without
    (arXiv:1710.03740).
    """

    PATIENCE = 2000

    def __init__(self, is_half: bool) -> None:
        self.is_half = is_half
        self.value, self.steady = 65536.0 if is_half else 1.0, 0

    @property
    def is_adapting(self) -> bool:
        """Whether an overflow may be cured by a smaller scale."""
        return self.is_half and self.value >= 1

    def update(self, are_finite: bool) -> None:
        if not self.is_half:
            return
        self.steady = self.steady + 1 if are_finite else 0
        if not are_finite:
            self.value /= 2
        elif self.steady % self.PATIENCE == 0:
            self.value *= 2


class State:
    """The resumable state of one training run.

    players: by name; the first is the one whose average is taken.
    position: batches consumed by all processes together, the place in the data.
    parts: batches in a step, over all processes.
    is_half: losses are computed in float16, and need a `Scale`.
    seconds: time spent training, over all sessions.
    skipped: steps whose gradients were not finite.
    """

    NUMBERS = ("step", "position", "parts", "seconds", "skipped")

    def __init__(
        self, players: dict[str, Player], ema: EMA, *, parts: int = 1, is_half: bool = False
    ) -> None:
        self.players, self.ema, self.parts, self.scale = players, ema, parts, Scale(is_half)
        self.step, self.position, self.seconds, self.skipped = 0, 0, 0.0, 0
        self.is_whole = True  # False while weights are being changed

    def numbers(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in self.NUMBERS}
        scale = {"scale": self.scale.value, "steady": self.scale.steady}
        return own | scale | {"averaged": self.ema.updates}

    def put_numbers(self, numbers: Mapping[str, Any]) -> None:
        for key in self.NUMBERS:
            setattr(self, key, numbers[key])
        self.scale.value, self.scale.steady = numbers["scale"], numbers["steady"]
        self.ema.updates = numbers["averaged"]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by "average.…", "PLAYER.weights.…" and "PLAYER.optimizer.…"."""
        found = self._fixed()
        for name, player in self.players.items():
            found |= _prefixed(f"{name}.optimizer", player.moments())
        return found

    def is_finite(self) -> bool:
        """Whether all that this process has of what is trained is still numbers."""
        held = [*self.ema.shadow.values()]
        for player in self.players.values():
            held += [p for p in player.module.parameters() if p.requires_grad]
            held += player.moments().values()
        numbers = (value.detach() for value in held if value.is_floating_point())
        local = (value.to_local() if hasattr(value, "to_local") else value for value in numbers)
        return all(bool(value.isfinite().all()) for value in local)

    def room(self, saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Tensors to read a saved state into: weights and average in place, moments new ones."""
        found = self._fixed()
        for name, player in self.players.items():
            found |= _prefixed(
                f"{name}.optimizer", player.empty_moments(_within(f"{name}.optimizer", saved))
            )
        return found

    def put_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what was read into `room`."""
        for name, player in self.players.items():
            player.put_moments(_within(f"{name}.optimizer", tensors))

    def _fixed(self) -> dict[str, Tensor]:
        found = _prefixed("average", self.ema.shadow)
        for name, player in self.players.items():
            found |= _prefixed(f"{name}.weights", player.weights())
        return found


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _within(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    start = prefix + "."
    return {n.removeprefix(start): v for n, v in values.items() if n.startswith(start)}
