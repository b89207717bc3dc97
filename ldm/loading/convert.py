"""Convert checkpoints between files in the original's layout and diffusers folders.

    file, diffusers folder or run folder -> Checkpoint -> file or diffusers folder

Tensors stay memory-mapped until they are written, one after the other. Output is written
atomically.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.encoders.image import ImageEmbedding
from ldm.encoders.text import TextEncoder
from ldm.loading.addons.lora import load_loras
from ldm.loading.addons.lora_weights import LoRAWeight, LoRAWeightLike
from ldm.loading.autoencoders import SCALE_KEY, UPCAST_KEY, works_in_float16
from ldm.loading.build import build_on_meta
from ldm.loading.config import format_yaml, parse_yaml, read_config_text, read_yaml
from ldm.loading.diffusers.files import (
    get_weights_path,
    is_diffusers_folder,
    make_folder_contents,
    write_text_files,
)
from ldm.loading.diffusers.layout import EXTRA_WEIGHTS
from ldm.loading.families import CONFIG_DIR, LATENT_UPSCALER
from ldm.loading.files.checkpoint import (
    CONFIG_KEY,
    Checkpoint,
    LazyTensor,
    cast_weight,
    use_ema_weights,
    write_checkpoint,
)
from ldm.loading.files.clip_statistics import get_clip_statistics, load_clip_statistics
from ldm.loading.legacy import AUTOENCODER_CONFIG
from ldm.loading.matching import match_weights, translate_names
from ldm.loading.model_config import (
    asks_for_ema,
    make_missing_config_error,
    probe_weights,
    read_config,
)
from ldm.loading.modelspec import MERGED_FROM_KEY, filter_metadata, make_modelspec
from ldm.loading.replace_components import check_upscaler, extract_autoencoder, extract_text_encoder
from ldm.loading.sgm import DIFFUSION_ENGINE
from ldm.loading.tiny_autoencoder import read_tiny_autoencoder
from ldm.loading.weight_names import (
    TEXT_2_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    has_prefix,
    has_sgm_names,
    pair_names,
    rename_weights,
    restore_names,
    to_original_name,
)
from ldm.loading.weights import identify_weights, open_checkpoint
from ldm.model import LatentDiffusion
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.pipelines.families import is_sdxl
from ldm.runtime.errors import (
    ArgumentError,
    ExistingFile,
    MissingArgument,
    WrongFamily,
    errors_about,
)
from ldm.runtime.files import disk_errors_about
from ldm.runtime.types import JsonObject
from ldm.runtime.version import __version__

__all__ = [
    "LORA_PREFIXES", "Conversion", "check_overwrite", "convert", "fill_lora_components",
    "find_config_text", "plan_conversion", "to_original_names",
]  # fmt: skip

TARGET_SUFFIXES = (".safetensors", ".ckpt", ".pth")
UNSUPPORTED_SUFFIXES = (".bin", ".pt", ".onnx", ".gguf")  # refused: not the name of a folder
K_DIFFUSION_SUFFIX = ".pth"
# Prefixes of the original's names in k-diffusion's file of the x2 latent upscaler.
UPSCALER_PREFIXES = ("inner_model.", "low_res_noise_embed.")
LORAS_KEY = "ldm.loras"  # metadata key: JSON list of merged LoRAs
ENCODER_CONV_IN = "encoder.conv_in.weight"  # in every autoencoder
LORA_PREFIXES = (UNET_PREFIX, TEXT_PREFIX, TEXT_2_PREFIX)  # of components that LoRAs change


@dataclass(frozen=True)
class Conversion:
    """A planned conversion.

    Args:
        source: Checkpoint that the tensors are from.
        weights: Tensors by name, by path in the folder; the path is "" if a file is written.
        text_files: Contents (JSON or text) by path in the folder; {} if a file is written.
        metadata: Metadata of the file, or of EXTRA_WEIGHTS in a folder.
        dtype: Dtype of floating-point weights; None = unchanged.
        summary: Lines that describe the conversion, for the user.
    """

    source: Checkpoint
    target: Path
    weights: Mapping[str, Mapping[str, Tensor | LazyTensor]]
    text_files: JsonObject = field(default_factory=dict)
    metadata: dict[str, str | int] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    summary: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Total size of the tensors to write."""
        return sum(_count_bytes(state, self.dtype) for state in self.weights.values())


