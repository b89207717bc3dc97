"""Load a model from a config and a weights file.

    weights  = identify_weights(open_checkpoint(ckpt))   memory-mapped, our names, with a family
    raw      = read_config(weights, config)            a YAML: given, embedded, or of the family
    model    = build_on_meta(translate_config(raw))    no memory, no initialisation
    fill_weights(model, match_weights(model, weights))      strict: every tensor, every shape
    add_loras(model), load_embeddings(model)           adapters

Only `hf:` addresses are downloaded. Where device and dtype stay as in the file, weights stay
memory-mapped.
"""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule, Schedule
from ldm.encoders.text import TextEncoder
from ldm.loading.addons.embeddings import add_embeddings, check_embeddings, load_embeddings
from ldm.loading.addons.lora import (
    LoRAFile,
    Weight,
    add_loras,
    detect_few_steps,
    read_loras,
    warn_if_distilled,
)
from ldm.loading.addons.midas import add_depth_network
from ldm.loading.autoencoders import find_scale, is_finite_in_half
from ldm.loading.buffers import make_buffers
from ldm.loading.build import build_on_meta, fill_weights
from ldm.loading.config import instantiate, parse_yaml, read_yaml
from ldm.loading.diffusers.files import PIPELINE_KEY, is_diffusers_folder, read_folder_metadata
from ldm.loading.diffusers.keys import unet_keys
from ldm.loading.families import Prediction, probe_prediction
from ldm.loading.files.checkpoint import (
    CONFIG_KEY,
    Checkpoint,
    detect_format,
    read_checkpoint,
    short_hash,
    write_checkpoint,
)
from ldm.loading.files.clip_statistics import clip_statistics_tensors, load_clip_statistics
from ldm.loading.k_diffusion import find_json, find_sizes, upscaler_config
from ldm.loading.legacy import MODEL, translate_config
from ldm.loading.matching import guess_kind, match_weights
from ldm.loading.modelspec import describe_model
from ldm.loading.published import find_checkpoint
from ldm.loading.sgm import ENGINE
from ldm.loading.tiny_autoencoder import (
    TinyWeights,
    build_tiny_autoencoder,
    check_latents,
    read_tiny_autoencoder,
)
from ldm.loading.variants import (
    ARGUMENT,
    GUIDANCE_WEIGHT,
    NO_VARIANT,
    VARIANTS,
    Found,
    detect_variant,
    set_variant,
)
from ldm.loading.weight_names import AUTOENCODER, TEXT, our_names, restore_names
from ldm.loading.weights import (
    Weights,
    extract_autoencoder,
    extract_text_encoder,
    has_transposed_projection,
    identify_weights,
    open_checkpoint,
)
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import PixelSpace
from ldm.pipelines.families import family_of, file_name, is_sdxl
from ldm.runtime.device import pick_wide_dtype
from ldm.runtime.errors import (
    ArgumentError,
    MissingArgument,
    MissingFile,
    WeightsMismatch,
    WrongFamily,
    errors_about,
    unknown_name,
)
from ldm.runtime.files import find_file
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "TRANSPOSED", "UPSCALER_PARTS", "check_upscaler", "choose_config", "file_variant",
    "find_schedule_early", "find_variant", "find_variant_early", "load", "probe_weights",
    "read_config", "save_model", "supports_variants",
]  # fmt: skip

log = logging.getLogger(__name__)

TRANSPOSED = (
    "text_projection of the second text encoder looks transposed, as in files copied unconverted "
    "from a diffusers folder; it is used as it is, and images follow the prompt less well"
)
PANORAMA = re.compile(r"ldm3d[-_. ]?pano")
DEMO_CONFIG, DEMO_CHECKPOINT = "configs/demo/text2img.yaml", "checkpoints/demo.safetensors"
# Parts that the published file of the x2 latent upscaler does not contain.
UPSCALER_PARTS = {AUTOENCODER: "autoencoder", TEXT: "text encoder (CLIP ViT-L/14)"}
# Relative error of noise schedules that were rounded to a dtype; 1e-5 for others. bfloat16 is tried
# first: most numbers with its 8 bits of precision are exact in float16, too.
SCHEDULE_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 2e-3}


