"""Schedulers: functions that choose the noise levels of a run, named as in k-diffusion.

Each takes the noise schedule of a model and a number n of steps, and returns n + 1 sigmas, float64,
descending; see `NoiseSchedule.get_step_sigmas`. Below, T is the number of the schedule's timesteps,
and i = 0 … n-1 the index of a step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.diffusion import names

if TYPE_CHECKING:
    from ldm.diffusion.schedule import NoiseSchedule

__all__ = ["SCHEDULER_FUNCTIONS", "linspace"]

# Sigmas of "Align Your Steps" (arXiv:2404.14507) for ten steps of Stable Diffusion 1 and XL, as
# published by the authors.
AYS_SIGMAS = (
    14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092,
    0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582,
)  # fmt: skip
AYS_SDXL_SIGMAS = (
    14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141,
    0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582,
)  # fmt: skip


def linspace(start: float, end: float, n: int) -> Tensor:
    """Return n evenly spaced numbers, float64."""
    return torch.linspace(start, end, n, dtype=torch.float64)


def get_sigmas_uniform(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Space steps like the original's DDIM: t = floor(i T / n) + 1, descending, then t = 0.

    Equal to the original if n divides T. For n = T the + 1 is omitted, as it would exceed the last
    timestep.
    """
    total = len(schedule)
    t = torch.arange(steps) * total // steps + (1 if steps < total else 0)
    return torch.cat([schedule.sigmas[t].flip(0), schedule.sigmas[:1]])