def plan_conversion(
    source: str | Path,
    target: str | Path,
    *,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    prune: bool = False,
    variant: str | None = None,
    clip_stats: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    loras: Sequence[tuple[str | Path, LoRAWeightLike]] = (),
) -> Conversion:
    """Plan a conversion: read names and configs, write nothing.

    Args:
        source: A file, a diffusers folder, or the folder of a training run.
        target: Path ending in .safetensors or .ckpt for a file in the original's layout, in .pth
            for the UNet of an x2 latent upscaler in k-diffusion's layout, else a folder.
        config: The YAML of the source; None finds it as `load` does.
        dtype: Dtype of floating-point weights; None = unchanged.
        ema: Whether to replace the raw weights by EMA weights.
        prune: Whether to leave EMA weights out of a file; a folder has none.
        variant: Variant in the file names of diffusers folders, such as `fp16`, which also sets the
            dtype if the source is a file; None = see `read_component_state`.
        clip_stats: See `load`.
        vae: Checkpoint that replaces the autoencoder; None = keep the source's.
        text_encoder: Checkpoint that replaces the text encoder, and adds its autoencoder if the
            source, an x2 latent upscaler, contains none; None = keep the source's.
        loras: (file, weight) pairs as in `load`, merged into the weights; EMA weights are left out.
    """
    target = Path(target).expanduser()
    suffix = target.suffix.lower()
    is_file = suffix in TARGET_SUFFIXES
    if suffix in UNSUPPORTED_SUFFIXES:
        message = f"`{target}`: a file must end in {' or '.join(TARGET_SUFFIXES)}, a folder in none"
        raise ArgumentError(message, "target")
    if variant == "fp16" and dtype is None and not is_diffusers_folder(source):
        dtype = torch.float16
    file = open_checkpoint(source, variant)
    config_text = find_config_text(file, config)
    if config_text is None and (loras or not is_file):
        raise make_missing_config_error(identify_weights(file))
    config_dict = parse_yaml(config_text) if config_text else {}
    model = build_on_meta(config_dict) if config_text else None
    file = to_original_names(file, model, ema=ema)
    summary: list[str] = []
    if vae is not None:
        with errors_about("vae"):
            file = _replace_autoencoder(file, model, config_dict, vae)
        if config_text and parse_yaml(config_text) != config_dict:
            config_text = format_yaml(config_dict)
        summary.append(f"autoencoder taken from {vae}")
    if text_encoder is not None:
        with errors_about("text_encoder"):
            file = _replace_text_encoder(file, model, text_encoder)
        summary.append(f"text encoder taken from {text_encoder}")
    metadata = _make_metadata(file, config_text, ema)
    if loras:
        with errors_about("loras"):
            file, metadata[LORAS_KEY], tokens = _merge_loras(file, model, loras, dtype)
        merged = (f"{name} of weight {LoRAWeight.parse(weight)}" for name, weight in loras)
        summary.append(f"merged: {', '.join(merged)}")
        merged_from = [file.path.name, *(Path(lora).name for lora, _ in loras)]
        metadata[MERGED_FROM_KEY] = ", ".join(merged_from)
        file.added_tokens.update(tokens)
    if file.added_tokens:
        listed = ", ".join(f"`{token}`" for token in file.added_tokens)
        summary.append(f"added tokens are not written, load them as embeddings: {listed}")
    if clip_stats is not None:
        if not isinstance(model, LatentDiffusion) or model.conditioner.find(ImageEmbedding) is None:
            message = f"`{file.path}` is not an unCLIP model, it takes no clip_stats"
            raise ArgumentError(message, "clip_stats")
        if is_file:
            load_clip_statistics(model.conditioner, file.path, clip_stats)
            file.state_dict.update(get_clip_statistics(model.conditioner))
    source_metadata = filter_metadata(file.metadata, keep_author_fields=not loras)
    metadata = make_modelspec(model, target.stem, metadata={**source_metadata, **metadata})
    ema_state_dict = file.ema_state_dict if is_file and not (ema or prune or loras) else {}
    text_files: JsonObject = {}
    if suffix == K_DIFFUSION_SUFFIX:
        weights, metadata = {"": _select_upscaler_weights(file, target)}, {}
    elif is_file:
        weights = {"": {**file.state_dict, **ema_state_dict}}
    else:
        if isinstance(model, LatentDiffusion) and isinstance(model.unet, LatentUpscalerUNet):
            check_upscaler(rename_weights(file.state_dict), file.path)
        text_files, components = make_folder_contents(file, config_dict, clip_stats)
        weights = {get_weights_path(c, text_files, variant): s for c, s in components.items() if s}
    for path, state in weights.items():
        size = _count_bytes(state, dtype) / 1e9
        summary.append(f"{path or target.name:60} {len(state):>5} tensors {size:8.3f} GB")
    if file.ema_state_dict and not ema_state_dict:
        result = "replaced the raw weights" if ema else "left out (`ema` converts these instead)"
        if not ema and config_dict and file.has_litema_weights and asks_for_ema(config_dict):
            result += ", though the config asks for them (`use_ema`)"
        summary.append(f"{'model_ema.*':60} {len(file.ema_state_dict):>5} tensors {result}")
    return Conversion(file, target, weights, text_files, metadata, dtype, tuple(summary))


