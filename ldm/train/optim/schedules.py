"""Learning rate schedules: our own, or a `scheduler_config` of the original.

    LambdaLinearScheduler, LambdaWarmUpCosineScheduler2: cycles, with one list entry per cycle
        step n of a cycle < warm_up_steps:   f_start -> f_max, linear
        later:                               f_max -> f_min at the end of the cycle; for
            LambdaLinearScheduler on a line that has f_max at step 0, so it drops after the warm-up
    LambdaWarmUpCosineScheduler: one warm-up lr_start -> lr_max, then a half cosine to lr_min

Their values are multipliers of the learning rate.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from ldm.runtime.errors import check_name, check_names, unknown_name
from ldm.runtime.types import JsonMapping

__all__ = ["SCHEDULER_CONFIG_KEY", "LearningRate", "build_lr_multiplier"]

LR_SCHEDULERS = ("constant", "linear", "cosine")
LINEAR = "LambdaLinearScheduler"
SINGLE_COSINE = "LambdaWarmUpCosineScheduler"
CYCLE_KEYS = ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths")
KEYS = {
    LINEAR: CYCLE_KEYS,
    SINGLE_COSINE: ("warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps"),
    "LambdaWarmUpCosineScheduler2": CYCLE_KEYS,
}
SCHEDULER_CONFIG_KEY = "model.params.scheduler_config"


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a function of the step and of the progress of the run."""

    lr: float
    warmup_steps: float = 0  # linear
    scheduler: str = "constant"  # "linear" and "cosine" end at 0
    scheduler_config: JsonMapping | None = None  # of the original, instead of the two above

    def __post_init__(self) -> None:
        check_name("lr_scheduler", self.scheduler, LR_SCHEDULERS)
        self(0, 0.0)  # raises early for a wrong `scheduler_config`

    def __call__(self, step: int, progress: float) -> float:
        """Return the rate at a step, counted from 0.

        The decay depends on `progress` (0 … 1) of the run, which may be limited by time.
        """
        if self.scheduler_config:
            return self.lr * build_lr_multiplier(self.scheduler_config)(step)
        remaining = max(0.0, 1 - progress)
        cosine = 0.5 - 0.5 * math.cos(math.pi * remaining)
        factors = {"constant": 1.0, "linear": remaining, "cosine": cosine}
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps)) * factors[self.scheduler]


def build_lr_multiplier(spec: JsonMapping) -> Callable[[int], float]:
    """Build the schedule of a `scheduler_config`: step -> multiplier of the learning rate.

    Raises:
        ValueError: the scheduler or a parameter is unknown, or a parameter is missing.
    """
    name = str(spec.get("target", "")).rpartition(".")[2]
    if name not in KEYS:
        raise unknown_name("scheduler", spec.get("target"), KEYS, SCHEDULER_CONFIG_KEY)
    params = dict(spec.get("params") or {})
    params.pop("verbosity_interval", None)
    check_names(f"parameter of {name}", params, KEYS[name], SCHEDULER_CONFIG_KEY)
    missing = [f"`{key}`" for key in KEYS[name] if key not in params]
    if missing:
        raise ValueError(f"{SCHEDULER_CONFIG_KEY}: {name} needs {', '.join(missing)}")
    values = [params[key] for key in KEYS[name]]
    if name == SINGLE_COSINE:
        values = [[value] for value in values]
    if len({len(column) for column in values}) != 1:
        raise ValueError(
            f"{SCHEDULER_CONFIG_KEY}: the lists of {name} must be equally long, one value per cycle"
        )
    cycles = list(zip(*values, strict=True))
    ends = list(accumulate(length for *_, length in cycles))

    def multiplier(step: int) -> float:
        # A cycle includes its last step; after the last cycle, its final value stays.
        k = min(bisect_left(ends, step), len(ends) - 1)
        warm_up, low, high, start, length = cycles[k]
        n = min(step - (ends[k] - length), length)
        if n < warm_up:
            return float(start + (high - start) * n / warm_up)
        if name == LINEAR:
            remaining = (length - n) / length  # as in the original, without regard to the warm-up
        else:
            remaining = 0.5 * (1 + math.cos(math.pi * min(1.0, (n - warm_up) / (length - warm_up))))
        return float(low + (high - low) * remaining)

    return multiplier
