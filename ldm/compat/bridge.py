"""Convert models between the class of `ldm.load` (modern) and the original's classes (compat).

    model = from_modern(ldm.load("v1-inference.yaml", "sd-v1-4.ckpt"))
    image = ldm.txt2img(to_modern(model), ["a red apple"])

Weights are shared, not copied: training one of the two models changes the other.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ldm.compat import encoders as compat_encoders
from ldm.compat.autoencoder import AutoencoderKL as CompatAutoencoderKL
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
from ldm.encoders.concat_images import LowResImage, MaskedImage, NoiseLevel
from ldm.encoders.depth import MiDaSDepth
from ldm.encoders.image import CLIPImage, CLIPVision, EmbeddingNoise, ImageEmbedding, OpenCLIPImage
from ldm.encoders.text import CLIPText, OpenCLIPText
from ldm.encoders.towers import quick_gelu
from ldm.loading.build import meta_device
from ldm.model import LatentDiffusion as ModernLatentDiffusion
from ldm.nets.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.nets.unet import UNet
from ldm.runtime.errors import WrongFamily

__all__ = ["from_modern", "to_modern"]

PLACEHOLDER_CONFIG = {"target": "torch.nn.Identity"}  # for a module that is replaced later
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """A class of the original, and how to convert the encoders of its models.

    Args:
        encoder_names: Names of the encoders in the `Conditioner`, except the text encoder.
        build_encoders: (compat model) -> these encoders by name.
        config_key: Constructor argument of `compat_class` for the config of the module that
            `add_module` sets; None = no such module.
        add_module: Sets this module of a compat model, built from a `Conditioner`.
    """

    compat_class: type[LatentDiffusion]
    encoder_names: frozenset[str]
    conditioning_key: str
    build_encoders: Callable[[Any], dict[str, Encoder]] = lambda model: {}
    config_key: str | None = None
    add_module: Callable[[Any, Conditioner], None] = lambda model, conditioner: None


def from_modern(model: ModernLatentDiffusion) -> LatentDiffusion:
    """Convert a model of `ldm.load` to the original's class, with shared weights.

    Raises:
        WrongFamily: The original has no class for the model.
    """
    names = frozenset(model.conditioner.encoders)
    conversion = next((c for c in CONVERSIONS if c.encoder_names | {"text"} == names), None)
    if conversion is None:
        encoders = ", ".join(sorted(names)) or "none"
        raise WrongFamily(f"no class of the original has these encoders: {encoders}")
    if not isinstance(model.autoencoder, AutoencoderKL):
        name = type(model.autoencoder).__name__
        raise WrongFamily(f"an autoencoder of class {name} has no counterpart in the original")
    if not isinstance(model.schedule, Schedule) or not model.schedule.uses_plain_timesteps:
        raise WrongFamily("a schedule with timestep options of sgm has no counterpart")
    if model.latent_mean is not None or model.latent_std is not None:
        raise WrongFamily("a mean and standard deviation of latents have no counterpart")
    configs: dict[str, Any] = {}
    if conversion.config_key is not None:
        configs[conversion.config_key] = PLACEHOLDER_CONFIG
    compat_model = conversion.compat_class(
        unet_config=dict(PLACEHOLDER_CONFIG),
        first_stage_config=PLACEHOLDER_CONFIG,
        cond_stage_config=PLACEHOLDER_CONFIG,
        timesteps=len(model.schedule),
        given_betas=model.schedule.betas.numpy(),
        parameterization=model.parameterization,
        scale_factor=model.scale_factor,
        image_size=model.image_size,
        channels=model.channels,
        conditioning_key=conversion.conditioning_key,
        first_stage_key="jpg",
        cond_stage_key="txt",
        use_ema=False,
        **configs,
    )
    compat_model.model.diffusion_model = _to_compat_unet(model.unet)
    compat_model.first_stage_model = freeze(_to_compat_autoencoder(model.autoencoder))
    text_encoder = _to_compat_text_encoder(model.conditioner.encoders["text"])
    compat_model.cond_stage_model = freeze(text_encoder)
    compat_model.num_downs = len(model.autoencoder.config.ch_mult) - 1
    conversion.add_module(compat_model, model.conditioner)
    return compat_model.to(model.device).eval()


def to_modern(model: LatentDiffusion) -> ModernLatentDiffusion:
    """Convert a model of the original's class to one for `ldm.txt2img`, with shared weights.

    Modules that third-party code has added, such as control networks, are left out.

    Raises:
        WrongFamily: The model, or a module of it, has no counterpart in this package.
    """
    key = model.model.conditioning_key
    candidates = (c for c in CONVERSIONS if isinstance(model, c.compat_class))
    conversion = next((c for c in candidates if c.conditioning_key == key), None)
    if conversion is None:
        name = type(model).__name__
        raise WrongFamily(f"a {name} with conditioning_key `{key}` cannot be converted")
    betas = model.betas_float64
    if not torch.equal(betas.float(), model.betas.cpu()):  # the buffer has been replaced
        betas = model.betas.cpu().double()
    text_encoder = _to_modern_text_encoder(model.cond_stage_model)
    modern = ModernLatentDiffusion(
        unet=_to_modern_unet(model.model.diffusion_model),
        autoencoder=_to_modern_autoencoder(model.first_stage_model),
        conditioner=Conditioner(
            join="tokens", text=text_encoder, **conversion.build_encoders(model)
        ),
        schedule=Schedule(betas),
        parameterization=model.parameterization,
        scale_factor=float(model.scale_factor),
        image_size=model.image_size,
    )
    return modern.eval()


def _copy_with_shared_weights(module: ModuleT) -> ModuleT:
    """Copy a module, but not its weights, which the copy shares."""
    # `deepcopy` takes objects from `memo`, by `id`, instead of copying them.
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(module, memo)


def _assign_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Assign tensors to a module on the meta device, without copying them."""
    state_dict = {name: weights[name] for name in module.state_dict()}
    module.load_state_dict(state_dict, strict=True, assign=True)


