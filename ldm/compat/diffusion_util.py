"""`ldm.modules.diffusionmodules.util` of the original: noise levels, plain torch layers."""

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
    """Choose the timesteps of a run, int64, ascending.

    Args:
        ddim_discr_method: "uniform" takes every c-th, c = num_ddpm_timesteps // num_ddim_timesteps,
            which are often more than asked for; "quad" takes squares up to 0.8 of the last.
    """
    if ddim_discr_method == "uniform":
        # The last may be one past the tables (3, 9, 27 … steps of 1000): an IndexError, as ever.
        step = num_ddpm_timesteps // num_ddim_timesteps
        return np.arange(1, num_ddpm_timesteps + 1, step, dtype=np.int64)
    if ddim_discr_method == "quad":
        roots = np.linspace(0, np.sqrt(num_ddpm_timesteps * 0.8), num_ddim_timesteps)
        timesteps: NDArray[np.int64] = (roots**2).astype(np.int64) + 1
        return timesteps
    raise NotImplementedError(f"there is no DDIM discretization `{ddim_discr_method}`")


def make_ddim_sampling_parameters(
    alphacums: Tensor | Array, ddim_timesteps: NDArray[np.int64], eta: float, verbose: bool = True
) -> tuple[Tensor | Array, Tensor | Array, Array]:
    """Compute the tables of DDIM (arXiv:2010.02502, eq. 12) at the timesteps of a run.

    Returns:
        sigmas (float64), ᾱ and ᾱ of the step before (float64 numpy); the first two are tensors if
        `alphacums` is one.
    """
    table = torch.as_tensor(alphacums)
    alphas = table[torch.as_tensor(ddim_timesteps)]
    # It begins with the first ᾱ, not with 1, so that the last step leaves a little noise.
    previous = torch.cat([table[:1], alphas[:-1]]).double()
    exact = alphas.double()
    variance = (1 - previous) / (1 - exact) * (1 - exact / previous)
    sigmas, alphas_prev = eta * variance.sqrt(), previous.cpu().numpy()
    if isinstance(alphacums, Tensor):
        return sigmas, alphas, alphas_prev
    return sigmas.numpy(), alphas.numpy(), alphas_prev


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> Array:
    """Build betas from ᾱ as a function of time in [0, 1]."""
    times = [i / num_diffusion_timesteps for i in range(num_diffusion_timesteps + 1)]
    values = np.array([alpha_bar(t) for t in times])
    betas: Array = np.minimum(1 - values[1:] / values[:-1], max_beta)
    return betas


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Read a table at timesteps (B,), as (B, 1, …) for tensors of `x_shape`."""
    return a.gather(-1, t).reshape(t.shape[0], *(1,) * (len(x_shape) - 1))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Draw normal noise; with `repeat` the same for all of the batch."""
    if repeat:
        first = torch.randn((1, *shape[1:]), device=device)
        return first.repeat(shape[0], *(1,) * (len(shape) - 1))
    return torch.randn(tuple(shape), device=device)


def timestep_embedding(
    timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False
) -> Tensor:
    """Embed timesteps (B,) as sines and cosines, (B, dim) float32.

    Args:
        repeat_only: Repeat the timestep `dim` times instead, in its dtype.
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    return blocks.timestep_embedding(timesteps, dim, max_period)


def checkpoint(
    func: Callable[..., Result], inputs: Sequence[object], params: Iterable[Tensor], flag: bool
) -> Result:
    """Call a function, and if `flag` recompute its activations in the backward pass.

    Args:
        params: Not needed any more: parameters are found, and may be frozen.
    """
    if flag and torch.is_grad_enabled():
        # Not reentrant: parameters get their gradients even where no input needs one.
        result: Result = _checkpoint(func, *inputs, use_reentrant=False)
        return result
    return func(*inputs)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter to zero."""
    return blocks.zero(module)


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter by a number."""
    for parameter in module.parameters():
        parameter.detach().mul_(scale)
    return module


class SiLU(nn.Module):
    """x sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with mean and variance in float32 whatever the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        # torch's kernels sum in float32 even if all is half, but take no mixture.
        y = super().forward(x if x.dtype == self.weight.dtype else x.float())
        return y.type(x.dtype)


def normalization(channels: int) -> nn.Module:
    """Build the norm of the UNet's residual blocks."""
    return GroupNorm32(32, channels)


def conv_nd(dims: int, *args: object, **kwargs: object) -> nn.Module:
    """Build a convolution of 1, 2 or 3 dimensions."""
    return _by_dims((nn.Conv1d, nn.Conv2d, nn.Conv3d), dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: object, **kwargs: object) -> nn.Module:
    """Build a mean over 1, 2 or 3 dimensions."""
    return _by_dims((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), dims)(*args, **kwargs)


def linear(*args: object, **kwargs: object) -> nn.Module:
    """Build a linear layer."""
    layer: Callable[..., nn.Module] = nn.Linear
    return layer(*args, **kwargs)


class HybridConditioner(nn.Module):
    """Two conditioners from configs, for conditions to concatenate and to attend to."""

    def __init__(self, c_concat_config: Config, c_crossattn_config: Config) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: object, c_crossattn: object) -> dict[str, list[Tensor]]:
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }


def _by_dims(kinds: Sequence[type[nn.Module]], dims: int) -> Callable[..., nn.Module]:
    if dims not in (1, 2, 3):
        raise ValueError(f"unsupported dimensions: {dims}")
    return kinds[dims - 1]
