"""Group normalization that is accurate on large feature maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nets.cpu.support import can_accelerate

MAX_BLOCK_PIXELS = 4096  # few enough for accurate sums in float32


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute F.group_norm, also accurately for large channels-last feature maps.

    Torch's channels-last kernel sums all pixels in one float32 accumulator: at 512 x 512 the error
    is 3e-5, 600 times that of its other kernel. Here, moments are computed in blocks and combined.
    """
    height, width = x.shape[-2:]
    is_large = x.dim() == 4 and height * width > MAX_BLOCK_PIXELS and x.dtype == torch.float32
    if not (is_large and x.is_contiguous(memory_format=torch.channels_last) and can_accelerate(x)):
        return F.group_norm(x, groups, weight, bias, eps)
    batch, channels = x.shape[:2]
    # As many rows per block as fit; blocks have one size, so that their moments weigh the same.
    max_rows = max(1, MAX_BLOCK_PIXELS // width)
    block_rows = next(n for n in range(max_rows, 0, -1) if height % n == 0)
    pixels = x.permute(0, 2, 3, 1)  # (B, h, w, C)
    blocks = pixels.reshape(-1, block_rows, width, channels).permute(0, 3, 1, 2)
    moments = [_compute_moments(block, groups) for block in blocks.split(1)]
    means = torch.cat([mean for mean, _ in moments]).view(batch, -1, groups)
    variances = torch.cat([variance for _, variance in moments]).view(batch, -1, groups)
    mean = means.mean(1, keepdim=True)  # (B, 1, groups), float64
    # Law of total variance: mean variance within blocks, plus variance of their means.
    variance = (variances + (means - mean).square()).mean(1, keepdim=True)
    scale = weight.view(groups, -1) * (variance + eps).rsqrt().view(batch, groups, 1)
    shift = bias.view(groups, -1) - scale * mean.view(batch, groups, 1)
    # (x - mean) / std weight + bias, as one product and sum per pixel
    scale, shift = (y.to(x.dtype).view(batch, 1, 1, channels) for y in (scale, shift))
    return torch.addcmul(shift, pixels, scale).permute(0, 3, 1, 2)


def _compute_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of each group of one block, in float64."""
    eps = 1e-12  # the kernel returns 1 / sqrt(variance + eps)
    num_pixels = x.shape[-2:].numel()
    _, mean, rstd = torch.native_group_norm(x, None, None, 1, x.shape[1], num_pixels, groups, eps)
    return mean.double(), rstd.double() ** -2 - eps
