"""Check files, LoRAs and options of a request against the model, before the first image."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ldm.diffusion.names import SAMPLERS
from ldm.generate.defaults import resolve_sampling
from ldm.generate.plan import Batch, LineOptions, line_options
from ldm.generate.request import Request
from ldm.generate.tasks import PreparedTask, Task
from ldm.generate.tasks.base import RGBDInputs
from ldm.loading.addons.lora import read_changes
from ldm.loading.families import PIXELS, Family
from ldm.loading.load import (
    DEMO_CHECKPOINT,
    file_variant,
    find_schedule_early,
    find_variant_early,
    supports_variants,
)
from ldm.loading.published import find_checkpoint
from ldm.loading.weights import Weights, identify_weights, open_checkpoint
from ldm.model import LatentDiffusion
from ldm.pipelines.families import FAMILIES, wrong_family
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling_options import (
    SamplingOptions,
    explain_excess,
    explain_high_start,
    get_sigmas,
)
from ldm.pipelines.task import check_clip_skip
from ldm.runtime.errors import ArgumentError, MissingArgument
from ldm.runtime.files import find_file, read_text

__all__ = [
    "check_depth", "check_files", "check_loras", "check_steps",
    "find_few_steps_warnings", "find_option_warnings", "warn_about_ignored_options",
]  # fmt: skip

SAFE_PIPELINE = "StableDiffusionPipelineSafe"  # class in the index of a diffusers folder

log = logging.getLogger(__name__)


def find_few_steps_warnings(
    tasks: Mapping[LineOptions, PreparedTask], batches: Sequence[Batch]
) -> list[str]:
    """Return warnings about steps and scales that do not suit models for few steps.

    Called before weights are read.

    Args:
        tasks: the tasks of a run, see `run_request`.
    """
    warnings = []
    for options, loras in dict.fromkeys((line_options(batch), batch[0].loras) for batch in batches):
        request = tasks[options].request
        choice = replace(request.model, lora=loras)
        warnings.append(_explain_few_steps(replace(request, model=choice)))
    return list(dict.fromkeys(filter(None, warnings)))


def _explain_few_steps(request: Request) -> str | None:
    """Say, before weights are read, why steps and scale do not suit a model for few steps.

    Returns:
        None if they do, or if neither name nor metadata tell that it is one.
    """
    choice, sampling = request.model, request.sampling
    is_asked = sampling.steps or sampling.scale is not None or sampling.sigmas
    if not is_asked or not any(map(supports_variants, request.task.families)):
        return None
    if choice.ckpt is None and choice.config is not None:
        return None
    try:
        found = find_variant_early(_find_ckpt(request), choice.lora, choice.variant)
    except (OSError, ValueError):  # which loading will name
        return None
    if found is None:
        return None
    own = resolve_sampling(request, found.defaults)
    return explain_excess(found.defaults, f"`{found.path.name}`", own.steps, own.scale)


def check_steps(tasks: Mapping[LineOptions, PreparedTask]) -> None:
    """Raise ArgumentError, before weights are read, for more steps than a scheduler can choose.

    It is not raised where the noise schedule is not known yet: sampling checks the steps, too.

    Args:
        tasks: the tasks of a run, see `run_request`.
    """
    for prepared in tasks.values():
        _check_steps(prepared.request)


def _check_steps(request: Request) -> None:
    choice, sampling = request.model, request.sampling
    # The quirk takes any number, and levels that are given are counted.
    if not sampling.steps or sampling.sigmas is not None or "steps" in sampling.legacy:
        return
    if choice.ckpt is None and choice.config is not None:
        return
    try:
        schedule = find_schedule_early(_find_ckpt(request), choice.config, choice.overrides)
    except (OSError, ValueError):  # which loading will name
        return
    default = SAMPLERS[sampling.sampler].scheduler if sampling.sampler is not None else None
    if schedule is not None:
        schedule.check_steps(sampling.steps, sampling.scheduler or default or "uniform")


def _find_ckpt(request: Request) -> Path:
    """Find the checkpoint of a request: that of the demo model if none is given."""
    choice = request.model
    if choice.ckpt is None:
        return find_file(request.task.demo_model or DEMO_CHECKPOINT)
    return find_checkpoint(choice.ckpt, variant=file_variant(choice.variant))


def check_loras(model: LatentDiffusion, batches: Sequence[Batch]) -> None:
    """Raise what a LoRA of a later image would, where images have their own, before the first."""
    choices = dict.fromkeys(batch[0].loras for batch in batches)
    if len(choices) > 1:
        for file, weight in dict.fromkeys(lora for loras in choices for lora in loras):
            read_changes(file, model, weight)


def find_option_warnings(
    tasks: Mapping[LineOptions, PreparedTask], model: LatentDiffusion
) -> list[str]:
    """Return warnings about sampling options that do not suit the model.

    Raises:
        ArgumentError: there are not as many layers as clip skip needs.
    """
    requests = [prepared.request for prepared in tasks.values()]
    skip = max(request.sampling.clip_skip for request in requests)
    warnings = [
        check_clip_skip(model, skip),
        *(_explain_start(request, model) for request in requests),
    ]
    return list(dict.fromkeys(filter(None, warnings)))


def _explain_start(request: Request, model: LatentDiffusion) -> str | None:
    """Say why the sampler cannot begin where the scheduler of a run does; None if it can.

    Runs from an image begin lower, which `sample` judges.
    """
    sampling = resolve_sampling(request, model.defaults)
    assert sampling.sampler is not None
    is_whole = request.get_values().get("strength", 1.0) == 1.0
    if not is_whole or SAMPLERS[sampling.sampler].wide_scheduler is None:
        return None
    options: SamplingOptions = {
        "steps": sampling.steps, "sampler": sampling.sampler, "scheduler": sampling.scheduler,
        "rho": sampling.rho, "sigmas": sampling.sigmas,
    }  # fmt: skip
    sigmas = get_sigmas(model, Quirks.of(model, sampling.legacy), options)
    return explain_high_start(sampling.sampler, sampling.scheduler, float(sigmas[0]))


def check_files(
    request: Request, ckpt: Path | None, refiner: Path | None, upscaler: Path | None
) -> None:
    """Raise ArgumentError if a file of a model is not suitable, as far as its header shows.

    Weights are not read. Models of unusual shapes are checked by the pipelines, after loading.
    """
    weights = _identify(ckpt)
    _check_families(request.task, ckpt, _family(weights), refiner, upscaler)
    if ckpt is not None and (channels := _pixel_channels(ckpt, weights)) is not None:
        check_depth(request, f"`{ckpt.name}`", channels)


def _check_families(
    task: Task, ckpt: Path | None, base: Family | None, refiner: Path | None, upscaler: Path | None
) -> None:
    """Raise ArgumentError if a file is of another family than its use needs.

    Args:
        base: family of `ckpt`; None = unknown.
    """
    other, second = _family(_identify(refiner)), _family(_identify(upscaler))
    if upscaler is not None and second is not None and second.task != "upscale_latent":
        message = f"`{upscaler.name}` is {second.title}, not an x2 latent upscaler"
        raise ArgumentError(message, "upscaler")
    if upscaler is not None and (refiner is not None or (base is not None and base.is_xl)):
        raise ArgumentError(
            "the x2 latent upscaler is for latents of Stable Diffusion 1 and 2, not XL", "upscaler"
        )
    if ckpt is not None and base is not None:
        name = next(name for name, family in FAMILIES.items() if family.function == base.task)
        if name not in task.families:
            raise wrong_family(f"`{ckpt.name}`", name)
        if refiner is not None and not base.is_xl:
            message = f"`{ckpt.name}` is {base.title}: a refiner needs Stable Diffusion XL"
            raise ArgumentError(message, "refiner")
    if refiner is not None and other is not None and other.task != "img2img":
        message = f"`{refiner.name}` is {other.title}, not the refiner of Stable Diffusion XL"
        raise ArgumentError(message, "refiner")


def _identify(path: Path | None) -> Weights | None:
    """Return the weights of a .safetensors in the original's layout; None for other files."""
    if path is None or path.suffix != ".safetensors" or not path.is_file():
        return None
    return identify_weights(open_checkpoint(path))