def convert(
    conversion: Conversion,
    *,
    force: bool = False,
    progress: Callable[[int], object] = lambda size: None,
) -> Path:
    """Write a planned conversion atomically; return the target.

    Args:
        progress: Called with the size in bytes of each tensor once it is written.
    """
    target, memory_mapped = conversion.target, conversion.source.memory_mapped
    _check_target(conversion, force)
    write = partial(
        write_checkpoint, dtype=conversion.dtype, memory_mapped=memory_mapped, progress=progress
    )
    if not conversion.text_files:
        write(target, conversion.weights[""], conversion.metadata)
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with disk_errors_about(target):
            write_text_files(temporary, conversion.text_files)
        for path, state in conversion.weights.items():
            write(temporary / path, state, conversion.metadata if path == EXTRA_WEIGHTS else {})
        _replace_folder(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def check_overwrite(target: str | Path, *, force: bool) -> None:
    """Raise ExistingFile if a file or folder exists, unless `force` is set."""
    if not force and Path(target).exists():
        raise ExistingFile(f"`{target}` exists\nhint: `force` replaces it", "force")


def _replace_folder(target: Path, new: Path) -> None:
    """Rename a folder to `target`; if that fails, restore the old one."""
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)  # Windows keeps files that are still memory-mapped


def _check_target(conversion: Conversion, force: bool) -> None:
    target = conversion.target
    if not target.exists():
        return
    check_overwrite(target, force=force)
    is_folder = target.is_dir()
    if is_folder != bool(conversion.text_files) or (is_folder and not is_diffusers_folder(target)):
        reason = "not a diffusers folder" if is_folder else "a file"
        raise ArgumentError(f"`{target}` is not replaced: it is {reason}", "target")


