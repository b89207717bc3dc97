"""Noise schedules: the noise levels of a model.

A noise level is given by the timestep `t`, the input of the network, or by `sigma`, the standard
deviation of the noise, with which samplers work:

    z_t = √ᾱ z + √(1-ᾱ) noise,      x = z_t / √ᾱ = z + sigma noise,      sigma = √((1-ᾱ) / ᾱ).

`Schedule` has T levels from betas, at t in 0 … T-1; between two timesteps log ᾱ is linear in t, as
in DPM-Solver. `ContinuousSchedule` has a continuous range of levels. `schedulers` choose the levels
of a run.

DDPM: Ho et al. 2020 (arXiv:2006.11239). Cosine: Nichol and Dhariwal 2021 (arXiv:2102.09672). EDM:
Karras et al. 2022 (arXiv:2206.00364). Zero terminal SNR: Lin et al. 2023 (arXiv:2305.08891).
DPM-Solver: Lu et al. 2022 (arXiv:2206.00927).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion import names
from ldm.diffusion.scheduler_options import check_rho
from ldm.diffusion.schedulers import SCHEDULER_FUNCTIONS, linspace
from ldm.runtime.errors import ArgumentError, check_name, make_unknown_name_error

__all__ = [
    "ContinuousSchedule", "NoiseSchedule", "Schedule", "betas_from_sigmas", "make_betas",
    "rescale_zero_terminal_snr",
]  # fmt: skip

# ᾱ of the last timestep, T-1, for zero terminal SNR. It is not 0, as samplers need a finite sigma,
# which is 4096 then. √ᾱ is 2.4e-4, next to 0.068 in Stable Diffusion.
TERMINAL_ALPHA_CUMPROD = 2.0**-24


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
            beta; `sqrt` is the square root of linear betas (the original's misleading names). In
            `cosine` and diffusers' `squaredcos_cap_v2`, ᾱ is a squared cosine; the latter ignores
            `cosine_s` and has an offset of 0.008.
        linear_start, linear_end: First and last beta of `linear` and `sqrt_linear`; for `sqrt`,
            the squares of its first and last beta.
        cosine_s: Offset s of `cosine` (arXiv:2102.09672, eq. 17).
    """
    if not isinstance(timesteps, SupportsIndex) or timesteps < 1:
        message = f"timesteps must be a positive whole number, got `{timesteps}`"
        raise ArgumentError(message, "timesteps")
    if name == "linear":
        return linspace(linear_start**0.5, linear_end**0.5, timesteps) ** 2
    if name == "sqrt_linear":
        return linspace(linear_start, linear_end, timesteps)
    if name == "sqrt":
        return linspace(linear_start, linear_end, timesteps) ** 0.5
    if name in ("cosine", "squaredcos_cap_v2"):
        offset = cosine_s if name == "cosine" else 8e-3
        u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        # A beta of 1, the last one, would leave no signal (arXiv:2102.09672, section 3.2).
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, 0.999)
    allowed = ("linear", "sqrt_linear", "sqrt", "cosine", "squaredcos_cap_v2")
    raise make_unknown_name_error("beta schedule", name, allowed)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Rescale betas (T,) to zero terminal SNR (arXiv:2305.08891, algorithm 1), in float64.

    √ᾱ is unchanged at timestep 0, and becomes √TERMINAL_ALPHA_CUMPROD at T-1.
    """
    sqrt_alphas_cumprod = torch.cumprod(1 - betas.double(), dim=0).sqrt()  # (T,)
    first, last = sqrt_alphas_cumprod[0], sqrt_alphas_cumprod[-1]
    alphas_cumprod = ((sqrt_alphas_cumprod - last) * first / (first - last)) ** 2
    alphas_cumprod[-1] = TERMINAL_ALPHA_CUMPROD
    return _betas_from_alphas_cumprod(alphas_cumprod)


def betas_from_sigmas(sigmas: Tensor) -> Tensor:
    """Compute the betas (T,) float64 of noise levels (T,), ascending."""
    return _betas_from_alphas_cumprod(1 / (1 + sigmas.double() ** 2))


def _betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    alphas_cumprod_prev = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / alphas_cumprod_prev


class NoiseSchedule(ABC):
    """Noise levels of a model, and the timesteps that its network gets for them.

    Attributes:
        sigmas: Noise levels that schedulers choose from, (T,) float64, ascending.
        zero_snr: Whether the last level is (nearly) noise alone: zero terminal SNR.
    """

    sigmas: Tensor
    zero_snr: bool = False

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    @abstractmethod
    def t_range(self) -> tuple[float, float]:
        """Timesteps of the lowest and the highest noise level."""

    @abstractmethod
    def sigma_to_t(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to a timestep, which may be fractional."""

    @abstractmethod
    def t_to_sigma(self, t: Tensor | float) -> Tensor:
        """Convert a timestep to a noise level, float64."""

    def sigma_to_c_noise(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to c_noise (EDM), the timestep input of the network."""
        return self.sigma_to_t(sigma)

    def get_nearest_sigma(self, sigma: Tensor | float) -> Tensor:
        """Return the nearest noise level that the model was trained with."""
        return torch.as_tensor(sigma)

    def scale_timestep(self, sigma: float, factor: float) -> float:
        """Return the noise level at `factor` times the timestep of sigma, for TCD.

        A continuous schedule scales sigma instead.
        """
        return factor * sigma

    def get_step_sigmas(
        self, steps: int, scheduler: str = "uniform", rho: float | None = None
    ) -> Tensor:
        """Return the noise levels (steps + 1,) of a run, float64, descending.

        Args:
            steps: 1 … T, or at most `max_steps` of the scheduler.
            scheduler: A name in `names.SCHEDULERS`. All but "uniform", "time_uniform" and "tcd" end
                at 0; "ddim_uniform" may have more steps than `steps`, "beta" fewer.
            rho: Exponent of "karras", "polyexponential" and "edm"; None = the scheduler's default.
        """
        self.check_steps(steps, scheduler)
        check_rho(rho, scheduler)
        options = {} if rho is None else {"rho": rho}
        return SCHEDULER_FUNCTIONS[scheduler](self, steps, **options)

    def check_steps(self, steps: int, scheduler: str) -> None:
        """Raise ArgumentError unless a scheduler exists and supports a number of steps."""
        check_name("scheduler", scheduler, SCHEDULER_FUNCTIONS, argument="scheduler")
        max_steps = names.SCHEDULERS[scheduler].max_steps
        if not 1 <= steps <= (max_steps or len(self)):
            suffix = f" with scheduler `{scheduler}`" if max_steps else ""
            limit = f"{max_steps or len(self)}{suffix}"
            raise ArgumentError(f"steps must be in 1 … {limit}, got {steps}", "steps")


@dataclass(frozen=True, eq=False)
class Schedule(NoiseSchedule):
    """A discrete noise schedule: the levels of T timesteps, from betas.

    Example: Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012)).

    Args:
        betas: (T,) float64 in (0, 1).
        v_posterior: Weight of beta in `posterior_variance` of `compute_buffers`, 0 … 1; the weight
            of the true posterior variance is 1 - v_posterior.
        zero_snr: Whether to rescale the betas to zero terminal SNR.
        uses_log_sigma: Whether c_noise, the timestep input of the network, is computed from
            0.25 ln sigma (EDM) instead of sigma.
        quantize_c_noise: Whether c_noise is the index of a level, instead of sigma or 0.25 ln sigma
            itself. It is fractional between two levels; with `uses_log_sigma`, it is rounded.
        flip_timesteps: Whether index 0 is the highest level for the network: sgm's `flip: false`.
        append_zero: Whether sigma 0 is also a level for the network: sgm's `do_append_zero`.

    Attributes:
        alphas_cumprod: ᾱ, (T,) float64.
        sigmas: √((1-ᾱ) / ᾱ), (T,) float64.
    """

    betas: Tensor
    v_posterior: float = 0.0
    zero_snr: bool = False
    uses_log_sigma: bool = False
    quantize_c_noise: bool = True
    flip_timesteps: bool = False
    append_zero: bool = False
    alphas_cumprod: Tensor = field(init=False)
    sigmas: Tensor = field(init=False)

    def __post_init__(self) -> None:
        betas = rescale_zero_terminal_snr(self.betas) if self.zero_snr else self.betas.double()
        # In float64: 1 / ᾱ - 1 of the first levels is 1e-3, to four digits in float32.
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
        object.__setattr__(self, "sigmas", (1 / alphas_cumprod - 1).sqrt())

    @property
    def uses_plain_timesteps(self) -> bool:
        """Whether c_noise is t itself, as no option of sgm's `DiscreteDenoiser` is set."""
        is_modified = self.uses_log_sigma or self.flip_timesteps or self.append_zero
        return self.quantize_c_noise and not is_modified

    def scale_timestep(self, sigma: float, factor: float) -> float:
        """Return the noise level at floor(factor * t), where t is the timestep of sigma."""
        # Rounded to 6 digits first: interpolation may return 498.9999 … for timestep 499.
        t = round(float(self.sigma_to_t(sigma)), 6)
        return float(self.sigmas[math.floor(factor * t)])

    @property
    def network_sigmas(self) -> Tensor:
        """Noise levels by the index that c_noise counts, (T,) or (T + 1,) float64."""
        levels = torch.cat([torch.zeros(1), self.sigmas]) if self.append_zero else self.sigmas
        return levels.flip(0) if self.flip_timesteps else levels

    @property
    def t_range(self) -> tuple[float, float]:
        """First and last timestep."""
        return 0, len(self) - 1

    def sigma_to_t(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to a fractional timestep, clamped to 0 … T-1."""
        log_alphas_cumprod = self.alphas_cumprod.log().flip(0)  # ascending, for np.interp
        return _interpolate_at_sigma(sigma, log_alphas_cumprod, torch.arange(len(self) - 1, -1, -1))

    def sigma_to_c_noise(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to c_noise, the timestep input of the network.

        It is fractional between two levels; rounded to an index only with `uses_log_sigma` and
        `quantize_c_noise`.
        """
        if self.uses_plain_timesteps:
            return self.sigma_to_t(sigma)
        sigma = torch.as_tensor(sigma, dtype=torch.float64).cpu()
        if not self.quantize_c_noise or self.uses_log_sigma:
            c_noise = 0.25 * sigma.log() if self.uses_log_sigma else sigma
            # As in sgm, which looks c_noise up among the sigmas although it is a logarithm.
            return self._nearest_index(c_noise) if self.quantize_c_noise else c_noise
        levels = self.network_sigmas
        indices = torch.arange(len(levels))
        if not self.flip_timesteps:  # to descending levels, that is ascending log ᾱ
            levels, indices = levels.flip(0), indices.flip(0)
        return _interpolate_at_sigma(sigma, -levels.square().log1p(), indices)

    def t_to_sigma(self, t: Tensor | float) -> Tensor:
        """Convert a timestep in 0 … T-1 to a noise level, float64.

        Integer tensors index `sigmas`; other numbers are interpolated.
        """
        if isinstance(t, Tensor) and not t.is_floating_point():
            return self.sigmas[t.cpu()]
        t = torch.as_tensor(t, dtype=torch.float64).cpu()
        log_alphas_cumprod = self.alphas_cumprod.log().numpy()
        timesteps = np.arange(len(self), dtype=np.float64)
        log_alpha_cumprod = np.interp(t.numpy(), timesteps, log_alphas_cumprod)
        return torch.as_tensor(np.sqrt(np.expm1(-log_alpha_cumprod)))  # √(1/ᾱ - 1)

    def get_nearest_sigma(self, sigma: Tensor | float) -> Tensor:
        """Return the nearest of `network_sigmas`; of two equally near ones, the first."""
        index = self._nearest_index(torch.as_tensor(sigma, dtype=torch.float64).cpu())
        return self.network_sigmas[index]

    def _nearest_index(self, value: Tensor) -> Tensor:
        # In float32, as sgm: which of two neighbors is nearer may depend on the precision.
        return (value.float()[..., None] - self.network_sigmas.float()).abs().argmin(dim=-1)

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute z_t = √ᾱ z + √(1-ᾱ) noise, float32 (arXiv:2006.11239, eq. 4).

        Args:
            z, noise: (B, …).
            t: Timesteps (B,) int64 in 0 … T-1.
        """
        if t.min() < 0 or t.max() >= len(self):
            raise ValueError(f"timesteps must be in 0 … {len(self) - 1}, got {t.tolist()}")
        alphas_cumprod = self.alphas_cumprod[t.cpu()].reshape(-1, *(1,) * (z.dim() - 1))
        # Rounded to float32 after the square root, as the original's tables.
        signal_scale = alphas_cumprod.sqrt().to(z.device, torch.float32)
        noise_scale = (1 - alphas_cumprod).sqrt().to(z.device, torch.float32)
        return signal_scale * z.float() + noise_scale * noise.to(z.device, torch.float32)

    def compute_vlb_weights(self, parameterization: str) -> Tensor:
        """Compute weights (T,) float32 of the squared error in the variational lower bound.

        eps   β² / (2 σ² α (1 - ᾱ)), with the posterior variance σ² (arXiv:2006.11239, eq. 12)
        x0    √ᾱ / (2 (2 - ᾱ)), as in the original
        v     1
        """
        # From the float32 buffers, as in the original: it moves weights by up to 2e-4.
        buffers = self.compute_buffers()
        alphas_cumprod = buffers["alphas_cumprod"]
        if parameterization == "v":
            return torch.ones_like(alphas_cumprod)
        if parameterization == "x0":
            weights = 0.5 * alphas_cumprod.sqrt() / (2 - alphas_cumprod)
        else:
            alphas, posterior_variance = (1 - self.betas).float(), buffers["posterior_variance"]
            weights = buffers["betas"] ** 2 / (
                2 * posterior_variance * alphas * (1 - alphas_cumprod)
            )
        # Without `v_posterior`, the posterior of timestep 0 has no variance: for eps its weight is
        # infinite. As in the original, it gets the weight of timestep 1, also for x0.
        return torch.cat([weights[1:2], weights[1:]])

    def compute_buffers(self) -> dict[str, Tensor]:
        """Compute the twelve buffers (T,) float32 in the original's checkpoints, by name."""
        betas, alphas_cumprod = self.betas, self.alphas_cumprod
        alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        true_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        posterior_variance = (1 - self.v_posterior) * true_variance + self.v_posterior * betas
        buffers = {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - alphas_cumprod).log(),
            "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": posterior_variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_coef2": (
                (1 - alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - alphas_cumprod)
            ),
        }
        return {name: buffer.float() for name, buffer in buffers.items()}


