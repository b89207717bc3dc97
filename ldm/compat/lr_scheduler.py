"""`ldm.lr_scheduler` of the original: multipliers of the learning rate, for torch's LambdaLR."""

from collections.abc import Sequence

from ldm.train.optim.schedules import build_lr_multiplier


class LearningRateMultiplier:
    """Base class of functions step -> multiplier; see `ldm.train.optim.schedules`."""

    target: str  # not the class's name, as third-party code may subclass it

    def __init__(self, **params: object) -> None:
        self.multiplier = build_lr_multiplier({"target": self.target, "params": params})

    def schedule(self, n: int, **ignored: object) -> float:
        """Return the multiplier of step n."""
        return self.multiplier(n)

    def __call__(self, n: int, **ignored: object) -> float:
        return self.schedule(n, **ignored)


class LambdaWarmUpCosineScheduler(LearningRateMultiplier):
    """Linear warm-up, then a half cosine."""

    target = "LambdaWarmUpCosineScheduler"

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        super().__init__(
            warm_up_steps=warm_up_steps,
            lr_min=lr_min,
            lr_max=lr_max,
            lr_start=lr_start,
            max_decay_steps=max_decay_steps,
        )


class LambdaWarmUpCosineScheduler2(LearningRateMultiplier):
    """Cycles of a linear warm-up and a half cosine; arguments are lists of one value per cycle."""

    target = "LambdaWarmUpCosineScheduler2"

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        super().__init__(
            warm_up_steps=warm_up_steps,
            f_min=f_min,
            f_max=f_max,
            f_start=f_start,
            cycle_lengths=cycle_lengths,
        )


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Cycles of a linear warm-up and a linear decay."""

    target = "LambdaLinearScheduler"
