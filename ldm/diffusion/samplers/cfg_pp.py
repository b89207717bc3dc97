"""CFG++ (arXiv:2406.08070): steps to the guided estimate, then back along the unconditional noise.

x' = D + sigma_down (x - D_uncond) / sigma + sigma_up noise
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ldm.diffusion.samplers.common import (
    Constrain,
    Denoise,
    NoiseSampler,
    StepCallback,
    get_ancestral_step,
    pair_sigmas,
)

__all__ = ["euler_ancestral_cfg_pp", "euler_cfg_pp"]


def euler_ancestral_cfg_pp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    last_uncond: Callable[[], Tensor | None] = lambda: None,
    eta: float = 1.0,
    noise: NoiseSampler | None = None,
    callback: StepCallback | None = None,
    constrain: Constrain | None = None,
) -> Tensor:
    """Sample by Euler ancestral CFG++, for guidance scales about 1; eta 0 is Euler CFG++.

    Args:
        last_uncond: Returns the unconditional estimate of the last evaluation; None without
            guidance: then this is the ancestral Euler method.
    """
    for i, (sigma, sigma_next) in enumerate(pair_sigmas(sigmas)):
        x = constrain(x, sigma) if constrain else x
        denoised = denoise(x, sigma)
        uncond = last_uncond()
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, eta)
        slope = (x - (denoised if uncond is None else uncond)) / sigma
        x = denoised + slope * sigma_down
        if noise:
            x = x + noise(x) * sigma_up
        if callback:
            callback(i, x, denoised)
    return x


euler_cfg_pp = partial(euler_ancestral_cfg_pp, eta=0.0)
