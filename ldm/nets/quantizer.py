"""Vector quantization of latents by a learned codebook.

Van den Oord et al. 2017 (arXiv:1711.00937); Esser et al. 2021 (arXiv:2012.09841).
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["Quantized", "VectorQuantizer"]

COMMITMENT_WEIGHT = 0.25  # beta of the paper
MAX_DISTANCES = 1 << 24  # computed at once: 64 MB


class Quantized(NamedTuple):
    """Result of a `VectorQuantizer`.

    Args:
        z: Quantized latents (B, C, h, w), whose gradient reaches the input unchanged.
        loss: Codebook and commitment loss, a scalar.
        indices: Indices in the codebook, int64 (B, h, w).
    """

    z: Tensor
    loss: Tensor
    indices: Tensor


class VectorQuantizer(nn.Module):
    """Replaces the vector at each position of a latent by the nearest vector of the codebook.

    Args:
        num_vectors: Vectors of the codebook, K.
        dim: Their dimension: the channels of the latent, C.
        legacy: Whether the commitment weight is applied to the codebook's half of the loss instead
            of the encoder's, as in all published models. The value of the loss is the same.
    """

    def __init__(self, num_vectors: int, dim: int, *, legacy: bool = True) -> None:
        super().__init__()
        self.legacy = legacy
        self.embedding = nn.Embedding(num_vectors, dim)
        if not self.embedding.weight.is_meta:
            nn.init.uniform_(self.embedding.weight, -1 / num_vectors, 1 / num_vectors)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents (B, C, h, w)."""
        indices = self.find_nearest(z)  # (B, h, w)
        quantized = self.get_vectors(indices).to(z.dtype)  # (B, C, h, w)
        encoder_loss = (quantized.detach() - z).square().mean()
        codebook_loss = (quantized - z.detach()).square().mean()
        if self.legacy:
            loss = encoder_loss + COMMITMENT_WEIGHT * codebook_loss
        else:
            loss = COMMITMENT_WEIGHT * encoder_loss + codebook_loss
        # Straight-through estimator: the gradient with respect to z is that of the result.
        return Quantized(z + (quantized - z).detach(), loss, indices)

    def find_nearest(self, z: Tensor) -> Tensor:
        """Return the indices (B, h, w) of the nearest vectors to those of z (B, C, h, w)."""
        weight = self.embedding.weight.float()  # (K, C)
        squared_norms = weight.square().sum(dim=1)
        vectors = rearrange(z, "b c h w -> (b h w) c").float()
        indices = []
        with torch.autocast(z.device.type, enabled=False):
            for block in vectors.split(max(1, MAX_DISTANCES // len(weight))):
                # |v|² + |e|² - 2 v·e in float32; ties go to the smallest index.
                distances = block.square().sum(dim=1, keepdim=True) + squared_norms  # (n, K)
                indices.append(distances.addmm(block, weight.T, alpha=-2).argmin(dim=1))
        batch_size, _, height, width = z.shape
        return torch.cat(indices).view(batch_size, height, width)

    def get_vectors(self, indices: Tensor) -> Tensor:
        """Return the vectors (B, C, h, w) of indices (B, h, w)."""
        vectors: Tensor = self.embedding(indices)  # (B, h, w, C)
        return rearrange(vectors, "b h w c -> b c h w").contiguous()
