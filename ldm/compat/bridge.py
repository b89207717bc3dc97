"""Bridges between models of `ldm.load` and the original's, which share their weights.

    old = from_modern(ldm.load("v1-inference.yaml", "sd-v1-4.ckpt"))
    image = ldm.txt2img(to_modern(old), ["a red apple"])

Both build the other classes around the same tensors: what one of the two is trained to, the other
has. Models of Stable Diffusion 1 and 2 with a text encoder, and their inpainting models, have both.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.compat import autoencoder as old_autoencoder, encoders as old_encoders
from ldm.compat.ddpm import LatentDiffusion, LatentInpaintDiffusion
from ldm.compat.latent_diffusion import freeze
from ldm.compat.openaimodel import UNetModel
from ldm.conditioning import Conditioner, Encoder
from ldm.diffusion.schedule import Schedule
from ldm.encoders.lowres import MaskedImage
from ldm.encoders.text import CLIPText, OpenCLIPText
from ldm.encoders.towers import quick_gelu
from ldm.loading.build import meta_device
from ldm.model import LatentDiffusion as ModernModel
from ldm.nets.autoencoder import AutoencoderKL, Layout
from ldm.nets.unet import UNet
from ldm.runtime.errors import WrongFamily

__all__ = ["from_modern", "to_modern"]

NOTHING = {"target": "torch.nn.Identity"}
ENCODERS = ({"text"}, {"text", "masked"})  # of models that have an old class here


def from_modern(model: ModernModel) -> LatentDiffusion:
    """Return a model of the original's class over the weights of one of `ldm.load`.

    Raises:
        WrongFamily: The model has no counterpart here.
    """
    names = set(model.conditioner.encoders)
    schedule = model.schedule
    if names not in ENCODERS or not isinstance(model.autoencoder, AutoencoderKL):
        found = ", ".join(sorted(names)) or "none"
        raise WrongFamily(
            f"only models with a text encoder, and inpainting models, can be bridged; the "
            f"encoders of this one: {found}"
        )
    is_inpainting = "masked" in names
    options: dict[str, Any] = {
        "unet_config": dict(NOTHING),
        "first_stage_config": NOTHING,
        "cond_stage_config": NOTHING,
        "timesteps": len(schedule),
        "given_betas": schedule.betas.numpy(),
        "parameterization": model.parameterization,
        "scale_factor": model.scale_factor,
        "image_size": model.image_size,
        "channels": model.channels,
        "conditioning_key": "hybrid" if is_inpainting else "crossattn",
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "use_ema": False,
    }
    old = LatentInpaintDiffusion(**options) if is_inpainting else LatentDiffusion(**options)
    old.model.diffusion_model = _old_unet(model.unet)
    old.first_stage_model = freeze(_old_autoencoder(model.autoencoder))
    old.cond_stage_model = freeze(_old_text(model.conditioner.encoders["text"]))
    old.num_downs = len(model.autoencoder.layout.ch_mult) - 1
    return old.to(model.device).eval()


def to_modern(model: LatentDiffusion) -> ModernModel:
    """Return a model for `ldm.txt2img` and its like over the weights of an old one.

    Branches that a program has added, such as control networks, are left out.

    Raises:
        WrongFamily: The model has no counterpart here.
    """
    encoders: dict[str, Encoder] = {"text": _modern_text(model.cond_stage_model)}
    key = model.model.conditioning_key
    if isinstance(model, LatentInpaintDiffusion):
        encoders["masked"] = MaskedImage()
    elif key != "crossattn":
        raise WrongFamily(f"a model with conditioning_key `{key}` cannot be bridged")
    betas = model.exact_betas
    if not torch.equal(betas.float(), model.betas.cpu()):
        betas = model.betas.cpu().double()
    modern = ModernModel(
        unet=_modern_unet(model.model.diffusion_model),
        autoencoder=_modern_autoencoder(model.first_stage_model),
        conditioner=Conditioner(join="tokens", **encoders),
        schedule=Schedule(betas),
        parameterization=model.parameterization,
        scale_factor=float(model.scale_factor),
        image_size=model.image_size,
    )
    return modern.eval()


def _share(new: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Let a module without memory have the tensors of another one."""
    own = new.state_dict()
    new.load_state_dict({name: weights[name] for name in own}, strict=True, assign=True)


def _old_unet(unet: nn.Module) -> UNetModel:
    if not isinstance(unet, UNet):
        raise WrongFamily(f"a {type(unet).__name__} has no counterpart in the original")
    fields = {field.name: getattr(unet, field.name) for field in dataclasses.fields(UNet)}
    for name in ("transformer_depth_middle", "transformer_depth_output", "time_cond_proj_dim"):
        if fields.pop(name) is not None:
            raise WrongFamily(f"a UNet with {name} has no counterpart in the original")
    if fields.pop("disable_middle_transformer"):
        raise WrongFamily("a UNet without middle transformer has no counterpart in the original")
    with meta_device():
        old = UNetModel(image_size=32, **fields)
    _share(old, unet.state_dict())
    old.dtype = unet.dtype
    return old.requires_grad_(False)


