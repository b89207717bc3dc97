"""Group normalization that stays accurate on large maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nets.cpu.support import applies

PIXELS = 4096  # per block, that float32 sums accurately


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute F.group_norm, accurately also for large channels-last maps.

    Torch's channels-last kernel sums all pixels in one float32 number: at 512 x 512 the error is
    3e-5, 600 times that of its other kernel. Here, moments are computed in blocks and combined.
    """
    height, width = x.shape[-2:]
    large = x.dim() == 4 and height * width > PIXELS and x.dtype == torch.float32
    if not (large and x.is_contiguous(memory_format=torch.channels_last) and applies(x)):
        return F.group_norm(x, groups, weight, bias, eps)
    batch, channels = x.shape[:2]
    rows = next(n for n in range(max(1, PIXELS // width), 0, -1) if height % n == 0)
    pixels = x.permute(0, 2, 3, 1)  # (B, h, w, C)
    blocks = pixels.reshape(-1, rows, width, channels).permute(0, 3, 1, 2)
    moments = [_moments(block, groups) for block in blocks.split(1)]
    means = torch.cat([mean for mean, _ in moments]).view(batch, -1, groups)
    variances = torch.cat([variance for _, variance in moments]).view(batch, -1, groups)
    mean = means.mean(1, keepdim=True)  # (B, 1, groups), float64
    variance = (variances + (means - mean).square()).mean(1, keepdim=True)
    scale = weight.view(groups, -1) * (variance + eps).rsqrt().view(batch, groups, 1)
    shift = bias.view(groups, -1) - scale * mean.view(batch, groups, 1)
    scale, shift = (y.to(x.dtype).view(batch, 1, 1, channels) for y in (scale, shift))
    return torch.addcmul(shift, pixels, scale).permute(0, 3, 1, 2)


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of each group of one block, in float64."""
    tiny = 1e-12
    pixels = x.shape[-2:].numel()
    _, mean, rstd = torch.native_group_norm(x, None, None, 1, x.shape[1], pixels, groups, tiny)
    return mean.double(), rstd.double() ** -2 - tiny
