"""`ldm.models.diffusion.sampling_util` of the original: broadcasting, thresholding of x0."""

from torch import Tensor


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """Append axes of length 1 until a tensor has `target_dims` axes."""
    num_new = target_dims - x.dim()
    if num_new < 0:
        raise ValueError(f"target_dims must be at least {x.dim()}, got {target_dims}")
    return x.reshape(*x.shape, *(1,) * num_new)


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each x0 (B, …) down to a root mean square of at most `value`."""
    rms = x0.square().flatten(1).mean(1).sqrt().clamp(min=value)
    return x0 * (value / append_dims(rms, x0.dim()))


def spatial_norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each pixel of x0 (B, C, h, w) down to a root mean square over C of at most `value`."""
    return x0 * (value / x0.square().mean(1, keepdim=True).sqrt().clamp(min=value))