def get_sigmas_time_uniform(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Space steps like DPM-Solver: evenly in time, from the last timestep to the first."""
    first, last = schedule.t_range
    return schedule.t_to_sigma(linspace(last, first, steps + 1))


def get_sigmas_trailing(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Take timesteps T (n - i) / n - 1, rounded; the first is T-1 (arXiv:2305.08891, table 2)."""
    t = (torch.arange(steps, 0, -1, dtype=torch.float64) * len(schedule) / steps).round().long()
    return _append_zero(schedule.sigmas[t - 1])


def get_sigmas_sgm_uniform(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Space steps like sgm for SDXL: timesteps (T-1) (1 - i / n), truncated; all if n = T."""
    t = np.arange(len(schedule))[::-1].copy()
    if steps < len(schedule):
        t = np.linspace(len(schedule) - 1, 0, steps, endpoint=False).astype(np.int64)
    return _append_zero(schedule.sigmas[torch.from_numpy(t)])


def get_sigmas_sgm_uniform_a1111(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Space steps like A1111's "SGM Uniform": as `sgm_uniform`, with fractional timesteps."""
    return _append_zero(
        _interpolate_timesteps(schedule, np.linspace(len(schedule) - 1, 0, steps + 1)[:-1])
    )


def get_sigmas_leading(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Space steps like diffusers' "leading": t = (n - 1 - i) floor(T / n) + 1 (steps_offset)."""
    t = torch.arange(steps - 1, -1, -1) * (len(schedule) // steps) + 1
    return _append_zero(schedule.sigmas[t.clamp(max=len(schedule) - 1)])


def get_sigmas_ddim_uniform(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Take timesteps 1, 1 + k, 1 + 2k … < T in descending order, k = floor(T / n), like ComfyUI.

    There may be more than n of them.
    """
    t = torch.arange(1, len(schedule), max(len(schedule) // steps, 1)).flip(0)
    return _append_zero(schedule.sigmas[t])


def get_sigmas_turbo(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Take timesteps T-1 - i floor(T / 10), like sgm's demo of SDXL Turbo for 1 … 4 steps."""
    t = len(schedule) - 1 - torch.arange(steps) * (len(schedule) // 10)
    return _append_zero(schedule.sigmas[t])


def get_sigmas_edm(
    schedule: "NoiseSchedule",
    steps: int,
    sigma_min: float = 0.03,
    sigma_max: float = 14.61,
    rho: float = 3.0,
) -> Tensor:
    """Space steps evenly in sigma^(1/rho), like `karras`, over the range of sgm's demo."""
    return _append_zero(linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho)


def get_sigmas_karras(schedule: "NoiseSchedule", steps: int, rho: float = 7.0) -> Tensor:
    """Space steps evenly in sigma^(1/rho) (arXiv:2206.00364, eq. 5)."""
    sigma_min, sigma_max = schedule.sigmas[[0, -1]].tolist()
    return get_sigmas_edm(schedule, steps, sigma_min, sigma_max, rho)


def get_sigmas_exponential(schedule: "NoiseSchedule", steps: int, rho: float = 1.0) -> Tensor:
    """Space steps in log sigma as u^rho, with u evenly from 1 to 0; rho 1 is exponential."""
    log_min, log_max = schedule.sigmas[0].log(), schedule.sigmas[-1].log()
    ramp = linspace(1, 0, steps) ** rho
    return _append_zero((log_min + ramp * (log_max - log_min)).exp())


def get_sigmas_normal(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Space steps evenly in time, T-1 to 0, like k-diffusion's `get_sigmas`."""
    return _append_zero(_interpolate_timesteps(schedule, np.linspace(len(schedule) - 1, 0, steps)))


def get_sigmas_simple(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Take timesteps T-1 - floor(i T / n), like ComfyUI."""
    t = len(schedule) - 1 - torch.arange(steps) * len(schedule) // steps
    return _append_zero(schedule.sigmas[t])


def get_sigmas_beta(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Take timesteps at quantiles 1 - i / n of Beta(0.6, 0.6), like ComfyUI (arXiv:2407.12173).

    Repeated timesteps are dropped: with more than 138 steps of 1000 timesteps, there are fewer.
    """
    quantiles = _compute_beta_quantiles(1 - np.arange(steps) / steps)
    t = np.unique(np.rint((len(schedule) - 1) * quantiles).astype(np.int64))
    return _append_zero(schedule.sigmas[torch.from_numpy(t).flip(0)])


def get_sigmas_beta_sigma(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Space sigmas, not timesteps, as quantiles of Beta(0.6, 0.6), like A1111 and diffusers."""
    sigma_min, sigma_max = schedule.sigmas[[0, -1]].tolist()
    quantiles = torch.from_numpy(_compute_beta_quantiles(np.linspace(1, 0, steps)))
    return _append_zero(sigma_min + quantiles * (sigma_max - sigma_min))


def get_sigmas_kl_optimal(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Space steps evenly in arctan sigma, like A1111's "KL Optimal" (arXiv:2404.14507)."""
    atan_min, atan_max = schedule.sigmas[[0, -1]].atan().tolist()
    return _append_zero(linspace(atan_max, atan_min, steps).tan())


def get_sigmas_ays(
    schedule: "NoiseSchedule", steps: int, sigmas: Sequence[float] = AYS_SIGMAS
) -> Tensor:
    """Take the sigmas of "Align Your Steps" (arXiv:2404.14507), like ComfyUI: the last becomes 0.

    For numbers of steps other than ten, they are interpolated in log sigma.
    """
    return _append_zero(_interpolate_sigmas(sigmas, steps + 1)[:-1])


def get_sigmas_ays_a1111(
    schedule: "NoiseSchedule", steps: int, sigmas: Sequence[float] = AYS_SIGMAS
) -> Tensor:
    """Take all sigmas of "Align Your Steps", then 0, like A1111."""
    return _append_zero(_interpolate_sigmas(sigmas, steps))


def get_sigmas_lcm(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Take n of the 50 timesteps used in the distillation of LCMs (arXiv:2310.04378)."""
    return _append_zero(_take_teacher_sigmas(schedule, steps))


def get_sigmas_lcm_a1111(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Space steps evenly over the 50 sigmas of `lcm`, interpolated, like A1111."""
    sigmas = _take_teacher_sigmas(schedule, min(50, len(schedule))).tolist()
    return _append_zero(_interpolate_sigmas(sigmas, steps))


def get_sigmas_tcd(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Take timesteps as `get_sigmas_lcm` does, and end at the first one (arXiv:2402.19159)."""
    return torch.cat([_take_teacher_sigmas(schedule, steps), schedule.sigmas[:1]])


get_sigmas_ays_sdxl = partial(get_sigmas_ays, sigmas=AYS_SDXL_SIGMAS)
get_sigmas_ays_sdxl_a1111 = partial(get_sigmas_ays_a1111, sigmas=AYS_SDXL_SIGMAS)


def _take_teacher_sigmas(schedule: "NoiseSchedule", steps: int) -> Tensor:
    """Take n sigmas of the teacher's DDIM steps, as in consistency distillation."""
    teacher_steps = min(50, len(schedule))  # `original_inference_steps` in diffusers
    indices = teacher_steps - torch.arange(steps) * teacher_steps // steps
    return schedule.sigmas[indices * (len(schedule) // teacher_steps) - 1]


def _interpolate_timesteps(schedule: "NoiseSchedule", t: NDArray[np.float64]) -> Tensor:
    """Return sigmas at fractional timesteps, linear in log sigma as in k-diffusion."""
    log_sigmas = schedule.sigmas.log().numpy()
    return torch.as_tensor(np.interp(t, np.arange(len(schedule)), log_sigmas)).exp()


def _interpolate_sigmas(sigmas: Sequence[float], n: int) -> Tensor:
    """Return n sigmas, interpolated in log sigma at evenly spaced indices of `sigmas`."""
    indices = np.linspace(0, len(sigmas) - 1, n)
    return torch.as_tensor(np.exp(np.interp(indices, np.arange(len(sigmas)), np.log(sigmas))))


def _compute_beta_quantiles(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return quantiles of Beta(alpha, alpha), alpha = 0.6, as scipy.stats.beta.ppf.

    With x = sin² θ, the density of θ is (sin θ cos θ)^(2 alpha - 1), and that of u = θ^(2 alpha) is
    (sin θ cos θ / θ)^(2 alpha - 1), without a singularity at 0. The latter is integrated by the
    trapezoidal rule up to θ = π/4, x = 1/2.
    """
    power = 2 * 0.6
    u = np.linspace(0, (np.pi / 4) ** power, 1 << 13)
    theta = u ** (1 / power)
    ratio = np.ones_like(theta)  # sin θ cos θ / θ
    ratio[1:] = np.sin(theta[1:]) * np.cos(theta[1:]) / theta[1:]
    density = ratio ** (power - 1)
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    cdf /= 2 * cdf[-1]  # 1/2 at the end, as the distribution is symmetric
    is_low = probabilities < 0.5
    u_quantiles = np.interp(np.where(is_low, probabilities, 1 - probabilities), cdf, u)
    # Below 0.5, so that the median, 1 - x, is slightly above 0.5 as scipy's, and its timestep is
    # rounded up.
    x = np.minimum(np.sin(u_quantiles ** (1 / power)) ** 2, 0.5 - 1e-15)
    quantiles: NDArray[np.float64] = np.where(is_low, x, 1 - x)
    return quantiles


def _append_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


# Functions of this module by name of the scheduler.
SCHEDULER_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    name: globals()[scheduler.function_name] for name, scheduler in names.SCHEDULERS.items()
}
