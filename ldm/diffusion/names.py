"""Names that users choose from: samplers, schedulers, guidance presets, quirks of the original.

Each table is the only list of its names: functions, flags, form fields and PNG texts read it. This
module does not import torch, so that `--help` is fast.
"""

import math
from collections.abc import Collection, Sequence, Sized
from dataclasses import Field, dataclass, fields

from ldm.runtime.errors import ArgumentError, check_name

__all__ = [
    "APG", "API_LEGACY", "EXCLUSIVE_GUIDANCE", "FREEU_PRESETS", "FREEU_VERSIONS", "HIGH_SIGMA",
    "LEGACY", "SAMPLERS", "SCHEDULERS", "SDXL_LEGACY", "SLD", "SLD_CONCEPTS", "SLD_PRESETS",
    "TILINGS", "FreeUFactors", "Sampler", "Scheduler", "check_guidance_options",
]  # fmt: skip

# Above this sigma, x is practically pure noise, as with zero terminal SNR and cosine schedules.
# Samplers that extrapolate over a whole step, or take few levels up to it, return broken images if
# they start there.
HIGH_SIGMA = 1000.0

TILINGS = ("none", "x", "y", "xy")  # see `ldm.nets.circular`


@dataclass(frozen=True)
class Sampler:
    """A sampler: its function, the options that it takes, and its defaults.

    Args:
        function_name: Name of its function in a module of `ldm.diffusion.samplers`.
        label: Name in A1111's parameter text and on the page.
        eta: Default amount of noise that it adds after steps; None = it does not take eta.
        adds_fixed_noise: Whether it adds noise after steps whose amount cannot be set.
        takes_brownian: Whether noise after steps may come from a Brownian path over sigma.
        takes_churn: Whether it adds noise before steps (s_churn).
        scales_timesteps: Whether it takes the function `NoiseSchedule.scale_timestep`.
        is_cfg_pp: Whether it is CFG++, which also takes the unconditional estimate of z.
        scale: Default guidance scale; None = the model's.
        scheduler: Default scheduler; None = the model's.
        high_sigma_scheduler: Default scheduler if the highest sigma is above HIGH_SIGMA; None =
            `scheduler`.
        a1111_scheduler: The scheduler that A1111's "Automatic" stands for.
        is_adaptive: Whether its steps depend on the batch; commands and page use batches of one.
        skips_last_level: Whether to plan one step more and drop the last level before 0, as A1111
            does.
    """

    function_name: str
    label: str
    eta: float | None = None
    adds_fixed_noise: bool = False
    takes_brownian: bool = False
    takes_churn: bool = False
    scales_timesteps: bool = False
    is_cfg_pp: bool = False
    scale: float | None = None
    scheduler: str | None = None
    high_sigma_scheduler: str | None = None
    a1111_scheduler: str = "normal"
    is_adaptive: bool = False
    skips_last_level: bool = False

    @property
    def takes_noise(self) -> bool:
        """Whether it adds noise after steps."""
        return self.eta is not None or self.adds_fixed_noise


@dataclass(frozen=True)
class Scheduler:
    """A scheduler: its function, its limits and its defaults.

    Args:
        function_name: Name of its function in `ldm.diffusion.schedulers`.
        label: Name in A1111's parameter text and on the page; a name of A1111's only if its sigmas
            are the same.
        max_steps: Largest number of steps; None = the number of timesteps.
        sdxl_scheduler: Name of the scheduler that replaces it for SDXL; None = not replaced.
        rho: Default exponent; None = it does not take rho.
    """

    function_name: str
    label: str
    max_steps: int | None = None
    sdxl_scheduler: str | None = None
    rho: float | None = None


