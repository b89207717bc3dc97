"""Translate training options of `sgm.models.diffusion.DiffusionEngine` to our `lightning` section.

loss_fn_config      -> objective      sigma sampler, weighting, l2 or l1, offset noise
optimizer_config    -> optimizer      default AdamW
ema_decay_rate      -> optimizer
sampler_config      -> callbacks.sampling, for the image grids
compile_model       -> trainer
"""

import math

from ldm.diffusion.step_noise import STEP_NOISE_OPTIONS
from ldm.loading.sgm import DIFFUSION_ENGINE
from ldm.runtime.errors import check_name, check_names
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.train.config.specs import get_section, read_spec
from ldm.train.tasks.criterion import LOSS_TYPES

__all__ = ["is_sgm_model", "translate_training"]

SECTION = "model.params"
# name of a class or parameter -> ours
WEIGHTING_NAMES = {
    "EpsWeighting": "eps", "VWeighting": "v", "EDMWeighting": "edm", "UnitWeighting": "unit",
}  # fmt: skip
LOG_NORMAL_PARAMS = {"p_mean": "mean", "p_std": "std"}
OPTIMIZERS = {
    "AdamW": "adamw", "Adam": "adamw", "AdamW8bit": "adamw8bit", "Adafactor": "adafactor",
    "Muon": "muon",
}  # fmt: skip
SAMPLER_NAMES = {
    "EulerEDMSampler": "euler",
    "HeunEDMSampler": "heun",
    "EulerAncestralSampler": "euler_a",
    "DPMPP2SAncestralSampler": "dpmpp_2s_a",
    "DPMPP2MSampler": "dpmpp_2m",
    "LinearMultistepSampler": "lms",
}
# EDMDiscretization is not our "edm", which has the sigma range of sgm's demo: "karras" has that of
# the model, which a continuous model takes from its EDMDiscretization.
SCHEDULER_NAMES = {"LegacyDDPMDiscretization": "sgm_uniform", "EDMDiscretization": "karras"}
# guidance scale; None = the guider's parameter `scale`
GUIDERS = {"VanillaCFG": None, "IdentityGuider": 1.0}
SAMPLER_PARAMS = (
    "num_steps", "discretization_config", "guider_config", "verbose", "device", *STEP_NOISE_OPTIONS,
)  # fmt: skip


def is_sgm_model(model: JsonMapping) -> bool:
    """Return whether the `model` section of a config is a DiffusionEngine of `sgm`."""
    return model.get("target") == DIFFUSION_ENGINE


def translate_training(params: JsonMapping) -> dict[str, JsonObject]:
    """Translate the parameters of a DiffusionEngine that concern training.

    Returns:
        Options by section of `lightning`: trainer, optimizer, callbacks, objective.
    """
    sections: dict[str, JsonObject] = {"trainer": {}, "optimizer": {}, "callbacks": {}}
    sections["objective"] = _translate_objective(params)
    if params.get("input_key", "jpg") != "jpg":
        raise ValueError(f"{SECTION}.input_key: must be `jpg`, the batch key of images")
    if params.get("optimizer_config"):
        sections["optimizer"] = _translate_optimizer(params["optimizer_config"])
    if params.get("use_ema") and params.get("ema_decay_rate") is not None:
        sections["optimizer"]["ema_decay"] = params["ema_decay_rate"]
    if params.get("sampler_config"):
        sections["callbacks"]["sampling"] = _translate_sampler(params["sampler_config"])
    if params.get("compile_model"):
        sections["trainer"]["compile"] = True
    return sections


def _translate_objective(params: JsonMapping) -> JsonObject:
    # Configs from before November 2023 have the weighting here.
    weighting = get_section(params, "denoiser_config.params").get("weighting_config")
    weighting_path = f"{SECTION}.denoiser_config.params.weighting_config"
    objective: JsonObject = {}
    if params.get("loss_fn_config"):
        where = f"{SECTION}.loss_fn_config"
        _, loss_params = read_spec(params["loss_fn_config"], ("StandardDiffusionLoss",), where)
        if "loss_weighting_config" in loss_params:
            weighting = loss_params.pop("loss_weighting_config")
            weighting_path = f"{where}.params.loss_weighting_config"
        sigma_sampler = loss_params.pop("sigma_sampler_config", None)
        if sigma_sampler is not None:
            objective["noise_levels"] = _translate_sigma_sampler(
                sigma_sampler, f"{where}.params.sigma_sampler_config"
            )
        loss_type = loss_params.pop("loss_type", loss_params.pop("type", "l2"))
        check_name("loss_type", loss_type, LOSS_TYPES, where)
        objective["loss_type"] = loss_type
        if offset := loss_params.pop("offset_noise_level", 0):
            objective |= {"noise_offset": offset, "noise_offset_by": "sample"}
        if loss_params.pop("batch2model_keys", None):
            raise ValueError(f"{where}: `batch2model_keys` is for video models, not supported")
        check_names("parameter", loss_params, (), where)
    if weighting is not None:
        name, options = read_spec(weighting, WEIGHTING_NAMES, weighting_path)
        check_names("parameter", options, ("sigma_data",), weighting_path)
        objective |= {"weighting": WEIGHTING_NAMES[name], **options}
    return objective


def _translate_sigma_sampler(config: JsonMapping, where: str) -> JsonObject | None:
    """Return keywords of `LogNormal`; None for uniform timesteps."""
    name, params = read_spec(config, ("DiscreteSampling", "EDMSampling"), where)
    if name == "DiscreteSampling":
        return None
    check_names("parameter", params, LOG_NORMAL_PARAMS, where)
    return {LOG_NORMAL_PARAMS[key]: value for key, value in params.items()}


def _translate_optimizer(config: JsonMapping) -> JsonObject:
    name, params = read_spec(config, OPTIMIZERS, f"{SECTION}.optimizer_config")
    if name == "Adam":  # equals AdamW without weight decay
        params.setdefault("weight_decay", 0.0)
        if params["weight_decay"]:
            raise ValueError(
                f"{SECTION}.optimizer_config: Adam with weight_decay (L2) is not supported, AdamW "
                "has decoupled weight decay"
            )
    return {"name": OPTIMIZERS[name], **params}


def _translate_sampler(config: JsonMapping) -> JsonObject:
    where = f"{SECTION}.sampler_config"
    name, params = read_spec(config, SAMPLER_NAMES, where)
    if name == "LinearMultistepSampler" and params.get("order") == 4:  # the order of our `lms`
        del params["order"]
    check_names(f"parameter of {name}", params, SAMPLER_PARAMS, where)
    sampling: JsonObject = {"sampler": SAMPLER_NAMES[name], "scale": 1.0}  # 1: no guider
    if params.get("num_steps"):
        sampling["steps"] = params["num_steps"]
    sampling |= {
        key: params[key] for key in STEP_NOISE_OPTIONS if params.get(key, math.inf) != math.inf
    }
    if not params.get("s_churn"):  # without which its limits have no effect
        sampling = {k: v for k, v in sampling.items() if k not in ("s_tmin", "s_tmax")}
    if params.get("discretization_config"):
        discretization, options = read_spec(
            params["discretization_config"],
            SCHEDULER_NAMES,
            f"{where}.params.discretization_config",
        )
        sampling["scheduler"] = SCHEDULER_NAMES[discretization]
        if "rho" in options:
            sampling["rho"] = options["rho"]
    if params.get("guider_config"):
        guider, options = read_spec(
            params["guider_config"], GUIDERS, f"{where}.params.guider_config"
        )
        sampling["scale"] = GUIDERS[guider] or options.get("scale")
    return sampling
