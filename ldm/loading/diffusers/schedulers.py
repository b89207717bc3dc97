"""Convert noise schedules between the original's keywords and `scheduler_config.json`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.diffusion.schedule import make_betas
from ldm.runtime.errors import unknown_name

__all__ = ["beta_params", "betas_config", "ddim_config", "parameterization"]

# The original's names and diffusers'; other schedules are written as a list of betas.
SCHEDULES = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
}
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
COSINE = 8e-3  # the offset of diffusers' cosine, which is the original's default
START, END = 1e-4, 2e-2  # defaults of `make_betas` and of diffusers


def ddim_config(betas: Any, parameterization: str, *, zero_snr: bool = False) -> dict[str, Any]:
    """The config of the default sampler, with the same steps and the same last step.

    Args:
        betas: of a translated config: a spec of `make_betas`, or a tensor.
        parameterization: "eps", "v" or "x0".
    """
    zero = {"rescale_betas_zero_snr": True} if zero_snr else {}
    return {
        "_class_name": "DDIMScheduler",
        **betas_config(betas),
        **zero,
        "clip_sample": False,
        "set_alpha_to_one": zero_snr,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero_snr else "leading",
        "prediction_type": PREDICTION_TYPES[parameterization],
    }


def betas_config(betas: Any) -> dict[str, Any]:
    """The config of the noise schedule alone; `betas` as for `ddim_config`."""
    if isinstance(betas, Tensor):
        return _trained_betas(betas)
    params = dict(betas.get("params") or {})
    name = params.get("name", "linear")
    if name == "cosine" and params.get("cosine_s", COSINE) == COSINE:
        name = "squaredcos_cap_v2"
    if name not in SCHEDULES:
        return _trained_betas(make_betas(**params))
    return {
        "num_train_timesteps": params.get("timesteps", 1000),
        "beta_schedule": SCHEDULES[name],
        "beta_start": params.get("linear_start", START),
        "beta_end": params.get("linear_end", END),
    }


def beta_params(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The original's keywords for the noise schedule of any scheduler.

    Raises:
        UnknownName: the original has no such schedule.
    """
    zero = {"rescale_betas_zero_snr": True} if config.get("rescale_betas_zero_snr") else {}
    if config.get("trained_betas"):
        betas = config["trained_betas"]
        return {"timesteps": len(betas), "given_betas": betas, **zero}
    names = {theirs: ours for ours, theirs in SCHEDULES.items()}
    name = config.get("beta_schedule", "linear")
    if name not in names:
        raise unknown_name("beta_schedule", name, names, where)
    return {
        "timesteps": config.get("num_train_timesteps", 1000),
        "beta_schedule": names[name],
        "linear_start": config.get("beta_start", START),
        "linear_end": config.get("beta_end", END),
        **zero,
    }


def parameterization(config: Mapping[str, Any], where: str) -> str:
    """What the network predicts: "eps", "v" or "x0".

    Raises:
        UnknownName: it is something else.
    """
    kinds = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    kind = config.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise unknown_name("prediction_type", kind, kinds, where)
    return kinds[kind]


def _trained_betas(betas: Tensor) -> dict[str, Any]:
    return {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}
