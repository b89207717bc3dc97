"""Draw noise levels for training: random timesteps, stratified over a batch.

Each of n samples is drawn from its own n-quantile, in random order, so that the loss of a batch
varies less than with independent draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule, Schedule

__all__ = ["LogNormal", "draw_timesteps"]


@dataclass(frozen=True)
class LogNormal:
    """Log-normal sigma, with mean and std of ln sigma (arXiv:2206.00364, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def compute_sigmas(self, quantiles: Tensor) -> Tensor:
        """Compute sigmas, float64, at these quantiles (0 … 1) of the distribution."""
        # Of a normal distribution, the quantiles 0 and 1 are infinite.
        normal: Tensor = torch.special.ndtri(quantiles.double().clamp(1e-6, 1 - 1e-6))
        return (self.mean + self.std * normal).exp()


def draw_timesteps(
    schedule: NoiseSchedule,
    n: int,
    generator: torch.Generator,
    *,
    sigma_distribution: LogNormal | None = None,
    bias: float = 1.0,
    timestep_range: Sequence[int] | None = None,
) -> Tensor:
    """Draw n timesteps (n,) of a schedule.

    Args:
        sigma_distribution: None = uniform timesteps, or the default LogNormal if the schedule is
            continuous.
        bias: See `timestep_bias` of `DiffusionTask`; for discrete timesteps only.
        timestep_range: Range [first, end) of timesteps; None = all.
    """
    # In [0, 1), one from each n-quantile, in random order.
    quantiles = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    if sigma_distribution is None and isinstance(schedule, Schedule):
        first, end = timestep_range or (0, len(schedule))
        count = end - first
        # A quantile close to 1 may be rounded to 1.
        return first + (quantiles ** (1 / bias) * count).long().clamp(max=count - 1)
    return schedule.sigma_to_t((sigma_distribution or LogNormal()).compute_sigmas(quantiles))
