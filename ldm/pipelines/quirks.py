"""Quirks of the original scripts, enabled by name to reproduce old results.

The keyword `legacy` takes their names; `ldm.diffusion.names.LEGACY` explains each. Pipelines call
`Quirks` where the original behaved differently; without names it has no effect.
"""

import operator
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Denoise, GuidanceScale, add_guidance
from ldm.diffusion.names import LEGACY, SDXL_LEGACY
from ldm.diffusion.samplers.common import NoiseSource
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler_options import check_rho
from ldm.model import LatentDiffusion
from ldm.pipelines.families import find_family, is_sdxl
from ldm.runtime.arguments import as_list
from ldm.runtime.errors import ArgumentError, make_unknown_name_error

__all__ = ["Quirks", "get_row_seeds", "make_noise_source", "make_seeded_noise_source"]


@dataclass(frozen=True)
class Quirks:
    """The quirks that are enabled in a run.

    Args:
        names: Names in LEGACY.
        is_depth2img: Whether the model is one of depth2img, whose script differs in `strength`.
    """

    names: frozenset[str] = frozenset()
    is_depth2img: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(self.names - LEGACY.keys())
        if unknown:
            raise make_unknown_name_error("legacy name", unknown[0], LEGACY, argument="legacy")

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @classmethod
    def for_model(cls, model: LatentDiffusion, names: str | Iterable[str]) -> "Quirks":
        """Return the quirks with these names, or this name, that have an effect on a model."""
        requested: list[str] = as_list(names)
        enabled = cls(frozenset(requested)).names
        if not is_sdxl(model):
            enabled -= SDXL_LEGACY.keys()
        elif find_family(model.conditioner) == "refiner":
            enabled -= {"ignore-negative"}
        else:
            enabled -= {"refiner-from-noise"}
        return cls(enabled, find_family(model.conditioner) == "depth")

    def get_sigmas(
        self, schedule: NoiseSchedule, steps: int, scheduler: str, rho: float | None = None
    ) -> Tensor:
        """Return the noise levels of a run; as `NoiseSchedule.get_step_sigmas` without a quirk."""
        if "steps" in self and scheduler == "uniform":
            check_rho(rho, scheduler)
            return _compute_original_sigmas(schedule, steps)
        return schedule.get_step_sigmas(steps, scheduler, rho)

    def get_denoiser(self, model: LatentDiffusion, sampler: str) -> Denoiser:
        """Return the model's denoiser; with quirks, v or x0 predictions are taken for eps."""
        denoiser = replace(model.denoiser, quantize_sigma="nearest-sigma" in self)
        v_as_eps = "plms-v" in self and sampler == "plms" and denoiser.parameterization == "v"
        x0_as_eps = "x0-eps" in self and denoiser.parameterization == "x0"
        if x0_as_eps and sampler == "dpm":
            raise ArgumentError(
                "the original fails on x0 models with `dpm`\nhint: leave out `x0-eps`", "legacy"
            )
        return replace(denoiser, parameterization="eps") if v_as_eps or x0_as_eps else denoiser

    def find_first_step(self, strength: float, steps: int, total_steps: int) -> tuple[int, int]:
        """Find the noise levels at which a run on an image begins.

        Args:
            strength: Fraction of the steps to run, 0 … 1.
            steps: Requested number of steps.
            total_steps: Actual number of steps, which the quirk "steps" changes.
        Returns:
            (index of the first sigma, index of the sigma of the noise added to the image).
        """
        if "refiner-from-noise" in self:
            return 0, 0
        if "legacy-steps" in self:
            first_step = total_steps + 1 - max(int(strength * (total_steps + 1)), 1)
            return first_step, first_step
        if "strength" in self:
            max_steps = (steps if self.is_depth2img else total_steps) - 1
            first_step = total_steps - min(int(strength * steps), max_steps)
            return first_step, first_step - 1
        steps_to_run = round(float(strength) * total_steps)
        if strength > 0:
            steps_to_run = max(steps_to_run, 1)
        return total_steps - steps_to_run, total_steps - steps_to_run

    def ignores_negative(self, *, after_base: bool) -> bool:
        """Return whether a model, or a refiner after its base, ignores the negative prompt."""
        return ("refiner-empty-negative" if after_base else "ignore-negative") in self

    def starts_from_noise(self, strength: float, steps: int, total_steps: int) -> bool:
        """Return whether a run on an image starts from noise alone; see `find_first_step`."""
        # The original's img2img never does: it fails, unless there are more steps than requested.
        if "strength" in self and not self.is_depth2img and total_steps > steps:
            return False
        return strength == 1 and "legacy-steps" not in self and "refiner-from-noise" not in self

    def draw_unused_noise(self, sampler: str, sigmas: Tensor, x: Tensor) -> None:
        """Draw noise that the original's PLMS drew but did not use: later batches depend on it."""
        if "noise" in self and sampler == "plms":
            for _ in range(len(sigmas)):
                draw_global_noise(x)

    def build_inversion_denoise(
        self,
        model: LatentDiffusion,
        sigmas: Tensor,
        cond: Cond,
        uncond: Cond | None,
        scale: GuidanceScale,
    ) -> Denoise:
        """Return `denoise(x, sigma)` for DDIM inversion.

        With the quirk "encode" the network gets the loop index as timestep, and every prediction is
        taken for eps.
        """
        if "encode" not in self:
            return add_guidance(model.denoiser, cond, uncond, scale)
        indices = {sigma: i for i, sigma in enumerate(sigmas.tolist())}

        def denoise(x: Tensor, sigma: float) -> Tensor:
            def network(z_t: Tensor, t: Tensor, **conditioning: Tensor | None) -> Tensor:
                t = torch.full_like(t, indices[sigma])
                return model.denoiser.network(z_t, t, **conditioning)

            denoiser = Denoiser(network, model.schedule, "eps")
            return add_guidance(denoiser, cond, uncond, scale)(x, sigma)

        return denoise