def _modern_unet(old: nn.Module) -> UNet:
    if not isinstance(old, UNetModel):
        raise WrongFamily(f"the UNet is a {type(old).__name__}, not a UNetModel")
    fields = {field.name: getattr(old, field.name) for field in dataclasses.fields(UNet)}
    with meta_device():
        unet = UNet(**fields)
    _share(unet, old.state_dict())
    return unet.requires_grad_(False)


def _old_autoencoder(modern: AutoencoderKL) -> old_autoencoder.AutoencoderKL:
    with meta_device():
        old = old_autoencoder.AutoencoderKL(
            dataclasses.asdict(modern.layout), NOTHING, modern.embed_dim
        )
    _share(old, modern.state_dict())
    return old


def _modern_autoencoder(old: nn.Module) -> AutoencoderKL:
    if not isinstance(old, old_autoencoder.AutoencoderKL):
        raise WrongFamily(f"the autoencoder is a {type(old).__name__}, not an AutoencoderKL")
    names = [field.name for field in dataclasses.fields(Layout)]
    ddconfig = {name: value for name, value in old.ddconfig.items() if name in names}
    with meta_device():
        modern = AutoencoderKL(ddconfig=ddconfig, embed_dim=old.embed_dim)
    _share(modern, old.state_dict())
    return modern.requires_grad_(False)


def _old_text(encoder: Encoder) -> nn.Module:
    old: nn.Module
    if isinstance(encoder, CLIPText):
        table, blocks = encoder.tower.token_embedding.weight, encoder.tower.blocks
        sizes = {
            "vocab_size": len(table),
            "hidden_size": table.shape[1],
            "intermediate_size": blocks[0].mlp["fc1"].out_features,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].self_attn.heads,
            "max_position_embeddings": encoder.length,
            "hidden_act": _name_of(blocks[0].activation),
        }
        index = encoder.blocks_run if encoder.layer == "hidden" else None
        with meta_device():
            old = old_encoders.FrozenCLIPEmbedder(
                arch=sizes, max_length=encoder.length, layer=encoder.layer, layer_idx=index
            )
    elif isinstance(encoder, OpenCLIPText):
        model = encoder.model
        arch = _open_clip_arch(
            model.token_embedding.weight,
            model.positional_embedding,
            model.text_projection,
            heads=model.blocks[0].attn.heads,
            layers=len(model.blocks),
        )
        arch["quick_gelu"] = model.blocks[0].activation is quick_gelu
        with meta_device():
            old = old_encoders.FrozenOpenCLIPEmbedder(arch, layer=encoder.layer)
    else:
        raise WrongFamily(f"the text encoder is a {type(encoder).__name__}, of no old class")
    if encoder.token_ids is not None:
        raise WrongFamily("a text encoder with a pruned vocabulary has no counterpart")
    _share(old, encoder.state_dict())
    return old


def _modern_text(old: nn.Module | None) -> CLIPText | OpenCLIPText:
    encoder: CLIPText | OpenCLIPText
    if isinstance(old, old_encoders.FrozenCLIPEmbedder):
        with meta_device():
            encoder = CLIPText(
                arch=vars(old.transformer.config),
                max_length=old.max_length,
                layer=old.layer,  # type: ignore[arg-type]
                layer_idx=old.layer_idx,
            )
    elif isinstance(old, old_encoders.FrozenOpenCLIPEmbedder):
        model = old.model
        blocks = model.transformer.resblocks
        arch = _open_clip_arch(
            model.token_embedding.weight,
            model.positional_embedding,
            model.text_projection,
            heads=blocks[0].attn.num_heads,
            layers=len(blocks),
        )
        arch["quick_gelu"] = type(blocks[0].mlp.gelu).__name__ == "QuickGELU"
        with meta_device():
            encoder = OpenCLIPText(arch=arch, layer=old.layer)  # type: ignore[arg-type]
    else:
        raise WrongFamily(f"a text encoder of class {type(old).__name__} cannot be bridged")
    _share(encoder, old.state_dict())
    return encoder


def _open_clip_arch(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    projection: torch.Tensor,
    heads: int,
    layers: int,
) -> dict[str, Any]:
    """Return the config of open_clip that tensors of these shapes have."""
    text = {
        "context_length": len(positions),
        "vocab_size": len(tokens),
        "width": tokens.shape[1],
        "heads": heads,
        "layers": layers,
    }
    return {"embed_dim": projection.shape[1], "text_cfg": text}


def _name_of(activation: Any) -> str:
    return "quick_gelu" if activation is quick_gelu else "gelu"