def _family(weights: Weights | None) -> Family | None:
    """Return the family of weights, if it is a published one."""
    if weights is None or weights.family is None or not weights.family.task:
        return None
    return weights.family


def _pixel_channels(path: Path, weights: Weights | None) -> int | None:
    """Return the channels of a model's images (`ldm.imaging.rgbd`); None if unknown yet."""
    config = path / "vae/config.json"
    if config.is_file():
        channels = json.loads(read_text(config)).get("in_channels")
        return channels if isinstance(channels, int) else None
    weight = None if weights is None else weights.state.get(PIXELS)
    return None if weight is None else weight.shape[1]


def check_depth(request: Request, model: str, channels: int) -> None:
    """Raise ArgumentError or MissingArgument unless depth options suit a model.

    Args:
        model: its name in messages.
        channels: channels of its images.
    """
    inputs, has_depth = request.inputs, channels != 3
    if request.output.glb and not has_depth:
        raise ArgumentError(
            f"{model} makes images without depth: no 3D mesh can be made of them", "glb"
        )
    if not isinstance(inputs, RGBDInputs) or inputs.init_img is None:
        return
    if inputs.depth is not None and not has_depth:
        raise ArgumentError(f"{model} makes images without depth, leave it out", "depth")
    if inputs.depth is None and has_depth:
        raise MissingArgument(f"{model} also needs the depth of the image", "depth")


def warn_about_ignored_options(request: Request, model: LatentDiffusion) -> None:
    """Log options that have no effect on a model, or not the one that is expected."""
    choice, sampling = request.model, request.sampling
    if sampling.used_eta != sampling.eta:
        log.warning("sampler `dpm` is deterministic: eta %g is ignored", sampling.eta)
    if choice.channels not in (None, model.channels):
        log.warning("`C` %d is ignored: the model has %d", choice.channels, model.channels)
    if choice.factor not in (None, model.downscale):
        log.warning("`f` %d is ignored: the model has %d", choice.factor, model.downscale)
    if model.provenance.get("pipeline") == SAFE_PIPELINE and sampling.sld is None:
        log.info("the model's own pipeline uses safe latent diffusion: `sld` medium does the same")
    row = SAMPLERS.get(sampling.sampler or "")
    if row and row.takes_uncond and (sampling.scale or 0) > 2 * (row.scale or 1):
        log.warning(
            "sampler `%s` is made for guidance scales about 1, not %g",
            sampling.sampler, sampling.scale,
        )  # fmt: skip
    if sampling.freeu is not None and request.sdxl.refiner is not None:
        log.warning("freeu changes the base, not its refiner")
    values = request.get_values()
    for name in ("torchscript", "ipex", "laion400m"):
        if values[name]:
            log.warning("`%s` has no effect", name)
    native = model.image_size * model.downscale
    is_text_v = request.task.families == ("text",) and model.parameterization == "v"
    if native == 512 and is_text_v and sampling.size == (None, None):
        log.info("Stable Diffusion 2 v models were trained at 768 x 768: that size may be better")