SAMPLERS = {
    "ddim": Sampler("ddim", "DDIM", eta=0.0, a1111_scheduler="uniform"),
    "plms": Sampler("plms", "PLMS", high_sigma_scheduler="uniform", a1111_scheduler="uniform"),
    "dpm": Sampler("dpmpp_2m", "DPM++ 2M (original dpm)", scheduler="time_uniform"),
    "euler": Sampler("euler", "Euler", takes_churn=True),
    "euler_a": Sampler("euler_ancestral", "Euler a", eta=1.0),
    "heun": Sampler("heun", "Heun", takes_churn=True, high_sigma_scheduler="uniform"),
    "dpmpp_2s_a": Sampler("dpmpp_2s_ancestral", "DPM++ 2S a", eta=1.0, a1111_scheduler="karras"),
    "dpmpp_2m_sde": Sampler(
        "dpmpp_2m_sde", "DPM++ 2M SDE", eta=1.0, takes_brownian=True, a1111_scheduler="exponential"
    ),
    "dpmpp_2m_sde_heun": Sampler(
        "dpmpp_2m_sde_heun",
        "DPM++ 2M SDE Heun",
        eta=1.0,
        takes_brownian=True,
        a1111_scheduler="exponential",
    ),
    "lms": Sampler("lms", "LMS"),
    "dpmpp_2m": Sampler("dpmpp_2m", "DPM++ 2M", a1111_scheduler="karras"),
    "dpm2": Sampler(
        "dpm2", "DPM2", takes_churn=True, a1111_scheduler="karras", skips_last_level=True
    ),
    "dpm2_a": Sampler(
        "dpm2_ancestral",
        "DPM2 a",
        eta=1.0,
        high_sigma_scheduler="uniform",
        a1111_scheduler="karras",
        skips_last_level=True,
    ),
    "dpmpp_sde": Sampler(
        "dpmpp_sde", "DPM++ SDE", eta=1.0, takes_brownian=True, a1111_scheduler="karras"
    ),
    "dpmpp_3m_sde": Sampler(
        "dpmpp_3m_sde",
        "DPM++ 3M SDE",
        eta=1.0,
        takes_brownian=True,
        a1111_scheduler="exponential",
        skips_last_level=True,
    ),
    "restart": Sampler(
        "restart",
        "Restart",
        adds_fixed_noise=True,
        scheduler="karras",
        high_sigma_scheduler="edm",
        a1111_scheduler="karras",
    ),
    "dpm_fast": Sampler(
        "dpm_fast", "DPM fast", eta=1.0, scheduler="normal", high_sigma_scheduler="edm"
    ),
    "dpm_adaptive": Sampler(
        "dpm_adaptive",
        "DPM adaptive",
        eta=1.0,
        scheduler="normal",
        high_sigma_scheduler="edm",
        is_adaptive=True,
    ),
    "ddpm": Sampler("euler_ancestral", "DDPM", eta=1.0),
    "euler_cfg_pp": Sampler(
        "euler_cfg_pp",
        "Euler CFG++",
        is_cfg_pp=True,
        scale=1.0,
        a1111_scheduler="uniform",
    ),
    "euler_a_cfg_pp": Sampler(
        "euler_ancestral_cfg_pp", "Euler a CFG++", eta=1.0, is_cfg_pp=True, scale=1.0
    ),
    "unipc": Sampler("unipc", "UniPC", a1111_scheduler="uniform"),
    "deis": Sampler("deis", "DEIS"),
    "lcm": Sampler(
        "lcm", "LCM", adds_fixed_noise=True, scheduler="lcm", a1111_scheduler="lcm_a1111"
    ),
    "tcd": Sampler("tcd", "TCD", eta=0.3, scales_timesteps=True, scheduler="tcd"),
}

SCHEDULERS = {
    "uniform": Scheduler("get_sigmas_uniform", "DDIM uniform"),
    "trailing": Scheduler("get_sigmas_trailing", "Trailing"),
    "karras": Scheduler("get_sigmas_karras", "Karras", rho=7.0),
    "exponential": Scheduler("get_sigmas_exponential", "Exponential"),
    "polyexponential": Scheduler("get_sigmas_exponential", "Polyexponential", rho=1.0),
    "time_uniform": Scheduler("get_sigmas_time_uniform", "Uniform in time"),
    "sgm_uniform": Scheduler("get_sigmas_sgm_uniform", "SGM Uniform in whole timesteps"),
    "sgm_uniform_a1111": Scheduler("get_sigmas_sgm_uniform_a1111", "SGM Uniform"),
    "ddim_uniform": Scheduler("get_sigmas_ddim_uniform", "DDIM"),
    "leading": Scheduler("get_sigmas_leading", "Leading"),
    "turbo": Scheduler("get_sigmas_turbo", "Turbo", max_steps=10),
    "edm": Scheduler("get_sigmas_edm", "EDM", rho=3.0),
    "normal": Scheduler("get_sigmas_normal", "Normal"),
    "simple": Scheduler("get_sigmas_simple", "Simple"),
    "beta": Scheduler("get_sigmas_beta", "Beta in time"),
    "beta_sigma": Scheduler("get_sigmas_beta_sigma", "Beta"),
    "kl_optimal": Scheduler("get_sigmas_kl_optimal", "KL Optimal"),
    "ays": Scheduler("get_sigmas_ays", "Align Your Steps, last to 0", sdxl_scheduler="ays_xl"),
    "ays_a1111": Scheduler(
        "get_sigmas_ays_a1111", "Align Your Steps", sdxl_scheduler="ays_xl_a1111"
    ),
    "ays_xl": Scheduler("get_sigmas_ays_sdxl", "Align Your Steps XL, last to 0"),
    "ays_xl_a1111": Scheduler("get_sigmas_ays_sdxl_a1111", "Align Your Steps XL"),
    "lcm": Scheduler("get_sigmas_lcm", "LCM", max_steps=50),
    "lcm_a1111": Scheduler("get_sigmas_lcm_a1111", "LCM as in A1111"),
    "tcd": Scheduler("get_sigmas_tcd", "TCD", max_steps=50),
}


