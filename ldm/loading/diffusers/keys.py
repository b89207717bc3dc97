"""Where each tensor of ours lives in the components of a diffusers folder, and in which form.

    unet.input_blocks.1.0.in_layers.2.weight         unet: down_blocks.0.resnets.0.conv1.weight
    autoencoder.encoder.mid.attn_1.q.weight          vae: ….to_q.weight, a matrix
    conditioner.text.model.….attn.in_proj_weight     text_encoder: three thirds
    conditioner.text.model.logit_scale               nowhere

One table, read in both directions: which names there are is known from a model of ours on the meta
device, so the way back needs no inverse rules.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.encoders.image import CLIPImage
from ldm.encoders.text import OpenCLIPText
from ldm.loading.diffusers.names import text_layers, unet_layers
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL

__all__ = [
    "Location",
    "depth_keys",
    "gather_weights",
    "locate_weights",
    "scatter_weights",
    "text_keys",
    "unet_keys",
    "vae_keys",
    "vision_keys",
]

Names = Iterable[str]
REST = "rest"  # the component of what diffusers has no place for
THIRDS = ("q", "k", "v")
TEXT = "conditioner.text."
EYE = "conditioner.image.clip."
DEPTH = "conditioner.depth."

VAE = (
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
# How diffusers called the attention of autoencoders before 0.15; folders of that time remain.
VAE_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
VISION = (
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    (r"conv1\.", "embeddings.patch_embedding."),
    (r"ln_pre\.", "pre_layrnorm."),  # sic
    (r"ln_post\.", "post_layernorm."),
)
BIT, NECK = "dpt.embeddings.backbone.bit.", "neck.reassemble_stage."
MIDAS = (
    (r"pretrained\.model\.patch_embed\.backbone\.stem\.conv", BIT + "embedder.convolution"),
    (r"pretrained\.model\.patch_embed\.backbone\.stem\.norm", BIT + "embedder.norm"),
    (
        r"pretrained\.model\.patch_embed\.backbone\.stages\.(\d+)\.blocks",
        BIT + r"encoder.stages.\1.layers",
    ),
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
    # Theirs count levels from 0, and fuse from coarse to fine.
    *((rf"scratch\.layer{i}_rn", f"neck.convs.{i - 1}") for i in (1, 2, 3, 4)),
    *((rf"scratch\.refinenet{i}", f"neck.fusion_stage.layers.{4 - i}") for i in (1, 2, 3, 4)),
    (r"(layers\.\d)\.out_conv", r"\1.projection"),
    (r"resConfUnit([12])\.conv([12])", r"residual_layer\1.convolution\2"),
)


@dataclass(frozen=True)
class Location:
    """Where a tensor of ours lives: in a component, under one name, or in thirds under three.

    form: "flat" is a 1x1 convolution of ours and a matrix of theirs, "turned" the transpose.
    """

    names: tuple[str, ...]
    form: Literal["same", "flat", "turned"] = "same"
    component: str = ""

    def put(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Our tensor as theirs: views, nothing is copied."""
        if self.form == "flat":
            value = value.flatten(1)
        elif self.form == "turned":
            value = value.T
        return zip(self.names, value.chunk(len(self.names)), strict=True)

    def take(self, theirs: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Their tensors as ours, copied only where several become one."""
        parts = [theirs[name] for name in self.names]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.form == "turned":
            value = value.T
        fits = self.form == "flat" and value.numel() == like.numel()
        return value.reshape(like.shape) if fits else value


def scatter_weights(
    places: Mapping[str, Location], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors that have a place, under their names; views."""
    return {n: v for k, value in state.items() if k in places for n, v in places[k].put(value)}


def gather_weights(
    places: Mapping[str, Location], theirs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Theirs as ours; what is missing there is left out. wanted: our names, and shapes."""
    return {
        name: place.take(theirs, wanted[name])
        for name, place in places.items()
        if all(part in theirs for part in place.names)
    }


def locate_weights(model: nn.Module) -> dict[str, Location]:
    """Of every tensor of a model (or of an autoencoder alone) that has a place, by our name."""
    names = list(model.state_dict())
    if isinstance(model, AutoencoderKL):
        return _within("", "vae", vae_keys, names)
    assert isinstance(model, LatentDiffusion)
    found = _within("unet.", "unet", unet_keys, names) | _within(
        "autoencoder.", "vae", vae_keys, names
    )
    text_encoder = model.conditioner.text
    if isinstance(text_encoder, CLIPImage):
        found |= _within(TEXT, "image_encoder", vision_keys, names)
    else:
        kept = used_text_blocks(text_encoder)
        found |= _within(TEXT, "text_encoder", lambda names: text_keys(names, kept), names)
    found |= _within(EYE, "image_encoder", vision_keys, names)
    return found | _within(DEPTH, "depth_estimator", depth_keys, names)


def used_text_blocks(encoder: nn.Module | None) -> int | None:
    """How many blocks of a text tower are used, where that is not all of them."""
    if isinstance(encoder, OpenCLIPText) and encoder.layer == "penultimate":
        return len(encoder.model.transformer["resblocks"]) - 1  # type: ignore[arg-type]
    return None


def unet_keys(names: Names) -> dict[str, Location]:
    return {ours: Location((theirs,)) for ours, theirs in unet_layers(names).items()}


def vae_keys(names: Names) -> dict[str, Location]:
    names = list(names)
    levels = len({match[0] for name in names if (match := re.match(r"decoder\.up\.\d+", name))})
    found = {}
    for name in names:
        # Ours count the decoder's levels from the full size, theirs from the latent's.
        theirs = re.sub(r"\bup\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", name)
        for pattern, word in VAE:
            theirs = re.sub(pattern, word, theirs)
        is_matrix = re.search(r"\.to_\w+(\.0)?\.weight$", theirs)
        found[name] = Location((theirs,), "flat" if is_matrix else "same")
    return found


def text_keys(names: Names, blocks: int | None = None) -> dict[str, Location]:
    """blocks: theirs have so many, ours may have more."""
    found = {}
    for ours, theirs in text_layers(names).items():
        block = re.search(r"\.layers\.(\d+)\.", theirs)
        is_used = block is None or blocks is None or int(block[1]) < blocks
        if theirs.startswith("text_model.") and is_used:
            found[ours] = Location(_thirds(theirs))
    return found


def vision_keys(names: Names) -> dict[str, Location]:
    found, ours = {}, "model.visual."
    for name in names:
        tail = name.removeprefix(ours)
        if tail == name:
            continue
        if tail == "proj":
            found[name] = Location(("visual_projection.weight",), "turned")
            continue
        for pattern, word in VISION:
            tail = re.sub(rf"^{pattern}", word, tail)
        if tail.startswith("transformer."):  # the blocks are those of a text tower
            tail = text_layers([tail])[tail].removeprefix("text_model.")
        found[name] = Location(_thirds(f"vision_model.{tail}"))
    return found


def depth_keys(names: Names) -> dict[str, Location]:
    found = {}
    for name in names:
        theirs = name.removeprefix("model.")
        for pattern, word in MIDAS:
            theirs = re.sub(pattern, word, theirs)
        if not theirs.startswith("pretrained."):  # the head of a classifier is left over there
            thirds = ("query", "key", "value") if ".qkv." in theirs else ("qkv",)
            found[name] = Location(tuple(theirs.replace("qkv", third) for third in thirds))
    return found


def _thirds(name: str) -> tuple[str, ...]:
    """Queries, keys and values have layers of their own in transformers."""
    match = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
    return tuple(f"{match[1]}.{third}_proj.{match[2]}" for third in THIRDS) if match else (name,)


def _within(
    prefix: str, component: str, table: Callable[[list[str]], dict[str, Location]], names: list[str]
) -> dict[str, Location]:
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    found = table(inner) if inner else {}
    return {prefix + name: replace(place, component=component) for name, place in found.items()}
