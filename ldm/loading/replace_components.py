"""Replace or add the autoencoder or text encoder of a model, from another file or model."""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.encoders.text import TextEncoder
from ldm.loading.autoencoders import find_scale_factor, works_in_float16
from ldm.loading.diffusers.locations import locate_unet
from ldm.loading.files.checkpoint import Checkpoint, compute_short_hash
from ldm.loading.matching import match_weights
from ldm.loading.tiny_autoencoder import TinyWeights, check_latents
from ldm.loading.weight_names import (
    TEXT_2_PREFIX,
    TEXT_PREFIX,
    VAE_PREFIX,
    has_prefix,
    rename_weights,
    select_prefix,
)
from ldm.loading.weights import Weights, identify_weights, open_checkpoint
from ldm.model import SCALE_FACTOR_TOLERANCE, LatentDiffusion
from ldm.nets.autoencoder import Autoencoder, PixelSpace
from ldm.pipelines.families import is_sdxl, quote_name
from ldm.runtime.errors import ArgumentError, MissingArgument, WeightsMismatch

__all__ = [
    "UPSCALER_COMPONENTS", "check_upscaler", "complete_upscaler", "extract_autoencoder",
    "extract_text_encoder", "remove_autoencoder", "replace_autoencoder", "replace_text_encoder",
]  # fmt: skip

log = logging.getLogger(__name__)

# Prefix -> title of components that the published x2 latent upscaler does not contain.
UPSCALER_COMPONENTS = {VAE_PREFIX: "autoencoder", TEXT_PREFIX: "text encoder (CLIP ViT-L/14)"}


def replace_autoencoder(
    model: LatentDiffusion, weights: Weights, vae: str | Path
) -> dict[str, str]:
    """Put the autoencoder of another checkpoint into `weights`; return its path and hash."""
    source = open_checkpoint(vae)
    state = extract_autoencoder(source, model.autoencoder, weights.path)
    _warn_about_scale_factor(model, source, weights.path)
    may_overflow = model.upcast_autoencoder or is_sdxl(model)
    model.upcast_autoencoder = may_overflow and not works_in_float16(source)
    _replace_weights(weights, source, VAE_PREFIX, state)
    return _make_file_entry(source.path)


def remove_autoencoder(
    model: LatentDiffusion, weights: Weights, tiny: TinyWeights
) -> dict[str, str]:
    """Remove the autoencoder from `weights` if TAESD has an encoder; return TAESD's path, hash."""
    check_latents(tiny, model)
    if tiny.has_encoder:
        model.autoencoder = PixelSpace()
        model.upcast_autoencoder = False
        weights.state_dict = {
            n: v for n, v in weights.state_dict.items() if not n.startswith(VAE_PREFIX)
        }
    return _make_file_entry(tiny.path)


def replace_text_encoder(
    model: LatentDiffusion, weights: Weights, text_encoder: str | Path
) -> dict[str, str]:
    """Put the text encoder of another checkpoint into `weights`; return its path and hash.

    An autoencoder and a second text encoder that `weights` do not have are added.
    """
    source = open_checkpoint(text_encoder)
    state = extract_text_encoder(source, model, weights.state_dict, weights.path)
    _replace_weights(weights, source, TEXT_PREFIX, state)
    return _make_file_entry(source.path)


def extract_autoencoder(
    source: Checkpoint, autoencoder: nn.Module, path: str | Path
) -> dict[str, Tensor]:
    """Return the weights of an autoencoder, under our names, from its file or that of a model.

    Args:
        autoencoder: Autoencoder to fill, for names and shapes.
        path: The model's file, for messages.
    """
    if not isinstance(autoencoder, Autoencoder):
        raise WeightsMismatch(f"`{path}` has no autoencoder to replace")
    error_prefix = f"the autoencoder of `{source.path}` does not fit `{path}`"
    state = match_weights(autoencoder, rename_weights(source.state_dict), source.path, error_prefix)
    return {f"{VAE_PREFIX}{name}": value for name, value in state.items()}