def find_config_text(file: Checkpoint, config: str | Path | None) -> str | None:
    """Return the text of a model's YAML: `config`, else that in the file, else that of the family.

    For an autoencoder alone, it has only `first_stage_config`; for an unknown family it is None.
    """
    weights = identify_weights(file)
    is_model = file.has_ema or has_prefix(weights.state_dict, UNET_PREFIX)
    is_autoencoder = any(n.removeprefix(VAE_PREFIX) == ENCODER_CONV_IN for n in weights.state_dict)
    if config is None and CONFIG_KEY in file.metadata:
        config_text = file.metadata[CONFIG_KEY]
    elif config is None and is_autoencoder and not is_model:
        config_text = read_config_text(f"{CONFIG_DIR}/v1-inference.yaml")
    elif config is not None and weights.family is not LATENT_UPSCALER:
        config_text = read_config_text(config)
    else:
        weights.prediction_type = probe_weights(weights)
        try:
            path, config_dict = read_config(weights, config)
        except MissingArgument:
            return None
        config_text = read_config_text(path)
        if parse_yaml(config_text) != config_dict:  # adapted to markers and shapes of the weights
            config_text = format_yaml(config_dict)
    model = parse_yaml(config_text).get("model")
    params = model.get("params") if not is_model and isinstance(model, Mapping) else None
    if isinstance(params, Mapping) and AUTOENCODER_CONFIG in params:
        return format_yaml({"model": params[AUTOENCODER_CONFIG]})
    return config_text


def to_original_names(file: Checkpoint, model: nn.Module | None, *, ema: bool) -> Checkpoint:
    """Return a checkpoint with the original's names of weights.

    Args:
        model: Model on the meta device; None = an unknown family, whose names are not changed.
    """
    if model is None:
        if ema:
            use_ema_weights(
                file.state_dict, file.ema_state_dict, {n: n for n in file.state_dict}, file.path
            )
        return file
    weights, expected = identify_weights(file), model.state_dict()
    weights.select_ema(expected, ema)
    weight_names = set(dict(pair_names(file.state_dict)).values())
    auxiliary_tensors = {name: v for name, v in file.state_dict.items() if name not in weight_names}
    state = translate_names(model, weights.state_dict, file.path)
    is_sgm = has_sgm_names(expected)
    renamed = {to_original_name(name, sgm=is_sgm): value for name, value in state.items()}
    return replace(file, state_dict=auxiliary_tensors | renamed)


