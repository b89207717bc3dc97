"""batch -> latent -> noise -> error -> loss: what a latent diffusion model is trained on."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.source import to_device
from ldm.encoders.text import TextEncoder
from ldm.model import LatentDiffusion
from ldm.runtime.errors import unknown_name
from ldm.train.tasks.criterion import Criterion

__all__ = ["Diffusion", "measure_scale", "options", "spread_timesteps"]

# Parameters of the original's model that are keywords of `Diffusion`.
ORIGINAL = (
    "loss_type", "l_simple_weight", "original_elbo_weight", "learn_logvar", "logvar_init",
    "scale_by_std",
)  # fmt: skip


class Diffusion:
    """The training task of a LatentDiffusion: the UNet, and encoders that are not frozen.

    drop: share of captions replaced by "", which guidance needs; or shares by record.
    prior_weight: of the loss of `prior`, the samples of a class beside those of one of it
        (arXiv:2208.12242), where a batch has them.
    noise_bias: timesteps are drawn with density t ** (noise_bias - 1): 1 is uniform, 2 looks more
        often at much noise, where the caption alone must tell what to draw.
    offset_noise: of a second noise that is one number per channel, so that the model learns to
        change the mean of a picture; 0.1 is usual (Guttenberg 2023).
    input_perturbation: of more noise in what the network is shown, but is not to find, so that it
        learns to live with its own errors; 0.1 is usual (arXiv:2301.11706).
    scale_by_std: the model's scale was measured, see `measure_scale`: it is exported.
    weighting: keywords of `Criterion`.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        *,
        drop: float | Mapping[str, float] = 0.1,
        prior_weight: float = 1.0,
        noise_bias: float = 1.0,
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
        scale_by_std: bool = False,
        **weighting: Any,
    ) -> None:
        self.model, self.drop, self.noise_bias = model, drop, noise_bias
        self.prior_weight, self.has_own_scale, self.step = prior_weight, scale_by_std, 0
        self.offset_noise, self.input_perturbation = offset_noise, input_perturbation
        for key in weighting:
            if key not in Criterion.keywords():
                raise unknown_name("key", key, KEYWORDS, "lightning.objective")
        criterion = Criterion(model.schedule, model.parameterization, **weighting)
        self.criterion = criterion.to(model.device)
        model.autoencoder.requires_grad_(False)
        self.trained = nn.ModuleDict({"unet": model.unet, "conditioner": model.conditioner})
        if self.criterion.learns:
            self.trained["criterion"] = self.criterion

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """What `Criterion` says of a batch: images ("jpg") or latents ("z", and perhaps "z_std",
        the deviation of their posterior), and what else is read.

        Every family goes this way: what an encoder reads it makes itself of the batch.
        With a "prior" in the batch: the sum, and {"instance", "prior"}, its parts without weight.
        """
        made = self._loss(batch, generator)
        if "prior" not in batch:
            return made
        prior = self._loss(batch["prior"], generator)
        parts = {"instance": made["loss"].detach(), "prior": prior["loss"].detach()}
        joined = {name: torch.cat([made[name], prior[name]]) for name in ("t", "losses")}
        return made | joined | parts | {"loss": made["loss"] + self.prior_weight * prior["loss"]}

    def weights_to_export(self, images: Iterable[Tensor]) -> dict[str, Tensor]:
        """The whole model, under our names; the images are not needed."""
        state: dict[str, Tensor] = self.model.state_dict()
        if self.criterion.learns:
            state["logvar"] = self.criterion.logvar
        if self.has_own_scale:
            state["scale_factor"] = torch.tensor(self.model.scale_factor)
        return state

    def _loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        batch = to_device(batch, self.model.device)
        z = batch.get("z")  # (B, C, h, w)
        if z is None:
            with torch.no_grad():
                z = self.model.encode(batch["jpg"], generator)
        elif "z_std" in batch:  # of the posterior that z is the mean of
            z = z + batch["z_std"] * torch.randn(z.shape, generator=generator).to(z)
        t = spread_timesteps(len(z), len(self.model.schedule), generator, self.noise_bias)  # (B,)
        noise, seen = self._noise(z, generator)  # (B, C, h, w) each
        batch = self.model.prepare(batch, (z.shape[-2], z.shape[-1]), generator)
        cond = self.model.condition(batch, self.drop, generator)
        return self.criterion(self.model.denoiser.error(z, cond, t, noise, seen), t)

    def _noise(self, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The noise that is to be found, and the noise that is shown, (B, C, h, w) each."""
        noise = torch.randn(z.shape, generator=generator)
        if self.offset_noise:
            noise += self.offset_noise * torch.randn((*z.shape[:2], 1, 1), generator=generator)
        seen = noise
        if self.input_perturbation:
            more = torch.randn(z.shape, generator=generator)
            seen = noise + self.input_perturbation * more
        return noise.to(z), seen.to(z)


KEYWORDS = [
    *("drop", "prior_weight", "noise_bias", "offset_noise", "input_perturbation", "scale_by_std"),
    *Criterion.keywords(),
]


def options(params: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `Diffusion`.

    params: of the original's model, whose `ucg_training` and `embedding_dropout` are shares of
        `drop`, too.
    given: those of `lightning.objective`, which win.
    """
    found = {key: params[key] for key in ORIGINAL if params.get(key) is not None} | dict(given)
    shares = {key: share["p"] for key, share in (params.get("ucg_training") or {}).items()}
    if params.get("embedding_dropout"):
        shares["embedding"] = params["embedding_dropout"]
    if shares:
        own = given.get("drop", {})
        found["drop"] = {
            "txt": 0.1,
            **shares,
            **(own if isinstance(own, Mapping) else {"txt": own}),
        }
    return found


def measure_scale(model: LatentDiffusion, images: Tensor, generator: torch.Generator) -> None:
    """Sets `scale_factor` so that latents of these images have a standard deviation of 1.

        images: (B, 3, H, W) in [-1, 1], the first of the data. It is the original's `scale_by_std`.
    Raises ValueError if the config gives a `scale_factor` as well.

    Rombach et al. 2022 (arXiv:2112.10752), appendix G.
    """
    if model.scale_factor != 1:
        raise ValueError(f"scale_by_std measures `scale_factor`, which is {model.scale_factor}")
    with torch.no_grad():
        model.scale_factor = 1 / float(model.encode(images.to(model.device), generator).std())


def spread_timesteps(
    n: int, timesteps: int, generator: torch.Generator, bias: float = 1.0
) -> Tensor:
    """(n,) timesteps, one from each n-th of their distribution, shuffled: drawn with less variance.

    bias: see `Diffusion.noise_bias`.
    """
    place = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)
    return ((place / n) ** (1 / bias) * timesteps).long().clamp(max=timesteps - 1)


def vocabulary(texts: Iterable[str], encoder: TextEncoder) -> Tensor:
    """Sorted ids of all tokens in the texts, as the compact embedding of `encoder` keeps them.

    Rows that the texts leave over get ids beyond CLIP's, which never occur.
    Raises ValueError if there are more tokens than rows.
    """
    assert encoder.token_ids is not None
    ids, rows = encoder.tokenize(sorted(set(texts))).unique(), len(encoder.token_ids)
    if len(ids) > rows:
        raise ValueError(f"`compact_vocab` is too small: {len(ids)} tokens occur, plus one row")
    spare = torch.arange(rows - len(ids)) + 49408
    return torch.cat([ids, spare])
