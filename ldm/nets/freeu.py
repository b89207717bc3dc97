"""FreeU: other weights for the two inputs of the UNet's output blocks (arXiv:2309.11497).

Of what comes from below, half of the channels are multiplied; of the skip connection, the lowest
frequencies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FreeU"]


@dataclass(frozen=True)
class FreeU:
    """Factors b and s of each output block, None where it stays as it is."""

    factors: Sequence[tuple[float, float] | None]
    # whether b follows the mean of the channels, as in the second version: from 1 where it is
    # lowest in a sample to b where it is highest
    by_mean: bool = False

    def __call__(self, index: int, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Change h (B, C, h, w) and the skip connection (B, C', h, w) of an output block."""
        factors = self.factors[index]
        if factors is None:
            return h, skip
        b, s = factors
        half = h.shape[1] // 2
        factor: Tensor | float = b
        if self.by_mean:
            mean = h.float().mean(dim=1, keepdim=True)  # (B, 1, h, w)
            low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
            span = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
            factor = ((b - 1) * (mean - low) / span + 1).to(h.dtype)
        h = torch.cat([h[:, :half] * factor, h[:, half:]], dim=1)
        return h, scale_low_frequencies(skip, s)


def scale_low_frequencies(x: Tensor, factor: float) -> Tensor:
    """Multiply the frequencies 0 and -1 of both axes of x (B, C, h, w), and take the real part.

    These are the 2 x 2 in the middle of a shifted Fourier transform. With a, b the differences of
    phase between two positions, their sum is x convolved with

        (1 + cos a)(1 + cos b) - sin a sin b,

    which the functions 1, cos, sin of each axis span: no transform of all frequencies is needed.
    """
    if factor == 1:
        return x
    height, width = x.shape[-2:]
    rows, columns = (_waves(n, x.device) for n in (height, width))  # (3, h), (3, w)
    # Autocast would sum over all positions in half precision.
    with torch.autocast(x.device.type, enabled=False):
        product = rows @ x.float() @ columns.T  # (B, C, 3, 3)
        # sin a = sin y cos y' - cos y sin y': a quarter turn of cos and sin, for both axes.
        turned = torch.zeros_like(product)
        turned[..., 1, 1], turned[..., 2, 2] = product[..., 2, 2], product[..., 1, 1]
        turned[..., 1, 2], turned[..., 2, 1] = -product[..., 2, 1], -product[..., 1, 2]
        low = rows.T @ (product - turned) @ columns / (height * width)
        return (x.float() + (factor - 1) * low).to(x.dtype)


def _waves(n: int, device: torch.device) -> Tensor:
    """Return 1, cos and sin of frequency -1 at n positions, (3, n) float32.

    A single position has one frequency only.
    """
    phase = torch.arange(n, device=device) * (2 * math.pi / n)
    waves = torch.stack([torch.ones_like(phase), phase.cos(), phase.sin()])
    return waves if n > 1 else waves * torch.tensor([[1.0], [0.0], [0.0]], device=device)
