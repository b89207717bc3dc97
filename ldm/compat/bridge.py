"""Conversion between models of `ldm.load` and of the original's classes.

    old = from_modern(ldm.load("v1-inference.yaml", "sd-v1-4.ckpt"))
    image = ldm.txt2img(to_modern(old), ["a red apple"])

Weights are shared, not copied: training one of the two models changes the other.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ldm.compat import autoencoder as old_autoencoder, encoders as old_encoders
from ldm.compat.ddpm import (
    ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
)
from ldm.compat.latent_diffusion import freeze
from ldm.compat.midas import MiDaSInference
from ldm.compat.openaimodel import UNetModel
from ldm.compat.upscaling import (
    AbstractLowScaleModel,
    ImageConcatWithNoiseAugmentation,
    SimpleImageConcat,
)
from ldm.conditioning import Conditioner, Encoder
from ldm.diffusion.schedule import Schedule
from ldm.encoders.depth import MiDaSDepth
from ldm.encoders.image import CLIPImage, CLIPVision, EmbeddingNoise, ImageEmbedding, OpenCLIPImage
from ldm.encoders.lowres import LowRes, MaskedImage, NoiseLevel
from ldm.encoders.text import CLIPText, OpenCLIPText
from ldm.encoders.towers import quick_gelu
from ldm.loading.build import meta_device
from ldm.model import LatentDiffusion as ModernModel
from ldm.nets.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.nets.unet import UNet
from ldm.runtime.errors import WrongFamily

__all__ = ["from_modern", "to_modern"]

PLACEHOLDER = {"target": "torch.nn.Identity"}  # config of a module that is replaced later
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class _Family:
    """A class of the original, and the encoders of conditions that its models have.

    Args:
        names: Names of the encoders in a `Conditioner`, without the text encoder.
        build_encoders: Builds these encoders from an old model.
        config_key: Keyword of the constructor of `old_class` for the config of the module that
            `add_module` replaces; None = none.
        add_module: Adds that module, from the encoders of a `Conditioner`, to an old model.
    """

    old_class: type[LatentDiffusion]
    names: frozenset[str]
    conditioning_key: str
    build_encoders: Callable[[Any], dict[str, Encoder]] = lambda old: {}
    config_key: str | None = None
    add_module: Callable[[Any, Conditioner], None] = lambda old, conditioner: None


def from_modern(model: ModernModel) -> LatentDiffusion:
    """Convert a model of `ldm.load` to one of the original's class, with the same weights.

    Raises:
        WrongFamily: The original has no class for the model.
    """
    names = frozenset(model.conditioner.encoders)
    family = next((family for family in FAMILIES if family.names | {"text"} == names), None)
    if family is None:
        encoders = ", ".join(sorted(names)) or "none"
        raise WrongFamily(f"no class of the original has these encoders: {encoders}")
    if not isinstance(model.autoencoder, AutoencoderKL):
        name = type(model.autoencoder).__name__
        raise WrongFamily(f"an autoencoder of class {name} has no counterpart in the original")
    if not isinstance(model.schedule, Schedule) or not model.schedule.uses_plain_timesteps:
        raise WrongFamily("the original's classes have plain timesteps only, this model others")
    if model.latent_mean is not None or model.latent_std is not None:
        raise WrongFamily("the original's classes have no mean and standard deviation of latents")
    more: dict[str, Any] = {} if family.config_key is None else {family.config_key: PLACEHOLDER}
    old = family.old_class(
        unet_config=dict(PLACEHOLDER),
        first_stage_config=PLACEHOLDER,
        cond_stage_config=PLACEHOLDER,
        timesteps=len(model.schedule),
        given_betas=model.schedule.betas.numpy(),
        parameterization=model.parameterization,
        scale_factor=model.scale_factor,
        image_size=model.image_size,
        channels=model.channels,
        conditioning_key=family.conditioning_key,
        first_stage_key="jpg",
        cond_stage_key="txt",
        use_ema=False,
        **more,
    )
    old.model.diffusion_model = _old_unet(model.unet)
    old.first_stage_model = freeze(_old_autoencoder(model.autoencoder))
    old.cond_stage_model = freeze(_old_text(model.conditioner.encoders["text"]))
    old.num_downs = len(model.autoencoder.config.ch_mult) - 1
    family.add_module(old, model.conditioner)
    return old.to(model.device).eval()


def to_modern(model: LatentDiffusion) -> ModernModel:
    """Convert an old model to one for `ldm.txt2img` and the other tasks, with the same weights.

    Modules that a program has added, such as control networks, are left out.

    Raises:
        WrongFamily: This package has no tasks for such a model.
    """
    key = model.model.conditioning_key
    family = next(
        (
            family
            for family in FAMILIES
            if isinstance(model, family.old_class) and family.conditioning_key == key
        ),
        None,
    )
    if family is None:
        raise WrongFamily(
            f"a {type(model).__name__} with conditioning_key `{key}` cannot be bridged"
        )
    betas = model.betas_float64
    if not torch.equal(betas.float(), model.betas.cpu()):  # a program has replaced the buffer
        betas = model.betas.cpu().double()
    encoders = {"text": _modern_text(model.cond_stage_model), **family.build_encoders(model)}
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


def _copy_sharing(module: ModuleT) -> ModuleT:
    """Copy a module, but not the memory of its tensors."""
    # deepcopy takes the copies that the memo has, by the `id` of the original.
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(module, memo)


def _share(new: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Assign tensors to a module on the meta device, without copying them."""
    names = new.state_dict()
    new.load_state_dict({name: weights[name] for name in names}, strict=True, assign=True)


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
            dataclasses.asdict(modern.config), PLACEHOLDER, modern.embed_dim
        )
    _share(old, modern.state_dict())
    return old


