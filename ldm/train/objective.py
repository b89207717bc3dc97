"""batch -> latent -> noise -> loss: what a latent diffusion model is trained on."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import Schedule
from ldm.model import LatentDiffusion

__all__ = ["Diffusion", "min_snr", "on_device", "spread_timesteps"]


class Diffusion:
    """The training task of a LatentDiffusion: the UNet, and encoders that are not frozen.

    drop: share of captions replaced by "", which guidance needs.
    min_snr_gamma: cap of the signal-to-noise ratio in the weights (arXiv:2303.09556); None = all
        timesteps count alike.
    prior_weight: of the loss of `prior`, the samples of a class beside those of one of it
        (arXiv:2208.12242), where a batch has them.
    noise_bias: timesteps are drawn with density t ** (noise_bias - 1): 1 is uniform, 2 looks more
        often at much noise, where the caption alone must tell what to draw.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        *,
        drop: float = 0.1,
        min_snr_gamma: float | None = None,
        prior_weight: float = 1.0,
        noise_bias: float = 1.0,
    ) -> None:
        self.model, self.drop, self.noise_bias = model, drop, noise_bias
        self.prior_weight = prior_weight
        self.weights = min_snr(model.schedule, model.parameterization, min_snr_gamma)  # (T,)
        model.autoencoder.requires_grad_(False)
        self.trained = nn.ModuleDict({"unet": model.unet, "conditioner": model.conditioner})

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """{"loss": scalar} of a batch of images ("jpg") or latents ("z"), and of what else is read.

        Every family goes this way: what an encoder reads it makes itself of the batch.
        With a "prior" in the batch: the sum, and {"instance", "prior"}, its parts without weight.
        """
        loss = self._loss(batch, generator)
        if "prior" not in batch:
            return {"loss": loss}
        prior = self._loss(batch["prior"], generator)
        return {"loss": loss + self.prior_weight * prior, "instance": loss, "prior": prior}

    def weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        """The whole model, under our names; the images are not needed."""
        return self.model.state_dict()

    def _loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        batch = on_device(batch, self.model.device)
        z = batch.get("z")  # (B, C, h, w)
        if z is None:
            with torch.no_grad():
                z = self.model.encode(batch["jpg"], generator)
        t = spread_timesteps(len(z), len(self.model.schedule), generator, self.noise_bias)  # (B,)
        noise = torch.randn(z.shape, generator=generator).to(z)  # (B, C, h, w)
        batch = self.model.prepare(batch, (z.shape[-2], z.shape[-1]), generator)
        cond = self.model.condition(batch, self.drop, generator)
        losses = self.model.denoiser.loss(z, cond, t, noise)  # (B,)
        return (self.weights[t].to(losses) * losses).mean()


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def min_snr(schedule: Schedule, parameterization: str, gamma: float | None) -> Tensor:
    """Weight of the loss at every timestep, (T,) float32, as min(SNR, gamma) in terms of z."""
    snr = schedule.sigmas**-2
    if gamma is None:
        return torch.ones_like(snr).float()
    per_z = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[parameterization]
    return (snr.clamp(max=gamma) / per_z).float()


def spread_timesteps(
    n: int, timesteps: int, generator: torch.Generator, bias: float = 1.0
) -> Tensor:
    """(n,) timesteps, one from each n-th of their distribution, shuffled: drawn with less variance.

    bias: see `Diffusion.noise_bias`.
    """
    place = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)
    return ((place / n) ** (1 / bias) * timesteps).long().clamp(max=timesteps - 1)


def vocabulary(texts: Iterable[str], encoder: Any) -> Tensor:
    """Sorted ids of all tokens in the texts, as the compact embedding of `encoder` keeps them.

    Rows that the texts leave over get ids beyond CLIP's, which never occur.
    Raises ValueError if there are more tokens than rows.
    """
    ids = encoder.tokenize(sorted(set(texts))).unique()
    rows = len(encoder.token_ids)
    if len(ids) > rows:
        raise ValueError(f"`compact_vocab` is too small: {len(ids)} tokens occur, plus one row")
    spare = torch.arange(rows - len(ids)) + 49408
    return torch.cat([ids, spare])