@dataclass(frozen=True)
class SLD:
    """Hyperparameters of safe latent diffusion (arXiv:2211.05105); see `SafeGuidance`.

    Args:
        warmup: Number of evaluations of the network without SLD; delta in the paper.
        scale: Strength of the safety guidance per difference in eps, s_S in the paper; the
            strength is at most 1.
        threshold: Elements with a greater difference in eps are unchanged; lambda in the paper.
        momentum_scale: s_m in the paper.
        momentum_beta: beta_m in the paper, 0 … 1.
    """

    warmup: int
    scale: float
    threshold: float
    momentum_scale: float
    momentum_beta: float

    def __post_init__(self) -> None:
        numbers = (self.warmup, self.scale, self.threshold, self.momentum_scale)
        if not all(map(math.isfinite, numbers)) or min(self.warmup, self.scale) < 0:
            message = f"sld: numbers must be finite, warmup and scale not negative, got {numbers}"
            raise ArgumentError(message, "sld")
        if not 0 <= self.momentum_beta <= 1:
            raise ArgumentError(f"sld: beta must be in 0 … 1, got {self.momentum_beta}", "sld")

    @classmethod
    def parse(cls, value: "str | Sequence[float] | SLD") -> "SLD":
        """Return the hyperparameters of a preset, or five numbers in the order of the arguments."""
        if isinstance(value, SLD):
            return value
        if isinstance(value, str):
            check_name("preset of sld", value, SLD_PRESETS, argument="sld")
            return SLD_PRESETS[value]
        warmup, *numbers = _parse_numbers("sld", value, fields(cls))
        if warmup % 1:  # NaN for infinity and NaN
            raise ArgumentError(f"sld: warmup {warmup} is not a whole number", "sld")
        return cls(int(warmup), *numbers)


@dataclass(frozen=True)
class APG:
    """Hyperparameters of adaptive projected guidance (arXiv:2410.02416); see `ProjectedGuidance`.

    The defaults are the authors' for Stable Diffusion XL.

    Args:
        eta: Factor of the update's component parallel to the estimate; 1 keeps it.
        norm: Largest norm of an update, r in the paper; 0 for no limit.
        momentum: Factor of the running sum of updates, beta in the paper, in (-1, 1).
    """

    eta: float = 0.0
    norm: float = 15.0
    momentum: float = -0.5

    def __post_init__(self) -> None:
        if not math.isfinite(self.eta) or not 0 <= self.norm < math.inf:
            raise ArgumentError(
                f"apg: eta and norm must be finite, norm not negative, got {self.eta:g} and "
                f"{self.norm:g}",
                "apg",
            )
        if not -1 < self.momentum < 1:
            raise ArgumentError(f"apg: momentum must be in -1 … 1, got {self.momentum:g}", "apg")
        if (self.eta, self.norm, self.momentum) == (1, 0, 0):
            raise ArgumentError("apg with eta 1, norm 0 and momentum 0 has no effect", "apg")

    @classmethod
    def parse(cls, value: "Sequence[float] | APG") -> "APG":
        """Return hyperparameters from three numbers, in the order of the arguments."""
        return value if isinstance(value, APG) else cls(*_parse_numbers("apg", value, fields(cls)))


@dataclass(frozen=True)
class FreeUFactors:
    """Factors of FreeU (arXiv:2309.11497), 0 … 10.

    Args:
        b1, b2: Factors of the first half of the backbone's channels, in the output blocks of the
            lowest resolution and in those of the next one.
        s1, s2: Factors of the low frequencies of skip connections, in the same blocks.
    """

    b1: float
    b2: float
    s1: float
    s2: float

    def __post_init__(self) -> None:
        numbers = (self.b1, self.b2, self.s1, self.s2)
        if not all(0 <= number <= 10 for number in numbers):
            raise ArgumentError(f"freeu: factors must be in 0 … 10, got {numbers}", "freeu")
        if set(numbers) == {1}:
            raise ArgumentError("freeu with factors of 1 has no effect", "freeu")

    @classmethod
    def parse(
        cls, value: "str | Sequence[float] | FreeUFactors", auto_preset: str
    ) -> "FreeUFactors":
        """Return the factors of a preset, or four numbers in the order of the arguments.

        Args:
            auto_preset: The preset that "auto" stands for.
        """
        if isinstance(value, FreeUFactors):
            return value
        if isinstance(value, str):
            check_name("preset of freeu", value, ["auto", *FREEU_PRESETS], argument="freeu")
            return FREEU_PRESETS[auto_preset if value == "auto" else value]
        return cls(*_parse_numbers("freeu", value, fields(cls)))