def load(
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    ema: bool = False,
    overrides: Iterable[str] = (),
    allow: Iterable[str] = (),
    clip_stats: str | Path | None = None,
    midas: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Iterable[tuple[str | Path, Weight]] = (),
    text_encoder: str | Path | None = None,
    base: LatentDiffusion | None = None,
    embeddings: Iterable[str | Path] = (),
    variant: str | None = None,
) -> LatentDiffusion:
    """Load the model that a config describes, with the weights of a checkpoint.

    Args:
        config: a YAML; None recognises the family from the weights. Both None: the demo model.
        ckpt: a .ckpt or .safetensors, the folder of a diffusers pipeline or of a training run, the
            name of a published file that is on this machine (`sd-v2-1`), or an address on the
            Hugging Face hub, `hf:OWNER/NAME/FILE` or `hf:OWNER/NAME`; may be the only argument,
            `load("folder")`.
        dtype: of all weights; every part computes in the dtype of its weights.
        offload: keep each part on the CPU until it runs, see `LatentDiffusion.offload`; ignored if
            `device` is the CPU.
        ema: use the EMA weights of a file that has both.
        overrides: changes to the YAML, such as `model.params.scale_factor=0.13`.
        allow: packages of your own whose classes the YAML may name.
        clip_stats: file with mean and standard deviation of CLIP's embeddings; None = from the
            checkpoint or a file near it. For unCLIP models.
        midas: file with the depth network; None = from the checkpoint. For depth models.
        vae: a checkpoint, as `ckpt`, whose autoencoder is used instead; or TAESD: a file with its
            decoder only leaves the model's encoder in place.
        text_encoder: a checkpoint whose (first) text encoder is used instead, and whose autoencoder
            if `ckpt` contains none. The x2 latent upscaler takes both from a checkpoint of Stable
            Diffusion 1.
        base: a model whose autoencoder and text encoder are shared, not copied, where the
            checkpoint contains none; for the x2 latent upscaler.
        loras: (file, weight) pairs, merged into the weights; the weight is a number, a
            `LoRAWeight`, or its text, such as "0.5:1" for text encoders and UNet.
        embeddings: files of textual inversions, or folders of them: tokens for prompts.
        variant: kind of few-step (distilled) model, with its LoRAs: a name in `VARIANTS`, or "base"
            for an ordinary model; sets the model's `defaults`. None = detect it by tensors,
            metadata or file name. Any other name chooses files of a diffusers folder, such as
            `fp16`.

    Returns:
        The model in eval mode (or the part, for the config of a single part); its `provenance`
        lists the files and settings it was loaded from.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: config, files or options do not fit together.
    """
    config, ckpt = _choose_files(config, ckpt)
    loras, embeddings = tuple(loras), tuple(embeddings)
    weights = identify_weights(_read_variant(ckpt, variant))
    config_path, raw = read_config(weights, config, overrides)
    if config is None and config_path != CONFIG_KEY and weights.family is not None:
        log.info(
            "`%s` is %s; config %s; predicts %s",
            weights.path, weights.family.title, config_path, weights.prediction,
        )  # fmt: skip
    where = Path(config_path).name
    misfit = f"`{weights.path}` does not fit {where}"
    skipped: list[str] = []
    spec = translate_config(raw, where=where, skipped=skipped)
    model = build_on_meta(spec, allow=tuple(allow), where=where, skipped=skipped)
    adapters: list[LoRAFile] = []
    if isinstance(model, LatentDiffusion):  # refuse what does not fit before weights are read
        with errors_about("embeddings"):
            check_embeddings(model, embeddings)
        with errors_about("loras"):
            adapters = read_loras(model, loras)
    found = _choose_variant(model, weights, variant, adapters)
    if ema:
        weights.use_ema(model.state_dict())
    else:
        weights.check_has_unet(model.state_dict())
    provenance = {"config": config_path, **_provenance(raw, weights, ema, skipped)}
    if isinstance(model, LatentDiffusion):
        model.upcast_autoencoder &= not is_finite_in_half(weights.source)
    with errors_about("vae"):
        tiny = None if vae is None else read_tiny_autoencoder(vae)
        if tiny is not None:
            provenance["vae"] = _leave_out_autoencoder(model, weights, tiny)
        elif vae is not None:
            provenance["vae"] = _replace_autoencoder(model, weights, vae)
    if text_encoder is not None:
        with errors_about("text_encoder"):
            provenance["text_encoder"] = _replace_text_encoder(model, weights, text_encoder)
    if isinstance(model, LatentDiffusion) and weights.family and weights.family.name == "x2":
        _complete(model, weights, base)
    if add_depth_network(model.state_dict(), weights.state, weights.path, midas):
        weights.mapped = False  # its tensors are in memory
    state = match_weights(model, weights.state, weights.path, misfit)
    if has_transposed_projection(state):
        warnings.warn(f"`{weights.path}`: {TRANSPOSED}", stacklevel=2)
    for other in (weights.state, weights.source.state, weights.source.ema_state):
        other.clear()  # so that memory is freed while `state` is emptied
    overflows = isinstance(model, LatentDiffusion) and model.upcast_autoencoder
    offload = offload and torch.device(device).type != "cpu"
    fill_weights(
        model,
        state,
        device="cpu" if offload else device,
        dtype=dtype,
        mapped=weights.mapped,
        autoencoder_dtype=pick_wide_dtype(torch.device(device))
        if overflows and dtype == torch.float16
        else None,
    )
    if isinstance(model, LatentDiffusion):
        model.provenance = provenance
        _compare_schedules(model, weights.buffers, misfit)
        if tiny is not None:
            place = "cpu" if offload else device
            model.autoencoder = build_tiny_autoencoder(tiny, model, place, dtype)
        load_clip_statistics(model.conditioner, weights.path, clip_stats, weights.buffers)
        _check_prediction(model, weights, is_config_given=config is not None)
        if found is not None:
            is_folder = weights.source.kind == "diffusers"
            set_variant(model, found, has_scheduler=is_folder and is_sdxl(model))
        elif variant == NO_VARIANT:
            model.provenance["variant"] = None
        add_loras(model, adapters)
        add_embeddings(model, weights.source.added_tokens, weights.path)
        load_embeddings(model, embeddings)
        if offload:
            model.offload(torch.device(device))
    elif loras or embeddings:
        raise WrongFamily("LoRAs and embeddings need a whole model, the config describes a part")
    return cast(LatentDiffusion, model.eval())


