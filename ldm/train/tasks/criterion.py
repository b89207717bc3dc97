"""The loss of a denoiser: weighting by noise level, and the original's terms."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import SIGMA_DATA, scalings
from ldm.diffusion.schedule import NoiseSchedule, Schedule
from ldm.runtime.errors import ArgumentError, check_name, unknown_name

__all__ = ["LOSS_TYPES", "WEIGHTINGS", "Criterion", "denoised_weights"]

LOSS_TYPES = {"l2": 2, "l1": 1}  # power of the error
WEIGHTINGS = ("eps", "v", "edm", "unit")


@dataclass(eq=False, repr=False)
class Criterion(nn.Module):
    """The loss of prediction errors; a module, as `logvar` may be learned.

        loss = l_simple_weight mean(l / exp(logvar_t) + logvar_t) + original_elbo_weight mean(w_t l)

    where l is the error per sample, times `weights`, and w is `Schedule.vlb_weights`.

    Raises:
        UnknownName: the loss type or the weighting is unknown.
        ArgumentError: `original_elbo_weight` for a continuous schedule or "edm".
    """

    schedule: NoiseSchedule
    parameterization: str  # prediction type of the error
    _: KW_ONLY
    weighting: str | None = None  # of the denoised latent's error, in WEIGHTINGS; None: none
    sigma_data: float = SIGMA_DATA  # standard deviation of the latents, for the weighting "edm"
    model_sigma_data: float = SIGMA_DATA  # the same, for the parameterization "edm"
    min_snr_gamma: float | None = None  # cap of SNR (arXiv:2303.09556), instead of a weighting
    loss_type: str = "l2"  # squared error; or "l1", absolute error
    l_simple_weight: float = 1.0
    original_elbo_weight: float = 0.0
    learn_logvar: bool = False
    logvar_init: float = 0.0  # initial `logvar` of all timesteps

    def __post_init__(self) -> None:
        super().__init__()
        check_name("loss_type", self.loss_type, LOSS_TYPES)
        if self.weighting not in (None, *WEIGHTINGS):
            raise unknown_name("weighting", self.weighting, WEIGHTINGS)
        self.vlb_weights: Tensor | None = None  # (T,)
        if isinstance(self.schedule, Schedule) and self.parameterization != "edm":
            self.vlb_weights = self.schedule.vlb_weights(self.parameterization).float()
        elif self.original_elbo_weight:
            raise ArgumentError(
                "original_elbo_weight needs a model with timesteps, of eps, v or x0"
            )
        logvar = torch.full((len(self.schedule),), float(self.logvar_init))  # (T,)
        self.logvar = nn.Parameter(logvar, requires_grad=self.learn_logvar)

    def weights(self, t: Tensor) -> Tensor:
        """Compute the weights (B,) float32 of the errors at timesteps t."""
        sigma = self.schedule.t_to_sigma(t)
        c_out = scalings(self.parameterization, sigma, self.model_sigma_data)[1]
        # Weights are of the denoised latent's error, which is |c_out| times the prediction's.
        if self.min_snr_gamma is not None:
            weights = (sigma**-2).clamp(max=self.min_snr_gamma) * c_out**2
        elif self.weighting is not None:
            weights = denoised_weights(self.weighting, sigma, self.sigma_data)
            weights = weights * c_out.abs() ** LOSS_TYPES[self.loss_type]
        else:
            weights = torch.ones_like(sigma)
        return weights.float()

    def forward(self, error: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            error: (B, C, h, w), prediction minus target.
            t: (B,) timesteps of the schedule, on the CPU.
        Returns:
            "loss", its detached parts, and per sample (B,) the unweighted "losses" and the nearest
            timesteps "t", int64.
        """
        values = error.abs() if self.loss_type == "l1" else error.square()
        unweighted = values.mean(dim=(1, 2, 3))  # (B,)
        losses = self.weights(t).to(unweighted) * unweighted
        rows = _nearest_rows(self.schedule, t)
        logvar = self.logvar[rows.to(self.logvar.device)].to(losses.device)  # (B,)
        gamma = (losses / logvar.exp() + logvar).mean()  # the original's name
        result = {"loss": self.l_simple_weight * gamma, "loss_simple": unweighted.detach().mean()}
        if self.vlb_weights is not None:
            vlb = (self.vlb_weights[rows].to(losses) * losses).mean()
            result["loss"] = result["loss"] + self.original_elbo_weight * vlb
            result["loss_vlb"] = vlb.detach()
        if self.learn_logvar:
            result |= {"loss_gamma": gamma.detach(), "logvar": self.logvar.detach().mean()}
        return {**result, "t": rows, "losses": unweighted.detach()}


def denoised_weights(name: str, sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Compute weights (B,) of the squared error of the denoised latent at sigma (B,).

    "eps", "v" and "edm" are weight 1 for a prediction of that type (arXiv:2206.00364, eq. 8).

    Args:
        name: name in WEIGHTINGS; "unit" is 1.
        sigma_data: standard deviation of the latents, for "edm".
    """
    if name == "unit":
        return torch.ones_like(sigma)
    return sigma**-2 + {"eps": 0.0, "v": 1.0, "edm": sigma_data**-2}[name]


def _nearest_rows(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return the nearest rows (B,) int64 of timesteps in tables over the schedule."""
    if not t.is_floating_point():
        return t
    # Continuous timesteps have no row of their own.
    first, last = schedule.t_range
    steps = len(schedule) - 1
    return ((t - first) / (last - first) * steps).round().long().clamp(0, steps)
