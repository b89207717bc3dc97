"""Draw the initial noise of a batch, where it does not come from the seed of each image."""

import numpy as np
import torch
from torch import Tensor

from ldm.generate.plan import SEED_RANGE, Batch
from ldm.generate.request import Request
from ldm.model import LatentDiffusion
from ldm.pipelines import seeded_noise

__all__ = ["seed_globally", "start_noise"]


def seed_globally(request: Request, model: LatentDiffusion, size: tuple[int, int]) -> None:
    """With the quirk "noise", set torch's generator to the original's state before sampling."""
    if "noise" in request.sampling.legacy:
        torch.manual_seed(request.sampling.seed % SEED_RANGE)
        if request.sampling.fixed_code:
            # Drawn for the state after it: the original draws its start code at this place.
            shape = (request.output.n_samples, *_latent_shape(model, size))
            torch.randn(shape, device=model.device)


def start_noise(
    request: Request, model: LatentDiffusion, size: tuple[int, int], batch: Batch
) -> Tensor | None:
    """Draw the x_T (B, C, h, w) of a batch; None = it is drawn from the seed of each image."""
    sampling, shape = request.sampling, _latent_shape(model, size)
    is_legacy = "noise" in sampling.legacy
    # The original's demos of these tasks draw in numpy, in float64.
    if is_legacy and request.task.noise_from_numpy:
        values = np.random.RandomState(sampling.seed).randn(len(batch), *shape)
        return torch.from_numpy(values).float()
    if is_legacy and sampling.fixed_code:
        generator = torch.Generator(model.device).manual_seed(sampling.seed % SEED_RANGE)
        # For a full batch, as the original: a last one that is shorter has the first rows of it.
        shape_of_all = (request.output.n_samples, *shape)
        noise = torch.randn(shape_of_all, generator=generator, device=model.device)
        return noise[: len(batch)]
    if any(spec.initial_noise_seed != spec.seed for spec in batch):
        like = torch.empty((len(batch), *shape), device=model.device)
        return seeded_noise([spec.initial_noise_seed for spec in batch])(like)
    return None


def _latent_shape(model: LatentDiffusion, size: tuple[int, int]) -> tuple[int, int, int]:
    height, width = (-(-side // model.downscale) for side in size)
    return model.channels, height, width
