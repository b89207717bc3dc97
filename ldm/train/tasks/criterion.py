"""The loss of a denoising network: weighting by noise level, and the original's terms."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import SIGMA_DATA, get_scalings
from ldm.diffusion.schedule import NoiseSchedule, Schedule
from ldm.runtime.errors import ArgumentError

__all__ = ["LOSS_TYPES", "WEIGHTINGS", "Criterion", "compute_denoised_weights"]

LOSS_TYPES = {"l2": 2, "l1": 1}  # power of the error
WEIGHTINGS = ("eps", "v", "edm", "unit")


@dataclass(eq=False, repr=False)
class Criterion(nn.Module):
    """The loss of the prediction errors of a denoising network.

        loss = l_simple_weight mean(l / exp(logvar_t) + logvar_t) + original_elbo_weight mean(w_t l)

    where l is the mean squared (or absolute) error of each sample times `compute_weights`, and w is
    `Schedule.compute_vlb_weights`. It is a module, as `logvar` may be learned.

    Args:
        parameterization: What the network predicts: "eps", "v", "x0" or "edm".
        weighting: Name in WEIGHTINGS of a weighting of the denoised latent's error; None = weight 1
            for the prediction's error.
        sigma_data: Standard deviation of the latents, for the weighting "edm".
        model_sigma_data: The same, for the parameterization "edm".
        min_snr_gamma: Cap of the SNR (arXiv:2303.09556), instead of a weighting; None = no cap.
        loss_type: "l2", squared error, or "l1", absolute error.
        learn_logvar: Whether to train `logvar`, one number for each timestep.
    Raises:
        ArgumentError: `original_elbo_weight` with a continuous schedule or the parameterization
            "edm".
    """

    schedule: NoiseSchedule
    parameterization: str
    _: KW_ONLY
    weighting: str | None = None
    sigma_data: float = SIGMA_DATA
    model_sigma_data: float = SIGMA_DATA
    min_snr_gamma: float | None = None
    loss_type: str = "l2"
    l_simple_weight: float = 1.0
    original_elbo_weight: float = 0.0
    learn_logvar: bool = False
    logvar_init: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()
        self.vlb_weights: Tensor | None = None  # (T,)
        if isinstance(self.schedule, Schedule) and self.parameterization != "edm":
            self.vlb_weights = self.schedule.compute_vlb_weights(self.parameterization)
        elif self.original_elbo_weight:
            raise ArgumentError(
                "original_elbo_weight needs discrete timesteps, and a prediction of eps, v or x0"
            )
        logvar = torch.full((len(self.schedule),), float(self.logvar_init))  # (T,)
        self.logvar = nn.Parameter(logvar, requires_grad=self.learn_logvar)

    def compute_weights(self, t: Tensor) -> Tensor:
        """Compute the weights (B,) float32 of the errors at timesteps t."""
        sigma = self.schedule.t_to_sigma(t)
        _, c_out = get_scalings(self.parameterization, sigma, self.model_sigma_data)
        # Weights are for the denoised latent's error, which is |c_out| times the prediction's.
        if self.min_snr_gamma is not None:
            weights = (sigma**-2).clamp(max=self.min_snr_gamma) * c_out**2
        elif self.weighting is not None:
            weights = compute_denoised_weights(self.weighting, sigma, self.sigma_data)
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
            "loss"; its detached terms; "loss_per_sample" (B,), unweighted; and "t" (B,), int64, the
            indices of the nearest levels of the schedule.
        """
        elementwise = error.abs() if self.loss_type == "l1" else error.square()
        unweighted = elementwise.mean(dim=(1, 2, 3))  # (B,)
        weighted = self.compute_weights(t).to(unweighted) * unweighted
        indices = _find_nearest_indices(self.schedule, t)
        logvar = self.logvar[indices.to(self.logvar.device)].to(weighted.device)  # (B,)
        simple = (weighted / logvar.exp() + logvar).mean()
        # The names are those of the original's logs.
        result = {"loss": self.l_simple_weight * simple, "loss_simple": unweighted.detach().mean()}
        if self.vlb_weights is not None:
            vlb = (self.vlb_weights[indices].to(weighted) * weighted).mean()
            result["loss"] = result["loss"] + self.original_elbo_weight * vlb
            result["loss_vlb"] = vlb.detach()
        if self.learn_logvar:
            result |= {"loss_gamma": simple.detach(), "logvar": self.logvar.detach().mean()}
        return {**result, "t": indices, "loss_per_sample": unweighted.detach()}


def compute_denoised_weights(name: str, sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Compute weights (B,) for the squared error of the denoised latent at sigma (B,).

    "eps", "v" and "edm" are equivalent to weight 1 for the error of a prediction of that type
    (arXiv:2206.00364, eq. 8).

    Args:
        name: Name in WEIGHTINGS; "unit" is weight 1.
        sigma_data: Standard deviation of the latents, for "edm".
    """
    if name == "unit":
        return torch.ones_like(sigma)
    return sigma**-2 + {"eps": 0.0, "v": 1.0, "edm": sigma_data**-2}[name]


def _find_nearest_indices(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return the indices (B,) int64 of the schedule's levels nearest to timesteps t (B,)."""
    if not t.is_floating_point():
        return t
    # The range of continuous timesteps is divided into equal intervals.
    first, last = schedule.t_range
    last_index = len(schedule) - 1
    return ((t - first) / (last - first) * last_index).round().long().clamp(0, last_index)
