"""Options for the noise that samplers add before and after steps, and their checks."""

import math
from dataclasses import dataclass, fields

from ldm.diffusion.names import SAMPLERS
from ldm.runtime.errors import ArgumentError

__all__ = ["STEP_NOISE_OPTIONS", "StepNoise"]

SAMPLERS_WITH_ETA = [name for name, sampler in SAMPLERS.items() if sampler.eta is not None]
SAMPLERS_WITH_CHURN = [name for name, sampler in SAMPLERS.items() if sampler.takes_churn]
SAMPLERS_WITH_BROWNIAN = [name for name, sampler in SAMPLERS.items() if sampler.takes_brownian]
SAMPLERS_WITH_NOISE = [
    name for name, sampler in SAMPLERS.items() if sampler.takes_noise or sampler.takes_churn
]


@dataclass(frozen=True)
class StepNoise:
    """Options for the noise that steps add, under k-diffusion's names.

    Args:
        eta: Amount of noise after steps, 0 (none) … 1 (as DDPM); None = the sampler's default.
        s_churn: Amount of noise before steps, 0 … number of steps (arXiv:2206.00364, algorithm 2).
        s_tmin, s_tmax: Sigmas between which s_churn adds noise; None = no upper limit.
        s_noise: Standard deviation of the noise before and after steps.
        brownian: Whether noise after steps is from a Brownian path, see `BrownianPaths`.
    """

    eta: float | None = None
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float | None = None
    s_noise: float = 1.0
    brownian: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise ArgumentError(f"{name} must be 0 or more, got {value:g}", name)
        if self.s_tmax is not None and self.s_tmax < self.s_tmin:
            message = f"s_tmax must be s_tmin ({self.s_tmin:g}) or more, got {self.s_tmax:g}"
            raise ArgumentError(message, "s_tmax")

    def check(self, sampler: str) -> None:
        """Raise ArgumentError for a value that a sampler does not take."""
        for name, is_set, samplers in (
            ("eta", bool(self.eta), SAMPLERS_WITH_ETA),
            ("s_churn", self.s_churn > 0, SAMPLERS_WITH_CHURN),
            ("s_noise", self.s_noise != 1, SAMPLERS_WITH_NOISE),
            ("brownian", self.brownian, SAMPLERS_WITH_BROWNIAN),
        ):
            if is_set and sampler not in samplers:
                message = f"sampler `{sampler}` takes no {name}, only {', '.join(samplers)} do"
                raise ArgumentError(message, name)


STEP_NOISE_OPTIONS = tuple(field.name for field in fields(StepNoise))
