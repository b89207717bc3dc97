"""`ldm.modules.diffusionmodules.util` of the original: noise schedules, timesteps, layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn as nn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint as _checkpoint

from ldm.compat.util import (
    default as default,
    exists as exists,
    instantiate_from_config as instantiate_from_config,
    mean_flat as mean_flat,
)
from ldm.diffusion.schedule import make_betas
from ldm.nets import blocks
from ldm.nets.blocks import zero_module as zero_module

SiLU = nn.SiLU
Array = NDArray[np.float64]
Config = Mapping[str, Any] | str
Result = TypeVar("Result")


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> Array:
    """Build the betas (n_timestep,) float64 of a noise schedule; see `make_betas`."""
    betas = make_betas(
        schedule, n_timestep, linear_start=linear_start, linear_end=linear_end, cosine_s=cosine_s
    )
    array: Array = betas.numpy()
    return array


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> NDArray[np.int64]:
    """Choose the timesteps of DDIM sampling, int64, ascending.

    Args:
        ddim_discr_method: "uniform" takes every c-th, c = num_ddpm_timesteps // num_ddim_timesteps,
            often more than num_ddim_timesteps; "quad" is uniform in √t, up to
            0.8 num_ddpm_timesteps.
    """
    if ddim_discr_method == "uniform":
        if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
            allowed = f"1 … {num_ddpm_timesteps}"
            raise ValueError(f"num_ddim_timesteps must be in {allowed}, got {num_ddim_timesteps}")
        # With 3, 9, 27 … of 1000 steps, the last is 1000, which is out of range: an IndexError
        # later, as in the original.
        stride = num_ddpm_timesteps // num_ddim_timesteps
        return np.arange(1, num_ddpm_timesteps + 1, stride, dtype=np.int64)
    if ddim_discr_method == "quad":
        square_roots = np.linspace(0, np.sqrt(num_ddpm_timesteps * 0.8), num_ddim_timesteps)
        timesteps: NDArray[np.int64] = (square_roots**2).astype(np.int64) + 1
        return timesteps
    raise NotImplementedError(
        f"unknown ddim_discr_method `{ddim_discr_method}`, choose one of quad, uniform"
    )


def make_ddim_sampling_parameters(
    alphacums: Tensor | Array, ddim_timesteps: NDArray[np.int64], eta: float, verbose: bool = True
) -> tuple[Tensor | Array, Tensor | Array, Array]:
    """Compute the parameters of DDIM (arXiv:2010.02502, eq. 12) at its timesteps.

    Args:
        alphacums: ᾱ at each timestep of the model.

    Returns:
        sigma of the noise that each step adds (float64); ᾱ; and ᾱ at the previous timestep
        (float64 numpy). The first two are tensors if `alphacums` is a tensor, else numpy.
    """
    alphas_cumprod = torch.as_tensor(alphacums)
    alphas = alphas_cumprod[torch.as_tensor(ddim_timesteps)]
    # The first is ᾱ of timestep 0, which is below 1: the last step leaves a little noise.
    alphas_prev = torch.cat([alphas_cumprod[:1], alphas[:-1]]).double()
    alphas64 = alphas.double()
    variance = (1 - alphas_prev) / (1 - alphas64) * (1 - alphas64 / alphas_prev)
    sigmas = eta * variance.sqrt()
    if isinstance(alphacums, Tensor):
        return sigmas, alphas, alphas_prev.cpu().numpy()
    return sigmas.numpy(), alphas.numpy(), alphas_prev.numpy()


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> Array:
    """Build betas (num_diffusion_timesteps,) from ᾱ as a function of t in [0, 1]."""
    times = np.linspace(0, 1, num_diffusion_timesteps + 1)
    alphas_cumprod = np.array([alpha_bar(t) for t in times])
    betas: Array = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], max_beta)
    return betas


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Return a[t] for a (T,) and t (B,), as (B, 1, …) to broadcast with tensors of `x_shape`."""
    return a.gather(-1, t).reshape(t.shape[0], *(1,) * (len(x_shape) - 1))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Draw standard normal noise (B, …); if `repeat`, the same for each sample of the batch."""
    if not repeat:
        return torch.randn(tuple(shape), device=device)
    noise = torch.randn((1, *shape[1:]), device=device)
    return noise.repeat(shape[0], *(1,) * (len(shape) - 1))


def timestep_embedding(
    timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False
) -> Tensor:
    """Embed timesteps (B,) as sines and cosines, (B, dim) float32.

    Args:
        repeat_only: Whether to return each timestep repeated `dim` times instead, in its dtype.
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    return blocks.timestep_embedding(timesteps, dim, max_period)


def checkpoint(
    func: Callable[..., Result], inputs: Sequence[object], params: Iterable[Tensor], flag: bool
) -> Result:
    """Call a function; if `flag`, with gradient checkpointing.

    Args:
        params: Ignored, as torch finds the parameters itself.
    """
    if flag and torch.is_grad_enabled():
        # Not reentrant, so that parameters get gradients even if no input requires one.
        result: Result = _checkpoint(func, *inputs, use_reentrant=False)
        return result
    return func(*inputs)


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter by a number."""
    for parameter in module.parameters():
        parameter.detach().mul_(scale)
    return module


class GroupNorm32(nn.GroupNorm):
    """GroupNorm that computes mean and variance in float32, whatever the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        # torch's kernels need x and weight of one dtype, and compute in float32 for half precision.
        y = super().forward(x if x.dtype == self.weight.dtype else x.float())
        return y.type(x.dtype)


def normalization(channels: int) -> nn.Module:
    """Build the norm of the UNet's residual blocks."""
    return GroupNorm32(32, channels)


def conv_nd(dims: int, *args: object, **kwargs: object) -> nn.Module:
    """Build a convolution of 1, 2 or 3 dimensions."""
    return _select_by_dims((nn.Conv1d, nn.Conv2d, nn.Conv3d), dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: object, **kwargs: object) -> nn.Module:
    """Build average pooling of 1, 2 or 3 dimensions."""
    return _select_by_dims((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), dims)(*args, **kwargs)


def linear(*args: object, **kwargs: object) -> nn.Module:
    """Build a linear layer."""
    layer: Callable[..., nn.Module] = nn.Linear
    return layer(*args, **kwargs)


class HybridConditioner(nn.Module):
    """Two encoders, built from configs: one for `c_concat`, one for `c_crossattn`."""

    def __init__(self, c_concat_config: Config, c_crossattn_config: Config) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: object, c_crossattn: object) -> dict[str, list[Tensor]]:
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }


def _select_by_dims(classes: Sequence[type[nn.Module]], dims: int) -> Callable[..., nn.Module]:
    if dims not in (1, 2, 3):
        raise ValueError(f"unsupported dimensions: {dims}")  # the original's message
    return classes[dims - 1]
