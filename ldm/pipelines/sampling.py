"""From a condition to a latent: the one sampling loop that every task uses, and its inverse.

    sample     condition (and a latent to start from) -> latent
    invert     latent -> the noise that would give it (DDIM inversion)

`legacy` is a set of names out of LEGACY: each brings back one thing that the original did and that
we do otherwise, so that old results can be made again.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Denoise, Scale, guided
from ldm.diffusion.samplers import SAMPLERS, STOCHASTIC, Constrain, euler
from ldm.diffusion.schedule import Schedule
from ldm.model import LatentDiffusion
from ldm.nets.tiling import tiled

__all__ = ["LEGACY", "Noise", "Stop", "invert", "noise_source", "sample", "seeded_noise"]

LEGACY = {
    "steps": "the original's count of DDIM and PLMS steps (31 for 30), and its failures",
    "noise": "noise drawn for the whole batch from the global generator of the device",
    "truncate": "pixels truncated to integers, not rounded",
    "plms-v": "PLMS takes a v prediction for eps",
    "x0-eps": "an x0 prediction is taken for eps",
    "encode": "DDIM inversion tells the network the loop index, and takes v for eps",
    "watermark": "the weaker watermark, dwtDct",
    "size": "height and width cut down to multiples of 8, pictures squeezed to multiples of 64",
    "strength": "img2img truncates its count of steps, and starts with the noise of a step above",
    "weights": "unCLIP mixes with weights as they are given, not made to sum to 1",
}
Callback = Callable[[int, int, Tensor, Tensor], None]
Noise = Callable[[Tensor], Tensor]


class Stop(Exception):
    """Raised by a callback to end a run."""


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    cond: Cond,
    uncond: Cond | None = None,
    *,
    z: Tensor | None = None,
    strength: float = 1.0,
    x_T: Tensor | None = None,
    size: tuple[int, int] | None = None,
    steps: int = 50,
    sampler: str = "ddim",
    eta: float = 0.0,
    scale: Scale = 9.0,
    rescale: float = 0.0,
    seeds: int | Sequence[int] | Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    unet_tile: int | None = None,
    grid: str | None = None,
    legacy: Iterable[str] = (),
) -> Tensor:
    """A latent for each row of `cond`, (B, C, h, w) float32: the one loop of every task.

        uncond: the other half of guidance; None = none.
        z: (B, C, h, w), what to start from under noise; None = from noise alone.
        strength: share of the steps that is run from z: 0 keeps it, 1 forgets it.
        x_T: the noise to start from, standard normal; None = drawn.
        size: (height, width) in pixels; None = that of z or x_T, else the model's own.
        sampler: a name in SAMPLERS. eta: DDIM's share of fresh noise. rescale: see `guided`.
        seeds: one per row, or the first of consecutive ones; None = from torch's generator.
            The noise of a row depends on its seed alone; or a source of noise, used as it is.
        callback: called with (step, steps, x, denoised); may raise Stop.
        constrain: (x, sigma) -> x before every step. unet_tile: see `tiled`, in latent pixels.
        grid: a name in GRIDS; None = the sampler's own. legacy: names in LEGACY.
    Raises ValueError for an unknown or unfitting option.
    """
    legacy = _known(legacy)
    _check(sampler, eta)
    grid = grid or default_grid(model.schedule, sampler)
    sigmas = model.schedule.steps(steps, grid, original_count="steps" in legacy)
    shape = (len(cond), model.channels, *_latent_size(model, size, x_T if z is None else z))
    noise = noise_source(seeds, len(cond), legacy)
    if x_T is None:
        x_T = noise(torch.empty(shape, device=model.device))
    original = int(strength * steps) if "strength" in legacy else None
    x, sigmas = _started(z, x_T.to(model.device, torch.float32), sigmas, strength, original)
    denoiser = _in_tiles(_taken_for_eps(model, sampler, legacy), unet_tile)
    x = SAMPLERS[sampler](
        guided(denoiser, cond, uncond, scale, rescale=rescale),
        x,
        sigmas,
        callback=callback and _counted(callback, len(sigmas) - 1),
        constrain=constrain,
        **_options(sampler, eta, noise, "noise" in legacy),
    )
    if "noise" in legacy and sampler == "plms":
        # The original draws what it does not use, and so shifts the noise of later batches.
        for _ in range(len(sigmas)):
            _global_noise(x)
    return x / _spread(sigmas[-1])


@torch.no_grad()
def invert(
    model: LatentDiffusion,
    z: Tensor,
    cond: Cond,
    uncond: Cond | None = None,
    *,
    steps: int = 50,
    until: int | None = None,
    scale: Scale = 1.0,
    legacy: Iterable[str] = (),
) -> Tensor:
    """The noisy latent from which DDIM leads back to z: Euler up the grid (DDIM inversion).

        z: (B, C, h, w). until: number of steps to take of the `steps` of the grid (None = all).
    Returns z_t at that level, sqrt(ᾱ) z + sqrt(1-ᾱ) noise, shape of z.
    """
    legacy = _known(legacy)
    sigmas = model.schedule.steps(steps, original_count="steps" in legacy).flip(0)
    sigmas = sigmas[: (steps if until is None else until) + 1]
    denoiser, denoise = model.denoiser, guided(model.denoiser, cond, uncond, scale)
    if "encode" in legacy:
        denoiser = Denoiser(model.unet, model.schedule, "eps")
        denoise = _told_the_index(denoiser, sigmas, cond, uncond, scale)
    x = euler(denoise, z.float() * _spread(sigmas[0]), sigmas)
    return x / _spread(sigmas[-1])


def default_grid(schedule: Schedule, sampler: str) -> str:
    """A name in GRIDS; where the last timestep is noise alone, it must be the first step."""
    if sampler == "dpm":
        return "time_uniform"
    return "trailing" if schedule.zero_snr else "uniform"


def noise_source(
    seeds: int | Sequence[int] | Noise | None, n: int, legacy: Iterable[str] = ()
) -> Noise:
    """`noise(like)` for n rows, from whatever may be said for seeds; drawing goes on where it was.

    Raises ValueError for another number of seeds.
    """
    if callable(seeds):
        return seeds
    return _global_noise if "noise" in legacy else seeded_noise(_seeds(seeds, n))


def seeded_noise(seeds: Sequence[int]) -> Noise:
    """`noise(like)` whose row k is drawn on the CPU by a generator of its own, seeded seeds[k]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(like: Tensor) -> Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like.device)

    return noise


