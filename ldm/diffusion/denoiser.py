"""D(x, sigma): from what a network predicts to an estimate of the clean latent, and back.

The only file that knows whether a network predicts eps, v or x0. The three differ by two numbers,

    denoised = c_skip(sigma) x + c_out(sigma) prediction,        x = z + sigma noise,

and the training target is what makes `denoised` equal z, so that the two cannot drift apart.
The network itself sees the variance-preserving latent

    z_t = x / sqrt(1 + sigma²) = √ᾱ z + √(1-ᾱ) noise.

Preconditioning: Karras et al. 2022 (arXiv:2206.00364); v: Salimans and Ho 2022 (arXiv:2202.00512).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.schedule import Schedule

__all__ = ["PARAMETERIZATIONS", "Denoiser", "scalings"]

PARAMETERIZATIONS = ("eps", "v", "x0")


def scalings(parameterization: str, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at noise levels `sigma`, of the same shape.

    Raises ValueError unless `parameterization` is one of PARAMETERIZATIONS.
    """
    if parameterization == "eps":
        return torch.ones_like(sigma), -sigma
    if parameterization == "v":
        variance = 1 + sigma**2
        return 1 / variance, -sigma / variance.sqrt()
    if parameterization == "x0":
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    allowed = ", ".join(PARAMETERIZATIONS)
    raise ValueError(f"unknown parameterization `{parameterization}`, choose one of {allowed}")


@dataclass(frozen=True)
class Denoiser:
    """A network, its schedule and what it predicts: the seam between networks and samplers.

    network: (z_t, t, context=…, y=…) -> prediction, as `ldm.nets.unet.UNet`.
    """

    network: Callable[..., Tensor]
    schedule: Schedule
    parameterization: str = "eps"

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """The estimate of z, (B, C, h, w) float32.

        x: (B, C, h, w), z + sigma noise. sigma: one level, or one per row (B,).
        """
        return self.denoised(x, sigma, self.predict(x, sigma, cond))

    def predict(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        t: Tensor | float | None = None,
    ) -> Tensor:
        """What the network says of x: eps, v or x0, (B, C, h, w) float32.

        t: the timestep it is told, by default that of sigma.
        """
        t = self.schedule.sigma_to_t(sigma) if t is None else torch.as_tensor(t)
        sigma = _column(sigma, x)
        return self._network(x / (1 + sigma**2).sqrt(), t, cond)

    def denoised(self, x: Tensor, sigma: Tensor | float, prediction: Tensor) -> Tensor:
        """The estimate of z that follows from a prediction at x."""
        c_skip, c_out = scalings(self.parameterization, _column(sigma, x))
        return c_skip * x + c_out * prediction

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The prediction at timesteps t (B,) for which `denoised` is exactly z."""
        sigma = _column(self.schedule.sigmas[t.cpu()], z)
        c_skip, c_out = scalings(self.parameterization, sigma)
        return ((1 - c_skip) / c_out) * z - (c_skip / c_out * sigma) * noise

    def loss(self, z: Tensor, cond: Cond | None, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the prediction at timesteps t, one number per row (B,).

        z, noise: (B, C, h, w). t: (B,) integers in 0 … T-1. Gradients flow to network and cond.
        """
        return self.error(z, cond, t, noise).square().mean(dim=(1, 2, 3))

    def error(
        self, z: Tensor, cond: Cond | None, t: Tensor, noise: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Prediction minus target at timesteps t (B,), (B, C, h, w) float32.

        seen: the noise that the network is shown, where that is not `noise` (arXiv:2301.11706).
        """
        prediction = self.predict_at(z, cond, t, noise if seen is None else seen)
        return prediction - self.target(z, noise, t)

    def predict_at(self, z: Tensor, cond: Cond | None, t: Tensor, noise: Tensor) -> Tensor:
        """The network's prediction for z under `noise` at timesteps t (B,), float32."""
        return self._network(self.schedule.noised(z, noise, t), t, cond)

    def _network(self, z_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        cond = cond or Cond()
        if cond.concat is not None:
            z_t = torch.cat([z_t, cond.concat.to(z_t.dtype)], dim=1)  # (B, C + concat, h, w)
        t = t.to(z_t.device, torch.float32).expand(len(z_t))
        return self.network(z_t, t, context=cond.crossattn, y=cond.vector).float()


def _column(value: Tensor | float, like: Tensor) -> Tensor:
    """Scalars or one number per row as (B | 1, 1, 1, 1), in float32 on the device of `like`."""
    value = torch.as_tensor(value, dtype=torch.float64).float()
    return value.to(like.device).reshape(-1, *(1,) * (like.dim() - 1))
