"""Load a model from a config and a weights file.

    weights = identify_weights(open_checkpoint(ckpt))   memory-mapped, our names, with a family
    _, config_dict = read_config(weights, config)       a YAML: given, embedded, or of the family
    model = build_on_meta(config_dict)                  no memory, no initialization
    state = match_weights(model, weights.state_dict, …) strict: every tensor, every shape
    fill_weights(model, state)
    add_loras(model, …), load_embeddings(model, …)

Only `hf:` addresses are downloaded. Weights that are loaded on the CPU in the dtype of the file
stay memory-mapped.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import Schedule
from ldm.encoders.concat_images import LowResImage
from ldm.encoders.depth import MiDaSDepth
from ldm.encoders.image import ImageEmbedding
from ldm.loading.addons.embeddings import add_embeddings, check_embeddings, load_embeddings
from ldm.loading.addons.lora import add_loras, parse_loras, read_loras
from ldm.loading.addons.lora_weights import LoRAWeightLike
from ldm.loading.addons.midas import add_depth_network
from ldm.loading.autoencoders import works_in_float16
from ldm.loading.buffers import make_buffers
from ldm.loading.build import build_on_meta, fill_weights
from ldm.loading.diffusers.files import PIPELINE_KEY, is_diffusers_folder
from ldm.loading.families import LATENT_UPSCALER, probe_prediction_type
from ldm.loading.files.checkpoint import CONFIG_KEY, Checkpoint, write_checkpoint
from ldm.loading.files.clip_statistics import get_clip_statistics, load_clip_statistics
from ldm.loading.find_variant import resolve_variant, select_file_variant
from ldm.loading.matching import match_weights
from ldm.loading.model_config import (
    asks_for_ema,
    has_defaults,
    is_prediction_type_uncertain,
    read_config,
)
from ldm.loading.modelspec import make_modelspec
from ldm.loading.published import resolve_checkpoint
from ldm.loading.replace_components import (
    complete_upscaler,
    remove_autoencoder,
    replace_autoencoder,
    replace_text_encoder,
)
from ldm.loading.tiny_autoencoder import build_tiny_autoencoder, read_tiny_autoencoder
from ldm.loading.variants import NO_VARIANT, VARIANTS, set_variant
from ldm.loading.weight_names import restore_names
from ldm.loading.weights import (
    TRANSPOSED_WARNING,
    Weights,
    has_transposed_projection,
    identify_weights,
    open_checkpoint,
)
from ldm.model import LatentDiffusion
from ldm.pipelines.families import check_model, is_sdxl
from ldm.runtime.arguments import as_list
from ldm.runtime.device import pick_wide_range_dtype
from ldm.runtime.errors import (
    ArgumentError,
    FileFormatError,
    MissingArgument,
    MissingFile,
    errors_about,
    errors_as,
    make_unknown_name_error,
)
from ldm.runtime.files import find_file
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["DEMO_CHECKPOINT", "load", "save_model"]

T = TypeVar("T")
log = logging.getLogger(__name__)

DEMO_CONFIG, DEMO_CHECKPOINT = "configs/demo/text2img.yaml", "checkpoints/demo.safetensors"
# Allowed relative error of noise schedules that were rounded to a dtype. The least precise come
# first, as numbers rounded to these are exact in most others.
SCHEDULE_TOLERANCE = {
    torch.float8_e5m2: 0.125, torch.float8_e4m3fn: 0.0625, torch.bfloat16: 4e-3,
    torch.float16: 2e-3,
}  # fmt: skip


def load(
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    ema: bool | None = None,
    overrides: str | Iterable[str] = (),
    allow: str | Iterable[str] = (),
    clip_stats: str | Path | None = None,
    midas: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Iterable[tuple[str | Path, LoRAWeightLike]] = (),
    text_encoder: str | Path | None = None,
    base: LatentDiffusion | None = None,
    embeddings: str | Path | Iterable[str | Path] = (),
    variant: str | None = None,
) -> LatentDiffusion:
    """Load the model that a config describes, with the weights of a checkpoint.

    Args:
        config: A YAML; None = that of the family of the weights. Both None = the demo model.
        ckpt: A .ckpt or .safetensors, the folder of a diffusers pipeline or of a training run, the
            name of a published file that is on this machine (`sd-v2-1`), or an address on the
            Hugging Face hub, `hf:OWNER/NAME/FILE` or `hf:OWNER/NAME`. None = the demo model, or the
            checkpoint given as the only argument, `load("folder")`.
        dtype: Dtype of all weights; each component computes in the dtype of its weights.
        offload: Keep each component on the CPU until it runs, see `LatentDiffusion.offload`;
            ignored if `device` is the CPU.
        ema: Whether to use the EMA weights of a file that has both; None = if the config says so
            (`use_ema`), as the original's scripts do.
        overrides: Changes to the YAML, such as `model.params.scale_factor=0.13`.
        allow: Packages of your own whose classes the YAML may name.
        clip_stats: File with mean and standard deviation of CLIP's embeddings; None = from the
            checkpoint or a file near it. For unCLIP models only.
        midas: File with the depth network; None = from the checkpoint. For depth models only.
        vae: A checkpoint, as `ckpt`, that replaces the autoencoder; or TAESD, whose file may have
            only the decoder, and then does not replace the encoder. None = keep that of `ckpt`.
        text_encoder: A checkpoint that replaces the (first) text encoder, and adds its second text
            encoder and its autoencoder if `ckpt` contains none; None = keep that of `ckpt`. The x2
            latent upscaler takes both from a checkpoint of Stable Diffusion 1.
        base: A model whose autoencoder and text encoder are shared, not copied, if the checkpoint
            contains none; for the x2 latent upscaler only. None = nothing is shared.
        loras: (file, weight) pairs, merged into the weights; the weight is a number, a
            `LoRAWeight`, or its text, such as "0.5:1" for text encoders and UNet.
        embeddings: Files of textual inversions, or folders of them: tokens for prompts.
        variant: Few-step (distilled) variant of the model or its LoRAs: a name in `VARIANTS`, or
            "base" for an ordinary model; sets the model's `defaults`. None = detect it by tensors,
            metadata or file name. Any other name, such as `fp16`, selects the files of a diffusers
            folder that have it in their names.

    Returns:
        The model in eval mode (or a component, if the config describes only one); its `provenance`
        lists the files and settings from which it was loaded.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Config, files or options do not fit together.
    """
    _check_device_and_dtype(device, dtype)
    paths = {
        "config": config, "ckpt": ckpt, "clip_stats": clip_stats, "midas": midas, "vae": vae,
        "text_encoder": text_encoder,
    }  # fmt: skip
    for name, path in paths.items():
        if not isinstance(path, str | Path | None):
            raise ArgumentError(f"{name} must be a path, got {path!r}", name)
    if ema is not None and not isinstance(ema, bool):
        raise ArgumentError(f"ema must be True, False or None, got {ema!r}", "ema")
    overrides, allow = _to_list("overrides", overrides), _to_list("allow", allow)
    embeddings, loras = _to_list("embeddings", embeddings), tuple(parse_loras(loras))
    offload = offload and torch.device(device).type != "cpu"
    config, ckpt = _resolve_files(config, ckpt)
    weights = identify_weights(_open_weights(ckpt, variant))
    config_path, config_dict = read_config(weights, config, overrides)
    if config is None and config_path != CONFIG_KEY and weights.family is not None:
        log.info(
            "`%s` is %s; config %s; predicts %s",
            weights.path, weights.family.title, config_path, weights.prediction_type,
        )  # fmt: skip
    where = Path(config_path).name
    error_prefix = f"`{weights.path}` does not fit {where}"
    skipped: list[str] = []
    model = build_on_meta(config_dict, allow=allow, where=where, skipped=skipped)
    if ema is None:
        ema = weights.checkpoint.has_litema_weights and asks_for_ema(config_dict)
    _log_unused_keys(weights, ema, skipped)
    _check_family_options(model, weights, clip_stats=clip_stats, midas=midas, base=base)
    if base is not None:
        check_model(base, "base")
    for name in ("clip_stats", "midas"):
        if (path := paths[name]) is not None:
            with errors_about(name):
                find_file(path)
    if not isinstance(model, LatentDiffusion):
        _check_component_options(
            vae=vae, text_encoder=text_encoder, loras=loras, embeddings=embeddings,
            variant=variant in VARIANTS, offload=offload,
        )  # fmt: skip
        weights.select_ema(model.state_dict(), ema)
        _match_and_fill(model, weights, error_prefix, device, dtype)
        return cast(LatentDiffusion, model.eval())
    with errors_about("embeddings"):  # checked before weights are read, which takes longer
        check_embeddings(model, embeddings)
    with errors_about("loras"):
        lora_files = read_loras(model, loras)
    detected_variant = resolve_variant(model, weights, variant, loras)
    weights.select_ema(model.state_dict(), ema)
    provenance = _make_provenance(config_dict, weights)
    provenance |= {"config": config_path, "ema": ema, "skipped": skipped}
    model.upcast_autoencoder &= not works_in_float16(weights.checkpoint)
    with errors_about("vae"):
        tiny_weights = None if vae is None else read_tiny_autoencoder(vae)
        if tiny_weights is not None:
            provenance["vae"] = remove_autoencoder(model, weights, tiny_weights)
        elif vae is not None:
            provenance["vae"] = replace_autoencoder(model, weights, vae)
    if text_encoder is not None:
        with errors_about("text_encoder"):
            provenance["text_encoder"] = replace_text_encoder(model, weights, text_encoder)
    if weights.family is LATENT_UPSCALER:
        complete_upscaler(model, weights, base)
    if add_depth_network(model.state_dict(), weights.state_dict, weights.path, midas):
        weights.memory_mapped = False  # the network's tensors are in memory
    load_clip_statistics(model.conditioner, weights.path, clip_stats, weights.buffers)
    fill_device = "cpu" if offload else device
    autoencoder_dtype = _choose_autoencoder_dtype(model, torch.device(device), dtype)
    _match_and_fill(model, weights, error_prefix, fill_device, dtype, autoencoder_dtype)
    model.provenance = provenance
    if "scale_factor" in weights.buffers:  # stored by models trained with `scale_by_std`
        with errors_as(FileFormatError, f"`{weights.path}`: invalid scale_factor"):
            model.scale_factor = float(weights.buffers["scale_factor"])
    _warn_about_schedule(model, weights.buffers, error_prefix)
    if tiny_weights is not None:
        model.autoencoder = build_tiny_autoencoder(tiny_weights, model, fill_device, dtype)
    _resolve_prediction_type(model, weights, is_config_given=config is not None)
    if detected_variant is not None:
        is_folder = weights.checkpoint.format == "diffusers"
        has_scheduler = is_folder and is_sdxl(model) and has_defaults(config_dict)
        set_variant(model, detected_variant, has_scheduler=has_scheduler)
    elif variant == NO_VARIANT:
        model.provenance["variant"] = None
    add_loras(model, lora_files)
    add_embeddings(model, weights.checkpoint.added_tokens, weights.path)
    load_embeddings(model, embeddings)
    if offload:
        model.offload(torch.device(device))
    return model.eval()


def save_model(
    model: LatentDiffusion, path: str | Path, metadata: Mapping[str, str | int] | None = None
) -> None:
    """Write a model as .safetensors, .ckpt or .pth, in the layout of the original code.

    Args:
        metadata: Entries besides those of ModelSpec; with the YAML's text under `ldm.config`,
            `load` needs no config. None = no others.
    """
    state = restore_names(model.state_dict(), make_buffers(model))
    metadata = make_modelspec(model, Path(path).stem, metadata=metadata)
    write_checkpoint(path, state | get_clip_statistics(model.conditioner), metadata)


def _check_device_and_dtype(device: str | torch.device, dtype: torch.dtype) -> None:
    """Raise ArgumentError for a device that is not available, or a dtype that cannot compute."""
    try:
        torch.empty(0, device=torch.device(device))
    except (AssertionError, RuntimeError, TypeError) as error:  # AssertionError: built without
        message = f"device `{device}` is not available here, choose one such as cpu, cuda or mps"
        raise ArgumentError(message, "device") from error
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        message = f"dtype must be torch.float16 or another of 16 bits or more, got {dtype!r}"
        raise ArgumentError(message, "dtype")


def _to_list(name: str, values: T | Iterable[T]) -> list[T]:
    """Return a text or path, or several, as a list; raise ArgumentError for anything else."""
    is_valid = isinstance(values, Iterable | Path)
    items: list[T] = as_list(values) if is_valid else [cast(T, values)]
    for item in items:
        if not isinstance(item, str | Path):
            message = f"{name} must be one text or path or a list, got {item!r}"
            raise ArgumentError(message, name)
    return items


def _resolve_files(
    config: str | Path | None, ckpt: str | Path | None
) -> tuple[str | Path | None, str | Path]:
    """Return (config or None, checkpoint) for the arguments of `load`."""
    if ckpt is not None:
        return config, ckpt
    if config is None:
        try:
            return find_file(DEMO_CONFIG), find_file(DEMO_CHECKPOINT)
        except FileNotFoundError as error:
            message = f"the demo model is missing: {error}\nhint: pass a config and a checkpoint"
            raise MissingFile(message, "ckpt") from error
    if str(config).endswith((".yaml", ".yml")):
        with errors_about("config"):
            find_file(config)
        message = "a config alone has no weights\nhint: pass a checkpoint as well"
        raise MissingArgument(message, "ckpt")
    return None, config  # it is a checkpoint: `load("model.safetensors")`


def _open_weights(ckpt: str | Path, variant: str | None) -> Checkpoint:
    """Open weights; a variant that is not in VARIANTS selects the files of a diffusers folder."""
    file_variant = select_file_variant(variant)
    if file_variant and not is_diffusers_folder(
        resolve_checkpoint(ckpt, file_variant=file_variant)
    ):
        raise make_unknown_name_error(
            "variant", file_variant, (NO_VARIANT, *VARIANTS), argument="variant"
        )
    return open_checkpoint(ckpt, file_variant)


def _check_family_options(
    model: nn.Module, weights: Weights, **options: str | Path | LatentDiffusion | None
) -> None:
    """Raise ArgumentError for an option that is set, but only applies to another family."""
    encoders = model.conditioner.encoders.values() if isinstance(model, LatentDiffusion) else ()
    families = {
        "clip_stats": ("an unCLIP model", any(isinstance(e, ImageEmbedding) for e in encoders)),
        "midas": ("a depth model", any(isinstance(e, MiDaSDepth) for e in encoders)),
        "base": ("an x2 latent upscaler", weights.family is LATENT_UPSCALER),
    }
    for name, value in options.items():
        title, is_family = families[name]
        if value is not None and not is_family:
            raise ArgumentError(f"`{weights.path}` is not {title}, it takes no {name}", name)


def _check_component_options(**options: object) -> None:
    """Raise ArgumentError for an option that is set, but only applies to a whole model."""
    for name, value in options.items():
        if value:
            message = f"the config describes one component only: {name} needs a whole model"
            raise ArgumentError(message, name)


def _choose_autoencoder_dtype(
    model: LatentDiffusion, device: torch.device, dtype: torch.dtype
) -> torch.dtype:
    """Return the dtype of a model's autoencoder: one of wider range if it overflows in float16."""
    if dtype != torch.float16:
        return dtype
    if model.conditioner.find(LowResImage) is not None:  # the x4 upscaler's autoencoder overflows
        return torch.float32
    return pick_wide_range_dtype(device) if model.upcast_autoencoder else dtype