def _modern_autoencoder(old: nn.Module) -> AutoencoderKL:
    if not isinstance(old, old_autoencoder.AutoencoderKL):
        raise WrongFamily(f"the autoencoder is a {type(old).__name__}, not an AutoencoderKL")
    names = [field.name for field in dataclasses.fields(AutoencoderConfig)]
    ddconfig = {name: value for name, value in old.ddconfig.items() if name in names}
    with meta_device():
        modern = AutoencoderKL(ddconfig=ddconfig, embed_dim=old.embed_dim)
    _share(modern, old.state_dict())
    return modern.requires_grad_(False)


def _old_text(encoder: Encoder) -> nn.Module:
    old: nn.Module
    if isinstance(encoder, CLIPText):
        blocks = encoder.tower.blocks
        vocab_size, hidden_size = encoder.tower.token_embedding.weight.shape
        sizes = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": blocks[0].mlp["fc1"].out_features,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].self_attn.heads,
            "max_position_embeddings": encoder.length,
            "hidden_act": "quick_gelu" if blocks[0].activation is quick_gelu else "gelu",
        }
        index = encoder.blocks_run if encoder.layer == "hidden" else None
        with meta_device():
            old = old_encoders.FrozenCLIPEmbedder(
                arch=sizes, max_length=encoder.length, layer=encoder.layer, layer_idx=index
            )
    elif isinstance(encoder, OpenCLIPText):
        model = encoder.model
        arch = _open_clip_arch(model, model.blocks[0].attn.heads, len(model.blocks))
        arch["quick_gelu"] = model.blocks[0].activation is quick_gelu
        with meta_device():
            old = old_encoders.FrozenOpenCLIPEmbedder(arch, layer=encoder.layer)
    else:
        raise WrongFamily(f"the text encoder is a {type(encoder).__name__}, of no old class")
    if encoder.token_ids is not None:
        raise WrongFamily("a text encoder with a pruned vocabulary has no counterpart")
    if encoder.added_embeddings:
        tokens = ", ".join(encoder.added_embeddings)
        raise WrongFamily(f"textual inversions have no counterpart, this model has: {tokens}")
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
        arch = _open_clip_arch(model, blocks[0].attn.num_heads, len(blocks))
        arch["quick_gelu"] = type(blocks[0].mlp.gelu).__name__ == "QuickGELU"
        with meta_device():
            encoder = OpenCLIPText(arch=arch, layer=old.layer)  # type: ignore[arg-type]
    else:
        raise WrongFamily(f"a text encoder of class {type(old).__name__} cannot be bridged")
    _share(encoder, old.state_dict())
    if isinstance(old, old_encoders.FrozenCLIPEmbedder):  # textual inversions of a program
        table = encoder.embedding_table
        for token, token_id in old.tokenizer.added_tokens_encoder.items():
            encoder.added_embeddings[token.lower()] = table[token_id : token_id + 1]
    return encoder


def _open_clip_arch(model: Any, heads: int, layers: int) -> dict[str, Any]:
    """Return the open_clip config of a text model of `ldm.encoders` or of open_clip."""
    vocab_size, width = model.token_embedding.weight.shape
    text = {
        "context_length": len(model.positional_embedding),
        "vocab_size": vocab_size,
        "width": width,
        "heads": heads,
        "layers": layers,
    }
    return {"embed_dim": model.text_projection.shape[1], "text_cfg": text}


def _add_depth(old: LatentDepth2ImageDiffusion, conditioner: Conditioner) -> None:
    network = conditioner.get(MiDaSDepth).model
    if network is None:
        raise WrongFamily("a depth model without MiDaS has no counterpart in the original")
    old.depth_model = MiDaSInference.of_network(_copy_sharing(network))


