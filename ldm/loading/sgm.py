"""Translate configs of sgm (`generative-models`, SDXL): a `DiffusionEngine` and its components.

    network_config       UNetModel                ->  unet
    denoiser_config      denoiser, scaling …      ->  schedule, parameterization
    conditioner_config   list of `emb_models`     ->  conditioner
    first_stage_config   AutoencoderKL            ->  autoencoder

Both generations of these configs are supported. These parameters are additions of ours:
`image_size` (latent pixels), `latent_mean`, `latent_std`, `rescale_betas_zero_snr`, `defaults` (of
`ldm.model.Defaults`), and the conditioner's `force_uc_zero_embeddings`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from ldm.diffusion.denoiser import SIGMA_DATA
from ldm.diffusion.schedule import Schedule, betas_from_sigmas, make_betas
from ldm.runtime.errors import ConfigError, check_names, make_unknown_name_error
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "DIFFUSION_ENGINE", "SDXL_IMAGE_SIZE", "check_params", "name_encoders", "translate_engine",
]  # fmt: skip

DIFFUSION_ENGINE = "sgm.models.diffusion.DiffusionEngine"
REQUIRED_KEYS = ("network_config", "denoiser_config", "first_stage_config")
IGNORED_KEYS = {
    "ckpt_path", "compile_model", "ema_decay_rate",
    "en_and_decode_n_samples_a_time", "input_key", "log_keys", "loss_fn_config", "no_cond_log",
    "optimizer_config", "scheduler_config", "use_ema",
}  # fmt: skip
ADDED_KEYS = {"defaults", "image_size", "latent_mean", "latent_std", "rescale_betas_zero_snr"}
USED_KEYS = {
    *REQUIRED_KEYS, *ADDED_KEYS, "conditioner_config", "disable_first_stage_autocast",
    "network_wrapper", "sampler_config", "scale_factor",
}  # fmt: skip
UNET_WRAPPER = "sgm.modules.diffusionmodules.wrappers.OpenAIWrapper"
# By class: (prediction type, whether the network's timestep is 0.25 ln sigma, c_noise of EDM).
SCALINGS = {
    "EpsScaling": ("eps", False), "VScaling": ("v", False), "EDMScaling": ("edm", True),
    "VScalingWithEDMcNoise": ("v", True),
    "X0Scaling": ("x0", False),  # ours
}  # fmt: skip
DENOISER_PARAMS = {
    "DiscreteDenoiser": {"scaling_config", "weighting_config", "num_idx", "discretization_config",
                         "do_append_zero", "quantize_c_noise", "flip"},
    "Denoiser": {"scaling_config", "weighting_config"},
}  # fmt: skip
# Defaults of LegacyDDPMDiscretization and EDMDiscretization.
LEGACY_DDPM_DEFAULTS = {"linear_start": 0.00085, "linear_end": 0.0120, "num_timesteps": 1000}
EDM_DEFAULTS = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
CONDITIONER = "ldm.conditioning.Conditioner"
SIZE_EMBEDDING = "ldm.encoders.sizes.SizeEmbedding"
MASKED_IMAGE = "ldm.encoders.concat_images.MaskedImage"
TEXT_ENCODERS = ("ldm.encoders.text.CLIPText", "ldm.encoders.text.OpenCLIPText")
EMBEDDER_OPTIONS = ("is_trainable", "ucg_rate", "legacy_ucg_value")
IMAGE_SIZE, SDXL_IMAGE_SIZE = 64, 128  # latent pixels


def translate_engine(
    params: JsonMapping, where: str, skipped: list[str], translate: Callable[..., JsonObject]
) -> JsonObject:
    """Translate the parameters of a DiffusionEngine into those of LatentDiffusion.

    Args:
        skipped: List to which keys that sampling does not need are appended.
        translate: Translates the config of a component, as `translate_config`.
    """
    skipped += check_params(
        "DiffusionEngine", params, REQUIRED_KEYS, USED_KEYS, IGNORED_KEYS, where
    )
    if params.get("network_wrapper") not in (None, UNET_WRAPPER):
        message = f"`network_wrapper: {params['network_wrapper']}` is not supported"
        raise ConfigError(f"{where}: {message}")
    upcast_autoencoder = params.get("disable_first_stage_autocast", False)
    if not isinstance(upcast_autoencoder, bool):
        message = f"disable_first_stage_autocast must be true or false, got {upcast_autoencoder!r}"
        raise ConfigError(f"{where}: {message}")
    unet = translate(params["network_config"], where=f"{where}.network_config")
    unet["params"] = {"legacy": False} | unet["params"]
    if unet["params"].get("context_dim") is None:
        unet["params"]["use_spatial_transformer"] = "self"
    conditioner = _translate_conditioner(params, f"{where}.conditioner_config", translate)
    encoders = conditioner["params"].values()
    in_channels, out_channels = (unet["params"].get(f"{k}_channels", 4) for k in ("in", "out"))
    if in_channels == 2 * out_channels + 1:  # inpainting, which only the channels show
        conditioner["params"]["masked"] = {"target": MASKED_IMAGE, "params": {}}
    is_sdxl = any(isinstance(e, Mapping) and e["target"] == SIZE_EMBEDDING for e in encoders)
    model_params = {
        "unet": unet,
        "autoencoder": translate(params["first_stage_config"], where=f"{where}.first_stage_config"),
        "conditioner": conditioner,
        **_translate_denoiser(params, f"{where}.denoiser_config"),
        "scale_factor": params.get("scale_factor", 1.0),
        "upcast_autoencoder": upcast_autoencoder,
        "image_size": params.get("image_size", SDXL_IMAGE_SIZE if is_sdxl else IMAGE_SIZE),
    }
    for key in ("latent_mean", "latent_std"):
        if key in params:
            model_params[key] = params[key]
    return model_params


def check_params(
    name: str,
    params: JsonMapping,
    required: Iterable[str],
    used: Collection[str],
    ignored: Collection[str],
    where: str,
) -> list[str]:
    """Raise an error for unknown and missing parameters; return those of `ignored`, as `file.key`.

    Args:
        name: Class of the original, for messages.
        where: File and key of the config, for messages.
    """
    check_names(f"parameter of {name}", params, {*used, *ignored}, where)
    for key in required:
        if key not in params:
            raise ConfigError(f"{where}: {name} needs `{key}`")
    return [f"{where}.{key}" for key in params if key in ignored]


def name_encoders(targets: Mapping[int, tuple[str, str | None]]) -> dict[int, str]:
    """Return our names of encoders in the conditioner, by index in sgm's list of embedders.

    Args:
        targets: (our class, batch key) by index.
    """
    names = {}
    for index, (target, key) in targets.items():
        if target == SIZE_EMBEDDING and key is not None:
            names[index] = key
        elif index == 1 and target in TEXT_ENCODERS:
            names[index] = "text_2"
        else:
            names[index] = f"embedder_{index}" if index else "text"
    return names


def _translate_conditioner(
    engine: JsonMapping, where: str, translate: Callable[..., JsonObject]
) -> JsonObject:
    config = engine.get("conditioner_config") or {"params": {"emb_models": []}}
    params = (config.get("params") or {}) if isinstance(config, Mapping) else config
    if not isinstance(params, Mapping):
        raise ConfigError(f"{where}: `params` must be a mapping, got `{params}`")
    allowed = ("emb_models", "force_uc_zero_embeddings")
    check_names("parameter of GeneralConditioner", params, allowed, where)
    embedders = params.get("emb_models") or []
    if not isinstance(embedders, list) or not all(isinstance(e, Mapping) for e in embedders):
        raise ConfigError(f"{where}: `emb_models` must be a list of mappings")
    specs = {
        index: _translate_embedder(embedder, f"{where}.{index}", translate)
        for index, embedder in enumerate(embedders)
    }
    targets = {i: (spec["target"], spec["params"].get("key")) for i, spec in specs.items()}
    encoders = {name: specs[i] for i, name in name_encoders(targets).items()}
    text_encoders = [spec for spec in specs.values() if spec["target"] in TEXT_ENCODERS]
    # For an empty negative prompt, the original has zeros if there are two text encoders.
    zeroed_keys = params.get("force_uc_zero_embeddings", ["txt"] if len(text_encoders) > 1 else [])
    for spec, embedder in zip(specs.values(), embedders, strict=True):
        if _get_input_key(embedder, where) in zeroed_keys:
            spec["params"]["null"] = None
    return {"target": CONDITIONER, "params": {"join": "features", **encoders}}


def _translate_embedder(
    embedder: JsonMapping, where: str, translate: Callable[..., JsonObject]
) -> JsonObject:
    allowed = ("target", "params", "input_key", "input_keys", *EMBEDDER_OPTIONS)
    check_names("key of an embedder", embedder, allowed, where)
    key = _get_input_key(embedder, where)
    config = {name: embedder[name] for name in ("target", "params") if name in embedder}
    spec = translate(config, where=where)
    spec["params"] = dict(spec["params"])
    if spec["target"] in TEXT_ENCODERS:
        if key != "txt":
            raise ConfigError(f"{where}: text encoders read `txt`, not `{key}`")
    else:
        spec["params"]["key"] = key
    spec["params"]["is_trainable"] = bool(embedder.get("is_trainable", False))
    for name in EMBEDDER_OPTIONS[1:]:
        if embedder.get(name) is not None:
            spec["params"][name] = embedder[name]
    return spec


def _get_input_key(embedder: JsonMapping, where: str) -> str:
    keys = list(embedder.get("input_keys") or [])
    if "input_key" in embedder:
        keys = [embedder["input_key"]]
    if len(keys) != 1:
        raise ConfigError(f"{where}: an embedder needs one `input_key`, got {keys or 'none'}")
    return str(keys[0])


def _translate_denoiser(engine: JsonMapping, where: str) -> JsonObject:
    """Return noise schedule, prediction type, and default sampling options."""
    denoiser = engine["denoiser_config"]
    name = _get_class_name(denoiser, DENOISER_PARAMS, where)
    params = denoiser.get("params") or {}
    check_names(f"parameter of {name}", params, DENOISER_PARAMS[name], where)
    scaling = params.get("scaling_config") or {}
    prediction_type, uses_log_sigma = SCALINGS[_get_class_name(scaling, SCALINGS, where)]
    sigma_data = (scaling.get("params") or {}).get("sigma_data", SIGMA_DATA)
    if name == "DiscreteDenoiser":
        zero_snr = engine.get("rescale_betas_zero_snr", False)
        schedule = _make_discrete_schedule(params, zero_snr, uses_log_sigma, where)
        scheduler = "sgm_uniform"
    else:
        schedule = _make_continuous_schedule(
            engine.get("sampler_config") or {}, uses_log_sigma, where
        )
        scheduler = "karras"
    # Guidance scale 5 is the default of diffusers' SDXL pipelines.
    defaults = {"scale": 5.0, "scheduler": scheduler} | (engine.get("defaults") or {})
    return {
        "schedule": schedule,
        "parameterization": prediction_type,
        "sigma_data": sigma_data,
        "defaults": {"target": "ldm.model.Defaults", "params": defaults},
    }


def _make_discrete_schedule(
    params: JsonMapping, zero_snr: bool, uses_log_sigma: bool, where: str
) -> JsonObject:
    config = params.get("discretization_config") or {}
    name = _get_class_name(config, ("LegacyDDPMDiscretization", "EDMDiscretization"), where)
    discretization = dict(config.get("params") or {})
    num_levels = params.get("num_idx", 1000)
    options = {
        "zero_snr": zero_snr,
        "uses_log_sigma": uses_log_sigma,
        "quantize_c_noise": params.get("quantize_c_noise", True),
        "flip_timesteps": not params.get("flip", True),
        "append_zero": params.get("do_append_zero", False),
    }
    if name == "EDMDiscretization":
        betas: Any = betas_from_sigmas(
            _compute_edm_sigmas(num_levels, **_fill_defaults(discretization, EDM_DEFAULTS, where))
        )
    elif "given_betas" in discretization:  # an addition of ours, for diffusers folders
        betas = torch.tensor(discretization["given_betas"], dtype=torch.float64, device="cpu")
    else:
        beta_params = _get_beta_params(discretization, where)
        betas = {"target": "ldm.diffusion.schedule.make_betas", "params": beta_params}
        if num_levels != beta_params["timesteps"]:  # sgm selects num_levels of them
            sigmas = Schedule(make_betas(**beta_params)).get_step_sigmas(num_levels, "sgm_uniform")
            betas = betas_from_sigmas(sigmas[:-1].flip(0))
    return {"target": "ldm.diffusion.schedule.Schedule", "params": {"betas": betas, **options}}


def _make_continuous_schedule(sampler: JsonMapping, uses_log_sigma: bool, where: str) -> JsonObject:
    """Return a continuous schedule with the sampler's range of sigmas, as the denoiser has none."""
    config = (sampler.get("params") or {}).get("discretization_config") or {}
    discretization = dict(config.get("params") or {})
    if str(config.get("target", "")).endswith("LegacyDDPMDiscretization"):
        sigmas = Schedule(make_betas(**_get_beta_params(discretization, where))).sigmas
        discretization = {"sigma_min": float(sigmas[0]), "sigma_max": float(sigmas[-1])}
    discretization = _fill_defaults(discretization, EDM_DEFAULTS, where)
    del discretization["rho"]
    target = "ldm.diffusion.schedule.ContinuousSchedule"
    return {"target": target, "params": {**discretization, "uses_log_sigma": uses_log_sigma}}


def _get_beta_params(discretization: JsonMapping, where: str) -> JsonObject:
    """Return the arguments of `make_betas` for parameters of a LegacyDDPMDiscretization."""
    params = _fill_defaults(discretization, LEGACY_DDPM_DEFAULTS, where)
    params["timesteps"] = int(params.pop("num_timesteps"))
    return params


def _fill_defaults(params: JsonMapping, defaults: JsonMapping, where: str) -> JsonObject:
    """Add defaults for missing parameters; raise UnknownName for unknown parameters."""
    check_names("parameter", params, defaults, where)
    return {**defaults, **params}


def _compute_edm_sigmas(
    num_levels: int, sigma_min: float, sigma_max: float, rho: float
) -> torch.Tensor:
    """Compute the sigmas (num_levels,), ascending, of arXiv:2206.00364, eq. 5."""
    start, end = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.linspace(start, end, num_levels, dtype=torch.float64, device="cpu") ** rho


def _get_class_name(spec: JsonMapping, allowed: Collection[str], where: str) -> str:
    """Return the class name of a target, without its module."""
    name = str(spec.get("target", "")).rpartition(".")[2]
    if name not in allowed:
        raise make_unknown_name_error("target", spec.get("target", ""), allowed, where)
    return name
