"""Load the models of a request, on its device and in its precision."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.diffusion.names import SAMPLERS
from ldm.encoders.safety import SafetyChecker
from ldm.encoders.text import TextEncoder
from ldm.generate.groups import Sampling
from ldm.generate.request import Request
from ldm.generate.tasks import Task
from ldm.generate.tasks.base import RGBDInputs
from ldm.loading.addons.safety import COMPONENT, find_safety_checker, load_safety_checker
from ldm.loading.families import PIXELS, Family
from ldm.loading.load import (
    DEMO_CHECKPOINT,
    file_variant,
    find_variant_early,
    load as load_from_files,
    supports_variants,
)
from ldm.loading.published import find_checkpoint, identify_hash
from ldm.loading.variants import VARIANTS
from ldm.loading.weights import Weights, identify_weights, open_checkpoint
from ldm.model import Defaults, LatentDiffusion
from ldm.nets.attention import set_backend
from ldm.pipelines.families import FAMILIES, file_name, is_sdxl, wrong_family
from ldm.pipelines.latent_upscaling import Upscaling
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling import (
    SamplingOptions,
    default_scheduler,
    explain_excess,
    explain_high_start,
    run_sigmas,
)
from ldm.runtime.device import keep_memory, pick_device, pick_dtype, set_threads
from ldm.runtime.errors import ArgumentError, MissingArgument, MissingFile
from ldm.runtime.files import find_file, read_text
from ldm.runtime.hashes import known_sha256

__all__ = [
    "Models", "describe_variant", "explain_few_steps", "explain_start", "find_checker",
    "is_small_model", "load_models", "resolve_sampling",
]  # fmt: skip

SMALL_MODEL = 200e6  # bytes of weights below which half precision and many threads are slower

OWN_CHECKER = "own"  # value of `safety_checker` for the one in the --ckpt folder
SAFE_PIPELINE = "StableDiffusionPipelineSafe"  # class in the index of a diffusers folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The models of a run: base model, refiner, x2 latent upscaler and safety checker."""

    base: LatentDiffusion
    refiner: LatentDiffusion | None = None
    safety_checker: SafetyChecker | None = None
    upscaler: LatentDiffusion | None = None

    def float(self) -> None:
        """Convert the weights to float32."""
        for model in filter(None, (self.base, self.refiner, self.upscaler)):
            model.float()


def load_models(
    request: Request,
    *,
    threads: int | None = None,
    load: Callable[..., LatentDiffusion] = load_from_files,
    load_checker: Callable[..., SafetyChecker] = load_safety_checker,
) -> Models:
    """Load the models, and warn about options that have no effect on them.

    Args:
        threads: number of CPU threads; None = chosen by the size of the model.
        load: replaces `ldm.load`, with its arguments.
        load_checker: replaces `load_safety_checker`, with its arguments.
    Raises:
        ValueError, FileNotFoundError: see `ldm.load`.
    """
    choice, task = request.model, request.task
    files = file_variant(choice.variant)
    ckpt, refiner = _find_weights(choice.ckpt, files), _find_weights(request.sdxl.refiner)
    upscaler = _find_weights(request.upscaling.upscaler)
    weights = _identify(ckpt)
    _check_families(task, ckpt, _family(weights), refiner, upscaler)
    if ckpt is not None and (channels := _pixel_channels(ckpt, weights)) is not None:
        _check_depth(request, f"`{ckpt.name}`", channels)
    del weights  # so that the memory of a file that is not mapped is freed
    if request.uses_demo_model:
        log.info(
            "no checkpoint given: using the small model that ships with ldm (emoji); for Stable "
            "Diffusion 2: %s (see `ldm download`)",
            task.example_flags,
        )
        ckpt = find_file(task.demo_model) if task.demo_model else None
    is_small = ckpt is None or is_small_model(ckpt)
    device = pick_device(choice.device)
    dtype = pick_dtype(choice.precision, device, is_small)
    if device.type == "cpu":
        set_threads(threads, is_small)
        keep_memory()
    set_backend(choice.attention)
    checker_file = find_checker(request)
    checker_device = "cpu" if choice.offload else device
    checker = load_checker(checker_file, device=checker_device) if checker_file else None
    where: dict[str, Any] = {"device": device, "dtype": dtype, "offload": choice.offload}
    model = load(
        choice.config,
        ckpt,
        ema=choice.ema,
        overrides=choice.overrides,
        allow=choice.allow_module,
        loras=choice.lora,
        embeddings=choice.embedding,
        vae=choice.vae,
        text_encoder=choice.text_encoder,
        variant=choice.variant,
        **where,
        **request.inputs.get_model_files(),
    )
    log.info("running on %s in %s", device, str(dtype).removeprefix("torch."))
    describe_variant(request, model)
    _check_depth(request, file_name(model), model.autoencoder.in_channels)
    _warn_about_ignored_options(request, model)
    if upscaler is not None:
        second = load(None, upscaler, base=model, **where)
        Upscaling(second).check(model)
        return Models(model, safety_checker=checker, upscaler=second)
    if request.sdxl.refiner is None:
        return Models(model, safety_checker=checker)
    if not is_sdxl(model):
        message = f"a refiner is for Stable Diffusion XL, which {file_name(model)} is not"
        raise ArgumentError(message, "refiner")
    embeddings = _refiner_embeddings(model)
    return Models(model, load(None, refiner, embeddings=embeddings, **where), checker)


