"""At which noise levels a model is trained: random timesteps, spread evenly over a batch.

Each of n samples is drawn from its own n-quantile, in random order, so that the loss of a batch
varies less than that of independent draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule, Schedule

__all__ = ["LogNormal", "draw_timesteps", "spread_quantiles", "spread_timesteps"]


@dataclass(frozen=True)
class LogNormal:
    """Noise levels sigma whose logarithm is normal (arXiv:2206.00364, table 1)."""

    mean: float = -1.2  # of log sigma
    std: float = 1.2  # of log sigma

    def sigmas(self, quantiles: Tensor) -> Tensor:
        """Return the noise levels float64 below which these fractions of all draws are."""
        # The normal quantiles of 0 and 1 are infinite.
        normal: Tensor = torch.special.ndtri(quantiles.double().clamp(1e-6, 1 - 1e-6))
        return (self.mean + self.std * normal).exp()


def draw_timesteps(
    schedule: NoiseSchedule,
    n: int,
    generator: torch.Generator,
    *,
    levels: LogNormal | None = None,
    bias: float = 1.0,
    limits: Sequence[int] | None = None,
) -> Tensor:
    """Draw n timesteps (n,) of a schedule.

    Args:
        levels: distribution of the noise levels; None = all timesteps, if there are some.
        bias: see `Diffusion`'s `noise_bias`, for timesteps.
        limits: the first timestep and the end, instead of all.
    """
    if levels is None and isinstance(schedule, Schedule):
        first, end = limits or (0, len(schedule))
        return spread_timesteps(n, end - first, generator, bias) + first
    quantiles = spread_quantiles(n, generator)
    return schedule.sigma_to_t((levels or LogNormal()).sigmas(quantiles))


def spread_timesteps(
    n: int, timesteps: int, generator: torch.Generator, bias: float = 1.0
) -> Tensor:
    """Draw n timesteps (n,) int64 in 0 … timesteps - 1, with the `noise_bias` of `Diffusion`."""
    quantiles = spread_quantiles(n, generator)
    # The greatest quantile may be rounded to 1.
    return (quantiles ** (1 / bias) * timesteps).long().clamp(max=timesteps - 1)


def spread_quantiles(n: int, generator: torch.Generator) -> Tensor:
    """Draw n numbers (n,) in [0, 1], one of every n-quantile."""
    return (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