def _depth_encoders(old: LatentDepth2ImageDiffusion) -> dict[str, Encoder]:
    if not isinstance(old.depth_model, MiDaSInference):
        raise WrongFamily(f"a depth model of class {type(old.depth_model).__name__}, not MiDaS")
    depth = MiDaSDepth(model_type=None)
    depth.model = _copy_sharing(old.depth_model.model)
    return {"depth": depth}


def _add_low_scale(old: LatentUpscaleDiffusion, conditioner: Conditioner) -> None:
    lowres = conditioner.get(LowRes)
    old.low_scale_key = lowres.low_scale_key
    low_scale: AbstractLowScaleModel = SimpleImageConcat()
    if lowres.schedule is not None:
        low_scale = ImageConcatWithNoiseAugmentation({}, lowres.max_noise_level)
        _copy_schedule(low_scale, lowres, lowres.schedule)
    old.low_scale_model = freeze(low_scale)


def _low_scale_encoders(old: LatentUpscaleDiffusion) -> dict[str, Encoder]:
    low_scale = old.low_scale_model
    lowres = LowRes(max_noise_level=low_scale.max_noise_level, low_scale_key=old.low_scale_key)
    if isinstance(low_scale, ImageConcatWithNoiseAugmentation):
        _copy_schedule(lowres, low_scale, low_scale.schedule)
    return {"lowres": lowres, "level": NoiseLevel()}


def _add_embedder(old: ImageEmbeddingConditionedLatentDiffusion, conditioner: Conditioner) -> None:
    image = conditioner.get(ImageEmbedding)
    clip, noise = image.clip, image.noise
    is_openai = isinstance(clip, CLIPImage)
    with meta_device():
        embedder = (
            old_encoders.ClipImageEmbedder(antialias=clip.antialias)
            if is_openai
            else old_encoders.FrozenOpenCLIPImageEmbedder(antialias=clip.antialias)
        )
    embedder.model, embedder.blur = _copy_sharing(clip.model), clip.blur
    augmentor = old_encoders.CLIPEmbeddingNoiseAugmentation(
        {}, noise.max_noise_level, timestep_dim=noise.width
    )
    augmentor.data_mean, augmentor.data_std = noise.get_statistics()
    _copy_schedule(augmentor, noise, noise.schedule)
    old.embed_key = image.cache_key or "jpg"
    old.embedder, old.noise_augmentor = freeze(embedder), freeze(augmentor)


def _embedder_encoders(old: ImageEmbeddingConditionedLatentDiffusion) -> dict[str, Encoder]:
    embedder, augmentor = old.embedder, old.noise_augmentor
    if not isinstance(embedder, CLIPVision):
        raise WrongFamily(f"an embedder of class {type(embedder).__name__} cannot be bridged")
    if not isinstance(augmentor, old_encoders.CLIPEmbeddingNoiseAugmentation):
        raise WrongFamily("a model of image embeddings without noise augmentation")
    with meta_device():
        is_openai = isinstance(embedder, CLIPImage)
        clip: CLIPVision = CLIPImage() if is_openai else OpenCLIPImage()
    clip.model = _copy_sharing(embedder.model)
    clip.antialias, clip.blur = embedder.antialias, embedder.blur
    width = augmentor.data_mean.shape[1]
    noise = EmbeddingNoise(timestep_dim=width, max_noise_level=augmentor.max_noise_level)
    noise.set_statistics(augmentor.data_mean, augmentor.data_std)
    noise.schedule = augmentor.schedule
    _copy_schedule(noise, augmentor, augmentor.schedule)
    return {"image": ImageEmbedding(clip=clip, noise=noise, embedding_key=old.embed_key)}


def _copy_schedule(new: Any, module: nn.Module, schedule: Schedule) -> None:
    """Copy the noise schedule of a module, and its tables, to another one."""
    new.schedule = schedule
    for name in schedule.buffers():
        if name in module._buffers:
            new.register_buffer(name, module.get_buffer(name))


FAMILIES = (
    _Family(
        LatentInpaintDiffusion,
        frozenset({"masked"}),
        "hybrid",
        lambda old: {"masked": MaskedImage()},
    ),
    _Family(
        LatentDepth2ImageDiffusion,
        frozenset({"depth"}),
        "hybrid",
        _depth_encoders,
        "depth_stage_config",
        _add_depth,
    ),
    _Family(
        LatentUpscaleDiffusion,
        frozenset({"lowres", "level"}),
        "hybrid-adm",
        _low_scale_encoders,
        "low_scale_config",
        _add_low_scale,
    ),
    _Family(
        ImageEmbeddingConditionedLatentDiffusion,
        frozenset({"image"}),
        "crossattn-adm",
        _embedder_encoders,
        "embedder_config",
        _add_embedder,
    ),
    _Family(LatentDiffusion, frozenset(), "crossattn"),
)
