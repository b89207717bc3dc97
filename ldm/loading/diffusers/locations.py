"""Map each of our tensors to its location in the components of a diffusers folder.

    unet.input_blocks.1.0.in_layers.2.weight         unet: down_blocks.0.resnets.0.conv1.weight
    autoencoder.encoder.mid.attn_1.q.weight          vae: ….to_q.weight, a matrix
    conditioner.text.model.….attn.in_proj_weight     text_encoder: three tensors
    conditioner.text.model.logit_scale               none

One mapping serves both directions: our names come from a model on the meta device, so only our
names are converted to diffusers' names (keys), never the reverse.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.encoders.image import CLIPImage
from ldm.encoders.text import OpenCLIPText, TextEncoder
from ldm.loading.diffusers.names import rename_text_layers, rename_unet_layers, replace_all
from ldm.loading.weight_names import TEXT_PREFIX
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from ldm.nets.unet import UNet

__all__ = [
    "OLD_VAE_NAMES", "TEXT_COMPONENTS", "Location", "convert_from_diffusers",
    "convert_to_diffusers", "get_component_prefixes", "get_text_component",
    "locate_depth_estimator", "locate_text_encoder", "locate_unet", "locate_vae",
    "locate_vision_tower", "locate_weights",
]  # fmt: skip

TEXT_COMPONENTS = ("text_encoder", "text_encoder_2")
# Component -> prefix of our names; `get_component_prefixes` adds text encoders.
OUR_PREFIXES = {
    "unet": "unet.", "vae": "autoencoder.",
    "image_encoder": "conditioner.image.clip.", "depth_estimator": "conditioner.depth.",
}  # fmt: skip

VAE_RULES = (  # (pattern, replacement), as for `replace_all`
    (r"\bmid\.attn_1\b", "mid_block.attentions.0"),
    (r"\bmid\.block_1\b", "mid_block.resnets.0"),
    (r"\bmid\.block_2\b", "mid_block.resnets.1"),
    (r"\bdown\.(\d+)\.", r"down_blocks.\1."),
    (r"(_blocks\.\d+)\.block\b", r"\1.resnets"),
    (r"(_blocks\.\d+)\.attn\b", r"\1.attentions"),
    (r"(_blocks\.\d+)\.(down|up)sample\b", r"\1.\2samplers.0"),
    (r"\bnin_shortcut\b", "conv_shortcut"),
    (r"\bnorm_out\b", "conv_norm_out"),
    (r"(attentions\.\d+)\.norm\b", r"\1.group_norm"),
    (r"(attentions\.\d+)\.([qkv])\b", r"\1.to_\2"),
    (r"(attentions\.\d+)\.proj_out\b", r"\1.to_out.0"),
)
# Layers of the autoencoder's attention: diffusers' name -> its name in older diffusers.
OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
VISION_TOWER_RULES = (
    (r"^class_embedding", "embeddings.class_embedding"),
    (r"^positional_embedding", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),  # sic
    (r"^ln_post\.", "post_layernorm."),
)
BACKBONE, NECK = "dpt.embeddings.backbone.bit.", "neck.reassemble_stage."
DEPTH_RULES = (
    (r"pretrained\.model\.patch_embed\.backbone\.", BACKBONE),
    (r"bit\.stem\.conv", "bit.embedder.convolution"),
    (r"bit\.stem\.norm", "bit.embedder.norm"),
    (r"bit\.stages\.(\d+)\.blocks", r"bit.encoder.stages.\1.layers"),
    (r"pretrained\.model\.patch_embed\.proj", "dpt.embeddings.projection"),
    (r"pretrained\.model\.cls_token", "dpt.embeddings.cls_token"),
    (r"pretrained\.model\.pos_embed", "dpt.embeddings.position_embeddings"),
    (r"pretrained\.model\.norm", "dpt.layernorm"),
    (r"pretrained\.model\.blocks", "dpt.encoder.layer"),
    (r"(layer\.\d+)\.norm1", r"\1.layernorm_before"),
    (r"(layer\.\d+)\.norm2", r"\1.layernorm_after"),
    (r"(layer\.\d+)\.attn\.proj", r"\1.attention.output.dense"),
    (r"(layer\.\d+)\.attn\.qkv", r"\1.attention.attention.qkv"),
    (r"(layer\.\d+)\.mlp\.fc1", r"\1.intermediate.dense"),
    (r"(layer\.\d+)\.mlp\.fc2", r"\1.output.dense"),
    (r"pretrained\.act_postprocess3\.0\.project", NECK + "readout_projects.2"),
    (r"pretrained\.act_postprocess4\.0\.project", NECK + "readout_projects.3"),
    (r"pretrained\.act_postprocess3\.3", NECK + "layers.2.projection"),
    (r"pretrained\.act_postprocess4\.3", NECK + "layers.3.projection"),
    (r"pretrained\.act_postprocess4\.4", NECK + "layers.3.resize"),
    (r"scratch\.output_conv", "head.head"),
    # transformers' DPT numbers levels from 0, and fusion layers from coarse to fine.
    *((rf"scratch\.layer{i}_rn", f"neck.convs.{i - 1}") for i in (1, 2, 3, 4)),
    *((rf"scratch\.refinenet{i}", f"neck.fusion_stage.layers.{4 - i}") for i in (1, 2, 3, 4)),
    (r"(layers\.\d)\.out_conv", r"\1.projection"),
    (r"resConfUnit([12])\.conv([12])", r"residual_layer\1.convolution\2"),
)

INNER_PREFIX = "inner_model."  # prefix of the x2 latent upscaler, as of k-diffusion's wrappers
LATENT_UPSCALER_LAYER = re.compile(
    rf"{re.escape(INNER_PREFIX)}u_net\.([du])_blocks\.(\d+)\.(\d+)\."
)
# Our layer -> diffusers', outside of the levels.
LATENT_UPSCALER_OUTER_LAYERS = {
    "proj_in": "conv_in", "proj_out": "conv_out", "timestep_embed": "time_proj",
    "mapping.0": "time_embedding.linear_1", "mapping.2": "time_embedding.linear_2",
    "mapping_cond": "time_embedding.cond_proj",
}  # fmt: skip
# By type of block (residual block, self-attention or cross-attention): our layer -> diffusers'
# layers; our layer is the concatenation of several.
LATENT_UPSCALER_BLOCK_LAYERS = {
    "resnets": {
        "main.0.mapper": "norm1.linear", "main.2": "conv1", "main.4.mapper": "norm2.linear",
        "main.6": "conv2", "skip": "conv_shortcut",
    },
    "self": {
        "norm_in.mapper": "norm1.linear", "qkv_proj": "attn1.to_q attn1.to_k attn1.to_v",
        "out_proj": "attn1.to_out.0",
    },
    "cross": {
        "norm_dec.mapper": "norm2.linear", "norm_enc": "attn2.norm_cross", "q_proj": "attn2.to_q",
        "kv_proj": "attn2.to_k attn2.to_v", "out_proj": "attn2.to_out.0",
    },
}  # fmt: skip
# Weight in a block -> type of block.
LATENT_UPSCALER_BLOCK_TYPES = {
    "main.2.weight": "resnets", "qkv_proj.weight": "self", "kv_proj.weight": "cross"
}  # fmt: skip
Form = Literal["same", "matrix", "vector", "transposed"]


@dataclass(frozen=True)
class Location:
    """The location of one of our tensors in a component: one tensor, or several to concatenate.

    Args:
        keys: Names of diffusers' tensors.
        form: What diffusers stores: "matrix" for our 1x1 convolution, "vector" for our column
            (n, 1), "transposed" for the transpose of our matrix, or "same".
    """

    keys: tuple[str, ...]
    form: Form = "same"

    def to_diffusers(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Return diffusers' keys and tensors, which are views of our tensor."""
        if self.form == "matrix":
            value = value.flatten(1)
        elif self.form == "vector":
            value = value.flatten()
        elif self.form == "transposed":
            value = value.T
        return zip(self.keys, value.chunk(len(self.keys)), strict=True)

    def from_diffusers(self, component_state: Mapping[str, Tensor]) -> Tensor:
        """Return our tensor from diffusers' tensors; a copy only if there are several."""
        tensors = [component_state[key] for key in self.keys]
        value = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if self.form == "transposed":
            value = value.T
        return value.reshape(-1, 1) if self.form == "vector" else value