def save_model(
    model: LatentDiffusion, path: str | Path, metadata: Mapping[str, str | int] | None = None
) -> None:
    """Write a model as .safetensors, .ckpt or .pth, in the layout of the original code.

    Args:
        metadata: entries of the file; with the YAML's text under `ldm.config`, `load` needs no
            config.
    """
    state = restore_names(model.state_dict(), make_buffers(model))
    metadata = describe_model(model, Path(path).stem, metadata=metadata)
    write_checkpoint(path, state | clip_statistics_tensors(model.conditioner), metadata)


def choose_config(weights: Weights) -> str:
    """Return the path of the YAML of the weights' family; `CONFIG_KEY` if their file contains one.

    Raises:
        MissingArgument: the family is unknown or not supported.
    """
    if CONFIG_KEY in weights.markers:
        return CONFIG_KEY
    family = weights.family
    if family is None or not family.config:
        if family is None and (kind := guess_kind(weights.source.state)):
            raise MissingArgument(f"`{weights.path}` is {kind}")
        looks = f"looks like {family.title}, which is not supported" if family else "is unknown"
        message = f"`{weights.path}` {looks}\nhint: pass its config"
        raise MissingArgument(message, "config")
    path = family.config_path(weights.prediction.kind)
    if family.name == "x2":
        path = str(find_json(weights.path) or path)
    return path