def make_noise_source(
    seeds: int | Sequence[int] | NoiseSource | None, n: int, legacy: Iterable[str] = ()
) -> NoiseSource:
    """Make a noise source for n rows; each call continues the random sequences.

    Args:
        seeds: One for each row, or the first of consecutive ones; None = drawn from torch's
            generator; a noise source is returned unchanged.
        legacy: Names in LEGACY; "noise" draws all rows from the global generator of the device.
    """
    if callable(seeds):
        return seeds
    if "noise" in legacy:
        return draw_global_noise
    return make_seeded_noise_source(get_row_seeds(seeds, n))


def get_row_seeds(seeds: int | Sequence[int] | None, n: int) -> list[int]:
    """Return the seeds of n rows as Python integers; see `make_noise_source`.

    Raises:
        ArgumentError: A seed is not in -2^63 … 2^64 - 1, or there are not n.
    """
    if seeds is None:
        seeds = int(torch.randint(2**31, ()))
    if isinstance(seeds, Tensor):
        seeds = seeds.tolist()
    if isinstance(seeds, Sized):
        row_seeds = given_seeds = [operator.index(seed) for seed in seeds]
    else:
        given_seeds = [operator.index(seeds)]
        row_seeds = [given_seeds[0] + k for k in range(n)]
    if len(row_seeds) != n:
        raise ArgumentError(f"{len(row_seeds)} seeds were given for {n} images", "seeds")
    for seed in given_seeds:
        if not -(1 << 63) <= seed < 1 << 64:  # as `torch.manual_seed` takes
            raise ArgumentError(f"seeds must be in -2^63 … 2^64 - 1, got {seed}", "seeds")
    return row_seeds


def make_seeded_noise_source(seeds: Sequence[int]) -> NoiseSource:
    """Make a noise source whose row k has its own CPU generator, seeded with seeds[k] mod 2^64."""
    generators = [torch.Generator().manual_seed(seed % (1 << 64)) for seed in seeds]

    def draw_noise(like: Tensor) -> Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like.device)

    return draw_noise


def draw_global_noise(like: Tensor) -> Tensor:
    """Draw standard normal noise from the global generator of the device, float32."""
    return torch.randn_like(like, dtype=torch.float32)


def _compute_original_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Compute the original's `uniform` sigmas, which often have more steps than requested."""
    if not 1 <= steps <= len(schedule):
        raise ArgumentError(f"steps must be in 1 … {len(schedule)}, got {steps}", "steps")
    t = torch.arange(0, len(schedule), len(schedule) // steps) + 1
    if t[-1] >= len(schedule):
        raise ArgumentError(
            f"the original fails at {steps} steps: its last timestep would be {int(t[-1])} of "
            f"{len(schedule)}\nhint: leave out the legacy name `steps`",
            "steps",
        )
    return torch.cat([schedule.sigmas[t].flip(0), schedule.sigmas[:1]])
