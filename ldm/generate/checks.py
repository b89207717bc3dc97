"""Check files, LoRAs and options of a request against the model, before the first image."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ldm.conditioning import Conditioner
from ldm.diffusion.names import SAMPLERS
from ldm.generate.defaults import resolve_sampling
from ldm.generate.plan import Batch, LineOptions
from ldm.generate.request import Request
from ldm.generate.tasks import PreparedTask
from ldm.generate.tasks.images import RGBDInputs
from ldm.loading.addons.lora import read_loras
from ldm.loading.build import build_on_meta
from ldm.loading.diffusers.files import is_diffusers_folder, read_folder_config
from ldm.loading.diffusers.layout import read_json
from ldm.loading.families import VAE_CONV_IN
from ldm.loading.find_variant import (
    find_variant_without_weights,
    select_file_variant,
    supports_variants,
)
from ldm.loading.legacy import translate_config
from ldm.loading.load import DEMO_CHECKPOINT
from ldm.loading.model_config import find_schedule_without_weights
from ldm.loading.published import resolve_checkpoint
from ldm.loading.weights import Weights, identify_weights, open_checkpoint
from ldm.model import LatentDiffusion
from ldm.pipelines.families import (
    FAMILIES,
    SIZE_KEYS,
    find_family,
    make_wrong_family_error,
    quote_name,
)
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling_options import (
    SamplingOptions,
    get_default_scheduler,
    get_few_step_warning,
    get_high_sigma_warning,
    get_sigmas,
)
from ldm.pipelines.sdxl import REFINER_FILE
from ldm.pipelines.task import get_clip_skip_warning
from ldm.runtime.errors import ArgumentError, MissingArgument
from ldm.runtime.files import find_file

__all__ = [
    "check_checkpoints", "check_depth", "check_loras", "check_steps",
    "find_few_step_warnings", "find_option_warnings", "log_advice",
]  # fmt: skip

SAFE_PIPELINE = "StableDiffusionPipelineSafe"  # class in `model_index.json` of a diffusers folder
# Option -> the option that it requires, without which it has no effect.
REQUIRED_OPTIONS = {
    "repeat": "from_file", "source_prompt": "inversion", "depth_inverted": "depth_map",
    "prior_steps": "prior", "prior_scale": "prior",
}  # fmt: skip
# Family -> options of its task that it ignores.
IGNORED_OPTIONS = {
    "upscaling": ("noise_sigma", "noise_kind"), "rgbd-upscaling": ("noise_sigma", "noise_kind"),
    "latent-upscaling": ("noise_level",), "variation": ("prompt",),
    "super-resolution": ("prompt", "negative_prompt", "noise_level", "noise_sigma", "noise_kind"),
    **dict.fromkeys(
        ("class", "unconditional", "semantic", "layout"), ("prompt", "negative_prompt")
    ),
}  # fmt: skip

log = logging.getLogger(__name__)


def find_few_step_warnings(
    tasks: Mapping[LineOptions, PreparedTask], batches: Sequence[Batch]
) -> list[str]:
    """Return warnings about steps and scales that do not suit few-step (distilled) models.

    Called before weights are read.
    """
    warnings = []
    for options, loras in dict.fromkeys((batch.line_options, batch.loras) for batch in batches):
        request = tasks[options].request
        request = replace(request, model=replace(request.model, lora=loras))
        warnings.append(_get_few_step_warning(request))
    return list(dict.fromkeys(filter(None, warnings)))


def _get_few_step_warning(request: Request) -> str | None:
    """Return a warning if steps or scale do not suit a model that seems to be a few-step model."""
    model, sampling = request.model, request.sampling
    sets_steps_or_scale = sampling.steps or sampling.scale is not None or sampling.sigmas
    if not sets_steps_or_scale or not any(map(supports_variants, request.task.families)):
        return None
    try:
        ckpt = _find_checkpoint(request)
        variant = (
            None if ckpt is None else find_variant_without_weights(ckpt, model.lora, model.variant)
        )
    except (OSError, ValueError):  # reported when the model is loaded
        return None
    if variant is None:
        return None
    resolved, name = resolve_sampling(request, variant.defaults), f"`{variant.path.name}`"
    return get_few_step_warning(variant.defaults, name, resolved.steps, resolved.scale)


def check_steps(request: Request) -> None:
    """Raise ArgumentError, before weights are read, for more steps than the scheduler supports.

    If the noise schedule cannot be found without weights, sampling checks the steps.
    """
    model, sampling = request.model, request.sampling
    if not sampling.steps or sampling.sigmas is not None:  # `sigmas` set the number of steps
        return
    try:
        ckpt = _find_checkpoint(request)
        if ckpt is None:
            return
        found = find_schedule_without_weights(ckpt, model.config, model.overrides)
        variant = find_variant_without_weights(ckpt, model.lora, model.variant)
    except (OSError, ValueError):  # reported when the model is loaded
        return
    if found is None:
        return
    schedule, defaults = found
    if variant is not None:
        defaults = variant.resolve_defaults(defaults, has_scheduler=is_diffusers_folder(ckpt))
    scheduler = sampling.scheduler or get_default_scheduler(
        schedule, defaults, sampling.sampler or defaults.sampler
    )
    if "steps" in sampling.legacy:
        Quirks(frozenset(sampling.legacy)).get_sigmas(schedule, sampling.steps, scheduler)
    else:
        schedule.check_steps(sampling.steps, scheduler)


def _find_checkpoint(request: Request) -> Path | None:
    """Find the checkpoint of a request, or the demo model; None = a config without checkpoint."""
    model = request.model
    if model.ckpt is not None:
        return resolve_checkpoint(model.ckpt, file_variant=select_file_variant(model.variant))
    if model.config is not None:
        return None
    return find_file(request.task.demo_model or DEMO_CHECKPOINT)


def check_loras(model: LatentDiffusion, batches: Sequence[Batch]) -> None:
    """If batches have different LoRAs, read all of them, so that errors precede the first image.

    Raises:
        ValueError, OSError: See `read_loras`.
    """
    combinations = dict.fromkeys(batch.loras for batch in batches)
    if len(combinations) > 1:
        for lora in dict.fromkeys(lora for loras in combinations for lora in loras):
            read_loras(model, [lora])


def find_option_warnings(
    tasks: Mapping[LineOptions, PreparedTask], model: LatentDiffusion
) -> list[str]:
    """Return warnings about options that do not suit the model, or have no effect on it.

    Raises:
        ArgumentError: The text encoder has fewer layers than clip skip needs.
    """
    requests = [prepared.request for prepared in tasks.values()]
    clip_skip = max(request.sampling.clip_skip for request in requests)
    warnings = [
        *(warning for request in requests for warning in _list_ignored_options(request, model)),
        get_clip_skip_warning(model, clip_skip),
        *(_get_high_sigma_warning(request, model) for request in requests),
    ]
    return list(dict.fromkeys(filter(None, warnings)))


def _get_high_sigma_warning(request: Request, model: LatentDiffusion) -> str | None:
    """Return a warning if the first sigma of the scheduler is too high for the sampler.

    With strength below 1 a run starts at a lower sigma, which `sample` checks.
    """
    sampling = resolve_sampling(request, model.defaults)
    assert sampling.sampler is not None
    starts_from_noise = request.get_values().get("strength", 1.0) == 1.0
    if not starts_from_noise or SAMPLERS[sampling.sampler].high_sigma_scheduler is None:
        return None
    options: SamplingOptions = {
        "steps": sampling.steps, "sampler": sampling.sampler, "scheduler": sampling.scheduler,
        "rho": sampling.rho, "sigmas": sampling.sigmas,
    }  # fmt: skip
    sigmas = get_sigmas(model, Quirks.for_model(model, sampling.legacy), options)
    return get_high_sigma_warning(sampling.sampler, sampling.scheduler, float(sigmas[0]))


def check_checkpoints(
    request: Request, ckpt: Path | None, refiner: Path | None, upscaler: Path | None
) -> None:
    """Raise ArgumentError if headers or configs show that a model does not suit the request.

    Weights are not read. Models of unknown families are checked by the pipelines, after loading.
    """
    weights = _open_weights(ckpt)
    # A config of the request takes precedence over that of a diffusers folder.
    family = _find_family(None if request.model.config else ckpt, weights)
    refiner_family = _find_family(refiner, _open_weights(refiner))
    upscaler_family = _find_family(upscaler, _open_weights(upscaler))
    is_sdxl = family is not None and family.is_sdxl
    if upscaler is not None and upscaler_family and upscaler_family.name != "latent-upscaling":
        message = f"`{upscaler.name}` is {upscaler_family.title}, not an x2 latent upscaler"
        raise ArgumentError(message, "upscaler")
    if upscaler is not None and (refiner is not None or is_sdxl):
        raise ArgumentError(
            "the x2 latent upscaler is for latents of Stable Diffusion 1 and 2, not XL", "upscaler"
        )
    if ckpt is not None and family is not None:
        if family.name not in request.task.families:
            raise make_wrong_family_error(f"`{ckpt.name}`", family.name)
        if refiner is not None and not is_sdxl:
            message = f"`{ckpt.name}` is {family.title}: a refiner needs Stable Diffusion XL"
            raise ArgumentError(message, "refiner")
    if refiner is not None and refiner_family is not None and refiner_family.name != "refiner":
        message = f"`{refiner.name}` is {refiner_family.title}, not the refiner of"
        raise ArgumentError(f"{message} Stable Diffusion XL, such as {REFINER_FILE}", "refiner")
    if ckpt is not None and (channels := _find_image_channels(ckpt, weights)) is not None:
        check_depth(request, f"`{ckpt.name}`", channels)


class _Family(NamedTuple):
    """Family of a checkpoint.

    Args:
        name: Name in `pipelines.families.FAMILIES`.
        title: Name in messages.
    """

    name: str
    title: str
    is_sdxl: bool


def _find_family(path: Path | None, weights: Weights | None) -> _Family | None:
    """Return the family of a diffusers folder, or of weights of a published family; else None."""
    if path is not None and is_diffusers_folder(path):
        spec = translate_config(read_folder_config(path), where=path.name)
        if "conditioner" not in spec["params"]:
            return None
        conditioner = build_on_meta(spec["params"]["conditioner"], where=path.name)
        assert isinstance(conditioner, Conditioner)
        if (name := find_family(conditioner)) is None:
            return None
        return _Family(name, FAMILIES[name].title, not SIZE_KEYS.isdisjoint(conditioner.keys))
    if weights is None or weights.family is None or not weights.family.task:
        return None
    published = weights.family
    name = next(key for key, family in FAMILIES.items() if family.function == published.task)
    if published.has_vision_tower:  # its task is the same as for unCLIP
        name = "variation"
    return _Family(name, published.title, published.is_sdxl)


def _open_weights(path: Path | None) -> Weights | None:
    """Return the weights of a single-file .safetensors checkpoint; None for other files."""
    if path is None or path.suffix != ".safetensors" or not path.is_file():
        return None
    return identify_weights(open_checkpoint(path))


def _find_image_channels(path: Path, weights: Weights | None) -> int | None:
    """Return the number of channels of a model's images (`ldm.imaging.rgbd`); None = unknown."""
    config = path / "vae/config.json"
    if config.is_file():
        channels = read_json(config).get("in_channels")
        return channels if isinstance(channels, int) else None
    weight = None if weights is None else weights.state_dict.get(VAE_CONV_IN)
    return None if weight is None else weight.shape[1]