def _match_and_fill(
    model: nn.Module,
    weights: Weights,
    error_prefix: str,
    device: str | torch.device,
    dtype: torch.dtype,
    autoencoder_dtype: torch.dtype | None = None,
) -> None:
    """Fill a model on the meta device with `weights`, whose dicts are then emptied.

    Args:
        error_prefix: See `match_weights`.
    """
    state = match_weights(model, weights.state_dict, weights.path, error_prefix)
    if has_transposed_projection(state):
        warnings.warn(f"`{weights.path}`: {TRANSPOSED_WARNING}", stacklevel=3)
    for source in (
        weights.state_dict,
        weights.checkpoint.state_dict,
        weights.checkpoint.ema_state_dict,
    ):
        source.clear()  # so that memory is freed while `state` is emptied
    fill_weights(
        model,
        state,
        device=device,
        dtype=dtype,
        memory_mapped=weights.memory_mapped,
        autoencoder_dtype=autoencoder_dtype,
    )


def _log_unused_keys(weights: Weights, ema: bool, skipped: list[str]) -> None:
    """Log which keys of the config are not used, and whether EMA weights are."""
    if skipped:
        log.info("not needed for sampling, skipped: %s", ", ".join(skipped))
    if weights.checkpoint.has_ema:
        log.info("`%s`: its EMA weights are %s", weights.path, "used" if ema else "not used")
    elif weights.checkpoint.ema_state_dict:  # as in Runway's inpainting model
        log.info("`%s` has counters of an EMA but not its weights: EMA is not used", weights.path)