def check_guidance_options(options: Collection[str], scale: float | None) -> None:
    """Raise ArgumentError for guidance methods that exclude each other or need another scale.

    Args:
        options: Names of the options that have a value.
        scale: Guidance scale; None = not known.
    """
    methods = [name for name in EXCLUSIVE_GUIDANCE if name in options]
    if len(methods) > 1:
        message = f"{methods[0]} and {methods[1]} are both guidance methods: give one"
        raise ArgumentError(message, methods[1])
    if scale == 1 and methods and methods[0] != "sld":
        raise ArgumentError(f"{methods[0]} needs a guidance scale other than 1", methods[0])
    if "freeu_version" in options and "freeu" not in options:
        raise ArgumentError("freeu_version needs freeu", "freeu_version")


def _parse_numbers(
    option: str, numbers: Sequence[float], parameters: Sequence["Field[object]"]
) -> Sequence[float]:
    """Convert numbers to floats; raise ArgumentError unless there is one for each parameter."""
    count = len(numbers) if isinstance(numbers, Sized) else 1
    if count != len(parameters):
        names = ", ".join(parameter.name for parameter in parameters)
        message = f"{option} takes {len(parameters)} numbers ({names}), got {count}"
        raise ArgumentError(message, option)
    return [float(number) for number in numbers]


# Safe latent diffusion: the authors' presets, and the unsafe concepts of their package and of
# diffusers.
SLD_PRESETS = {
    "weak": SLD(15, 20, 0.0, 0.0, 0.0),
    "medium": SLD(10, 1000, 0.01, 0.3, 0.4),
    "strong": SLD(7, 2000, 0.025, 0.5, 0.7),
    "max": SLD(0, 5000, 1.0, 0.5, 0.7),
}
_CONCEPT = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child "
    "abuse, brutality, cruelty"
)
SLD_CONCEPTS = {"original": _CONCEPT, "diffusers": f"an image showing {_CONCEPT}"}

# A run has at most one of these guidance methods, which `pag` can be combined with. They have no
# effect at a guidance scale of 1: `sld` warns then, the others are refused.
EXCLUSIVE_GUIDANCE = ("sld", "apg", "perp_neg")
FREEU_PRESETS = {  # the authors', for version 1
    "sd1": FreeUFactors(1.5, 1.6, 0.9, 0.2),
    "sd2": FreeUFactors(1.4, 1.6, 0.9, 0.2),
    "sdxl": FreeUFactors(1.3, 1.4, 0.9, 0.2),
}
FREEU_VERSIONS = {
    "1": "the authors' first version, in blocks with certain channel counts",
    "2": "their second version, with b scaled by the mean over channels",
    "diffusers": "the first version in the deepest blocks, as in diffusers",
}

# Quirks of SDXL's original code, which have no effect on other models.
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
# Quirks of sgm's `SamplingPipeline` which its demo does not have.
API_LEGACY = frozenset({"refiner-from-noise", "api-scores"})

# Quirks of the original scripts, enabled by name to reproduce old results; code in
# `ldm.pipelines.quirks`.
LEGACY = {
    "steps": "the original's count of DDIM and PLMS steps (31 for 30), and its failures",
    "noise": "noise drawn for the whole batch from the global generator of the device",
    "truncate": "pixels truncated to integers, not rounded",
    "plms-v": "PLMS takes a v prediction for eps",
    "x0-eps": "an x0 prediction is taken for eps",
    "encode": "DDIM inversion gives the network the loop index as timestep, and takes v for eps",
    "watermark": "the weaker watermark, dwtDct",
    "size": "height and width cut down to multiples of 8, images resized to multiples of 64",
    "strength": "img2img truncates its count of steps, and starts with the noise of a step above",
    "sld-off": "safe latent diffusion is off at a scale of 1 or less, as in diffusers",
    "weights": "unCLIP mixes with weights as they are given, not made to sum to 1",
    "untiled": "the x4 upscaler runs on the whole image, not on tiles of its training size",
    "unmasked": "the x2 latent upscaler reads the padding after a prompt, as in diffusers",
} | SDXL_LEGACY