def check_depth(request: Request, model_name: str, image_channels: int) -> None:
    """Raise ArgumentError or MissingArgument unless depth options suit a model.

    Args:
        model_name: Name of the model in messages.
        image_channels: Number of channels of its images: 3, with depth (LDM3D) 4 or 6.
    """
    inputs, has_depth = request.inputs, image_channels != 3
    if request.output.glb and not has_depth:
        raise ArgumentError(
            f"{model_name} makes images without depth, which cannot be saved as 3D meshes", "glb"
        )
    if not isinstance(inputs, RGBDInputs) or inputs.init_img is None:
        return
    if inputs.depth is not None and not has_depth:
        raise ArgumentError(f"{model_name} makes images without depth, leave it out", "depth")
    if inputs.depth is None and has_depth:
        raise MissingArgument(f"{model_name} also needs the depth of the image", "depth")


def _list_ignored_options(request: Request, model: LatentDiffusion) -> list[str]:
    """Return warnings about options that have no effect on a model, or not the expected one."""
    model_options, sampling = request.model, request.sampling
    warnings = []
    if sampling.effective_eta != sampling.eta:
        warnings.append(f"sampler `dpm` is deterministic: eta {sampling.eta:g} is ignored")
    if model_options.channels not in (None, model.channels):
        warnings.append(f"`C` {model_options.channels} is ignored: the model has {model.channels}")
    if model_options.factor not in (None, model.downscale_factor):
        warnings.append(
            f"`f` {model_options.factor} is ignored: the model has {model.downscale_factor}"
        )
    sampler = SAMPLERS.get(sampling.sampler or "")
    if sampler and sampler.is_cfg_pp and (sampling.scale or 0) > 2 * (sampler.scale or 1):
        warnings.append(
            f"sampler `{sampling.sampler}` is made for guidance scales around 1,"
            f" not {sampling.scale:g}"
        )
    if sampling.freeu is not None and request.sdxl.refiner is not None:
        warnings.append("freeu applies to the base model, not to the refiner")
    values = request.get_values()
    options = request.task.options
    is_set = {name: values[name] != option.default for name, option in options.items()}
    if request.prompts.from_file is not None and is_set["prompt"]:
        warnings.append("prompts are read from from_file: prompt is ignored")
    if values.get("inversion") and sampling.fixed_code:
        warnings.append("DDIM inversion computes the initial noise: fixed_code is ignored")
    warnings += [
        f"{name} needs {required}: ignored"
        for name, required in REQUIRED_OPTIONS.items()
        if is_set.get(name) and not is_set[required]
    ]
    family = find_family(model.conditioner) or ""
    warnings += [
        f"{quote_name(model)} is {FAMILIES[family].title}: {name} is ignored"
        for name in IGNORED_OPTIONS.get(family, ())
        if is_set.get(name) and family in request.task.families
    ]
    unused = ("torchscript", "ipex", "laion400m")
    return warnings + [f"`{name}` has no effect" for name in unused if values[name]]


def log_advice(request: Request, model: LatentDiffusion) -> None:
    """Log options that may suit the model better."""
    sampling = request.sampling
    if model.provenance.get("pipeline") == SAFE_PIPELINE and sampling.sld is None:
        log.info("the model's own pipeline uses safe latent diffusion: `sld` medium does the same")
    native_size = model.image_size * model.downscale_factor
    is_text_v_prediction = request.task.families == ("text",) and model.parameterization == "v"
    if native_size == 512 and is_text_v_prediction and sampling.size == (None, None):
        log.info(
            "v-prediction models of Stable Diffusion 2 are trained at 768 x 768: use that size"
        )
