"""Check the initial loss of a fine-tune before its first step.

The loss of the model is compared with a baseline without a network, the least-squares multiple of
each noisy latent. A trained model is far better; one with the wrong prediction type
(v taken for eps), or with latents of the wrong scale, is worse. The prediction is compared with
eps, v and x0, to detect its actual type.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.data.dataset import Sample
from ldm.data.source import Batch, collate, to_device
from ldm.diffusion.denoiser import PARAMETERIZATIONS
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import Autoencoder
from ldm.train.distributed.parallel import eval_mode
from ldm.train.tasks.noise_levels import draw_timesteps

__all__ = ["NUM_SAMPLES", "BaselineComparison", "check_initial_loss", "compare_with_baseline"]

log = logging.getLogger(__name__)

NUM_SAMPLES = 16  # training samples that the training loop passes
# Maximum of loss / baseline loss. Measured on the demo model, which predicts v:
#     correct                     0.22
#     taken for eps, for x0       1.7, 6
#     latents times 0.18, 5.5     1.4, 2.4
#     random weights              1.0
MAX_LOSS_RATIO = 0.85
STD_RANGE = (0.4, 2.5)  # standard deviation of latents with a plausible scale factor
HINT = "\nhint: lightning.trainer.check_initial_loss=false skips this check"


@dataclass(frozen=True)
class BaselineComparison:
    """Losses of a model and of the baseline on one batch.

    Args:
        parameterization: The config's prediction type, "eps", "v", "x0" or "edm".
        ratios: Loss / baseline loss if the prediction is taken for eps, for v, and for x0.
        std: Standard deviation of the latents.
    """

    parameterization: str
    loss: float
    baseline_loss: float
    ratios: Mapping[str, float]
    std: float

    @property
    def best_fit(self) -> str:
        """The parameterization that the prediction fits best."""
        return min(self.ratios, key=lambda name: self.ratios[name])

    def find_problem(self) -> str | None:
        """Return a description of the problem in one line; None if there is none."""
        measurements = (
            f"(loss {self.loss:.3f}, baseline {self.baseline_loss:.3f}, latents with std "
            f"{self.std:.2f})"
        )
        if self.best_fit != self.parameterization and self.ratios[self.best_fit] < MAX_LOSS_RATIO:
            return (
                f"the model predicts `{self.best_fit}`, but model.params.parameterization says "
                f"`{self.parameterization}` {measurements}"
            )
        if self.ratios[self.parameterization] <= MAX_LOSS_RATIO:
            return None
        if not STD_RANGE[0] <= self.std <= STD_RANGE[1]:
            return f"model.params.scale_factor does not fit this autoencoder {measurements}"
        problem = "the model is hardly better than a trivial baseline: are its weights loaded?"
        return f"{problem} {measurements}"


def check_initial_loss(
    model: LatentDiffusion | Autoencoder,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    seed: int,
    timestep_range: Sequence[int] | None = None,
) -> None:
    """Check on a few samples that the weights of a model fit its config.

    Args:
        samples: Samples of the training data with images ("jpg") of one size.
        batch_size: Number of samples that fit into memory.
        timestep_range: Range [first, end) of timesteps; None = all.
    Raises:
        ValueError: The weights do not fit the config; the message says what may be wrong.
    """
    with eval_mode(model):
        if isinstance(model, Autoencoder):
            image = torch.stack([sample["jpg"] for sample in samples[:batch_size]])
            problem = find_autoencoder_problem(model, image)
        else:
            generator = torch.Generator().manual_seed(seed)
            comparison = compare_with_baseline(
                model, samples, generator, batch_size=batch_size, timestep_range=timestep_range
            )
            log.info(
                "the model predicts %s: initial loss %.3f, trivial baseline %.3f",
                comparison.parameterization,
                comparison.loss,
                comparison.baseline_loss,
            )
            problem = comparison.find_problem()
    if problem:
        raise ValueError(problem + HINT)


@torch.no_grad()
def compare_with_baseline(
    model: LatentDiffusion,
    samples: Sequence[Sample],
    generator: torch.Generator,
    *,
    batch_size: int = NUM_SAMPLES,
    timestep_range: Sequence[int] | None = None,
) -> BaselineComparison:
    """Compare losses of a model and of the baseline; arguments as in `check_initial_loss`."""
    n = len(samples)
    t = draw_timesteps(model.schedule, n, generator, timestep_range=timestep_range)  # (B,)
    starts = range(0, len(samples), batch_size)
    batches = [list(samples[k : k + batch_size]) for k in starts]
    outputs = [
        _predict(model, collate(batch), t[k : k + batch_size], generator)
        for k, batch in zip(starts, batches, strict=True)
    ]
    z, noise, prediction = (torch.cat(values) for values in zip(*outputs, strict=True))
    losses: dict[str, float] = {}
    baseline_losses: dict[str, float] = {}
    # The noisy latents up to a factor, which the baseline fits anyway.
    x = z + model.schedule.t_to_sigma(t).to(z).view(-1, 1, 1, 1) * noise
    configured = model.parameterization
    names = ["edm"] if configured == "edm" else [p for p in PARAMETERIZATIONS if p != "edm"]
    for name in names:
        target = replace(model.denoiser, parameterization=name).compute_target(z, noise, t)
        losses[name] = float((prediction - target).square().mean())
        baseline_losses[name] = float(_compute_baseline_loss(x, target))
    ratios = {name: losses[name] / baseline_losses[name] for name in losses}
    return BaselineComparison(
        configured, losses[configured], baseline_losses[configured], ratios, float(z.std())
    )


def _predict(
    model: LatentDiffusion, batch: Batch, t: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (z, noise, prediction) of a batch of images, (B, C, h, w) each."""
    batch = to_device(batch, model.device)
    z = model.encode(batch["jpg"], generator)
    noise = torch.randn(z.shape, generator=generator).to(z)
    batch = model.prepare(batch, (z.shape[-2], z.shape[-1]), generator)
    return z, noise, model.denoiser.add_noise_and_predict(z, model.condition(batch), t, noise)


def _compute_baseline_loss(x: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of the best multiple of x, fitted for each sample."""
    x, target = x.flatten(1), target.flatten(1)  # (B, N)
    factor = (x * target).sum(1) / x.square().sum(1)  # (B,)
    return (factor[:, None] * x - target).square().mean()


@torch.no_grad()
def find_autoencoder_problem(model: Autoencoder, image: Tensor) -> str | None:
    """Compare the errors of reconstructions and of the images' mean colors.

    Args:
        image: (B, 3, H, W) in [-1, 1].
    Returns:
        A description of the problem; None if there is none.
    """
    image = image.to(model.quant_conv.weight.device)
    reconstruction = model.decode(model.encode(image).mode()).float()
    mse = float((reconstruction - image).square().mean())
    baseline_mse = float((image - image.mean((2, 3), keepdim=True)).square().mean())
    log.info("initial reconstruction MSE %.4f, MSE of mean colors %.4f", mse, baseline_mse)
    if mse <= MAX_LOSS_RATIO * baseline_mse:
        return None
    return (
        "the autoencoder is hardly better than mean colors: are its weights loaded? "
        f"(reconstruction MSE {mse:.3f}, MSE of mean colors {baseline_mse:.3f})"
    )
