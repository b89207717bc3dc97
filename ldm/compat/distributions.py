"""`ldm.modules.distributions.distributions` of the original: the posterior of a latent."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.nets.autoencoder import DiagonalGaussian


class DiagonalGaussianDistribution(DiagonalGaussian):
    """A normal distribution with diagonal covariance; see `DiagonalGaussian`."""

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        super().__init__(parameters, deterministic)
        self.var = torch.zeros_like(self.mean) if deterministic else self.logvar.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a sample, mean + std * noise, (B, C, h, w); the noise is drawn on the CPU."""
        noise = torch.randn(self.mean.shape, generator=generator)
        # The noise stays float32, whatever the dtype of the mean: as in the original, the sample
        # has at least float32 precision.
        return self.mean + self.std * noise.to(self.parameters.device)

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Compute the KL divergence (B,) from another distribution; None is the standard normal."""
        if other is None or self.deterministic:
            return super().kl()
        terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var
        return 0.5 * (terms - 1.0 - self.logvar + other.logvar).sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Compute the negative log-likelihood of a sample, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1)
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=tuple(dims))


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """Compute the KL divergence between normal distributions, elementwise; one must be a tensor."""
    values = (mean1, logvar1, mean2, logvar2)
    tensor = next((value for value in values if isinstance(value, Tensor)), None)
    assert tensor is not None, "at least one argument must be a Tensor"
    # Numbers get the dtype and device of the first tensor.
    logvar1, logvar2 = (torch.as_tensor(value).to(tensor) for value in (logvar1, logvar2))
    terms = -1.0 + logvar2 - logvar1 + (logvar1 - logvar2).exp()
    return 0.5 * (terms + (mean1 - mean2) ** 2 * (-logvar2).exp())