def _to_compat_unet(unet: nn.Module) -> UNetModel:
    if not isinstance(unet, UNet):
        raise WrongFamily(f"a {type(unet).__name__} has no counterpart in the original")
    config = {field.name: getattr(unet, field.name) for field in dataclasses.fields(UNet)}
    for name in ("transformer_depth_middle", "transformer_depth_output", "time_cond_proj_dim"):
        if config.pop(name) is not None:
            raise WrongFamily(f"a UNet with {name} has no counterpart in the original")
    if config.pop("disable_middle_transformer"):
        raise WrongFamily("a UNet without middle transformer has no counterpart in the original")
    with meta_device():
        compat_unet = UNetModel(image_size=32, **config)
    _assign_weights(compat_unet, unet.state_dict())
    compat_unet.dtype = unet.dtype
    return compat_unet.requires_grad_(False)


def _to_modern_unet(compat_unet: nn.Module) -> UNet:
    if not isinstance(compat_unet, UNetModel):
        raise WrongFamily(f"a UNet of class {type(compat_unet).__name__} cannot be converted")
    config = {field.name: getattr(compat_unet, field.name) for field in dataclasses.fields(UNet)}
    with meta_device():
        unet = UNet(**config)
    _assign_weights(unet, compat_unet.state_dict())
    return unet.requires_grad_(False)


def _to_compat_autoencoder(autoencoder: AutoencoderKL) -> CompatAutoencoderKL:
    with meta_device():
        compat_autoencoder = CompatAutoencoderKL(
            dataclasses.asdict(autoencoder.config), PLACEHOLDER_CONFIG, autoencoder.embed_dim
        )
    _assign_weights(compat_autoencoder, autoencoder.state_dict())
    return compat_autoencoder


def _to_modern_autoencoder(compat_autoencoder: nn.Module) -> AutoencoderKL:
    if not isinstance(compat_autoencoder, CompatAutoencoderKL):
        name = type(compat_autoencoder).__name__
        raise WrongFamily(f"an autoencoder of class {name} cannot be converted")
    names = [field.name for field in dataclasses.fields(AutoencoderConfig)]
    ddconfig = {name: value for name, value in compat_autoencoder.ddconfig.items() if name in names}
    with meta_device():
        autoencoder = AutoencoderKL(ddconfig=ddconfig, embed_dim=compat_autoencoder.embed_dim)
    _assign_weights(autoencoder, compat_autoencoder.state_dict())
    return autoencoder.requires_grad_(False)