def read_config(
    weights: Weights, config: str | Path | None = None, overrides: Iterable[str] = ()
) -> tuple[str, JsonObject]:
    """Return (path or `CONFIG_KEY`, content) of the given config, or of the weights' family."""
    path = choose_config(weights) if config is None else str(config)
    if config is not None and not path.endswith(".json"):
        return path, read_yaml(config, overrides)
    if (sizes := find_sizes(path, weights.state)) is not None:
        return path, upscaler_config(sizes, overrides)
    if path == CONFIG_KEY:
        raw = parse_yaml(weights.markers[CONFIG_KEY], overrides, where=path)
    else:
        raw = read_yaml(path, overrides)
        if "ztsnr" in weights.markers and weights.prediction.kind != "eps":
            raw["model"]["params"].setdefault("rescale_betas_zero_snr", True)
    spec = raw.get("model", raw)
    if _is_panorama(weights):
        params = spec["params"]
        params["image_size"] = [params["image_size"], 2 * params["image_size"]]
    if spec.get("target") == ENGINE:
        _apply_buffers(spec["params"], weights)
    if GUIDANCE_WEIGHT in weights.state:
        key = "network_config" if spec.get("target") == ENGINE else "unet_config"
        width = weights.state[GUIDANCE_WEIGHT].shape[1]
        spec["params"][key]["params"]["time_cond_proj_dim"] = width
    return path, raw


def _is_panorama(weights: Weights) -> bool:
    """Return whether the weights are LDM3D for panoramas, by the name of their file or folder."""
    is_ldm3d = weights.family is not None and weights.family.name.startswith("ldm3d")
    names = (*weights.path.parts, weights.markers.get("ldm.source", ""))
    return is_ldm3d and any(PANORAMA.search(name.lower()) for name in names)


def _apply_buffers(params: JsonObject, weights: Weights) -> None:
    """Set parameters of sgm's `DiffusionEngine` by the buffers of the file."""
    buffers = weights.buffers
    for key, table in (("latent_mean", "edm_mean"), ("latent_std", "edm_std")):
        if table in buffers:
            params[key] = buffers[table].flatten().tolist()
    if "edm_vpred.sigma_max" in buffers:
        ends = {
            key: float(buffers[f"edm_vpred.{key}"])
            for key in ("sigma_min", "sigma_max")
            if f"edm_vpred.{key}" in buffers
        }
        params["sampler_config"]["params"]["discretization_config"]["params"] |= ends


def find_variant(weights: Weights) -> Found | None:
    """Return the variant of weights, and how it was recognised; None for ordinary models."""
    return detect_variant(weights.path, weights.markers, weights.state)


def supports_variants(family: str | None) -> bool:
    """Return whether there are few-step models of a family, a name in `pipelines.families`."""
    return family in ("text", "inpainting", "depth", "refiner")


def _choose_variant(
    model: torch.nn.Module, weights: Weights, variant: str | None, loras: Iterable[LoRAFile]
) -> Found | None:
    """Return the variant by the argument, a LoRA or the weights; None for a model without one."""
    is_model = isinstance(model, LatentDiffusion) and supports_variants(
        family_of(model.conditioner)
    )
    if not is_model:
        return None
    pairs = [(file.path, file.weight) for file in loras]
    found = _combine_variants(find_variant(weights), pairs, variant, weights.path)
    if found is None and variant != NO_VARIANT:
        warn_if_distilled(pairs)
    return found


def _combine_variants(
    own: Found | None, loras: Iterable[tuple[str | Path, Weight]], variant: str | None, path: Path
) -> Found | None:
    """Return the variant by the argument, a LoRA or the model, the first that tells it.

    Args:
        own: what tells the model's variant, if anything.
        path: of the model.
    Raises:
        ArgumentError: the variant needs a tensor that the model has not.
    """
    if variant == NO_VARIANT:
        return None
    if own is not None and VARIANTS[own.variant].marker:
        return own
    found = detect_few_steps(loras) or own
    if variant is not None and file_variant(variant) is None:
        found = Found(variant, ARGUMENT, found.path if found else path)
    if found is not None and VARIANTS[found.variant].marker:
        raise ArgumentError(
            f"`{path}` does not embed the guidance scale, its variant is not {found.variant}",
            "variant",
        )
    return found


def find_variant_early(
    path: Path, loras: Iterable[tuple[str | Path, Weight]] = (), variant: str | None = None
) -> Found | None:
    """Return the variant that `load` will find, by names and metadata; weights are not read.

    None where a tensor may tell more than the name of a file that is slow to open.
    """
    if is_diffusers_folder(path):
        metadata, is_embedded = read_folder_metadata(path)
        own = detect_variant(path, metadata, [GUIDANCE_WEIGHT] if is_embedded else [])
    elif _opens_quickly(path):
        file = read_checkpoint(path)
        own = detect_variant(path, file.metadata, [name for name, _ in our_names(file.state)])
    else:
        own = detect_variant(path, {})
        if "lcm" in (variant or "") or (own is not None and own.variant == "lcm"):
            return None
    return _combine_variants(own, loras, variant, path)


