"""What a user asks for, as functions: a task is a function over one sampling loop.

    sample     condition -> latent: the loop that every task uses
    txt2img    prompts -> images
    invert     latent -> the noise that would give it (DDIM inversion)

`legacy` is a set of names out of LEGACY: each brings back one thing that the original did and that
we do otherwise, so that old results can be made again.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Denoise, Scale, guided
from ldm.diffusion.samplers import SAMPLERS, STOCHASTIC, euler
from ldm.model import LatentDiffusion

__all__ = ["LEGACY", "NonFinite", "Stop", "invert", "sample", "seeded_noise", "txt2img"]

LEGACY = {
    "steps": "the original's count of DDIM and PLMS steps (31 for 30), and its failures",
    "noise": "noise drawn for the whole batch from the global generator of the device",
    "truncate": "pixels truncated to integers, not rounded",
    "plms-v": "PLMS takes a v prediction for eps",
    "x0-eps": "an x0 prediction is taken for eps",
    "encode": "DDIM inversion tells the network the loop index, and takes v for eps",
    "watermark": "the weaker watermark, dwtDct",
    "size": "height and width cut down to multiples of 8",
}
DEFAULT_GRIDS = {"ddim": "uniform", "plms": "uniform", "dpm": "time_uniform"}
Callback = Callable[[int, int, Tensor, Tensor], None]
Checked = TypeVar("Checked", Tensor, Cond)


class Stop(Exception):
    """Raised by a callback to end a run."""


class NonFinite(ArithmeticError):
    """NaN or infinity came out of a stage of the model."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"{stage} gave values that are not finite")
        self.stage = stage


@torch.no_grad()
def txt2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    size: tuple[int, int] | None = None,
    scale: Scale = 9.0,
    tile: int | None = None,
    **options: object,
) -> Tensor:
    """One image per prompt, (B, 3, H, W) float32 in [-1, 1].

        negative_prompt: what to steer away from, for all or one for each; "" is nothing.
        size: (height, width) in pixels, multiples of 8; None = the model's own.
        scale: guidance; 1 is none.
        tile: decode in tiles of this many latent pixels (None = whole).
        options: those of `sample`: steps, sampler, eta, seeds, grid, x_T, callback, legacy …
    Raises NonFinite naming the stage, ValueError for a bad option.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    uncond = None
    if scale != 1:
        uncond = _negative(model, negative_prompt, len(prompts))
    cond = _finite(model.condition({"txt": prompts}), "the text encoder")
    z = sample(model, cond, uncond, size=size, scale=scale, **options)  # type: ignore[arg-type]
    return _finite(model.decode(_finite(z, "the UNet"), tile=tile), "the VAE").clamp(-1, 1)


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    cond: Cond,
    uncond: Cond | None = None,
    *,
    x_T: Tensor | None = None,
    size: tuple[int, int] | None = None,
    steps: int = 50,
    sampler: str = "ddim",
    eta: float = 0.0,
    scale: Scale = 9.0,
    rescale: float = 0.0,
    seeds: int | Sequence[int] | None = None,
    callback: Callback | None = None,
    grid: str | None = None,
    legacy: Iterable[str] = (),
) -> Tensor:
    """A latent for each row of `cond`, (B, C, h, w) float32: the one loop of every task.

        uncond: the other half of guidance; None = none.
        x_T: the noise to start from, standard normal; None = drawn.
        size: (height, width) in pixels; None = that of x_T, else the model's own.
        sampler: a name in SAMPLERS. eta: DDIM's share of fresh noise. rescale: see `guided`.
        seeds: one per row, or the first of consecutive ones; None = from torch's generator.
            The noise of a row depends on its seed alone: not on batch, position or device.
        callback: called with (step, steps, x, denoised); may raise Stop.
        grid: a name in GRIDS; None = the sampler's own.
        legacy: names in LEGACY.
    Raises ValueError for an unknown or unfitting option.
    """
    legacy = _known(legacy)
    _check(sampler, eta)
    grid = grid or DEFAULT_GRIDS.get(sampler, "uniform")
    sigmas = model.schedule.steps(steps, grid, original_count="steps" in legacy)
    shape = (len(cond), model.channels, *_latent_size(model, size, x_T))
    noise = _global_noise if "noise" in legacy else seeded_noise(_seeds(seeds, len(cond)))
    if x_T is None:
        x_T = noise(torch.empty(shape, device=model.device))
    denoiser = _taken_for_eps(model, sampler, legacy)
    options = _options(sampler, eta, noise, "noise" in legacy)
    x = SAMPLERS[sampler](
        guided(denoiser, cond, uncond, scale, rescale=rescale),
        x_T.to(model.device, torch.float32) * _spread(sigmas[0]),
        sigmas,
        callback=callback and _counted(callback, len(sigmas) - 1),
        **options,
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


def seeded_noise(seeds: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """`noise(like)` whose row k is drawn on the CPU by a generator of its own, seeded seeds[k]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(like: Tensor) -> Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like.device)

    return noise


def _global_noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, device=like.device)


def _seeds(seeds: int | Sequence[int] | None, n: int) -> list[int]:
    if seeds is None:
        seeds = int(torch.randint(2**31, ()))
    if isinstance(seeds, int):
        return [seeds + k for k in range(n)]
    if len(seeds) != n:
        raise ValueError(f"{len(seeds)} seeds were given for {n} images")
    return list(seeds)


def _negative(model: LatentDiffusion, negative: str | Sequence[str], n: int) -> Cond:
    """The condition to steer away from, n rows; what all share is encoded once."""
    negatives = [negative] if isinstance(negative, str) else list(negative)
    if len(set(negatives)) == 1:
        return model.condition({"txt": negatives[:1]}).repeat(n)
    if len(negatives) != n:
        raise ValueError(f"{len(negatives)} negative prompts were given for {n} images")
    return model.condition({"txt": negatives})


def _options(
    sampler: str, eta: float, noise: Callable[[Tensor], Tensor], always: bool
) -> dict[str, object]:
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
    model: LatentDiffusion, size: tuple[int, int] | None, x_T: Tensor | None
) -> tuple[int, int]:
    if size is None:
        side = model.image_size
        return (side, side) if x_T is None else (x_T.shape[-2], x_T.shape[-1])
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


def _finite(value: Checked, stage: str) -> Checked:
    tensors = [value] if isinstance(value, Tensor) else value.filled().values()
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise NonFinite(stage)
    return value
