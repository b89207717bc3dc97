"""Noise schedules: the original's keywords and diffusers' `scheduler_config.json`, both ways."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.diffusion.schedule import make_betas

__all__ = ["beta_params", "betas_config", "ddim_config", "prediction"]

# What the original calls a schedule, and what diffusers does; others are spelt out, beta by beta.
NAMES = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
}
PREDICTS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
COSINE = 8e-3  # the offset of diffusers' cosine, which is the original's default
START, END = 1e-4, 2e-2  # `make_betas`' and diffusers' own


def ddim_config(betas: Any, parameterization: str, *, zero_snr: bool = False) -> dict[str, Any]:
    """The sampler that our scripts use when nothing is said: the same grid, the same end.

    betas: those of a translated config, a spec of `make_betas` or a tensor.
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
        "prediction_type": PREDICTS[parameterization],
    }


def betas_config(betas: Any) -> dict[str, Any]:
    """The schedule alone."""
    if isinstance(betas, Tensor):
        return _spelt_out(betas)
    params = dict(betas.get("params") or {})
    name = params.get("name", "linear")
    if name == "cosine" and params.get("cosine_s", COSINE) == COSINE:
        name = "squaredcos_cap_v2"
    if name not in NAMES:
        return _spelt_out(make_betas(**params))
    return {
        "num_train_timesteps": params.get("timesteps", 1000),
        "beta_schedule": NAMES[name],
        "beta_start": params.get("linear_start", START),
        "beta_end": params.get("linear_end", END),
    }


def beta_params(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The original's keywords for the schedule of any scheduler.

    Raises ValueError for a schedule that has no name there.
    """
    zero = {"rescale_betas_zero_snr": True} if config.get("rescale_betas_zero_snr") else {}
    if config.get("trained_betas"):
        betas = config["trained_betas"]
        return {"timesteps": len(betas), "given_betas": betas, **zero}
    names = {theirs: ours for ours, theirs in NAMES.items()}
    name = config.get("beta_schedule", "linear")
    if name not in names:
        raise ValueError(f"{where}: `beta_schedule: {name}` is none of {', '.join(names)}")
    return {
        "timesteps": config.get("num_train_timesteps", 1000),
        "beta_schedule": names[name],
        "linear_start": config.get("beta_start", START),
        "linear_end": config.get("beta_end", END),
        **zero,
    }


def prediction(config: Mapping[str, Any], where: str) -> str:
    """What the network predicts: "eps", "v" or "x0"."""
    kinds = {theirs: ours for ours, theirs in PREDICTS.items()}
    kind = config.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise ValueError(f"{where}: `prediction_type: {kind}` is none of {', '.join(kinds)}")
    return kinds[kind]


def _spelt_out(betas: Tensor) -> dict[str, Any]:
    return {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}