def fill_lora_components(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Fill only the components of a model on the meta device that LoRAs change, without copies."""
    others = {n: v for n, v in model.state_dict().items() if not n.startswith(LORA_PREFIXES)}
    filled = {name: v for name, v in state.items() if name.startswith(LORA_PREFIXES)}
    model.load_state_dict(match_weights(model, filled | others, path), assign=True)


def _merge_loras(
    file: Checkpoint,
    model: nn.Module | None,
    loras: Sequence[tuple[str | Path, LoRAWeightLike]],
    dtype: torch.dtype | None,
) -> tuple[Checkpoint, str, dict[str, list[Tensor]]]:
    """Return (checkpoint with LoRAs merged, JSON list of all its LoRAs, vectors of their tokens).

    The result has the dtype of the weights, unless float32 is written.
    """
    if not isinstance(model, LatentDiffusion):
        raise WrongFamily(f"`{file.path}` is not a whole model: LoRAs cannot be merged into it")
    state = rename_weights(file.state_dict)
    if dtype == torch.float32:
        state = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    fill_lora_components(model, state, file.path)
    unmerged = dict(model.named_parameters())
    load_loras(model, loras)
    is_sgm = has_sgm_names(unmerged)
    merged = {
        to_original_name(name, sgm=is_sgm): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter is not unmerged[name]
    }
    all_loras = json.loads(file.metadata.get(LORAS_KEY, "[]"))
    all_loras += [{**lora, "path": Path(lora["path"]).name} for lora in model.provenance["loras"]]
    tokens: dict[str, list[Tensor]] = {}
    for encoder in model.conditioner.find_all(TextEncoder):
        for token, vectors in encoder.added_embeddings.items():
            tokens.setdefault(token, []).append(vectors)
    file = replace(file, state_dict={**file.state_dict, **merged}, memory_mapped=False)
    return file, json.dumps(all_loras), tokens


def _replace_autoencoder(
    file: Checkpoint, model: nn.Module | None, config: JsonObject, vae: str | Path
) -> Checkpoint:
    """Return a checkpoint with another autoencoder, in the dtype of the replaced one.

    Args:
        config: Config of the checkpoint; for SDXL `disable_first_stage_autocast` is set in place.
    """
    if isinstance(model, LatentDiffusion):
        autoencoder: nn.Module = model.autoencoder
    else:
        config_dict = read_yaml(f"{CONFIG_DIR}/v1-inference.yaml")["model"]["params"]
        autoencoder = build_on_meta(config_dict[AUTOENCODER_CONFIG])
    if read_tiny_autoencoder(vae) is not None:
        message = "is TAESD, which checkpoints cannot contain: pass it when making images"
        raise ArgumentError(f"`{vae}` {message}", "vae")
    source = open_checkpoint(vae)
    state = extract_autoencoder(source, autoencoder, file.path)
    is_sdxl_model = isinstance(model, LatentDiffusion) and is_sdxl(model)
    if is_sdxl_model and config["model"]["target"] == DIFFUSION_ENGINE:
        overflows = not works_in_float16(source)
        config["model"]["params"]["disable_first_stage_autocast"] = overflows
    # Scale factor and upcast are options of the old autoencoder.
    metadata = {k: v for k, v in file.metadata.items() if k not in (SCALE_KEY, UPCAST_KEY)}
    metadata |= {k: v for k, v in source.metadata.items() if k == SCALE_KEY}
    file_names = dict(pair_names(file.state_dict))
    for name in state.keys() & file_names.keys():
        file_name = file_names[name]
        state[name] = cast_weight(file_name, state[name], file.state_dict[file_name].dtype)
    return _replace_component(replace(file, metadata=metadata), VAE_PREFIX, restore_names(state))


def _replace_text_encoder(
    file: Checkpoint, model: nn.Module | None, text_encoder: str | Path
) -> Checkpoint:
    """Return a checkpoint with another text encoder, and with components that it did not have."""
    names = rename_weights(file.state_dict).keys()
    state = extract_text_encoder(open_checkpoint(text_encoder), model, names, file.path)
    return _replace_component(file, TEXT_PREFIX, restore_names(state, sgm=has_sgm_names(names)))


def _replace_component(file: Checkpoint, prefix: str, tensors: dict[str, Tensor]) -> Checkpoint:
    """Return a checkpoint whose tensors under a prefix (of our names) are replaced by others."""
    names = [
        file_name for name, file_name in pair_names(file.state_dict) if name.startswith(prefix)
    ]
    state = {name: value for name, value in file.state_dict.items() if name not in names}
    return replace(file, state_dict=state | tensors, memory_mapped=False)


def _select_upscaler_weights(file: Checkpoint, target: Path) -> dict[str, Tensor]:
    """Return the tensors that k-diffusion's file of the x2 latent upscaler contains."""
    state = {n: value for n, value in file.state_dict.items() if n.startswith(UPSCALER_PREFIXES)}
    if not state:
        raise ArgumentError(
            f"`{target}`: only x2 latent upscalers are written as {K_DIFFUSION_SUFFIX}", "target"
        )
    return state


def _make_metadata(file: Checkpoint, config_text: str | None, ema: bool) -> dict[str, str | int]:
    """Return metadata about the source of a conversion."""
    metadata: dict[str, str | int] = {"ldm.version": __version__, "ldm.source": file.path.name}
    if config_text:
        metadata[CONFIG_KEY] = config_text
    if file.step is not None:
        metadata["global_step"] = file.step
    return metadata | ({"ldm.ema": "merged"} if ema else {})


def _count_bytes(state: Mapping[str, Tensor | LazyTensor], dtype: torch.dtype | None) -> int:
    """Return the size of tensors after casting floating-point ones to `dtype`."""
    return sum(
        value.numel() * (dtype if dtype and value.is_floating_point() else value.dtype).itemsize
        for value in state.values()
    )