@dataclass(frozen=True, eq=False)
class ContinuousSchedule(NoiseSchedule):
    """A continuous range of noise levels, as EDM models have (arXiv:2206.00364).

    Args:
        sigma_min, sigma_max: Lowest and highest noise level.
        uses_log_sigma: Whether c_noise (table 1) is 0.25 ln sigma instead of sigma.

    Attributes:
        sigmas: 1000 levels, evenly spaced in log sigma, for schedulers that index timesteps.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    uses_log_sigma: bool = True
    sigmas: Tensor = field(init=False)

    def __post_init__(self) -> None:
        sigmas = linspace(math.log(self.sigma_min), math.log(self.sigma_max), 1000).exp()
        object.__setattr__(self, "sigmas", sigmas)

    @property
    def t_range(self) -> tuple[float, float]:
        """Timesteps of `sigma_min` and `sigma_max`."""
        return float(self.sigma_to_t(self.sigma_min)), float(self.sigma_to_t(self.sigma_max))

    def sigma_to_t(self, sigma: Tensor | float) -> Tensor:
        """Convert a noise level to 0.25 ln sigma, or to sigma without `uses_log_sigma`; float64."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64).cpu()
        return 0.25 * sigma.log() if self.uses_log_sigma else sigma

    def t_to_sigma(self, t: Tensor | float) -> Tensor:
        """Convert a timestep to a noise level, float64."""
        t = torch.as_tensor(t, dtype=torch.float64).cpu()
        return (4 * t).exp() if self.uses_log_sigma else t


def _interpolate_at_sigma(
    sigma: Tensor | float, log_alphas_cumprod: Tensor, values: Tensor
) -> Tensor:
    """Interpolate values (n,) at sigma, linearly in log ᾱ (n,), which is ascending."""
    # ᾱ = 1 / (1 + sigma²)
    log_alpha_cumprod = -torch.as_tensor(sigma, dtype=torch.float64).cpu().square().log1p()
    value = np.interp(log_alpha_cumprod.numpy(), log_alphas_cumprod.numpy(), values.numpy())
    return torch.as_tensor(value)