def _to_compat_text_encoder(encoder: Encoder) -> nn.Module:
    compat_encoder: nn.Module
    if isinstance(encoder, CLIPText):
        blocks = encoder.tower.blocks
        vocab_size, hidden_size = encoder.tower.token_embedding.weight.shape
        config = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": blocks[0].mlp["fc1"].out_features,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].self_attn.heads,
            "max_position_embeddings": encoder.length,
            "hidden_act": "quick_gelu" if blocks[0].activation is quick_gelu else "gelu",
        }
        layer_idx = encoder.blocks_run if encoder.layer == "hidden" else None
        with meta_device():
            compat_encoder = compat_encoders.FrozenCLIPEmbedder(
                arch=config, max_length=encoder.length, layer=encoder.layer, layer_idx=layer_idx
            )
    elif isinstance(encoder, OpenCLIPText):
        model = encoder.model
        arch = _make_open_clip_arch(model, model.blocks[0].attn.heads, len(model.blocks))
        arch["quick_gelu"] = model.blocks[0].activation is quick_gelu
        with meta_device():
            compat_encoder = compat_encoders.FrozenOpenCLIPEmbedder(arch, layer=encoder.layer)
    else:
        name = type(encoder).__name__
        raise WrongFamily(f"a text encoder of class {name} has no counterpart in the original")
    if encoder.token_ids is not None:
        raise WrongFamily("a text encoder with a pruned vocabulary has no counterpart")
    if encoder.added_embeddings:
        tokens = ", ".join(encoder.added_embeddings)
        raise WrongFamily(f"textual inversions have no counterpart, this model has: {tokens}")
    _assign_weights(compat_encoder, encoder.state_dict())
    return compat_encoder


def _to_modern_text_encoder(compat_encoder: nn.Module | None) -> CLIPText | OpenCLIPText:
    encoder: CLIPText | OpenCLIPText
    if isinstance(compat_encoder, compat_encoders.FrozenCLIPEmbedder):
        with meta_device():
            encoder = CLIPText(
                arch=vars(compat_encoder.transformer.config),
                max_length=compat_encoder.max_length,
                layer=compat_encoder.layer,  # type: ignore[arg-type]
                layer_idx=compat_encoder.layer_idx,
            )
    elif isinstance(compat_encoder, compat_encoders.FrozenOpenCLIPEmbedder):
        model = compat_encoder.model
        blocks = model.transformer.resblocks
        arch = _make_open_clip_arch(model, blocks[0].attn.num_heads, len(blocks))
        arch["quick_gelu"] = type(blocks[0].mlp.gelu).__name__ == "QuickGELU"
        with meta_device():
            encoder = OpenCLIPText(arch=arch, layer=compat_encoder.layer)  # type: ignore[arg-type]
    else:
        name = type(compat_encoder).__name__
        raise WrongFamily(f"a text encoder of class {name} cannot be converted")
    _assign_weights(encoder, compat_encoder.state_dict())
    # Added tokens become textual inversions.
    if isinstance(compat_encoder, compat_encoders.FrozenCLIPEmbedder):
        for token, token_id in compat_encoder.tokenizer.added_tokens_encoder.items():
            embedding = encoder.embedding_table[token_id : token_id + 1]
            encoder.added_embeddings[token.lower()] = embedding
    return encoder


def _make_open_clip_arch(model: Any, heads: int, layers: int) -> dict[str, Any]:
    """Return the open_clip config of a text model of `ldm.encoders` or of open_clip."""
    vocab_size, width = model.token_embedding.weight.shape
    text_cfg = {
        "context_length": len(model.positional_embedding),
        "vocab_size": vocab_size,
        "width": width,
        "heads": heads,
        "layers": layers,
    }
    return {"embed_dim": model.text_projection.shape[1], "text_cfg": text_cfg}


def _add_depth_model(model: LatentDepth2ImageDiffusion, conditioner: Conditioner) -> None:
    network = conditioner.get(MiDaSDepth).model
    if network is None:
        raise WrongFamily("a depth model without MiDaS has no counterpart in the original")
    model.depth_model = MiDaSInference.from_network(_copy_with_shared_weights(network))


def _build_depth_encoders(model: LatentDepth2ImageDiffusion) -> dict[str, Encoder]:
    if not isinstance(model.depth_model, MiDaSInference):
        name = type(model.depth_model).__name__
        raise WrongFamily(f"a depth model of class {name} cannot be converted, only MiDaSInference")
    depth = MiDaSDepth(model_type=None)
    depth.model = _copy_with_shared_weights(model.depth_model.model)
    return {"depth": depth}


