"""FreeU: rescales the two inputs of the UNet's output blocks.

The first half of the backbone's channels is multiplied by b, the lowest frequencies of the skip
connection by s. Si et al. 2023 (arXiv:2309.11497).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FreeU"]


@dataclass(frozen=True)
class FreeU:
    """Rescales the inputs of output blocks, `freeu(index, h, skip)`.

    Args:
        factors: (b, s) of each output block; None leaves the block unchanged.
        is_version_2: Whether the backbone's factor grows with the mean over channels, from 1 at its
            minimum in a sample to b at its maximum; in version 1 it is b everywhere.
    """

    factors: Sequence[tuple[float, float] | None]
    is_version_2: bool = False

    def __call__(self, index: int, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Rescale backbone (B, C, h, w) and skip (B, C', h, w) of output block `index`."""
        factors = self.factors[index]
        if factors is None:
            return h, skip
        b, s = factors
        half = h.shape[1] // 2
        backbone_factor: Tensor | float = b
        if self.is_version_2:
            mean = h.float().mean(dim=1, keepdim=True)  # (B, 1, h, w)
            lowest, highest = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
            span = (highest - lowest).clamp(min=torch.finfo(torch.float32).tiny)
            backbone_factor = ((b - 1) * (mean - lowest) / span + 1).to(h.dtype)
        h = torch.cat([h[:, :half] * backbone_factor, h[:, half:]], dim=1)
        return h, scale_low_frequencies(skip, s)


def scale_low_frequencies(x: Tensor, factor: float) -> Tensor:
    """Multiply the frequencies 0 and -1 of both axes of x (B, C, h, w), and take the real part.

    These are the central 2 x 2 of a shifted Fourier transform, as in the authors' code. With θ, φ
    the phase differences of two positions along the axes, their sum is x convolved with

        (1 + cos θ)(1 + cos φ) - sin θ sin φ.

    That is in the span of 1, cos and sin along each axis: no full Fourier transform is needed.
    """
    if factor == 1:
        return x
    height, width = x.shape[-2:]
    basis_y = _make_fourier_basis(height, x.device)  # (3, h)
    basis_x = _make_fourier_basis(width, x.device)  # (3, w)
    # Autocast would sum over all positions in half precision.
    with torch.autocast(x.device.type, enabled=False):
        coefficients = basis_y @ x.float() @ basis_x.T  # (B, C, 3, 3)
        # sin θ = sin y cos y' - cos y sin y': rotate (cos, sin) by 90° along both axes.
        rotated = torch.zeros_like(coefficients)
        rotated[..., 1, 1], rotated[..., 2, 2] = coefficients[..., 2, 2], coefficients[..., 1, 1]
        rotated[..., 1, 2], rotated[..., 2, 1] = -coefficients[..., 2, 1], -coefficients[..., 1, 2]
        low_frequencies = basis_y.T @ (coefficients - rotated) @ basis_x / (height * width)
        return (x.float() + (factor - 1) * low_frequencies).to(x.dtype)


def _make_fourier_basis(n: int, device: torch.device) -> Tensor:
    """Return 1, cos and sin of frequency -1 at n positions, (3, n) float32.

    A single position has only the frequency 0: its cos and sin are returned as 0.
    """
    phases = torch.arange(n, device=device) * (2 * math.pi / n)
    basis = torch.stack([torch.ones_like(phases), phases.cos(), phases.sin()])
    return basis if n > 1 else basis * torch.tensor([[1.0], [0.0], [0.0]], device=device)
