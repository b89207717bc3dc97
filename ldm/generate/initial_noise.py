"""Draw the initial noise of a batch if the pipeline cannot draw it from the seed of each image."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.generate.plan import SEED_RANGE, Batch
from ldm.generate.request import Request
from ldm.model import LatentDiffusion
from ldm.pipelines import make_seeded_noise_source

__all__ = ["draw_initial_noise", "save_rng_state", "seed_legacy_noise"]


def seed_legacy_noise(request: Request, model: LatentDiffusion, size: tuple[int, int]) -> None:
    """With legacy `noise`, set torch's generator to the original's state before sampling."""
    if "noise" in request.sampling.legacy:
        torch.manual_seed(request.sampling.seed % SEED_RANGE)
        if request.sampling.fixed_code:
            # Only to advance the generator: the original draws its initial noise here.
            shape = (request.output.n_samples, *_get_latent_shape(model, size))
            torch.randn(shape, device=model.device)


def draw_initial_noise(
    request: Request, model: LatentDiffusion, size: tuple[int, int], batch: Batch
) -> Tensor | None:
    """Draw the x_T (B, C, h, w) of a batch; None = the pipeline draws it."""
    sampling, shape = request.sampling, _get_latent_shape(model, size)
    is_legacy = "noise" in sampling.legacy
    # The original's demos of these tasks draw it with numpy, in float64.
    if is_legacy and request.task.uses_numpy_noise:
        array = np.random.RandomState(sampling.seed).randn(len(batch), *shape)
        return torch.from_numpy(array).float()
    if is_legacy and sampling.fixed_code:
        generator = torch.Generator(model.device).manual_seed(sampling.seed % SEED_RANGE)
        # For a full batch, as in the original; a smaller last batch uses the first ones.
        full_shape = (request.output.n_samples, *shape)
        noise = torch.randn(full_shape, generator=generator, device=model.device)
        return noise[: len(batch)]
    if any(spec.initial_noise_seed != spec.seed for spec in batch.images):
        like = torch.empty((len(batch), *shape), device=model.device)
        return make_seeded_noise_source([spec.initial_noise_seed for spec in batch.images])(like)
    return None


def _get_latent_shape(model: LatentDiffusion, size: tuple[int, int]) -> tuple[int, int, int]:
    height, width = (-(-side // model.downscale_factor) for side in size)
    return model.channels, height, width


def save_rng_state(model: LatentDiffusion) -> Callable[[], None]:
    """Save the states of torch's global generators; return a function that restores them."""
    state = torch.get_rng_state()
    is_cuda = model.device.type == "cuda"
    device_state = torch.cuda.get_rng_state(model.device) if is_cuda else None

    def restore() -> None:
        torch.set_rng_state(state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, model.device)

    return restore
