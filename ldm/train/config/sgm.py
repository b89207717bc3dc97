"""Translate training options of `sgm.models.diffusion.DiffusionEngine` to `lightning:`.

loss_fn_config      -> objective      sigma sampler, weighting, l2 or l1, offset noise
optimizer_config    -> optimizer      default AdamW
ema_decay_rate      -> optimizer
sampler_config      -> callbacks.sampling, for the image grids
compile_model       -> trainer
"""

from collections.abc import Mapping
from typing import Any

from ldm.diffusion.step_noise import STEP_NOISE
from ldm.loading.sgm import ENGINE
from ldm.runtime.errors import check_name, check_names, unknown_name
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.train.tasks.criterion import LOSS_TYPES

__all__ = ["is_engine", "translate_training"]

PARAMS = "model.params"
# name of a class or parameter -> ours
WEIGHTINGS = {
    "EpsWeighting": "eps", "VWeighting": "v", "EDMWeighting": "edm", "UnitWeighting": "unit",
}  # fmt: skip
NOISE_LEVELS = {"p_mean": "mean", "p_std": "std"}
OPTIMIZERS = {
    "AdamW": "adamw", "Adam": "adamw", "AdamW8bit": "adamw8bit", "Adafactor": "adafactor",
    "Muon": "muon",
}  # fmt: skip
SAMPLERS = {
    "EulerEDMSampler": "euler",
    "HeunEDMSampler": "heun",
    "EulerAncestralSampler": "euler_a",
    "DPMPP2SAncestralSampler": "dpmpp_2s_a",
    "DPMPP2MSampler": "dpmpp_2m",
    "LinearMultistepSampler": "lms",
}
SCHEDULERS = {"LegacyDDPMDiscretization": "sgm_uniform", "EDMDiscretization": "edm"}
GUIDERS = {"VanillaCFG": None, "IdentityGuider": 1.0}  # guidance scale; None = its `scale`


def is_engine(model: JsonMapping) -> bool:
    """Return whether the `model` section of a config is a DiffusionEngine of `sgm`."""
    return model.get("target") == ENGINE


def translate_training(params: JsonMapping) -> dict[str, JsonObject]:
    """Translate the parameters of a DiffusionEngine that concern training.

    Raises:
        ValueError: A class or a parameter is unknown, or not supported.
    """
    sections: dict[str, JsonObject] = {"trainer": {}, "optimizer": {}, "callbacks": {}}
    sections["objective"] = _translate_loss(params)
    if params.get("input_key", "jpg") != "jpg":
        raise ValueError(f"{PARAMS}.input_key: images have the batch key `jpg` here")
    if params.get("optimizer_config"):
        sections["optimizer"] = _translate_optimizer(params["optimizer_config"])
    if params.get("use_ema") and params.get("ema_decay_rate") is not None:
        sections["optimizer"]["ema_decay"] = params["ema_decay_rate"]
    if params.get("sampler_config"):
        sections["callbacks"]["sampling"] = _translate_sampler(params["sampler_config"])
    if params.get("compile_model"):
        sections["trainer"]["compile"] = True
    return sections


def _translate_loss(params: JsonMapping) -> JsonObject:
    denoiser = (params.get("denoiser_config") or {}).get("params") or {}
    weighting = denoiser.get("weighting_config")  # its place in configs of before November 2023
    objective: JsonObject = {}
    loss: JsonObject = {}
    if params.get("loss_fn_config"):
        where = f"{PARAMS}.loss_fn_config"
        _, loss = _read_target(params["loss_fn_config"], ("StandardDiffusionLoss",), where)
        weighting = loss.pop("loss_weighting_config", weighting)
        sampler = loss.pop("sigma_sampler_config", None)
        if sampler is not None:
            objective["noise_levels"] = _translate_levels(sampler, f"{where}.sigma_sampler_config")
        loss_type = loss.pop("loss_type", loss.pop("type", "l2"))
        check_name("loss_type", loss_type, LOSS_TYPES, where)
        objective["loss_type"] = loss_type
        if offset := loss.pop("offset_noise_level", 0):
            objective |= {"noise_offset": offset, "noise_offset_by": "sample"}
        if loss.pop("batch2model_keys", None):
            raise ValueError(f"{where}: `batch2model_keys` are for video models, not supported")
        if loss:
            raise unknown_name("parameter", next(iter(loss)), (), where)
    if weighting is not None:
        name, options = _read_target(weighting, WEIGHTINGS, f"{PARAMS}.loss_weighting_config")
        objective["weighting"] = WEIGHTINGS[name]
        if "sigma_data" in options:
            objective["sigma_data"] = options["sigma_data"]
    return objective


def _translate_levels(spec: JsonMapping, where: str) -> JsonObject | None:
    """Return keywords of `LogNormal`; None for a uniform draw of timesteps."""
    name, params = _read_target(spec, ("DiscreteSampling", "EDMSampling"), where)
    if name == "DiscreteSampling":
        return None
    check_names("parameter", params, NOISE_LEVELS, where)
    return {NOISE_LEVELS[key]: value for key, value in params.items()}


def _translate_optimizer(spec: JsonMapping) -> JsonObject:
    name, params = _read_target(spec, OPTIMIZERS, f"{PARAMS}.optimizer_config")
    if name == "Adam":  # the same without weight decay
        params.setdefault("weight_decay", 0.0)
        if params["weight_decay"]:
            raise ValueError(f"{PARAMS}.optimizer_config: Adam with weight decay, use AdamW")
    return {"name": OPTIMIZERS[name], **params}


def _translate_sampler(spec: JsonMapping) -> JsonObject:
    where = f"{PARAMS}.sampler_config"
    name, params = _read_target(spec, SAMPLERS, where)
    sampling: JsonObject = {"sampler": SAMPLERS[name]}
    if params.get("num_steps"):
        sampling["steps"] = params["num_steps"]
    sampling |= {name: params[name] for name in STEP_NOISE if params.get(name) is not None}
    if params.get("discretization_config"):
        discretization, _ = _read_target(params["discretization_config"], SCHEDULERS, where)
        sampling["scheduler"] = SCHEDULERS[discretization]
    if params.get("guider_config"):
        guider, options = _read_target(params["guider_config"], GUIDERS, where)
        sampling["scale"] = options.get("scale") if GUIDERS[guider] is None else GUIDERS[guider]
    return sampling


def _read_target(
    spec: Any, known: Mapping[str, object] | tuple[str, ...], where: str
) -> tuple[str, JsonObject]:
    """Return the class name in `target`, and a copy of `params` without nulls.

    Raises:
        ValueError: The class is not one of `known`.
    """
    target = spec.get("target") if isinstance(spec, Mapping) else spec
    name = str(target).rpartition(".")[2]
    if name not in known:
        raise unknown_name("target", target, known, where)
    return name, {k: v for k, v in (spec.get("params") or {}).items() if v is not None}
