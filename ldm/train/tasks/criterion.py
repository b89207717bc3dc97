"""Loss of a denoiser, with the original's weights."""

import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import Schedule
from ldm.runtime.errors import unknown_name

__all__ = ["Criterion", "min_snr_weights"]

LOSS_TYPES = ("l2", "l1")


class Criterion(nn.Module):
    """The loss of prediction errors at timesteps; a module, as `logvar` may be learned.

        loss = l_simple_weight mean(l / exp(logvar_t) + logvar_t) + original_elbo_weight mean(w_t l)

    where l is the error per sample, weighted by `min_snr_weights`, and w `Schedule.vlb_weights`.

    Args:
        parameterization: prediction type of the error, "eps", "v" or "x0".
        min_snr_gamma: cap of the signal-to-noise ratio (arXiv:2303.09556); None = the same weight
            for all timesteps.
        loss_type: squared ("l2") or absolute ("l1") error.
        logvar_init: initial `logvar` of every timestep.
    """

    def __init__(
        self,
        schedule: Schedule,
        parameterization: str,
        *,
        min_snr_gamma: float | None = None,
        loss_type: str = "l2",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise unknown_name("loss_type", loss_type, LOSS_TYPES)
        self.loss_type = loss_type
        self.l_simple_weight = l_simple_weight
        self.original_elbo_weight = original_elbo_weight
        self.learn_logvar = learn_logvar
        self.weights = min_snr_weights(schedule, parameterization, min_snr_gamma)  # (T,)
        self.vlb_weights = schedule.vlb_weights(parameterization).float()  # (T,)
        logvar = torch.full((len(schedule),), float(logvar_init))  # (T,)
        self.logvar = nn.Parameter(logvar, requires_grad=learn_logvar)

    def forward(self, error: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            error: (B, C, h, w), prediction minus target.
            t: (B,) integers in 0 … T-1, on the CPU.
        Returns:
            "loss", its detached parts, and per sample "t" and the unweighted "losses", (B,).
        """
        values = error.abs() if self.loss_type == "l1" else error.square()
        unweighted = values.mean(dim=(1, 2, 3))  # (B,)
        losses = self.weights[t].to(unweighted) * unweighted
        vlb = (self.vlb_weights[t].to(losses) * losses).mean()
        logvar = self.logvar[t.to(self.logvar.device)].to(losses.device)  # (B,)
        gamma = (losses / logvar.exp() + logvar).mean()  # the original's name
        result = {
            "loss": self.l_simple_weight * gamma + self.original_elbo_weight * vlb,
            "loss_simple": unweighted.detach().mean(),
            "loss_vlb": vlb.detach(),
        }
        if self.learn_logvar:
            result |= {"loss_gamma": gamma.detach(), "logvar": self.logvar.detach().mean()}
        return {**result, "t": t, "losses": unweighted.detach()}


def min_snr_weights(schedule: Schedule, parameterization: str, gamma: float | None) -> Tensor:
    """Compute the weight of the loss at every timestep, (T,) float32: min(SNR, gamma) for x0.

    The error of x0 has the weight min(SNR, gamma); that of eps is divided by SNR, that of v by
    SNR + 1 (Hang et al. 2023, arXiv:2303.09556, sections 3.4 and A).
    """
    snr = schedule.sigmas**-2
    if gamma is None:
        return torch.ones_like(snr).float()
    per_x0 = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[parameterization]
    return (snr.clamp(max=gamma) / per_x0).float()