def convert_to_diffusers(
    locations: Mapping[str, Location], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return views of our tensors under diffusers' names; those without a location are left out."""
    return {
        key: tensor
        for name, value in state.items()
        if name in locations
        for key, tensor in locations[name].to_diffusers(value)
    }


def convert_from_diffusers(
    locations: Mapping[str, Location], component_state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return diffusers' tensors under our names; names with missing tensors are left out.

    1x1 convolutions stay matrices, which `match_weights` reshapes.
    """
    return {
        name: location.from_diffusers(component_state)
        for name, location in locations.items()
        if all(key in component_state for key in location.keys)
    }


def get_component_prefixes(model: nn.Module) -> dict[str, str]:
    """Return the prefix of our names by component, for a model or a component of one."""
    if isinstance(model, AutoencoderKL):
        return {"vae": ""}
    if isinstance(model, UNet | LatentUpscalerUNet):
        return {"unet": ""}
    if not isinstance(model, LatentDiffusion):
        return {}
    if isinstance(model.conditioner.text, CLIPImage):
        # SD Image Variations: this CLIP takes the place of the text encoder.
        return {"unet": "unet.", "vae": "autoencoder.", "image_encoder": TEXT_PREFIX}
    return OUR_PREFIXES | {
        get_text_component(encoder): f"conditioner.{name}."
        for name, encoder in model.conditioner.encoders.items()
        if isinstance(encoder, TextEncoder)
    }


def get_text_component(encoder: TextEncoder) -> str:
    """Return the component of a text encoder: "text_encoder_2" for SDXL's OpenCLIP."""
    has_pooled_output = isinstance(encoder, OpenCLIPText) and encoder.always_return_pooled
    return "text_encoder_2" if has_pooled_output else "text_encoder"


def locate_weights(model: nn.Module) -> dict[str, dict[str, Location]]:
    """Return the locations of a model's tensors by component, then by our name.

    Tensors that diffusers does not have are left out.
    """
    names = list(model.state_dict())
    encoders = model.conditioner.encoders if isinstance(model, LatentDiffusion) else {}
    unused = tuple(
        f"conditioner.{encoder_name}.{name}"
        for encoder_name, encoder in encoders.items()
        for name in encoder.unused_weights
    )
    names = [name for name in names if not name.startswith(unused)]
    components = {}
    for component, prefix in get_component_prefixes(model).items():
        inner_names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if locations := LOCATORS[component](inner_names):
            components[component] = {prefix + n: location for n, location in locations.items()}
    return components


def locate_unet(names: Iterable[str]) -> dict[str, Location]:
    """Locate the UNet's tensors."""
    names = list(names)
    if any(name.startswith(INNER_PREFIX) for name in names):
        return _locate_latent_upscaler(names)
    return {name: Location((key,)) for name, key in rename_unet_layers(names).items()}


def _locate_latent_upscaler(names: Sequence[str]) -> dict[str, Location]:
    """Locate the tensors of the x2 latent upscaler, from names in the order of the blocks.

    The embedding of noise levels has no location: diffusers does not have it.
    """
    blocks: dict[str, tuple[str, str]] = {}  # our prefix -> type, diffusers' prefix
    num_resnets: Counter[str] = Counter()  # by level
    for name in names:
        match = LATENT_UPSCALER_LAYER.match(name)
        if match and (block_type := LATENT_UPSCALER_BLOCK_TYPES.get(name[match.end() :])):
            level = f"{'down' if match[1] == 'd' else 'up'}_blocks.{match[2]}"
            group = "resnets" if block_type == "resnets" else "attentions"
            if group == "resnets":  # attentions have the index of the resnet before them
                num_resnets[level] += 1
            blocks[match[0]] = block_type, f"{level}.{group}.{num_resnets[level] - 1}"
    locations: dict[str, Location] = {}
    for name in names:
        match = LATENT_UPSCALER_LAYER.match(name)
        layer, _, parameter = name.removeprefix(match[0] if match else INNER_PREFIX).rpartition(".")
        if match and match[0] in blocks:  # others are resampling filters
            block_type, prefix = blocks[match[0]]
            form: Form = "matrix" if layer.endswith("_proj") and parameter == "weight" else "same"
            layers = LATENT_UPSCALER_BLOCK_LAYERS[block_type][layer].split()
            locations[name] = Location(tuple(f"{prefix}.{n}.{parameter}" for n in layers), form)
        elif layer in LATENT_UPSCALER_OUTER_LAYERS:
            form = "vector" if layer == "timestep_embed" else "same"
            key = f"{LATENT_UPSCALER_OUTER_LAYERS[layer]}.{parameter}"
            locations[name] = Location((key,), form)
    return locations


def locate_vae(names: Iterable[str]) -> dict[str, Location]:
    """Locate the autoencoder's tensors."""
    names = list(names)
    num_levels = len({match[0] for name in names if (match := re.match(r"decoder\.up\.\d+", name))})
    locations = {}
    for name in names:
        # Our decoder's levels are counted from the full resolution, diffusers' from the latent's.
        key = re.sub(r"\bup\.(\d+)", lambda m: f"up_blocks.{num_levels - 1 - int(m[1])}", name)
        key = replace_all(VAE_RULES, key)
        is_matrix = re.search(r"\.to_\w+(\.0)?\.weight$", key)
        locations[name] = Location((key,), "matrix" if is_matrix else "same")
    return locations


def locate_text_encoder(names: Iterable[str]) -> dict[str, Location]:
    """Locate a text encoder's tensors."""
    locations = {}
    for name, key in rename_text_layers(names).items():
        if key == "text_projection":
            locations[name] = Location(("text_projection.weight",), "transposed")
        elif key.startswith("text_model."):
            locations[name] = Location(_split_qkv(key))
    return locations


def locate_vision_tower(names: Iterable[str]) -> dict[str, Location]:
    """Locate a vision tower's tensors, `visual.…` or `model.visual.…`."""
    locations = {}
    for name in names:
        network, _, inner_name = name.removeprefix("model.").partition(".")
        if name.endswith("visual.proj"):
            locations[name] = Location(("visual_projection.weight",), "transposed")
        elif network == "visual":
            key = replace_all(VISION_TOWER_RULES, inner_name)
            if key.startswith("transformer."):  # the blocks are named as in a text encoder
                key = rename_text_layers([key])[key].removeprefix("text_model.")
            locations[name] = Location(_split_qkv(f"vision_model.{key}"))
    return locations


def locate_depth_estimator(names: Iterable[str]) -> dict[str, Location]:
    """Locate the depth estimator's tensors."""
    locations = {}
    for name in names:
        key = replace_all(DEPTH_RULES, name.removeprefix("model."))
        if key.startswith("pretrained."):  # the unused classification head
            continue
        layers = ("query", "key", "value") if ".qkv." in key else ("qkv",)
        locations[name] = Location(tuple(key.replace("qkv", layer) for layer in layers))
    return locations


def _split_qkv(name: str) -> tuple[str, ...]:
    """Return transformers' q_proj, k_proj and v_proj for a fused in_proj; keep other names."""
    match = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
    return tuple(f"{match[1]}.{x}_proj.{match[2]}" for x in "qkv") if match else (name,)


LOCATORS = {  # function by component
    "unet": locate_unet,
    "vae": locate_vae,
    "text_encoder": locate_text_encoder,
    "text_encoder_2": locate_text_encoder,
    "image_encoder": locate_vision_tower,
    "depth_estimator": locate_depth_estimator,
}
