"""`ldm.models.diffusion.sampling_util` of the original: shapes and thresholds of estimates."""

from torch import Tensor

__all__ = ["append_dims", "norm_thresholding", "spatial_norm_thresholding"]


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """Append axes of length 1 until a tensor has `target_dims` of them."""
    missing = target_dims - x.dim()
    if missing < 0:
        raise ValueError(f"a tensor of {x.dim()} axes cannot have {target_dims}")
    return x.reshape(*x.shape, *(1,) * missing)


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale down estimates (B, …) whose root mean square is above a value."""
    norm = x0.square().flatten(1).mean(1).sqrt().clamp(min=value)
    return x0 * (value / append_dims(norm, x0.dim()))


def spatial_norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale down pixels (B, C, h, w) whose root mean square over channels is above a value."""
    return x0 * (value / x0.square().mean(1, keepdim=True).sqrt().clamp(min=value))