def find_schedule_early(
    path: Path, config: str | Path | None = None, overrides: Iterable[str] = ()
) -> NoiseSchedule | None:
    """Return the noise schedule of the model that `load` will build; weights are not read.

    None for a part of a model, and for a file that is slow to open.
    """
    if not is_diffusers_folder(path) and not _opens_quickly(path):
        return None
    config, raw = read_config(identify_weights(open_checkpoint(path)), config, overrides)
    spec = translate_config(raw, where=Path(config).name)
    if spec["target"] != MODEL:
        return None
    return cast(NoiseSchedule, instantiate(spec["params"]["schedule"], where=Path(config).name))


def _opens_quickly(path: Path) -> bool:
    """Return whether a file opens without reading its weights, unlike a pickle before torch 1.6."""
    return path.is_file() and detect_format(path) != "legacy"


def probe_weights(weights: Weights) -> Prediction:
    """Return the prediction type of weights; in doubt run their UNet once, see `probe_prediction`.

    A UNet that does not fit its family is not run.
    """
    family = weights.family
    if family is None or not _is_in_doubt(weights):
        return weights.prediction
    spec = translate_config(read_yaml(family.config_path(None)))
    unet = build_on_meta(spec["params"]["unet"])
    try:
        fill_weights(unet, match_weights(unet, weights.state, weights.path))
    except WeightsMismatch:
        return weights.prediction
    return probe_prediction(unet.eval(), weights.prediction, family.context or 0)


def _is_in_doubt(weights: Weights) -> bool:
    """Return whether fewer than two methods found the prediction type, and the family has both."""
    family = weights.family
    return family is not None and family.predicts is None and weights.prediction.votes < 2


def _choose_files(
    config: str | Path | None, ckpt: str | Path | None
) -> tuple[str | Path | None, str | Path]:
    """Return (config, checkpoint) for the arguments of `load`; a config of None is found later."""
    if ckpt is not None:
        return config, ckpt
    if config is None:
        try:
            return find_file(DEMO_CONFIG), find_file(DEMO_CHECKPOINT)
        except FileNotFoundError as error:
            message = f"the demo model is missing: {error}\nhint: pass a config and a checkpoint"
            raise MissingFile(message, "ckpt") from error
    if str(config).endswith((".yaml", ".yml")):
        message = "a config alone has no weights\nhint: pass a checkpoint as well"
        raise MissingArgument(message, "ckpt")
    return None, config  # it is a checkpoint: `load("model.safetensors")`


def _read_variant(ckpt: str | Path, variant: str | None) -> Checkpoint:
    """Read weights; a variant that is not in VARIANTS chooses the files of a diffusers folder."""
    files = file_variant(variant)
    if files and not is_diffusers_folder(find_checkpoint(ckpt, variant=files)):
        raise unknown_name("variant", files, (NO_VARIANT, *VARIANTS), argument="variant")
    return open_checkpoint(ckpt, files)


def file_variant(variant: str | None) -> str | None:
    """Return a variant if it is in file names of diffusers folders (`fp16`), else None."""
    return None if variant in (NO_VARIANT, *VARIANTS) else variant


def _replace_autoencoder(
    model: torch.nn.Module, weights: Weights, vae: str | Path
) -> dict[str, str]:
    """Use the autoencoder of another checkpoint; returns its path and hash."""
    if not isinstance(model, LatentDiffusion):
        message = "another autoencoder needs a whole model, the config describes only a part"
        raise ArgumentError(message, "vae")
    source = open_checkpoint(vae)
    new = extract_autoencoder(source, model.autoencoder, weights.path)
    _compare_scales(model, source, weights.path)
    model.upcast_autoencoder &= not is_finite_in_half(source)
    weights.state = new | {n: v for n, v in weights.state.items() if not n.startswith(AUTOENCODER)}
    weights.mapped = weights.mapped and source.mapped
    return {"path": str(source.path.resolve()), "hash": short_hash(source.path)}


