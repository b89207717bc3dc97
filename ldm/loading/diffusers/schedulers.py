"""Convert noise schedules between the original's parameters and `scheduler_config.json`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.diffusion.schedule import make_betas
from ldm.loading.diffusers.layout import SCHEDULER_CONFIG
from ldm.loading.families import PREDICTION_TYPES
from ldm.runtime.errors import check_name
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "get_timestep_spacing", "make_ddim_config", "make_noise_schedule_config",
    "parse_noise_schedule", "parse_prediction_type", "parse_scheduler",
    "to_diffusers_prediction_type",
]  # fmt: skip

# diffusers' beta_schedule -> the original's; other noise schedules are written as lists of betas.
BETA_SCHEDULES = {
    "scaled_linear": "linear",
    "linear": "sqrt_linear",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
}
# diffusers' timestep_spacing, or option for the spacing of sigmas -> our scheduler.
TIMESTEP_SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "normal"}
SIGMA_SPACINGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta_sigma",
}
COSINE_OFFSET = 8e-3  # of diffusers' cosine schedule, the original's default
LINEAR_START, LINEAR_END = 1e-4, 2e-2  # defaults of `make_betas` and of diffusers


def make_ddim_config(betas: Any, parameterization: str, *, zero_snr: bool = False) -> JsonObject:
    """Return the config of a DDIMScheduler with the timesteps of our default sampler.

    Args:
        betas: {"params": arguments of `make_betas`}, as in a translated config, or a tensor.
    """
    config = {
        "_class_name": "DDIMScheduler",
        **make_noise_schedule_config(betas),
        "clip_sample": False,
        "set_alpha_to_one": zero_snr,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero_snr else "leading",
        "prediction_type": to_diffusers_prediction_type(parameterization),
    }
    return config | ({"rescale_betas_zero_snr": True} if zero_snr else {})


def make_noise_schedule_config(betas: Any) -> JsonObject:
    """Return only a scheduler's options of the noise schedule; `betas` as in `make_ddim_config`."""
    if not isinstance(betas, Tensor):
        params = dict(betas.get("params") or {})
        name = params.get("name", "linear")
        if name == "cosine" and params.get("cosine_s", COSINE_OFFSET) == COSINE_OFFSET:
            name = "squaredcos_cap_v2"
        if name in BETA_SCHEDULES.values():
            return {
                "num_train_timesteps": params.get("timesteps", 1000),
                "beta_schedule": _find_key(name, BETA_SCHEDULES),
                "beta_start": params.get("linear_start", LINEAR_START),
                "beta_end": params.get("linear_end", LINEAR_END),
            }
        betas = make_betas(**params)
    return {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}


def parse_noise_schedule(config: JsonMapping, where: str) -> JsonObject:
    """Return the original's parameters of the noise schedule in the config of a scheduler."""
    if betas := config.get("trained_betas"):
        params = {"timesteps": len(betas), "given_betas": betas}
    else:
        params = {
            "timesteps": config.get("num_train_timesteps", 1000),
            "beta_schedule": _read_name(config, "beta_schedule", "linear", BETA_SCHEDULES, where),
            "linear_start": config.get("beta_start", LINEAR_START),
            "linear_end": config.get("beta_end", LINEAR_END),
        }
    if config.get("rescale_betas_zero_snr"):
        params["rescale_betas_zero_snr"] = True
    return params


def parse_prediction_type(config: JsonMapping) -> str:
    """Return the prediction type in the config of a scheduler as "eps", "v" or "x0"."""
    return _read_name(config, "prediction_type", "epsilon", PREDICTION_TYPES, SCHEDULER_CONFIG)


def to_diffusers_prediction_type(parameterization: str) -> str:
    """Convert "eps", "v" or "x0" to diffusers' `prediction_type`."""
    return _find_key(parameterization, PREDICTION_TYPES)


def parse_scheduler(config: JsonMapping, default: str) -> str:
    """Return our name of a scheduler by its config's spacing of timesteps or sigmas."""
    name = _read_name(config, "timestep_spacing", default, TIMESTEP_SPACINGS, SCHEDULER_CONFIG)
    if name == "normal" and "solver_order" in config:  # DPM-Solver, UniPC, DEIS leave out t = 0
        name = "sgm_uniform_a1111"
    return next((ours for key, ours in SIGMA_SPACINGS.items() if config.get(key)), name)


def get_timestep_spacing(scheduler: str | None) -> str:
    """Return diffusers' `timestep_spacing` for our scheduler; that of `sgm_uniform` is trailing."""
    spacings = {name: spacing for spacing, name in TIMESTEP_SPACINGS.items()}
    return spacings.get(scheduler or "", "trailing")


def _find_key(value: str, names: Mapping[str, str]) -> str:
    return next(key for key, name in names.items() if name == value)


def _read_name(
    config: JsonMapping, key: str, default: str, names: Mapping[str, str], where: str
) -> str:
    name = config.get(key, default)
    check_name(key, name, names, where)
    return names[name]