def _add_low_scale_model(model: LatentUpscaleDiffusion, conditioner: Conditioner) -> None:
    lowres = conditioner.get(LowResImage)
    model.low_scale_key = lowres.low_scale_key
    low_scale: AbstractLowScaleModel = SimpleImageConcat()
    if lowres.schedule is not None:
        low_scale = ImageConcatWithNoiseAugmentation({}, lowres.max_noise_level)
        _copy_schedule(low_scale, lowres, lowres.schedule)
    model.low_scale_model = freeze(low_scale)


def _build_low_scale_encoders(model: LatentUpscaleDiffusion) -> dict[str, Encoder]:
    low_scale = model.low_scale_model
    lowres = LowResImage(
        max_noise_level=low_scale.max_noise_level, low_scale_key=model.low_scale_key
    )
    if isinstance(low_scale, ImageConcatWithNoiseAugmentation):
        _copy_schedule(lowres, low_scale, low_scale.schedule)
    return {"lowres": lowres, "level": NoiseLevel()}


def _add_embedder(
    model: ImageEmbeddingConditionedLatentDiffusion, conditioner: Conditioner
) -> None:
    image = conditioner.get(ImageEmbedding)
    clip, noise = image.clip, image.noise
    is_openai = isinstance(clip, CLIPImage)
    with meta_device():
        embedder = (
            compat_encoders.ClipImageEmbedder(antialias=clip.antialias)
            if is_openai
            else compat_encoders.FrozenOpenCLIPImageEmbedder(antialias=clip.antialias)
        )
    embedder.model, embedder.blur = _copy_with_shared_weights(clip.model), clip.blur
    augmentor = compat_encoders.CLIPEmbeddingNoiseAugmentation(
        {}, noise.max_noise_level, timestep_dim=noise.embed_dim
    )
    augmentor.data_mean, augmentor.data_std = noise.get_statistics()
    _copy_schedule(augmentor, noise, noise.schedule)
    model.embed_key = image.cache_key or "jpg"
    model.embedder, model.noise_augmentor = freeze(embedder), freeze(augmentor)


def _build_embedder_encoders(model: ImageEmbeddingConditionedLatentDiffusion) -> dict[str, Encoder]:
    embedder, augmentor = model.embedder, model.noise_augmentor
    if not isinstance(embedder, CLIPVision):
        raise WrongFamily(f"an embedder of class {type(embedder).__name__} cannot be converted")
    if not isinstance(augmentor, compat_encoders.CLIPEmbeddingNoiseAugmentation):
        raise WrongFamily("an image-embedding model without noise augmentation cannot be converted")
    with meta_device():
        is_openai = isinstance(embedder, CLIPImage)
        clip: CLIPVision = CLIPImage() if is_openai else OpenCLIPImage()
    clip.model = _copy_with_shared_weights(embedder.model)
    clip.antialias, clip.blur = embedder.antialias, embedder.blur
    width = augmentor.data_mean.shape[1]
    noise = EmbeddingNoise(timestep_dim=width, max_noise_level=augmentor.max_noise_level)
    noise.set_statistics(augmentor.data_mean, augmentor.data_std)
    _copy_schedule(noise, augmentor, augmentor.schedule)
    return {"image": ImageEmbedding(clip=clip, noise=noise, embedding_key=model.embed_key)}


def _copy_schedule(target: Any, source: nn.Module, schedule: Schedule) -> None:
    """Copy a module's noise schedule, and the buffers registered for it, to another module."""
    target.schedule = schedule
    for name in schedule.compute_buffers():
        if name in source._buffers:
            target.register_buffer(name, source.get_buffer(name))


CONVERSIONS = (
    _Conversion(
        LatentInpaintDiffusion,
        frozenset({"masked"}),
        "hybrid",
        lambda model: {"masked": MaskedImage()},
    ),
    _Conversion(
        LatentDepth2ImageDiffusion,
        frozenset({"depth"}),
        "hybrid",
        _build_depth_encoders,
        "depth_stage_config",
        _add_depth_model,
    ),
    _Conversion(
        LatentUpscaleDiffusion,
        frozenset({"lowres", "level"}),
        "hybrid-adm",
        _build_low_scale_encoders,
        "low_scale_config",
        _add_low_scale_model,
    ),
    _Conversion(
        ImageEmbeddingConditionedLatentDiffusion,
        frozenset({"image"}),
        "crossattn-adm",
        _build_embedder_encoders,
        "embedder_config",
        _add_embedder,
    ),
    _Conversion(LatentDiffusion, frozenset(), "crossattn"),
)
