"""The learning rate at every step: our shapes, or a `scheduler_config` of the original.

    LambdaLinearScheduler, LambdaWarmUpCosineScheduler2: cycles with these lists, one value for each
        step n of a cycle < warm_up_steps:   f_start -> f_max in a straight line
        later:                               f_max -> f_min, at the end of cycle_lengths
    LambdaWarmUpCosineScheduler: one warm-up lr_start -> lr_max, then a half cosine to lr_min

All their numbers are multiples of the learning rate.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ldm.runtime.errors import unknown_name
from ldm.train.optim import optimizers

__all__ = ["Rate", "multiplier"]

LINEAR, COSINE, CYCLES = (
    "LambdaLinearScheduler",
    "LambdaWarmUpCosineScheduler",
    "LambdaWarmUpCosineScheduler2",
)
KEYS = {
    LINEAR: ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths"),
    COSINE: ("warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps"),
    CYCLES: ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths"),
}
WHERE = "model.params.scheduler_config"


@dataclass(frozen=True)
class Rate:
    """The learning rate as a function of the step (0-based) and of how much of the run is done.

    lr: what the shapes are multiplied with. warm_up, decay: see `optim.learning_rate`.
    schedule: a `scheduler_config`, which takes the place of both.
    """

    lr: float
    warm_up: float = 0
    decay: str = "constant"
    schedule: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self(0, 0.0)  # a wrong name is found before anything is computed

    def __call__(self, step: int, progress: float) -> float:
        if self.schedule:
            return self.lr * multiplier(self.schedule)(step)
        return optimizers.learning_rate(
            self.lr, step, progress, warm_up=self.warm_up, decay=self.decay
        )


def multiplier(spec: Mapping[str, Any]) -> Callable[[int], float]:
    """{"target": …, "params": …} of a scheduler -> its multiple of the learning rate by step.

    Raises ValueError for an unknown scheduler, or parameters that are missing or unknown.
    """
    name = str(spec.get("target", "")).rpartition(".")[2]
    if name not in KEYS:
        raise unknown_name("scheduler", spec.get("target"), KEYS, WHERE)
    params = dict(spec.get("params") or {})
    params.pop("verbosity_interval", None)
    for key in params:
        if key not in KEYS[name]:
            raise unknown_name(f"parameter of {name}", key, KEYS[name], WHERE)
    lacking = [f"`{key}`" for key in KEYS[name] if key not in params]
    if lacking:
        raise ValueError(f"{WHERE}: {name} needs {', '.join(lacking)}")
    if name == COSINE:
        return lambda step: _cosine(step, **params)
    if len({len(values) for values in params.values()}) != 1:
        raise ValueError(f"{WHERE}: the lists of {name} must be equally long, one value per cycle")
    return lambda step: _cycle(step, is_round=name == CYCLES, **params)


def _cosine(
    n: int,
    *,
    warm_up_steps: int,
    lr_min: float,
    lr_max: float,
    lr_start: float,
    max_decay_steps: int,
) -> float:
    if n < warm_up_steps:
        return lr_start + (lr_max - lr_start) * n / warm_up_steps
    done = min(1.0, (n - warm_up_steps) / (max_decay_steps - warm_up_steps))
    return lr_min + (lr_max - lr_min) * _half_cosine(done)


def _cycle(
    n: int,
    *,
    is_round: bool,
    warm_up_steps: Sequence[int],
    f_min: Sequence[float],
    f_max: Sequence[float],
    f_start: Sequence[float],
    cycle_lengths: Sequence[int],
) -> float:
    """A cycle owns its last step; after all cycles the last one stands still at its end."""
    ends = list(accumulate(cycle_lengths))
    k = min(bisect_left(ends, n), len(ends) - 1)
    length, warm_up = cycle_lengths[k], warm_up_steps[k]
    n = min(n - (ends[k] - length), length)
    if n < warm_up:
        return f_start[k] + (f_max[k] - f_start[k]) * n / warm_up
    if is_round:
        left = _half_cosine(min(1.0, (n - warm_up) / (length - warm_up)))
    else:
        left = (length - n) / length
    return f_min[k] + (f_max[k] - f_min[k]) * left


def _half_cosine(done: float) -> float:
    """1 … 0 for 0 … 1."""
    return 0.5 * (1 + math.cos(math.pi * done))
