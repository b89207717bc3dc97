"""Noise schedules (the levels of a model) and schedulers (the levels of a run).

A noise level is given by the timestep `t`, the input of the network, or by `sigma`, the variable of
the samplers. `Schedule` has T levels from betas, `sigma = sqrt((1 - ᾱ) / ᾱ)` at t in 0 … T-1, and
between two timesteps log ᾱ is linear in t, as in DPM-Solver. `ContinuousSchedule` has all levels of
a range.

DDPM: arXiv:2006.11239. Cosine: arXiv:2102.09672. Karras: arXiv:2206.00364. Zero terminal SNR:
arXiv:2305.08891.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.diffusion import names
from ldm.diffusion.scheduler_options import check_rho
from ldm.runtime.errors import ArgumentError, check_name, unknown_name

__all__ = [
    "SIGMA_FUNCTIONS",
    "ContinuousSchedule",
    "NoiseSchedule",
    "Schedule",
    "betas_from_sigmas",
    "make_betas",
    "rescale_zero_terminal_snr",
]

# ᾱ of the last timestep, T-1, for zero terminal SNR. Not 0, as samplers need a finite sigma (4096
# here); √ᾱ is then 2.4e-4; Stable Diffusion's is 0.068.
MIN_ALPHA_CUMPROD = 2.0**-24

# Noise levels of "Align Your Steps" (arXiv:2404.14507) for ten steps of Stable Diffusion 1 and XL.
AYS = (
    14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092,
    0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582,
)  # fmt: skip
AYS_XL = (
    14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141,
    0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582,
)  # fmt: skip


def make_betas(
    name: str = "linear",
    timesteps: int = 1000,
    *,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> Tensor:
    """Build the betas (T,) float64 of a named noise schedule.

    Args:
        name: `linear` is linear in sqrt(beta), as in Stable Diffusion; `sqrt_linear` is linear in
            beta; `sqrt` is the square root of those (misleading names of the original). `cosine`
            and `squaredcos_cap_v2` have the square of a cosine as ᾱ.
        linear_start, linear_end: First and last beta of `linear` and `sqrt_linear`; for `sqrt`,
            the squares of its first and last beta.
        cosine_s: Offset of `cosine`.
    """
    if name == "linear":
        return _linspace(linear_start**0.5, linear_end**0.5, timesteps) ** 2
    if name == "sqrt_linear":
        return _linspace(linear_start, linear_end, timesteps)
    if name == "sqrt":
        return _linspace(linear_start, linear_end, timesteps) ** 0.5
    if name in ("cosine", "squaredcos_cap_v2"):
        offset = cosine_s if name == "cosine" else 8e-3
        u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        # A beta of 1, the last one, would leave no signal (arXiv:2102.09672, section 3.2).
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)
    allowed = ("linear", "sqrt_linear", "sqrt", "cosine", "squaredcos_cap_v2")
    raise unknown_name("beta schedule", name, allowed)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Rescale betas (T,) to zero terminal SNR (arXiv:2305.08891, algorithm 1), in float64.

    √ᾱ stays at timestep 0, and becomes √MIN_ALPHA_CUMPROD at T-1.
    """
    signal = torch.cumprod(1 - betas.double(), dim=0).sqrt()  # (T,)
    first, last = signal[0], signal[-1]
    alphas_cumprod = ((signal - last) * first / (first - last)) ** 2
    alphas_cumprod[-1] = MIN_ALPHA_CUMPROD
    return _betas_from_alphas(alphas_cumprod)


def betas_from_sigmas(sigmas: Tensor) -> Tensor:
    """Compute the betas (T,) float64 of a table of noise levels (T,), ascending."""
    return _betas_from_alphas(1 / (1 + sigmas.double() ** 2))


def _betas_from_alphas(alphas_cumprod: Tensor) -> Tensor:
    previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / previous


