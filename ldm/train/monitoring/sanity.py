"""Before the first step of a fine-tune: does the untouched model know what it is doing?

The loss of one batch is compared with that of a guesser, who knows the schedule and the variance of
the latents, but has never seen a picture: for each timestep the best multiple of z_t. A trained
model is far better; one that is read as eps and predicts v, or whose latents have the wrong scale,
is worse. The same prediction is compared with eps, v and x0, which tells what it really is.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data.source import collate, to_device
from ldm.diffusion.denoiser import PARAMETERIZATIONS, Denoiser
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.train.monitoring.validation import paused
from ldm.train.tasks.diffusion import spread_timesteps

__all__ = ["Findings", "check", "look"]

log = logging.getLogger(__name__)

SAMPLES = 16
# Of a guesser's loss: a model with more does not know these latents. Measured on the demo model:
# 0.22; read as eps 1.7, as x0 6; latents times 0.18 1.4, times 5.5 2.4; random weights 1.0.
LIMIT = 0.85
SPREAD = (0.4, 2.5)  # standard deviations of latents that a scale factor is there for
OFF = "\nhint: lightning.trainer.sanity=false trains it all the same"


@dataclass(frozen=True)
class Findings:
    """What one batch says about a model.

    loss, guess: of the model and of a guesser, for what the config says that it predicts.
    ratios: loss / guess if it predicted eps, v or x0.
    std: of the latents.
    """

    predicts: str
    loss: float
    guess: float
    ratios: dict[str, float]
    std: float

    @property
    def best(self) -> str:
        """What the prediction resembles most."""
        return min(self.ratios, key=lambda name: self.ratios[name])

    def complaint(self) -> str | None:
        """What is suspicious, in one line."""
        numbers = (
            f"(loss {self.loss:.3f}, a guess {self.guess:.3f}, latents with std {self.std:.2f})"
        )
        if self.best != self.predicts and self.ratios[self.best] < LIMIT:
            return (
                f"the model predicts `{self.best}`, but model.params.parameterization says "
                f"`{self.predicts}` {numbers}"
            )
        if self.ratios[self.predicts] <= LIMIT:
            return None
        if not SPREAD[0] <= self.std <= SPREAD[1]:
            return f"model.params.scale_factor does not suit this autoencoder {numbers}"
        return f"the model is hardly better than a guess: are its weights loaded? {numbers}"


def check(run: Any) -> None:
    """Says what the model predicts, and how well.

        run: a `Run` that starts from weights; all processes call this.
    Raises ValueError in one line if that is not plausible, unless `trainer.sanity` is false.
    """
    if not run.settings.trainer.sanity:
        return
    records = _alike(run.source.first_samples(SAMPLES))
    with paused(run.model), run.precision():
        if isinstance(run.model, AutoencoderKL):
            image = torch.stack([record["jpg"] for record in records[: run.batch_size]])
            complaint = _reconstruction(run.model, image.to(run.device))
        else:
            chance = torch.Generator().manual_seed(run.seed)
            findings = look(run.model, records, chance, size=run.batch_size)
            complaint = findings.complaint()
            log.info(
                "the model predicts %s: loss %.3f before the first step, a guess would have %.3f",
                *(findings.predicts, findings.loss, findings.guess),
            )
    if complaint:
        raise ValueError(complaint + OFF)


@torch.no_grad()
def look(
    model: LatentDiffusion,
    records: Sequence[dict[str, Any]],
    generator: torch.Generator,
    *,
    size: int = SAMPLES,
) -> Findings:
    """One pass over pictures at timesteps that are spread over the schedule.

    size: of the batches in which they go through the model.
    """
    t = spread_timesteps(len(records), len(model.schedule), generator)  # (B,)
    parts = [slice(k, k + size) for k in range(0, len(records), size)]
    seen = [_predicted(model, collate(list(records[part])), t[part], generator) for part in parts]
    z, noise, prediction = (torch.cat(values) for values in zip(*seen, strict=True))
    losses, ratios, guesses = {}, {}, {}
    for name in PARAMETERIZATIONS:
        target = Denoiser(model.unet, model.schedule, name).target(z, noise, t)
        losses[name] = float((prediction - target).square().mean())
        guesses[name] = float(_guess(z, noise, t, target, model))
        ratios[name] = losses[name] / guesses[name]
    own = model.parameterization
    return Findings(own, losses[own], guesses[own], ratios, float(z.std()))


def _predicted(
    model: LatentDiffusion, batch: dict[str, Any], t: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, noise, prediction) of a batch of pictures, (B, C, h, w) each."""
    batch = to_device(batch, model.device)
    z = model.encode(batch["jpg"], generator)
    noise = torch.randn(z.shape, generator=generator).to(z)
    batch = model.prepare(batch, (z.shape[-2], z.shape[-1]), generator)
    return z, noise, model.denoiser.predict_at(z, model.condition(batch), t, noise)


def _guess(z: Tensor, noise: Tensor, t: Tensor, target: Tensor, model: LatentDiffusion) -> Tensor:
    """Mean squared error of the best multiple of z_t, for each timestep its own."""
    z_t = model.schedule.add_noise(z, noise, t).flatten(1)  # (B, N)
    target = target.flatten(1)
    best = (z_t * target).sum(1) / z_t.square().sum(1)  # (B,)
    return (best[:, None] * z_t - target).square().mean()


@torch.no_grad()
def _reconstruction(model: AutoencoderKL, image: Tensor) -> str | None:
    made = model.decode(model.encode(image).mode()).float()
    error = float((made - image).square().mean())
    guess = float((image - image.mean((2, 3), keepdim=True)).square().mean())
    log.info(
        "the autoencoder errs by %.4f before the first step, flat colours by %.4f", error, guess
    )
    if error <= LIMIT * guess:
        return None
    return (
        f"the autoencoder is hardly better than flat colours: are its weights loaded? (error "
        f"{error:.3f}, flat {guess:.3f})"
    )


def _alike(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the size of the first."""
    shape = samples[0]["jpg"].shape
    return [sample for sample in samples if sample["jpg"].shape == shape]
