"""CFG++ (arXiv:2406.08070): steps from the guided estimate along the unconditional noise.

x' = D + sigma_down (x - D_uncond) / sigma + sigma_up noise
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ldm.diffusion.samplers.common import (
    Denoise,
    NoiseSource,
    Steps,
    get_ancestral_step,
    pair_sigmas,
    sampler,
)

__all__ = ["euler_ancestral_cfg_pp", "euler_cfg_pp"]


@sampler
def euler_ancestral_cfg_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    get_uncond_denoised: Callable[[], Tensor | None] = lambda: None,
    eta: float = 1.0,
    noise_source: NoiseSource | None = None,
) -> Steps:
    """Sample by Euler ancestral CFG++, for guidance scales about 1; eta 0 is Euler CFG++.

    Args:
        get_uncond_denoised: Returns the unconditional estimate of the last evaluation; None without
            guidance: then this is the ancestral Euler method.
    """
    for sigma, sigma_next in pair_sigmas(sigmas):
        denoised = denoise(x, sigma)
        uncond_denoised = get_uncond_denoised()
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, eta)
        slope = (x - (denoised if uncond_denoised is None else uncond_denoised)) / sigma
        x = denoised + slope * sigma_down
        if noise_source:
            x = x + noise_source(x) * sigma_up
        x = yield x, denoised


euler_cfg_pp = partial(euler_ancestral_cfg_pp, eta=0.0)