def find_checker(request: Request) -> Path | None:
    """Find the file or folder of a request's safety checker; None if it asks for none.

    Raises:
        MissingFile: it does not exist.
    """
    name = request.output.safety_checker
    if name != OWN_CHECKER:
        return find_safety_checker(name) if name else None
    folder = Path(request.model.ckpt or "").expanduser()
    if request.model.ckpt is None or not (folder / COMPONENT).is_dir():
        model = f"`{folder.name}`" if request.model.ckpt else "the demo model"
        raise MissingFile(f"{model} contains no safety checker", COMPONENT)
    return find_safety_checker(folder)


def _check_families(
    task: Task, ckpt: Path | None, base: Family | None, refiner: Path | None, upscaler: Path | None
) -> None:
    """Raise ArgumentError if a file is not suitable, as far as the shapes in it show.

    Weights are not read. Models of unusual shapes are checked by the pipelines, after loading.

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


def _check_depth(request: Request, model: str, channels: int) -> None:
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


def _refiner_embeddings(base: LatentDiffusion) -> list[str]:
    """Return the embedding files that fit the last text encoder, the only one of a refiner."""
    encoders = base.conditioner.find_all(TextEncoder)
    files = base.provenance.get("embeddings", [])
    return [f["path"] for f in files if encoders[-1].added_embeddings.keys() >= set(f["words"])]


def explain_few_steps(request: Request) -> str | None:
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
        path = find_file(request.task.demo_model or DEMO_CHECKPOINT)
        if choice.ckpt is not None:
            path = find_checkpoint(choice.ckpt, variant=file_variant(choice.variant))
        found = find_variant_early(path, choice.lora, choice.variant)
    except (OSError, ValueError):  # which loading will name
        return None
    if found is None:
        return None
    own = resolve_sampling(request, found.defaults)
    return explain_excess(found.defaults, f"`{found.path.name}`", own.steps, own.scale)


def resolve_sampling(request: Request, defaults: Defaults) -> Sampling:
    """Return the sampling options of a request, with defaults for scale, steps, sampler and eta.

    Args:
        defaults: defaults of the model; for Stable Diffusion 1 and 2 the task sets the scale.
    """
    sampling, scale = request.sampling, defaults.scale
    sampler = sampling.sampler or defaults.sampler
    if (own_scale := SAMPLERS[sampler].scale) is not None:
        scale = own_scale
    elif scale == Defaults().scale:
        scale = request.task.demo_scale if request.uses_demo_model else request.task.scale
    eta = SAMPLERS[sampler].eta
    if sampler == defaults.sampler and defaults.eta is not None:
        eta = defaults.eta
    return replace(
        sampling,
        scale=scale if sampling.scale is None else sampling.scale,
        steps=len(sampling.sigmas) - 1 if sampling.sigmas else sampling.steps or defaults.steps,
        sampler=sampler,
        eta=eta if sampling.used_eta is None else sampling.used_eta,
    )


def explain_start(request: Request, model: LatentDiffusion) -> str | None:
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
    sigmas = run_sigmas(model, Quirks.of(model, sampling.legacy), options)
    return explain_high_start(sampling.sampler, sampling.scheduler, float(sigmas[0]))


def is_small_model(path: str | Path) -> bool:
    """Return whether the weights of a file or diffusers folder are as small as the demo model's."""
    file = Path(path).expanduser()
    files = file.glob("*/*.safetensors") if file.is_dir() else [file]
    return sum(file.stat().st_size for file in files if file.is_file()) < SMALL_MODEL


def _find_weights(name: str | None, variant: str | None = None) -> Path | None:
    """Find a checkpoint by its path or published name, and log which published one it is."""
    path = find_checkpoint(name, variant=variant) if name else None
    if path is not None and (published := identify_hash(known_sha256(path))):
        log.info("checkpoint: %s, %s (by its SHA-256)", published.name, published.title)
    return path


def describe_variant(request: Request, model: LatentDiffusion) -> None:
    """Log the kind of a few-step model, and how it will be sampled."""
    found = model.provenance.get("variant")
    if found is None:
        return
    sampling = resolve_sampling(request, model.defaults)
    assert sampling.sampler is not None
    log.info(
        "`%s` is %s (by %s): sampler %s, scheduler %s, steps %d, guidance scale %g",
        found["file"],
        VARIANTS[found["name"]].title,
        found["told_by"],
        sampling.sampler,
        sampling.scheduler or default_scheduler(model, sampling.sampler),
        sampling.steps,
        sampling.scale,
    )


def _warn_about_ignored_options(request: Request, model: LatentDiffusion) -> None:
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