def _leave_out_autoencoder(
    model: torch.nn.Module, weights: Weights, tiny: TinyWeights
) -> dict[str, str]:
    """Do not load the autoencoder if TAESD replaces all of it; return path and hash of TAESD."""
    if not isinstance(model, LatentDiffusion):
        message = "another autoencoder needs a whole model, the config describes only a part"
        raise ArgumentError(message, "vae")
    check_latents(tiny, model)
    if tiny.has_encoder:
        model.autoencoder = PixelSpace()
        model.upcast_autoencoder = False
        kept = {n: v for n, v in weights.state.items() if not n.startswith(AUTOENCODER)}
        weights.state = kept
    return {"path": str(tiny.path.resolve()), "hash": short_hash(tiny.path)}


def _replace_text_encoder(
    model: torch.nn.Module, weights: Weights, text_encoder: str | Path
) -> dict[str, str]:
    """Use the text encoder of another checkpoint; returns its path and hash."""
    text = model.conditioner.text if isinstance(model, LatentDiffusion) else None
    if not isinstance(model, LatentDiffusion) or not isinstance(text, TextEncoder):
        raise ArgumentError(f"`{weights.path}` has no text encoder to replace", "text_encoder")
    source = open_checkpoint(text_encoder)
    new = extract_text_encoder(source, text, weights.path)
    weights.state = new | {n: v for n, v in weights.state.items() if not n.startswith(TEXT)}
    names = (name for name, _ in our_names(source.state))
    if _lacks(weights, AUTOENCODER) and any(name.startswith(AUTOENCODER) for name in names):
        weights.state |= extract_autoencoder(source, model.autoencoder, weights.path)
    weights.mapped = weights.mapped and source.mapped
    return {"path": str(source.path.resolve()), "hash": short_hash(source.path)}


def _complete(model: LatentDiffusion, weights: Weights, base: LatentDiffusion | None) -> None:
    """Take autoencoder and text encoder of an x2 latent upscaler from `base` if they are missing.

    A UNet with diffusers' names gets the weights that diffusers leaves out.

    Raises:
        MissingArgument: a part is missing, and `base` has none of its shape.
    """
    expected, theirs = model.state_dict(), {} if base is None else base.state_dict()
    if "unet.time_proj.weight" in weights.state:
        known = unet_keys(model.unet.state_dict())
        for name, value in model.unet.state_dict().items():
            if name not in known:
                filled = torch.zeros(value.shape) if value.is_meta else value
                weights.state.setdefault(f"unet.{name}", filled)
        weights.mapped = False  # these tensors, and those of `base`, are in memory
    for prefix in UPSCALER_PARTS:
        names = [name for name in expected if name.startswith(prefix)]
        fits = all(n in theirs and theirs[n].shape == expected[n].shape for n in names)
        if _lacks(weights, prefix) and fits:
            weights.state |= {name: theirs[name] for name in names}
            weights.mapped = False
    check_upscaler(weights.state, weights.path, base)


def check_upscaler(names: Iterable[str], path: Path, base: LatentDiffusion | None = None) -> None:
    """Raise MissingArgument unless weights of an x2 latent upscaler have all parts.

    Args:
        names: our names of the weights.
        path: their file, for the message.
        base: the model from which missing parts were to be taken.
    """
    names = list(names)
    missing = [
        title
        for prefix, title in UPSCALER_PARTS.items()
        if not any(name.startswith(prefix) for name in names)
    ]
    if missing:
        message = f"`{path}` has no {' and no '.join(missing)}"
        if base is not None:
            raise MissingArgument(
                f"{message}, nor has {file_name(base)} one that fits\nhint: give its diffusers "
                "folder, or convert it with a text encoder first",
                "upscaler",
            )
        hint = "a checkpoint of Stable Diffusion 1 has both: pass it"
        raise MissingArgument(f"{message}\nhint: {hint}", "text_encoder")


def _lacks(weights: Weights, prefix: str) -> bool:
    return not any(name.startswith(prefix) for name in weights.state)


