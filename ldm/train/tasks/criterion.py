"""From the error of a prediction to the number that is trained on, with the original's weights."""

import inspect
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import Schedule

__all__ = ["Criterion", "min_snr"]


class Criterion(nn.Module):
    """The loss of errors at timesteps; a module, as `logvar` may be learned.

        loss = l_simple_weight mean(l / exp(logvar_t) + logvar_t) + original_elbo_weight mean(w_t l)

        l: per sample, weighted by `min_snr`. w: see `Schedule.vlb_weights`.
        min_snr_gamma: cap of the signal-to-noise ratio (arXiv:2303.09556); None = all timesteps
            count alike.
        logvar_init: logvar of every timestep. learn_logvar: it is trained.

    Names are the original's, but for the first.

    Raises ValueError for an unknown loss_type.
    """

    def __init__(
        self,
        schedule: Schedule,
        parameterization: str,
        *,
        min_snr_gamma: float | None = None,
        loss_type: Literal["l2", "l1"] = "l2",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
    ) -> None:
        super().__init__()
        if loss_type not in ("l2", "l1"):
            raise ValueError(f"unknown loss_type `{loss_type}`, choose one of l2, l1")
        self.is_l1 = loss_type == "l1"
        self.simple, self.bound = l_simple_weight, original_elbo_weight
        self.learns = learn_logvar
        self.weights = min_snr(schedule, parameterization, min_snr_gamma)  # (T,)
        self.vlb_weights = schedule.vlb_weights(parameterization).float()  # (T,)
        logvar = torch.full((len(schedule),), float(logvar_init))  # (T,)
        self.logvar = nn.Parameter(logvar, requires_grad=learn_logvar)

    @classmethod
    def keywords(cls) -> list[str]:
        """What may be given beside the first two arguments."""
        return list(inspect.signature(cls).parameters)[2:]

    def forward(self, error: Tensor, t: Tensor) -> dict[str, Tensor]:
        """error: (B, C, h, w), prediction minus target. t: (B,) integers in 0 … T-1, on the CPU.

        Returns {"loss"}, parts of it to be logged, and per sample, detached, {"t", "losses"} (B,).
        """
        losses = (error.abs() if self.is_l1 else error.square()).mean(dim=(1, 2, 3))  # (B,)
        plain = losses.detach()
        losses = self.weights[t].to(losses) * losses
        vlb = (self.vlb_weights[t].to(losses) * losses).mean()
        logvar = self.logvar[t.to(self.logvar.device)].to(losses.device)  # (B,)
        scaled = (losses / logvar.exp() + logvar).mean()
        made = {"loss": self.simple * scaled + self.bound * vlb}
        made |= {"loss_simple": plain.mean(), "loss_vlb": vlb.detach()}
        if self.learns:
            made |= {"loss_gamma": scaled.detach(), "logvar": self.logvar.detach().mean()}
        return {**made, "t": t, "losses": plain}


def min_snr(schedule: Schedule, parameterization: str, gamma: float | None) -> Tensor:
    """Weight of the loss at every timestep, (T,) float32, as min(SNR, gamma) in terms of z.

    Hang et al. 2023 (arXiv:2303.09556), sections 3.4 and A: the weight of x0 is min(SNR, gamma),
    of eps that by SNR, of v that by SNR + 1.
    """
    snr = schedule.sigmas**-2
    if gamma is None:
        return torch.ones_like(snr).float()
    per_z = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[parameterization]
    return (snr.clamp(max=gamma) / per_z).float()
