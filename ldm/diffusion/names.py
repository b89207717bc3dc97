"""What a user chooses by name: samplers, schedulers and quirks of the original. No torch here.

Each table is the only list of its kind: functions, flags, form fields and PNG texts read it.
"""

from dataclasses import dataclass

__all__ = ["API_LEGACY", "LEGACY", "SAMPLERS", "SCHEDULERS", "SDXL_LEGACY", "Sampler", "Scheduler"]


@dataclass(frozen=True)
class Sampler:
    """A sampler."""

    function: str  # in `ldm.diffusion.samplers`
    label: str  # in A1111's text and on the page
    takes_noise: bool = False  # between steps
    takes_eta: bool = False  # which sets how much
    scheduler: str | None = None  # that belongs to it; None for the model's


@dataclass(frozen=True)
class Scheduler:
    """A choice of sampling steps."""

    function: str  # in `ldm.diffusion.schedule`
    label: str  # in A1111's text and on the page; A1111 has it only where it means the same
    max_steps: int | None = None  # None for the number of timesteps


SAMPLERS = {
    "ddim": Sampler("ddim", "DDIM", takes_noise=True, takes_eta=True),
    "plms": Sampler("plms", "PLMS"),
    "dpm": Sampler("dpmpp_2m", "DPM++ 2M (original dpm)", scheduler="time_uniform"),
    "euler": Sampler("euler", "Euler"),
    "euler_a": Sampler("euler_ancestral", "Euler a", takes_noise=True),
    "heun": Sampler("heun", "Heun"),
    "dpmpp_2s_a": Sampler("dpmpp_2s_ancestral", "DPM++ 2S a", takes_noise=True),
    "dpmpp_2m_sde": Sampler("dpmpp_2m_sde", "DPM++ 2M SDE", takes_noise=True),
    "lms": Sampler("lms", "LMS"),
    "dpmpp_2m": Sampler("dpmpp_2m", "DPM++ 2M"),
}

SCHEDULERS = {
    "uniform": Scheduler("uniform_sigmas", "DDIM uniform"),
    "trailing": Scheduler("trailing_sigmas", "Trailing"),
    "karras": Scheduler("karras_sigmas", "Karras"),
    "exponential": Scheduler("exponential_sigmas", "Exponential"),
    "time_uniform": Scheduler("time_uniform_sigmas", "Uniform in time"),
    "sgm_uniform": Scheduler("sgm_uniform_sigmas", "SGM Uniform"),
    "leading": Scheduler("leading_sigmas", "Leading"),
    "turbo": Scheduler("turbo_sigmas", "Turbo", max_steps=10),
    "edm": Scheduler("edm_sigmas", "EDM"),
}

# Quirks of SDXL's original, which do nothing for other models.
SDXL_LEGACY = {
    "ignore-negative": "the base ignores the negative prompt",
    "refiner-empty-negative": "a refiner after the base ignores the negative prompt",
    "nearest-sigma": "the denoiser takes the nearest of its 1000 noise levels",
    "legacy-steps": "from an image and for a refiner, int(strength * (steps + 1)) - 1 steps",
    "refiner-from-noise": "the refiner alone starts from full noise (SamplingPipeline)",
    "api-scores": "aesthetic scores of 5 and 5 (SamplingPipeline)",
    "float-watermark": "the watermark, dwtDct, is written before pixels become integers",
    "unused-draws": "noise is drawn for the handover to a refiner, and not used",
}
API_LEGACY = frozenset({"refiner-from-noise", "api-scores"})  # what the demo does otherwise

# Quirks of the original scripts, each brought back by its name, so that old results can be made
# again; code in `ldm.pipelines.quirks`.
LEGACY = {
    "steps": "the original's count of DDIM and PLMS steps (31 for 30), and its failures",
    "noise": "noise drawn for the whole batch from the global generator of the device",
    "truncate": "pixels truncated to integers, not rounded",
    "plms-v": "PLMS takes a v prediction for eps",
    "x0-eps": "an x0 prediction is taken for eps",
    "encode": "DDIM inversion gives the network the loop index as timestep, and takes v for eps",
    "watermark": "the weaker watermark, dwtDct",
    "size": "height and width cut down to multiples of 8, images squeezed to multiples of 64",
    "strength": "img2img truncates its count of steps, and starts with the noise of a step above",
    "weights": "unCLIP mixes with weights as they are given, not made to sum to 1",
} | SDXL_LEGACY