def extract_text_encoder(
    source: Checkpoint, model: nn.Module | None, names: Iterable[str], path: Path
) -> dict[str, Tensor]:
    """Return the weights of a text encoder, under our names, from its file or that of a model.

    Weights of the second text encoder and of the autoencoder are added if the model's own file does
    not contain them.

    Args:
        model: Model to fill, for names and shapes; None = unknown.
        names: Our names of the weights in the model's file.
        path: The model's file, for messages.
    """
    encoder = model.conditioner.text if isinstance(model, LatentDiffusion) else None
    if not isinstance(model, LatentDiffusion) or not isinstance(encoder, TextEncoder):
        raise ArgumentError(f"`{path}` has no text encoder to replace", "text_encoder")
    prefix = "text_model."  # of transformers' CLIPTextModel
    all_weights = {
        f"{TEXT_PREFIX}{n}" if n.startswith(prefix) else n: v for n, v in source.state_dict.items()
    }
    all_weights = rename_weights(all_weights)
    error_prefix = f"the text encoder of `{source.path}` does not fit `{path}`"
    matched = match_weights(encoder, all_weights, source.path, error_prefix)
    state = {f"{TEXT_PREFIX}{name}": value for name, value in matched.items()}
    second, names = model.conditioner.encoders.get("text_2"), list(names)
    second_weights = select_prefix(all_weights, TEXT_2_PREFIX)
    if second is not None and second_weights and not has_prefix(names, TEXT_2_PREFIX):
        matched = match_weights(second, second_weights, source.path, error_prefix)
        state |= {f"{TEXT_2_PREFIX}{name}": value for name, value in matched.items()}
    needs_vae = isinstance(model.autoencoder, Autoencoder) and not has_prefix(names, VAE_PREFIX)
    if needs_vae and has_prefix(all_weights, VAE_PREFIX):
        state |= extract_autoencoder(source, model.autoencoder, path)
    return state


def complete_upscaler(
    model: LatentDiffusion, weights: Weights, base: LatentDiffusion | None
) -> None:
    """Take autoencoder and text encoder of an x2 latent upscaler from `base` if they are missing.

    Weights of the UNet that diffusers does not have are added.

    Args:
        base: Model whose tensors are shared; None = `weights` must have all components.
    Raises:
        MissingArgument: A component is missing, and `base` has none of its shape.
    """
    if "unet.time_proj.weight" in weights.state_dict:
        unet_state = model.unet.state_dict()
        for name in unet_state.keys() - locate_unet(unet_state).keys():
            value = unet_state[name]
            value = torch.zeros(value.shape) if value.is_meta else value
            weights.state_dict.setdefault(f"unet.{name}", value)
        weights.memory_mapped = False  # these tensors, and those of `base`, are in memory
    expected, base_state = model.state_dict(), {} if base is None else base.state_dict()
    for prefix in UPSCALER_COMPONENTS:
        names = [name for name in expected if name.startswith(prefix)]
        base_fits = all(n in base_state and base_state[n].shape == expected[n].shape for n in names)
        if base_fits and not has_prefix(weights.state_dict, prefix):
            weights.state_dict |= {name: base_state[name] for name in names}
            weights.memory_mapped = False
    check_upscaler(weights.state_dict, weights.path, base)


def check_upscaler(names: Iterable[str], path: Path, base: LatentDiffusion | None = None) -> None:
    """Raise MissingArgument unless weights of an x2 latent upscaler have all components.

    Args:
        base: Model with no fitting components, for messages; None = no model was given.
    """
    names = list(names)
    missing = [title for p, title in UPSCALER_COMPONENTS.items() if not has_prefix(names, p)]
    if missing:
        message = f"`{path}` has no {' and no '.join(missing)}"
        if base is not None:
            raise MissingArgument(
                f"{message}, and {quote_name(base)} has none that fits\nhint: pass its diffusers "
                "folder, or convert it with a text encoder first",
                "upscaler",
            )
        remedy = "pass a checkpoint of Stable Diffusion 1, which has both"
        raise MissingArgument(f"{message}\nhint: {remedy}", "text_encoder")


def _replace_weights(
    weights: Weights, source: Checkpoint, prefix: str, state: dict[str, Tensor]
) -> None:
    """Replace all weights with a prefix by `state`, a component of another checkpoint."""
    weights.state_dict = state | {
        n: v for n, v in weights.state_dict.items() if not n.startswith(prefix)
    }
    weights.memory_mapped = weights.memory_mapped and source.memory_mapped


def _make_file_entry(path: Path) -> dict[str, str]:
    return {"path": str(path.resolve()), "hash": compute_short_hash(path)}


def _warn_about_scale_factor(model: LatentDiffusion, source: Checkpoint, path: Path) -> None:
    """Warn if a replacement autoencoder was trained with another scale factor than the model's.

    The model's factor is used, as its UNet was trained with it. Most files of autoencoders do not
    contain theirs, and the shapes are the same for SD 1, SD 2 and SDXL.
    """
    factor, evidence = find_scale_factor(source, identify_weights(source).family)
    if factor is not None and abs(factor / model.scale_factor - 1) > SCALE_FACTOR_TOLERANCE:
        warnings.warn(
            f"the autoencoder of `{source.path}` has scale factor {factor:g} ({evidence}), that of "
            f"`{path}` is used, {model.scale_factor:g}: colors will be wrong, SDXL needs an "
            "autoencoder of SDXL, SD 1 and 2 need one of theirs",
            stacklevel=4,
        )
    log.info(
        "autoencoder of `%s`: used with scale factor %g of `%s`, its own is %s",
        source.path, model.scale_factor, path,
        "unknown" if factor is None else f"{factor:g} ({evidence})",
    )  # fmt: skip