class NoiseSchedule(ABC):
    """Noise levels of a model, and the timesteps that its network gets for them."""

    sigmas: Tensor  # levels that schedulers choose from, (T,) float64, ascending
    zero_snr: bool = False  # the last level is (nearly) noise alone: zero terminal SNR

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    @abstractmethod
    def t_range(self) -> tuple[float, float]:
        """Timesteps of the least and the greatest noise level."""

    @abstractmethod
    def sigma_to_t(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to a timestep, which may be fractional."""

    @abstractmethod
    def t_to_sigma(self, t: Tensor | float) -> Tensor:
        """Convert a timestep to a noise level, float64."""

    def network_timestep(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to the timestep input of the network (EDM's c_noise)."""
        return self.sigma_to_t(sigma)

    def nearest_sigma(self, sigma: Tensor | float) -> Tensor:
        """Return the nearest noise level that the model was trained with."""
        return torch.as_tensor(sigma)

    def scale_time(self, sigma: float, factor: float) -> float:
        """Return `factor * sigma`; discrete schedules scale the timestep instead (for TCD)."""
        return factor * sigma

    def step_sigmas(
        self, steps: int, scheduler: str = "uniform", rho: float | None = None
    ) -> Tensor:
        """Compute the noise levels (steps + 1,) of a run, float64, descending.

        Args:
            steps: 1 … T, or at most `max_steps` of the scheduler.
            scheduler: A name in `names.SCHEDULERS`. All but "uniform", "time_uniform" and "tcd" end
                at 0; "ddim_uniform" may have more steps than `steps`.
            rho: Exponent of "karras", "polyexponential" and "edm"; None for their defaults.
        """
        check_name("scheduler", scheduler, SIGMA_FUNCTIONS, argument="scheduler")
        most = names.SCHEDULERS[scheduler].max_steps
        if not 1 <= steps <= (most or len(self)):
            limit = f"1 … {most} with scheduler `{scheduler}`" if most else f"1 … {len(self)}"
            raise ArgumentError(f"steps must be in {limit}, got {steps}", "steps")
        check_rho(rho, scheduler)
        options = {} if rho is None else {"rho": rho}
        return SIGMA_FUNCTIONS[scheduler](self, steps, **options)


@dataclass(frozen=True, eq=False)
class Schedule(NoiseSchedule):
    """The noise levels of T timesteps.

    Example: Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012)).
    """

    betas: Tensor  # (T,) float64 in (0, 1)
    v_posterior: float = 0.0  # weight of beta against the posterior variance in `buffers`
    zero_snr: bool = False  # whether to rescale the betas to zero terminal SNR
    log_time: bool = False  # whether timesteps are made of 0.25 ln sigma (EDM), else of sigma
    # whether the network gets the index of the nearest level, else sigma itself or 0.25 ln sigma
    quantize_time: bool = True
    flip_time: bool = False  # whether level 0 is the greatest: sgm's `flip: false`
    append_zero: bool = False  # whether the network also counts the level 0: sgm's `do_append_zero`
    alphas_cumprod: Tensor = field(init=False)  # ᾱ, (T,) float64
    sigmas: Tensor = field(init=False)  # sqrt((1 - ᾱ) / ᾱ), (T,) float64

    def __post_init__(self) -> None:
        betas = rescale_zero_terminal_snr(self.betas) if self.zero_snr else self.betas.double()
        # In float64: 1 / ᾱ - 1 of the first levels is 1e-3, and float32 would keep four digits.
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
        object.__setattr__(self, "sigmas", (1 / alphas_cumprod - 1).sqrt())

    @property
    def uses_plain_timesteps(self) -> bool:
        """Whether the network gets t itself, without one of the variants of `DiscreteDenoiser`."""
        changed = self.log_time or self.flip_time or self.append_zero
        return self.quantize_time and not changed

    def scale_time(self, sigma: float, factor: float) -> float:
        """Return the noise level at `factor` times the timestep of sigma, rounded down."""
        t = round(float(self.sigma_to_t(sigma)), 6)  # whole timesteps come back as such
        return float(self.sigmas[math.floor(factor * t)])

    @property
    def network_levels(self) -> Tensor:
        """The noise levels in the order of the network's timesteps, (T,) or (T + 1,) float64."""
        levels = torch.cat([torch.zeros(1), self.sigmas]) if self.append_zero else self.sigmas
        return levels.flip(0) if self.flip_time else levels

    @property
    def t_range(self) -> tuple[float, float]:
        """First and last timestep."""
        return 0, len(self) - 1

    def sigma_to_t(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to a fractional timestep, clamped to 0 … T-1."""
        # Between timesteps log ᾱ is linear, as in DPM-Solver (arXiv:2206.00927).
        table = self.alphas_cumprod.log().flip(0)
        return _interpolate(sigma, table, torch.arange(len(self) - 1, -1, -1))

    def network_timestep(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to the timestep input of the network.

        It is fractional between two levels; rounded to an index only with `log_time` and
        `quantize_time`.
        """
        if self.uses_plain_timesteps:
            return self.sigma_to_t(sigma)
        sigma = torch.as_tensor(sigma, dtype=torch.float64).cpu()
        if not self.quantize_time or self.log_time:
            c_noise = 0.25 * sigma.log() if self.log_time else sigma
            # As in sgm, which looks c_noise up among the sigmas although it is a logarithm.
            return self._nearest(c_noise) if self.quantize_time else c_noise
        levels = self.network_levels
        index = torch.arange(len(levels))
        if not self.flip_time:
            levels, index = levels.flip(0), index.flip(0)
        return _interpolate(sigma, -levels.square().log1p(), index)

    def t_to_sigma(self, t: Tensor | float) -> Tensor:
        """Convert a timestep in 0 … T-1 to a noise level: of the table for integer tensors."""
        if isinstance(t, Tensor) and not t.is_floating_point():
            return self.sigmas[t.cpu()]
        t = torch.as_tensor(t, dtype=torch.float64).cpu()
        table = self.alphas_cumprod.log().numpy()
        log_alpha = np.interp(t.numpy(), np.arange(len(self), dtype=np.float64), table)
        return torch.as_tensor(np.sqrt(np.expm1(-log_alpha)))

    def nearest_sigma(self, sigma: Tensor | float) -> Tensor:
        """Return the nearest level of the table; of two equally near ones the first."""
        index = self._nearest(torch.as_tensor(sigma, dtype=torch.float64).cpu())
        return self.network_levels[index]

    def _nearest(self, value: Tensor) -> Tensor:
        # In float32, as sgm: which of two neighbours is the nearest may depend on it.
        return (value.float()[..., None] - self.network_levels.float()).abs().argmin(dim=-1)

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute z_t = √ᾱ z + √(1-ᾱ) noise, float32 (arXiv:2006.11239, eq. 4).

        Args:
            z, noise: (B, …).
            t: Timesteps (B,) int64 in 0 … T-1.
        """
        if t.min() < 0 or t.max() >= len(self):
            raise ValueError(f"timesteps must be in 0 … {len(self) - 1}, got {t.tolist()}")
        alphas = self.alphas_cumprod[t.cpu()].reshape(-1, *(1,) * (z.dim() - 1))
        signal_scale, noise_scale = (
            a.sqrt().to(z.device, torch.float32) for a in (alphas, 1 - alphas)
        )
        return signal_scale * z.float() + noise_scale * noise.to(z.device, torch.float32)

    def vlb_weights(self, parameterization: str) -> Tensor:
        """Compute weights (T,) of the squared error in the variational lower bound.

        arXiv:2006.11239, eq. 12, for eps. As in the original, x0 has 2 - ᾱ in place of 2 (1 - ᾱ),
        and v has 1.
        """
        alphas_cumprod = self.alphas_cumprod
        if parameterization == "v":
            return torch.ones_like(alphas_cumprod)
        if parameterization == "x0":
            weights = 0.5 * alphas_cumprod.sqrt() / (2 - alphas_cumprod)
        else:
            variance = self.buffers()["posterior_variance"].double()
            weights = self.betas**2 / (2 * variance * (1 - self.betas) * (1 - alphas_cumprod))
        # The first is infinite, as that posterior has no variance; the original repeats the next.
        return torch.cat([weights[1:2], weights[1:]])  # that of timestep 0 is infinite

    def buffers(self) -> dict[str, Tensor]:
        """Compute the twelve float32 tables in the original's checkpoints, by name."""
        betas, alphas_cumprod = self.betas, self.alphas_cumprod
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        posterior = betas * (1 - previous) / (1 - alphas_cumprod)
        variance = (1 - self.v_posterior) * posterior + self.v_posterior * betas
        tables = {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": previous,
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - alphas_cumprod).log(),
            "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * previous.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        }
        return {name: table.float() for name, table in tables.items()}


@dataclass(frozen=True, eq=False)
class ContinuousSchedule(NoiseSchedule):
    """A continuous range of noise levels, as of EDM models (arXiv:2206.00364)."""

    sigma_min: float = 0.002  # ends of the range
    sigma_max: float = 80.0
    log_time: bool = True  # whether the network gets 0.25 ln sigma, else sigma itself
    sigmas: Tensor = field(init=False)  # 1000, evenly in log sigma, for schedulers that index them

    def __post_init__(self) -> None:
        sigmas = _linspace(math.log(self.sigma_min), math.log(self.sigma_max), 1000).exp()
        object.__setattr__(self, "sigmas", sigmas)

    @property
    def t_range(self) -> tuple[float, float]:
        """Timesteps of `sigma_min` and `sigma_max`."""
        return float(self.sigma_to_t(self.sigma_min)), float(self.sigma_to_t(self.sigma_max))

    def sigma_to_t(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to 0.25 ln sigma, or to itself without `log_time`."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64).cpu()
        return 0.25 * sigma.log() if self.log_time else sigma

    def t_to_sigma(self, t: Tensor | float) -> Tensor:
        """Convert a timestep to a noise level."""
        t = torch.as_tensor(t, dtype=torch.float64).cpu()
        return (4 * t).exp() if self.log_time else t


def _interpolate(sigma: Tensor | float, log_alphas: Tensor, values: Tensor) -> Tensor:
    """Interpolate values (n,) at sigma, linearly in log ᾱ: `log_alphas` (n,), ascending."""
    log_alpha = -torch.as_tensor(sigma, dtype=torch.float64).cpu().square().log1p()
    return torch.as_tensor(np.interp(log_alpha.numpy(), log_alphas.numpy(), values.numpy()))


def _linspace(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


def uniform_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space steps like the original: t = floor(i T / steps) + 1, and the level of t = 0 at the end.

    Equal to the original wherever `steps` divides T. For steps = T the + 1 is left out, as it would
    exceed the last timestep.
    """
    total = len(schedule)
    t = torch.arange(steps) * total // steps + (1 if steps < total else 0)
    return torch.cat([schedule.sigmas[t].flip(0), schedule.sigmas[:1]])


def time_uniform_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space steps like DPM-Solver: evenly in time, from the last timestep to the first."""
    first, last = schedule.t_range
    return schedule.t_to_sigma(_linspace(last, first, steps + 1))


def trailing_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Take timesteps T i / steps - 1, rounded, from the very last (arXiv:2305.08891, table 2)."""
    t = (torch.arange(steps, 0, -1, dtype=torch.float64) * len(schedule) / steps).round().long()
    return _append_zero(schedule.sigmas[t - 1])


def sgm_uniform_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space steps like sgm for SDXL: timesteps (T-1) (1 - i / steps), truncated."""
    last = len(schedule) - 1
    t = np.arange(len(schedule))[::-1].copy()
    if steps < len(schedule):
        t = np.linspace(last, 0, steps, endpoint=False).astype(np.int64)
    return _append_zero(schedule.sigmas[torch.from_numpy(t)])


def sgm_uniform_a1111_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space steps like A1111: `sgm_uniform` with fractional timesteps."""
    return _append_zero(_levels_at(schedule, np.linspace(len(schedule) - 1, 0, steps + 1)[:-1]))


def leading_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space steps like diffusers' "leading" with steps_offset 1: t = i floor(T / steps) + 1."""
    t = torch.arange(steps - 1, -1, -1) * (len(schedule) // steps) + 1
    return _append_zero(schedule.sigmas[t.clamp(max=len(schedule) - 1)])


def ddim_uniform_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Take timesteps 1, 1 + k, 1 + 2k … < T, k = floor(T / steps), like ComfyUI.

    These may be more than `steps`.
    """
    t = torch.arange(1, len(schedule), max(len(schedule) // steps, 1)).flip(0)
    return _append_zero(schedule.sigmas[t])


def turbo_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Take timesteps T-1, T-1 - floor(T / 10) …, as SDXL Turbo does for 1 … 4 steps."""
    t = len(schedule) - 1 - torch.arange(steps) * (len(schedule) // 10)
    return _append_zero(schedule.sigmas[t])


def edm_sigmas(
    schedule: NoiseSchedule,
    steps: int,
    sigma_min: float = 0.03,
    sigma_max: float = 14.61,
    rho: float = 3.0,
) -> Tensor:
    """Space steps evenly in sigma^(1/rho) over a range; the defaults are those of sgm's demo."""
    return _append_zero(_linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho)


def karras_sigmas(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> Tensor:
    """Space steps evenly in sigma^(1/rho) (arXiv:2206.00364, eq. 5)."""
    sigma_min, sigma_max = schedule.sigmas[[0, -1]].tolist()
    return edm_sigmas(schedule, steps, sigma_min, sigma_max, rho)


def exponential_sigmas(schedule: NoiseSchedule, steps: int, rho: float = 1.0) -> Tensor:
    """Space steps evenly in log sigma; "polyexponential" with rho other than 1."""
    low, high = schedule.sigmas[0].log(), schedule.sigmas[-1].log()
    return _append_zero((low + _linspace(1, 0, steps) ** rho * (high - low)).exp())


def normal_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space steps evenly in time like k-diffusion, with log sigma linear between timesteps."""
    return _append_zero(_levels_at(schedule, np.linspace(len(schedule) - 1, 0, steps)))


def simple_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Take timesteps T-1 - i T / steps, truncated, like ComfyUI."""
    t = len(schedule) - 1 - torch.arange(steps) * len(schedule) // steps
    return _append_zero(schedule.sigmas[t])


def beta_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space timesteps as quantiles of Beta(0.6, 0.6), like ComfyUI (arXiv:2407.12173)."""
    quantiles = _beta_quantiles(1 - np.arange(steps) / steps)
    t = np.rint((len(schedule) - 1) * quantiles).astype(np.int64)
    return _append_zero(schedule.sigmas[torch.from_numpy(t)])


def beta_sigma_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space sigmas, not timesteps, as quantiles of Beta(0.6, 0.6), like A1111 and diffusers."""
    low, high = schedule.sigmas[[0, -1]].tolist()
    quantiles = torch.from_numpy(_beta_quantiles(np.linspace(1, 0, steps)))
    return _append_zero(low + quantiles * (high - low))


def kl_optimal_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space steps evenly in arctan sigma, like A1111's "KL Optimal" (arXiv:2404.14507)."""
    low, high = schedule.sigmas[[0, -1]].atan().tolist()
    return _append_zero(_linspace(high, low, steps).tan())


def ays_sigmas(schedule: NoiseSchedule, steps: int, levels: Sequence[float] = AYS) -> Tensor:
    """Take the levels of "Align Your Steps" (arXiv:2404.14507), like ComfyUI: the last becomes 0.

    Other numbers of steps than ten are interpolated in log sigma.
    """
    return _append_zero(_interpolate_levels(levels, steps + 1)[:-1])


def ays_a1111_sigmas(schedule: NoiseSchedule, steps: int, levels: Sequence[float] = AYS) -> Tensor:
    """Take the levels of "Align Your Steps" like A1111: all of them, and 0 after the last."""
    return _append_zero(_interpolate_levels(levels, steps))


def lcm_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Choose from the 50 timesteps used in the distillation of LCMs (arXiv:2310.04378)."""
    return _append_zero(_consistency_sigmas(schedule, steps))


def lcm_a1111_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Space steps evenly over the 50 levels of `lcm`, interpolated, like A1111."""
    levels = _consistency_sigmas(schedule, min(50, len(schedule))).tolist()
    return _append_zero(_interpolate_levels(levels, steps))


def tcd_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Choose timesteps as `lcm_sigmas` does, and end at the first one (arXiv:2402.19159)."""
    return torch.cat([_consistency_sigmas(schedule, steps), schedule.sigmas[:1]])


ays_xl_sigmas = partial(ays_sigmas, levels=AYS_XL)
ays_xl_a1111_sigmas = partial(ays_a1111_sigmas, levels=AYS_XL)


def _consistency_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    original_steps = min(50, len(schedule))  # of the solver that was distilled
    indices = original_steps - torch.arange(steps) * original_steps // steps
    return schedule.sigmas[indices * (len(schedule) // original_steps) - 1]


def _levels_at(schedule: NoiseSchedule, t: NDArray[np.float64]) -> Tensor:
    """Return the levels of fractional timesteps, linear in log sigma as in k-diffusion."""
    log_sigmas = schedule.sigmas.log().numpy()
    return torch.as_tensor(np.interp(t, np.arange(len(schedule)), log_sigmas)).exp()


def _interpolate_levels(levels: Sequence[float], count: int) -> Tensor:
    """Return `count` levels, interpolated in log sigma evenly over the positions of `levels`."""
    positions = np.linspace(0, len(levels) - 1, count)
    return torch.as_tensor(np.exp(np.interp(positions, np.arange(len(levels)), np.log(levels))))


def _beta_quantiles(probabilities: NDArray[np.float64], alpha: float = 0.6) -> NDArray[np.float64]:
    """Return quantiles of Beta(alpha, alpha), as scipy.stats.beta.ppf without needing scipy.

    Integrates over x = sin² θ: the density of θ is (sin θ cos θ)^(2 alpha - 1), which is smooth in
    u with θ = u^(1 / 2 alpha).
    """
    power = 2 * alpha
    u = np.linspace(0, (np.pi / 4) ** power, 1 << 13)
    theta = u ** (1 / power)
    ratio = np.ones_like(theta)  # sin θ cos θ / θ
    ratio[1:] = np.sin(theta[1:]) * np.cos(theta[1:]) / theta[1:]
    density = ratio ** (power - 1)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    below /= 2 * below[-1]  # the distribution is symmetric
    is_low = probabilities < 0.5
    at = np.interp(np.where(is_low, probabilities, 1 - probabilities), below, u)
    x = np.minimum(np.sin(at ** (1 / power)) ** 2, 0.5 - 1e-15)  # one half rounds up, as in scipy
    quantiles: NDArray[np.float64] = np.where(is_low, x, 1 - x)
    return quantiles


def _append_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


# Functions of this module by the name of the scheduler, from `names.SCHEDULERS`.
SIGMA_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    name: globals()[scheduler.function] for name, scheduler in names.SCHEDULERS.items()
}
