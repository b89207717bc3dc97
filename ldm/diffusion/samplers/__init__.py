"""Samplers: solvers of the diffusion ODE and SDE, as pure functions.

All start from x = z + sigma·noise and integrate over `sigmas`. D = `denoise(x, sigma)`, also called
`denoised`, is the estimate of the clean latent z by network, conditions and guidance. Most samplers
are written as generators of steps, see `common.sampler`; `lcm` is the simplest. The ODE
(arXiv:2206.00364, eq. 1 and 3) is

    dx / dsigma = (x - D) / sigma.

Args:
    denoise: (x, sigma) -> denoised, in the shape of x.
    x: z + sigmas[0]·noise, (B, C, h, w) float32.
    sigmas: Noise levels (n + 1,) float64, descending; the last may be 0.
    callback: Called after step i with (i, x, denoised). x is at sigmas[i + 1], except in
        `restart`, `dpm_fast` and `dpm_adaptive`, which choose levels of their own.
    constrain: (x, sigma) -> x, applied before every step, as for inpainting.
    noise_source: (like) -> standard normal noise in the shape of `like`.
    interval_noise: (like, sigma, next sigma) -> noise of the interval between two sigmas, instead
        of `noise_source`; k-diffusion's `noise_sampler` is (sigma, next sigma) -> noise. There is
        no other source of randomness.
    s_churn, s_tmin, s_tmax: Amount of noise before steps, and the range of sigma in which it is
        added (arXiv:2206.00364, algorithm 2).
    eta: Amount of noise after steps: 0 is deterministic, 1 adds as much as DDPM; of `tcd`, the
        paper's gamma.

Returns:
    x at sigmas[-1].

Before each of n steps with sigma from s_tmin to s_tmax, s_churn multiplies sigma by
1 + min(s_churn / n, √2 - 1). There is no argument `s_noise`: scale the noise of `noise_source`.

Formulation: Karras et al. 2022 (arXiv:2206.00364); names of samplers and options as in k-diffusion.
"""

from collections.abc import Callable

from torch import Tensor

from ldm.diffusion import names
from ldm.diffusion.samplers import cfg_pp, consistency, dpm_solver, multistep, sde, single_step

__all__ = ["SAMPLERS"]

_MODULES = (single_step, multistep, sde, dpm_solver, cfg_pp, consistency)
_FUNCTIONS = {name: value for module in _MODULES for name, value in vars(module).items()}

# Functions of these modules by name of the sampler.
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    name: _FUNCTIONS[sampler.function_name] for name, sampler in names.SAMPLERS.items()
}
