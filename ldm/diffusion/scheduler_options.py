"""Checks of options for the scheduler. Without torch, for the command line's parser."""

import math
from collections.abc import Sequence
from itertools import pairwise

from ldm.diffusion.names import SCHEDULERS
from ldm.runtime.errors import ArgumentError

__all__ = ["SCHEDULERS_WITH_RHO", "check_rho", "check_sigmas"]

SCHEDULERS_WITH_RHO = [name for name, scheduler in SCHEDULERS.items() if scheduler.rho is not None]


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Raise ArgumentError unless sigmas are at least two finite numbers >= 0, descending."""
    if len(sigmas) < 2:
        raise ArgumentError(f"sigmas must be two numbers or more, got {len(sigmas)}", "sigmas")
    for sigma, sigma_next in pairwise(sigmas):
        if not sigma > sigma_next:
            message = f"sigmas must descend, but {sigma_next:g} follows {sigma:g}"
            raise ArgumentError(message, "sigmas")
    if not sigmas[-1] >= 0 or math.isinf(sigmas[0]):
        raise ArgumentError("sigmas must be finite and not negative", "sigmas")


def check_rho(rho: float | None, scheduler: str) -> None:
    """Raise ArgumentError for a rho out of range, or for a scheduler that takes none."""
    if rho is None:
        return
    if scheduler not in SCHEDULERS_WITH_RHO:
        message = f"scheduler `{scheduler}` takes no rho, only {', '.join(SCHEDULERS_WITH_RHO)} do"
        raise ArgumentError(message, "rho")
    if not 0 < rho < math.inf:
        raise ArgumentError(f"rho must be greater than 0, got {rho:g}", "rho")
