"""Load the models of a request, on its device and in its precision."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.encoders.safety import SafetyChecker
from ldm.encoders.text import TextEncoder
from ldm.generate.checks import check_checkpoints, check_depth, log_advice
from ldm.generate.defaults import log_variant
from ldm.generate.request import Request
from ldm.loading.addons.safety import SAFETY_CHECKER, find_safety_checker, load_safety_checker
from ldm.loading.find_variant import select_file_variant
from ldm.loading.load import load as load_from_files
from ldm.loading.published import find_by_sha256, resolve_checkpoint
from ldm.loading.weights import list_weight_files
from ldm.model import LatentDiffusion
from ldm.nets.attention import set_backend
from ldm.pipelines.families import check_model, is_sdxl, quote_name
from ldm.pipelines.latent_upscaling import Upscaling
from ldm.runtime.device import keep_freed_memory, pick_device, pick_dtype, set_threads
from ldm.runtime.errors import ArgumentError, MissingFile, errors_about
from ldm.runtime.files import find_file
from ldm.runtime.hashes import find_cached_sha256

__all__ = ["Models", "find_existing_checkpoint", "find_requested_checker", "load_models"]

SMALL_MODEL_BYTES = 200e6  # half precision and many threads are slower for smaller weights

LOAD_OPTIONS = ("clip_stats", "midas")  # options of some tasks that are passed to `ldm.load`

OWN_CHECKER = "own"  # value of `safety_checker` for the one in the --ckpt folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The models of a run: base model, refiner, x2 latent upscaler and safety checker."""

    base: LatentDiffusion
    refiner: LatentDiffusion | None = None
    safety_checker: SafetyChecker | None = None
    upscaler: LatentDiffusion | None = None

    def to_float32(self) -> None:
        """Convert the weights to float32, except those of the safety checker."""
        for model in filter(None, (self.base, self.refiner, self.upscaler)):
            model.float()


def load_models(
    request: Request,
    *,
    threads: int | None = None,
    load: Callable[..., LatentDiffusion] = load_from_files,
    load_checker: Callable[..., SafetyChecker] = load_safety_checker,
) -> Models:
    """Load the models of a request, and set threads and attention backend of the process.

    Args:
        threads: Number of CPU threads; None = depends on the size of the model.
        load: Called instead of `ldm.load`, with the same arguments.
        load_checker: Called instead of `load_safety_checker`, with the same arguments.
    Raises:
        ArgumentError: A model is of the wrong family, or an option does not suit it.
        ValueError, FileNotFoundError: See `ldm.load`.
    """
    options, task = request.model, request.task
    ckpt = find_existing_checkpoint(options.ckpt, "ckpt", options.variant)
    refiner = find_existing_checkpoint(request.sdxl.refiner, "refiner")
    upscaler = find_existing_checkpoint(request.upscaling.upscaler, "upscaler")
    for path in filter(None, (ckpt, refiner, upscaler)):
        if published := find_by_sha256(find_cached_sha256(path)):
            log.info("checkpoint: %s, %s (by its SHA-256)", published.name, published.title)
    check_checkpoints(request, ckpt, refiner, upscaler)
    if request.uses_demo_model:
        log.info(
            "no checkpoint given: using the small model that ships with ldm (emoji); for Stable "
            "Diffusion 2: %s (see `ldm download`)",
            task.example_flags,
        )
        ckpt = find_file(task.demo_model) if task.demo_model else None
    is_small = ckpt is None or _is_small_model(ckpt)
    device = pick_device(options.device)
    dtype = pick_dtype(options.precision, device, is_small)
    if device.type == "cpu":
        set_threads(threads, is_small)
        keep_freed_memory()
    set_backend(options.attention)
    checker_file = find_requested_checker(request)
    checker_device = "cpu" if options.offload else device
    checker = load_checker(checker_file, device=checker_device) if checker_file else None
    placement: dict[str, Any] = {"device": device, "dtype": dtype, "offload": options.offload}
    values = request.get_values()
    model = load(
        options.config,
        ckpt,
        ema=options.ema,
        overrides=options.overrides,
        allow=options.allow_module,
        loras=options.lora,
        embeddings=options.embedding,
        vae=options.vae,
        text_encoder=options.text_encoder,
        variant=options.variant,
        **placement,
        **{name: values[name] for name in LOAD_OPTIONS if name in values},
    )
    check_model(model, "ckpt")
    log.info("running on %s in %s", device, str(dtype).removeprefix("torch."))
    log_variant(request, model)
    check_depth(request, quote_name(model), model.autoencoder.in_channels)
    log_advice(request, model)
    refiner_model = upscaler_model = None
    if upscaler is not None:
        upscaler_model = load(None, upscaler, base=model, **placement)
        Upscaling(upscaler_model).check(model)
    if refiner is not None:
        if not is_sdxl(model):
            message = f"a refiner is for Stable Diffusion XL, which {quote_name(model)} is not"
            raise ArgumentError(message, "refiner")
        refiner_model = load(None, refiner, embeddings=_list_refiner_embeddings(model), **placement)
        check_model(refiner_model, "refiner")
    return Models(model, refiner_model, checker, upscaler_model)


def find_requested_checker(request: Request) -> Path | None:
    """Find the file or folder of the safety checker that a request names; None = no checker.

    Raises:
        MissingFile: It does not exist.
    """
    name = request.output.safety_checker
    if name != OWN_CHECKER:
        return find_safety_checker(name) if name else None
    folder = Path(request.model.ckpt or "").expanduser()
    if request.model.ckpt is None or not (folder / SAFETY_CHECKER).is_dir():
        model = f"`{folder.name}`" if request.model.ckpt else "the demo model"
        raise MissingFile(f"{model} contains no safety checker", "safety_checker")
    return find_safety_checker(folder)


def find_existing_checkpoint(
    name: str | None, argument: str, variant: str | None = None
) -> Path | None:
    """Find a checkpoint by its path or published name; None if `name` is None.

    Args:
        argument: Name of the argument that has this value, for errors.
        variant: See `ldm.load`.
    Raises:
        MissingFile: It does not exist.
    """
    if name is None:
        return None
    with errors_about(argument):
        path = resolve_checkpoint(name, file_variant=select_file_variant(variant))
    if not path.exists():
        raise MissingFile(f"no checkpoint `{path}`", argument)
    return path


def _list_refiner_embeddings(base: LatentDiffusion) -> list[str]:
    """Return the embedding files with vectors for the last text encoder, which a refiner shares."""
    tokens = base.conditioner.find_all(TextEncoder)[-1].added_embeddings.keys()
    files = base.provenance.get("embeddings", [])
    return [file["path"] for file in files if tokens >= set(file["words"])]


def _is_small_model(path: Path) -> bool:
    """Return whether the weights of a file or folder take less than SMALL_MODEL_BYTES."""
    return sum(file.stat().st_size for file in list_weight_files(path)) < SMALL_MODEL_BYTES