def _make_provenance(config_dict: JsonMapping, weights: Weights) -> JsonObject:
    """Return entries of `provenance`: config hash, checkpoint, training step, pipeline."""
    digest = hashlib.sha256(json.dumps(config_dict, sort_keys=True, default=str).encode())
    return {
        "config_hash": digest.hexdigest()[:10],
        "checkpoint": str(weights.path),
        "step": weights.checkpoint.step,
        "pipeline": weights.checkpoint.metadata.get(PIPELINE_KEY),
    }


def _warn_about_schedule(
    model: LatentDiffusion, buffers: Mapping[str, Tensor], error_prefix: str
) -> None:
    """Warn if the noise schedule in the file differs from the config's, which is used."""
    expected = model.schedule.compute_buffers() if isinstance(model.schedule, Schedule) else {}
    for name in sorted(expected.keys() & buffers.keys()):
        stored, table = buffers[name], expected[name]
        if stored.shape != table.shape:
            difference = f"has {stored.numel()} steps, the config's {len(table)}"
        else:
            error = (stored.float() - table).abs().max()
            relative_error = float(error / table.abs().max())
            if relative_error <= _find_schedule_tolerance(stored):
                continue
            difference = f"by {relative_error:.2g} of its largest value"
        warnings.warn(
            f"{error_prefix}: its noise schedule differs (`{name}` {difference}); the config's "
            "is used, check `linear_start`, `linear_end` and `beta_schedule`",
            stacklevel=3,
        )
        return


