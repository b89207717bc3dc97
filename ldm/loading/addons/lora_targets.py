"""List the layers of a model that LoRA and LyCORIS may change, with their names in files."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from ldm.encoders.text import OpenCLIPText, TextEncoder
from ldm.encoders.towers import FusedAttention
from ldm.loading.diffusers.locations import get_text_component
from ldm.loading.diffusers.names import rename_text_layers, rename_unet_layers
from ldm.loading.weight_names import SECOND_TEXT_PREFIX, normalize_layer_name
from ldm.model import LatentDiffusion
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.nets.lora import TEXT_PROJECTION, Target
from ldm.pipelines.families import is_sdxl
from ldm.runtime.errors import WeightsMismatch

__all__ = [
    "KOHYA_UNET_PREFIX", "TargetLayer", "list_lora_targets", "list_lycoris_targets", "map_aliases",
]  # fmt: skip

LayerTypes = tuple[type[nn.Module], ...]
LORA_LAYERS = (nn.Linear, nn.Conv2d, FusedAttention)
KOHYA_UNET_PREFIX = "lora_unet_"
QKV_SUFFIXES = (".q_proj", ".k_proj", ".v_proj")  # of names for OpenCLIP's fused attention


class TargetLayer(NamedTuple):
    """A layer that a LoRA may change, with its names.

    Args:
        target: The weight in the model.
        original_name: Our name in the UNet; for text encoders, prefixed with diffusers' component.
        diffusers_name: `unet.down_blocks.0.…` or `text_encoder.text_model.…`.
        kohya_name: `lora_unet_…` or `lora_te_…`, the key in `LoRA.layers`.
    """

    target: Target
    original_name: str
    diffusers_name: str
    kohya_name: str


def list_lora_targets(model: LatentDiffusion) -> list[TargetLayer]:
    """List linear layers and convolutions that a LoRA may change."""
    return [*_list_unet_targets(model, LORA_LAYERS), *_list_text_targets(model, LORA_LAYERS)]


def list_lycoris_targets(model: LatentDiffusion) -> list[TargetLayer]:
    """List the target layers of LyCORIS: those of LoRA, norms, and text projections."""
    types = (*LORA_LAYERS, nn.GroupNorm, nn.LayerNorm)
    layers = [*_list_unet_targets(model, types), *_list_text_targets(model, types)]
    return [*layers, *_list_projections(model)]


def map_aliases(targets: Iterable[TargetLayer], model: LatentDiffusion) -> dict[str, str]:
    """Map other names of each layer, after `normalize_layer_name`, to kohya's name."""
    aliases = {
        normalize_layer_name(name): layer.kohya_name
        for layer in targets
        for name in (layer.original_name, layer.diffusers_name)
    }
    if len(model.conditioner.find_all(TextEncoder)) == 1:
        # Files name the refiner's only text encoder as the first or as the second one.
        aliases |= {alias.removeprefix(SECOND_TEXT_PREFIX): n for alias, n in aliases.items()}
    return aliases


def _list_unet_targets(model: LatentDiffusion, types: LayerTypes) -> Iterator[TargetLayer]:
    if isinstance(model.unet, LatentUpscalerUNet):
        raise WeightsMismatch("the x2 latent upscaler does not support LoRAs", "lora")
    if model.unet.context_dim is None:
        raise WeightsMismatch("a model without cross-attention does not support LoRAs", "lora")
    names = rename_unet_layers(_list_layer_names(model.unet, types))
    for original_name, diffusers_name in names.items():
        # kohya's scripts train SDXL in a UNet with the original's names.
        trained_name = original_name if is_sdxl(model) else diffusers_name
        kohya_name = KOHYA_UNET_PREFIX + trained_name.replace(".", "_")
        target = Target(model.unet.get_submodule(original_name))
        yield TargetLayer(target, original_name, f"unet.{diffusers_name}", kohya_name)


def _list_text_targets(model: LatentDiffusion, types: LayerTypes) -> Iterator[TargetLayer]:
    for prefix, encoder in _list_text_encoders(model):
        component = get_text_component(encoder)
        names = _list_layer_names(encoder, types)
        names = [name for name in names if not name.startswith(encoder.unused_weights)]
        for original_name, diffusers_name in rename_text_layers(names).items():
            layer = encoder.get_submodule(original_name)
            is_fused = isinstance(layer, FusedAttention)
            for qkv_index, suffix in enumerate(QKV_SUFFIXES) if is_fused else [(None, "")]:
                yield TargetLayer(
                    Target(layer, qkv_index),
                    f"{component}.{original_name}{suffix}",
                    f"{component}.{diffusers_name}{suffix}",
                    prefix + f"{diffusers_name}{suffix}".replace(".", "_"),
                )


def _list_projections(model: LatentDiffusion) -> Iterator[TargetLayer]:
    for prefix, encoder in _list_text_encoders(model):
        if isinstance(encoder, OpenCLIPText) and encoder.always_return_pooled:
            name = f"{get_text_component(encoder)}.{TEXT_PROJECTION}"
            target = Target(encoder.model, name=TEXT_PROJECTION)
            yield TargetLayer(target, name, name, prefix + TEXT_PROJECTION)


def _list_text_encoders(model: LatentDiffusion) -> Iterator[tuple[str, TextEncoder]]:
    """Yield (kohya's prefix of its layers, text encoder)."""
    encoders = model.conditioner.find_all(TextEncoder)
    for number, encoder in enumerate(encoders, start=1):
        yield f"lora_te{number}_" if len(encoders) > 1 else "lora_te_", encoder


def _list_layer_names(network: nn.Module, types: LayerTypes) -> list[str]:
    return [name for name, layer in network.named_modules() if isinstance(layer, types)]
