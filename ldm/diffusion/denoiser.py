"""The denoiser D(x, sigma): a network F whose predictions become estimates of the clean latent z.

    D(x, sigma) = c_skip(sigma) x + c_out(sigma) F(x / std(sigma), t),        x = z + sigma noise

The parameterizations eps, v, x0 and edm differ by c_skip and c_out, see `get_scalings`; the
training target is the prediction for which D equals z. The input of the network has the same
variance at every level: std is the standard deviation of x, sqrt(1 + sigma²), so that

    x / sqrt(1 + sigma²) = √ᾱ z + √(1-ᾱ) noise = z_t,

or, for edm, sqrt(sigma_data² + sigma²), with the standard deviation sigma_data of the latents.

Preconditioning: Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1, where c_in = 1 / std and
c_noise = t; v: Salimans and Ho 2022 (arXiv:2202.00512).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.schedule import NoiseSchedule, Schedule
from ldm.runtime.errors import make_unknown_name_error

__all__ = ["PARAMETERIZATIONS", "Denoiser", "get_scalings"]

PARAMETERIZATIONS = ("eps", "v", "x0", "edm")
SIGMA_DATA = 0.5  # default of EDM


def get_scalings(
    parameterization: str, sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> tuple[Tensor, Tensor]:
    """Compute c_skip and c_out at noise levels `sigma`, in the same shape."""
    if parameterization == "eps":
        return torch.ones_like(sigma), -sigma
    if parameterization == "v":
        variance = 1 + sigma**2
        return 1 / variance, -sigma / variance.sqrt()
    if parameterization == "x0":
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    if parameterization == "edm":
        variance = sigma_data**2 + sigma**2
        return sigma_data**2 / variance, sigma_data * sigma / variance.sqrt()
    raise make_unknown_name_error(
        "parameterization", parameterization, PARAMETERIZATIONS, argument="parameterization"
    )


@dataclass(frozen=True)
class Denoiser:
    """A network with its noise schedule and parameterization, for samplers and training losses.

    Args:
        network: (z_t, t, context=…, y=…) -> prediction; called with `context_mask` and `perturbed`
            only if the condition has them.
        parameterization: What the network predicts, a name in PARAMETERIZATIONS.
        quantize_sigma: Whether sigma is rounded to the nearest level of the schedule, as in sgm.
        sigma_data: Standard deviation of the latents, used by edm only.
    """

    network: Callable[..., Tensor]
    schedule: NoiseSchedule
    parameterization: str = "eps"
    quantize_sigma: bool = False
    sigma_data: float = SIGMA_DATA

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Estimate z in x = z + sigma noise, (B, C, h, w) float32.

        Args:
            x: (B, C, h, w).
            sigma: A number, or (B,).
            cond: None = an unconditional network.
        """
        return self.convert_prediction(x, sigma, self.predict(x, sigma, cond))

    def predict(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        t: Tensor | float | None = None,
    ) -> Tensor:
        """Run the network at x, and return its prediction (B, C, h, w) float32.

        Args:
            x, sigma, cond: As in `__call__`.
            t: Timestep input of the network, a number or (B,); None = computed from sigma.
        """
        sigma = self._round_sigma(sigma)
        t = self.schedule.sigma_to_c_noise(sigma) if t is None else torch.as_tensor(t)
        data_variance = self.sigma_data**2 if self.parameterization == "edm" else 1
        std = (data_variance + _to_broadcastable(sigma, x) ** 2).sqrt()  # of x
        return self._run_network(x / std, t, cond)

    def convert_prediction(self, x: Tensor, sigma: Tensor | float, prediction: Tensor) -> Tensor:
        """Convert a prediction at x to the estimate of z, (B, C, h, w)."""
        c_skip, c_out = self._get_scalings(_to_broadcastable(self._round_sigma(sigma), x))
        return c_skip * x + c_out * prediction

    def compute_eps_factor(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Compute the factor that converts a difference of predictions to one of eps.

        eps is (x - z) / sigma; for models that predict it, the factor is exactly 1. Its shape is
        (1 or B, 1, 1, 1).
        """
        rounded = _to_broadcastable(self._round_sigma(sigma), x)
        return -self.compute_denoised_factor(x, sigma) / rounded

    def compute_denoised_factor(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Compute c_out (1 or B, 1, 1, 1): it converts a difference of predictions to one of z."""
        _, c_out = self._get_scalings(_to_broadcastable(self._round_sigma(sigma), x))
        return c_out

    def compute_target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Compute the training target, the prediction that is converted to z, (B, C, h, w).

        z = c_skip (z + sigma noise) + c_out target, solved for the target: noise for eps.

        Args:
            z, noise: (B, C, h, w).
            t: Timesteps (B,): int64 in 0 … T-1, or fractional ones.
        """
        sigma = _to_broadcastable(self.schedule.t_to_sigma(t), z)
        c_skip, c_out = self._get_scalings(sigma)
        return ((1 - c_skip) / c_out) * z - (c_skip / c_out * sigma) * noise

    def compute_error(
        self,
        z: Tensor,
        cond: Cond | None,
        t: Tensor,
        noise: Tensor,
        input_noise: Tensor | None = None,
    ) -> Tensor:
        """Compute prediction minus target (B, C, h, w); its mean square is the simple loss of DDPM.

        Args:
            z: Latents (B, C, h, w).
            t: Timesteps (B,): int64 in 0 … T-1, or fractional ones.
            noise: Standard normal noise (B, C, h, w).
            input_noise: Noise in the network's input, for input perturbation (arXiv:2301.11706);
                None = `noise`.
        """
        prediction = self.add_noise_and_predict(
            z, cond, t, noise if input_noise is None else input_noise
        )
        return prediction - self.compute_target(z, noise, t)

    def add_noise_and_predict(
        self, z: Tensor, cond: Cond | None, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Add noise to latents z at timesteps t (B,), and predict; (B, C, h, w) float32."""
        schedule = self.schedule
        is_discrete = not t.is_floating_point() and self.parameterization != "edm"
        if is_discrete and isinstance(schedule, Schedule) and schedule.uses_plain_timesteps:
            # As CompVis' `q_sample`: dividing z + sigma noise would round differently.
            return self._run_network(schedule.add_noise(z, noise, t), t, cond)
        sigma = schedule.t_to_sigma(t)
        return self.predict(z + _to_broadcastable(sigma, z) * noise, sigma, cond)

    def _get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return get_scalings(self.parameterization, sigma, self.sigma_data)

    def _round_sigma(self, sigma: Tensor | float) -> Tensor | float:
        return self.schedule.get_nearest_sigma(sigma) if self.quantize_sigma else sigma

    def _run_network(self, z_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        cond = cond or Cond()
        if cond.concat is not None:
            z_t = torch.cat([z_t, cond.concat.to(z_t.dtype)], dim=1)  # (B, C + concat, h, w)
        # float32 also for networks in half precision: above 512, float16 has a spacing of 0.5 and
        # bfloat16 one of 4, which would round timesteps.
        t = t.to(z_t.device, torch.float32).expand(len(z_t))
        kwargs = {"context": cond.crossattn, "y": cond.vector}
        if cond.context_mask is not None:
            kwargs["context_mask"] = cond.context_mask
        if cond.perturbed is not None:
            kwargs["perturbed"] = cond.perturbed
        return self.network(z_t, t, **kwargs).float()


def _to_broadcastable(value: Tensor | float, like: Tensor) -> Tensor:
    """Reshape one value, or one per sample, to (1 or B, 1, 1, 1) float32, on `like`'s device."""
    value = torch.as_tensor(value, dtype=torch.float64).float()
    return value.to(like.device).reshape(-1, *(1,) * (like.dim() - 1))
