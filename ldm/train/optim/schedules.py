"""Learning rate schedules: our own, or a `scheduler_config` of the original.

    LambdaLinearScheduler, LambdaWarmUpCosineScheduler2: cycles, with one list entry per cycle
        step n of a cycle < warm_up_steps:   f_start -> f_max, linear
        later:                               f_max -> f_min at the end of the cycle; a half cosine,
            or for LambdaLinearScheduler the line from f_max at step 0 of the cycle, so that the
            value jumps down after the warmup
    LambdaWarmUpCosineScheduler: one warmup lr_start -> lr_max, then a half cosine to lr_min

All of these values, lr_… included, are multipliers of the learning rate.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from ldm.runtime.errors import check_names
from ldm.runtime.types import JsonMapping
from ldm.train.config.specs import read_spec

__all__ = ["SCHEDULER_CONFIG_KEY", "LearningRateSchedule", "build_lr_multiplier"]

LINEAR = "LambdaLinearScheduler"
SINGLE_COSINE = "LambdaWarmUpCosineScheduler"
CYCLE_PARAMETERS = ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths")
PARAMETERS = {  # by class
    LINEAR: CYCLE_PARAMETERS,
    SINGLE_COSINE: ("warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps"),
    "LambdaWarmUpCosineScheduler2": CYCLE_PARAMETERS,
}
SCHEDULER_CONFIG_KEY = "model.params.scheduler_config"


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate as a function of the step and of the progress of the run.

    Args:
        lr: Peak learning rate.
        scheduler: "constant"; or "linear" or "cosine", which end at 0.
        scheduler_config: The original's, which replaces `warmup_steps` and `scheduler`, or None.
    """

    lr: float
    warmup_steps: float = 0
    scheduler: str = "constant"
    scheduler_config: JsonMapping | None = None

    def __post_init__(self) -> None:
        self(0, 0.0)  # raises for an invalid `scheduler_config`

    def __call__(self, step: int, progress: float) -> float:
        """Return the learning rate at a step, counted from 0.

        Args:
            progress: Completed fraction (0 … 1) of the run, whose limit may be a time instead of a
                number of steps; a `scheduler_config` does not use it.
        """
        if self.scheduler_config:
            return self.lr * build_lr_multiplier(self.scheduler_config)(step)
        remaining = max(0.0, 1 - progress)
        cosine = 0.5 - 0.5 * math.cos(math.pi * remaining)
        factors = {"constant": 1.0, "linear": remaining, "cosine": cosine}
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps)) * factors[self.scheduler]


def build_lr_multiplier(scheduler_config: JsonMapping) -> Callable[[int], float]:
    """Build the function step -> multiplier of the learning rate of a `scheduler_config`."""
    name, params = read_spec(scheduler_config, PARAMETERS, SCHEDULER_CONFIG_KEY, kind="scheduler")
    params.pop("verbosity_interval", None)
    check_names(f"parameter of {name}", params, PARAMETERS[name], SCHEDULER_CONFIG_KEY)
    missing = [f"`{key}`" for key in PARAMETERS[name] if key not in params]
    if missing:
        raise ValueError(f"{SCHEDULER_CONFIG_KEY}: {name} needs {', '.join(missing)}")
    values = [params[key] for key in PARAMETERS[name]]
    if name == SINGLE_COSINE:
        values = [[value] for value in values]
    if len({len(per_cycle) for per_cycle in values}) != 1:
        raise ValueError(
            f"{SCHEDULER_CONFIG_KEY}: the lists of {name} must be equally long, one value per cycle"
        )
    cycles = list(zip(*values, strict=True))
    cycle_ends = list(accumulate(length for *_, length in cycles))

    def compute_multiplier(step: int) -> float:
        # A cycle includes its last step; after the last cycle, its final value is kept.
        k = min(bisect_left(cycle_ends, step), len(cycle_ends) - 1)
        warmup, f_min, f_max, f_start, length = cycles[k]
        n = min(step - (cycle_ends[k] - length), length)
        if n < warmup:
            return float(f_start + (f_max - f_start) * n / warmup)
        if name == LINEAR:
            fraction = (length - n) / length  # as in the original, without regard to the warmup
        else:
            fraction = 0.5 * (1 + math.cos(math.pi * min(1.0, (n - warmup) / (length - warmup))))
        return float(f_min + (f_max - f_min) * fraction)

    return compute_multiplier
