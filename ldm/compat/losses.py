"""`ldm.modules.losses.contperceptual` of the original: the loss of the KL autoencoder.

Esser et al. 2020 (arXiv:2012.09841), section 3.1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.compat.distributions import DiagonalGaussianDistribution
from ldm.nets.discriminator import PatchDiscriminator
from ldm.nets.lpips import LPIPS
from ldm.train.tasks.autoencoder import D_WEIGHT_EPS, MAX_D_WEIGHT


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """Return `weight` from step `threshold` on, and `value` before."""
    return value if global_step < threshold else weight


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Compute the discriminator's hinge loss."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Compute the discriminator's logistic loss."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


class DummyLoss(nn.Module):
    """Placeholder for the loss in configs of autoencoders that are not trained."""


class LPIPSWithDiscriminator(nn.Module):
    """L1 + LPIPS + KL divergence + GAN loss.

    Losses are summed over an image. The weights of LPIPS come from the checkpoint of the model.

    Args:
        disc_start: First step with the GAN losses.
        logvar_init: Initial log variance of the reconstruction loss.
        pixelloss_weight: Ignored, as in the original.
        disc_factor: Weight of the GAN losses of both autoencoder and discriminator.
        disc_weight: Gradient norm of the autoencoder's GAN loss at the last layer, relative to the
            gradient norm of the other losses.
        use_actnorm: Must be False.
        disc_conditional: Whether the discriminator also gets `cond`.
        disc_loss: "hinge" or "vanilla".
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
    ) -> None:
        super().__init__()
        if use_actnorm:
            raise ValueError("use_actnorm is not supported")
        if disc_loss not in ("hinge", "vanilla"):
            raise ValueError(f"disc_loss must be hinge or vanilla, got `{disc_loss}`")
        self.kl_weight = kl_weight
        self.pixel_weight = pixelloss_weight
        self.perceptual_loss = LPIPS()
        self.perceptual_weight = perceptual_weight
        self.logvar = nn.Parameter(torch.ones(()) * logvar_init)
        self.discriminator = PatchDiscriminator(
            in_channels=disc_in_channels, num_layers=disc_num_layers
        )
        self.discriminator_iter_start = disc_start
        self.disc_loss = hinge_d_loss if disc_loss == "hinge" else vanilla_d_loss
        self.disc_factor = disc_factor
        self.discriminator_weight = disc_weight
        self.disc_conditional = disc_conditional

    def calculate_adaptive_weight(
        self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor
    ) -> Tensor:
        """Compute the weight of g_loss from the ratio of gradient norms at the last layer."""
        nll_norm, g_norm = (
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
            for loss in (nll_loss, g_loss)
        )
        ratio = (nll_norm / (g_norm + D_WEIGHT_EPS)).clamp(0.0, MAX_D_WEIGHT).detach()
        weight: Tensor = ratio * self.discriminator_weight
        return weight

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute the loss of one optimizer, and a dict of values to log.

        Args:
            inputs, reconstructions: Images (B, 3, H, W) in [-1, 1].
            optimizer_idx: 0 for the loss of the autoencoder, 1 for that of the discriminator.
            last_layer: Weight of the decoder's last layer; None omits the autoencoder's GAN loss.
            cond: Channels (B, C, H, W) for the discriminator; None without `disc_conditional`.
            split: Prefix of the logged names.
            weights: Weights of the reconstruction loss, (B, 3, H, W); None = 1.
        """
        disc_factor = adopt_weight(self.disc_factor, global_step, self.discriminator_iter_start)
        if optimizer_idx == 1:
            real = self._compute_logits(inputs.contiguous().detach(), cond)
            fake = self._compute_logits(reconstructions.contiguous().detach(), cond)
            d_loss = disc_factor * self.disc_loss(real, fake)
            log = {"disc_loss": d_loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
            return d_loss, {f"{split}/{name}": value.detach() for name, value in log.items()}
        rec_loss = (inputs.contiguous() - reconstructions.contiguous()).abs()
        if self.perceptual_weight > 0:
            p_loss = self.perceptual_loss(inputs.contiguous(), reconstructions.contiguous())
            # (B, 1, 1, 1), added to the loss of every value, as in the original.
            rec_loss = rec_loss + self.perceptual_weight * p_loss
        nll_loss = rec_loss / self.logvar.exp() + self.logvar
        weighted_nll = (nll_loss if weights is None else weights * nll_loss).sum() / len(nll_loss)
        nll_loss = nll_loss.sum() / len(nll_loss)
        kl_loss = posteriors.kl().sum() / len(inputs)
        g_loss = -self._compute_logits(reconstructions.contiguous(), cond).mean()
        d_weight = torch.tensor(0.0)
        if self.disc_factor > 0.0 and last_layer is not None and torch.is_grad_enabled():
            d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        loss = weighted_nll + self.kl_weight * kl_loss + d_weight * disc_factor * g_loss
        log = {
            "total_loss": loss,
            "logvar": self.logvar,
            "kl_loss": kl_loss,
            "nll_loss": nll_loss,
            "rec_loss": rec_loss.mean(),
            "d_weight": d_weight,
            "disc_factor": torch.tensor(disc_factor),
            "g_loss": g_loss,
        }
        return loss, {f"{split}/{name}": value.detach().clone() for name, value in log.items()}

    def _compute_logits(self, images: Tensor, cond: Tensor | None) -> Tensor:
        if self.disc_conditional:
            if cond is None:
                raise TypeError("disc_conditional needs cond")
            images = torch.cat([images, cond], dim=1)
        logits: Tensor = self.discriminator(images)
        return logits
