"""Start noise of a batch, where it is not drawn from the seed of each image."""

from typing import TYPE_CHECKING

from ldm.generate.plan import Batch
from ldm.generate.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion

__all__ = ["seed_globally", "start_noise"]


def seed_globally(request: Request, model: "LatentDiffusion", size: tuple[int, int]) -> None:
    """Under the quirk "noise", bring torch's generator to the original's state before sampling."""
    import torch

    if "noise" in request.sampling.legacy:
        torch.manual_seed(request.sampling.seed)
        if request.sampling.fixed_code:
            shape = _latent_shape(model, size, request.output.n_samples)
            torch.randn(shape, device=model.device)


def start_noise(
    request: Request, model: "LatentDiffusion", size: tuple[int, int], batch: Batch
) -> "Tensor | None":
    """x_T of a batch, (B, C, h, w); None = drawn from the seed of each image."""
    import numpy as np
    import torch

    from ldm.pipelines import seeded_noise

    sampling = request.sampling
    is_legacy = "noise" in sampling.legacy
    if is_legacy and request.task.noise_from_numpy:
        values = np.random.RandomState(sampling.seed).randn(*_latent_shape(model, size, len(batch)))
        return torch.from_numpy(values).float()
    if is_legacy and sampling.fixed_code:
        generator = torch.Generator(model.device).manual_seed(sampling.seed)
        shape = _latent_shape(model, size, request.output.n_samples)
        return torch.randn(shape, generator=generator, device=model.device)[: len(batch)]
    if any(job.start_seed != job.seed for job in batch):
        like = torch.empty(_latent_shape(model, size, len(batch)), device=model.device)
        return seeded_noise([job.start_seed for job in batch])(like)
    return None


def _latent_shape(
    model: "LatentDiffusion", size: tuple[int, int], n: int
) -> tuple[int, int, int, int]:
    height, width = (-(-side // model.downscale) for side in size)
    return n, model.channels, height, width