def _compare_scales(model: LatentDiffusion, source: Checkpoint, path: Path) -> None:
    """Warn if a replacement autoencoder was trained with another scale factor than the model's.

    The model's is used, as its UNet was trained with it. Most files of autoencoders do not contain
    theirs, and the shapes are the same for SD 1, SD 2 and SDXL.
    """
    scale, reason = find_scale(source, identify_weights(source).family)
    if (
        scale is not None and abs(scale / model.scale_factor - 1) > 0.01
    ):  # they differ by 29 % or more
        warnings.warn(
            f"the autoencoder of `{source.path}` has scale factor {scale:g} ({reason}), `{path}` "
            f"{model.scale_factor:g}, which is used: colours will be wrong, SDXL needs an "
            "autoencoder of SDXL, SD 1 and 2 need one of theirs",
            stacklevel=4,
        )
    log.info(
        "autoencoder of `%s`: scale factor %g, with which the UNet of `%s` was trained (%s)",
        source.path, model.scale_factor, path, reason,
    )  # fmt: skip


def _provenance(raw: JsonMapping, weights: Weights, ema: bool, skipped: list[str]) -> JsonObject:
    """Return where a model comes from: hash of the config, checkpoint, step, raw or EMA weights."""
    if skipped:
        log.info("not needed for sampling, skipped: %s", ", ".join(skipped))
    if weights.source.has_ema and not ema:
        # The original samples with them where the config says `use_ema` and they exist.
        params = raw.get("model", raw).get("params") or {}
        asks = "asks" if params.get("use_ema", True) else "does not ask"
        log.info("`%s` also has EMA weights, the config %s for them", weights.path, asks)
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode())
    return {
        "config_hash": digest.hexdigest()[:10],
        "checkpoint": str(weights.path),
        "step": weights.source.step,
        "ema": ema,
        "skipped": skipped,
        "pipeline": weights.source.metadata.get(PIPELINE_KEY),
    }


def _compare_schedules(model: LatentDiffusion, buffers: Mapping[str, Tensor], misfit: str) -> None:
    """Warn if the noise schedule in the file differs from the config's, which is used."""
    if "scale_factor" in buffers:  # stored by models trained with `scale_by_std`
        model.scale_factor = float(buffers["scale_factor"])
    ours = model.schedule.buffers() if isinstance(model.schedule, Schedule) else {}
    for name in sorted(ours.keys() & buffers.keys()):
        theirs, table = buffers[name], ours[name]
        if theirs.shape != table.shape:
            difference = f"has {len(theirs)} steps, the config's {len(table)}"
        else:
            error = float((theirs.float() - table).abs().max() / table.abs().max())
            if error <= _schedule_tolerance(theirs):
                continue
            difference = f"by {error:.2g} of its largest value"
        warnings.warn(
            f"{misfit}: its noise schedule differs (`{name}` {difference}); the config's is "
            "used, check `linear_start`, `linear_end` and `beta_schedule`",
            stacklevel=3,
        )
        return


def _schedule_tolerance(table: Tensor) -> float:
    """Return the tolerance for the lowest precision to which a table was ever rounded."""
    for dtype, tolerance in SCHEDULE_TOLERANCE.items():
        if torch.equal(table.to(dtype).to(table.dtype), table):
            return tolerance
    return 1e-5


def _check_prediction(model: LatentDiffusion, weights: Weights, *, is_config_given: bool) -> None:
    """Warn if the weights look like another parameterization than the config's.

    With a config that was found, not given, fewer than two votes are too few: the UNet is run, too.
    """
    family, prediction = weights.family, weights.prediction
    if not is_config_given and family is not None and _is_in_doubt(weights):
        prediction = probe_prediction(model.unet, prediction, family.context or 0)
        if prediction.kind and prediction.kind != model.parameterization:
            model.parameterization = prediction.kind
            model.provenance["config"] = family.config_path(prediction.kind)
    model.provenance["prediction"] = str(prediction)
    if prediction.kind and prediction.kind != model.parameterization:
        warnings.warn(
            f"`{weights.path}` looks like a model that predicts {prediction.kind}, the config says "
            f"{model.parameterization}: {prediction}; images will be noise if the config is wrong",
            stacklevel=3,
        )
    elif prediction.disputed and not is_config_given:
        warnings.warn(
            f"`{weights.path}`: methods disagree about what the model predicts: {prediction}\n"
            "hint: pass a config (v2-inference.yaml: eps, v2-inference-v.yaml: v)",
            stacklevel=3,
        )