def _find_schedule_tolerance(table: Tensor) -> float:
    """Return the tolerance for the least precise dtype that represents a table exactly."""
    for dtype, tolerance in SCHEDULE_TOLERANCE.items():
        if torch.equal(table.to(dtype).float(), table.float()):
            return tolerance
    return 1e-5


def _resolve_prediction_type(
    model: LatentDiffusion, weights: Weights, *, is_config_given: bool
) -> None:
    """Warn if weights and config differ in the prediction type.

    If the config was not given and fewer than two methods have a result, the UNet is run, too, and
    the prediction type that results replaces the config's.
    """
    family, detected = weights.family, weights.prediction_type
    if not is_config_given and family is not None and is_prediction_type_uncertain(weights):
        detected = probe_prediction_type(model.unet, detected, family.context_dim or 0)
        if detected.value and detected.value != model.parameterization:
            model.parameterization = detected.value
            model.provenance["config"] = family.get_config_path(detected.value)
    model.provenance["prediction"] = str(detected)
    if detected.value and detected.value != model.parameterization:
        warnings.warn(
            f"`{weights.path}` looks like a model that predicts {detected.value}, the config says "
            f"{model.parameterization}: {detected}; images will be noise if the config is wrong",
            stacklevel=3,
        )
    elif detected.is_disputed and not is_config_given:
        warnings.warn(
            f"`{weights.path}`: methods disagree about what the model predicts: {detected}\n"
            "hint: pass a config (v2-inference.yaml: eps, v2-inference-v.yaml: v)",
            stacklevel=3,
        )