def _global_noise(like: Tensor) -> Tensor:
    return torch.randn_like(like, dtype=torch.float32)


def _seeds(seeds: int | Sequence[int] | None, n: int) -> list[int]:
    if seeds is None:
        seeds = int(torch.randint(2**31, ()))
    if isinstance(seeds, int):
        return [seeds + k for k in range(n)]
    if len(seeds) != n:
        raise ValueError(f"{len(seeds)} seeds were given for {n} images")
    return list(seeds)


def _started(
    z: Tensor | None, noise: Tensor, sigmas: Tensor, strength: float, original: int | None
) -> tuple[Tensor, Tensor]:
    """z under the noise of the step where sampling begins, and the grid from there on.

    original: the number of steps as the original counts them; it then starts with the noise of the
        step above, and from noise alone if strength is 1.
    """
    if z is None:
        return noise * _spread(sigmas[0]), sigmas
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in 0 … 1, got {strength}")
    count = len(sigmas) - 1
    run = round(strength * count) or min(math.ceil(strength), count)
    first = above = count - run
    if original is not None:
        first = count - min(original, count - 1)
        above = first - 1
    spread = _spread(sigmas[above])
    x = noise * spread if strength == 1 else z.to(noise) + float(sigmas[above]) * noise
    return x * (_spread(sigmas[first]) / spread), sigmas[first:]


def _in_tiles(denoiser: Denoiser, tile: int | None) -> Denoiser:
    """The same with a network that sees one patch at a time; what they say is blended."""
    if tile is None:
        return denoiser

    def network(z_t: Tensor, t: Tensor, **listens: Tensor | None) -> Tensor:
        return tiled(lambda patch: denoiser.network(patch, t, **listens), z_t, tile)

    return replace(denoiser, network=network)


def _options(sampler: str, eta: float, noise: Noise, always: bool) -> dict[str, object]:
    """What the chosen sampler takes beyond the common arguments."""
    if sampler == "ddim":
        return {"eta": eta, "noise": noise if eta > 0 or always else None}
    return {"noise": noise} if sampler in STOCHASTIC else {}


def _taken_for_eps(model: LatentDiffusion, sampler: str, legacy: frozenset[str]) -> Denoiser:
    """The model's denoiser, or the wrong one that the original would use."""
    denoiser = model.denoiser
    plms_v = "plms-v" in legacy and sampler == "plms" and denoiser.parameterization == "v"
    x0_eps = "x0-eps" in legacy and denoiser.parameterization == "x0"
    if x0_eps and sampler == "dpm":
        raise ValueError("the original fails on x0 models with `dpm`\nhint: leave out `x0-eps`")
    if plms_v or x0_eps:
        return Denoiser(denoiser.network, denoiser.schedule, "eps")
    return denoiser


def _told_the_index(
    denoiser: Denoiser, sigmas: Tensor, cond: Cond, uncond: Cond | None, scale: Scale
) -> Denoise:
    index = {sigma: i for i, sigma in enumerate(sigmas.tolist())}

    def denoise(x: Tensor, sigma: float) -> Tensor:
        told = Denoiser(
            lambda z_t, t, **kw: denoiser.network(z_t, torch.full_like(t, index[sigma]), **kw),
            denoiser.schedule,
            "eps",
        )
        return guided(told, cond, uncond, scale)(x, sigma)

    return denoise


def _counted(callback: Callback, steps: int) -> Callable[[int, Tensor, Tensor], None]:
    return lambda step, x, denoised: callback(step, steps, x, denoised)


def _spread(sigma: Tensor) -> float:
    """Standard deviation of x at `sigma` where z has 1."""
    return math.sqrt(1 + float(sigma) ** 2)


def _latent_size(
    model: LatentDiffusion, size: tuple[int, int] | None, like: Tensor | None
) -> tuple[int, int]:
    if size is None:
        side = model.image_size
        return (side, side) if like is None else (like.shape[-2], like.shape[-1])
    f = model.downscale
    if any(pixels <= 0 or pixels % f for pixels in size):
        raise ValueError(f"height and width must be multiples of {f}, got {size[0]} x {size[1]}")
    return size[0] // f, size[1] // f


def _check(sampler: str, eta: float) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler `{sampler}`, choose one of {', '.join(SAMPLERS)}")
    if eta and sampler != "ddim":
        raise ValueError(f"eta is DDIM's; sampler `{sampler}` takes none, got {eta}")


def _known(legacy: Iterable[str]) -> frozenset[str]:
    names = frozenset(legacy)
    if unknown := sorted(names - LEGACY.keys()):
        raise ValueError(f"unknown legacy name `{unknown[0]}`, choose among {', '.join(LEGACY)}")
    return names
