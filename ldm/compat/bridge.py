"""Bridges between models of `ldm.load` and the original's, which share their weights.

    old = from_modern(ldm.load("v1-inference.yaml", "sd-v1-4.ckpt"))
    image = ldm.txt2img(to_modern(old), ["a red apple"])

Both build the other classes around the same tensors: what one of the two is trained to, the other
has. The families of Stable Diffusion 1 and 2 that have both classes are in FAMILIES.
"""

import copy
import dataclasses
import itertools
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
from ldm.nets.autoencoder import AutoencoderKL, Layout
from ldm.nets.unet import UNet
from ldm.runtime.errors import WrongFamily

__all__ = ["from_modern", "to_modern"]

NOTHING = {"target": "torch.nn.Identity"}
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class _Family:
    """A class of the original, and the encoders beside the text encoder that it stands for.

    Args:
        stage: Keyword of its constructor for the config of what `add` replaces.
        add: Gives an old model what it has in place of the encoders of a conditioner.
        encoders: Builds the encoders, by name, from an old model.
    """

    old: type[LatentDiffusion]
    names: frozenset[str]
    conditioning_key: str
    encoders: Callable[[Any], dict[str, Encoder]] = lambda old: {}
    stage: str | None = None
    add: Callable[[Any, Conditioner], None] = lambda old, conditioner: None


def from_modern(model: ModernModel) -> LatentDiffusion:
    """Return a model of the original's class over the weights of one of `ldm.load`.

    Raises:
        WrongFamily: The model has no counterpart here.
    """
    names = frozenset(model.conditioner.encoders)
    family = next((row for row in FAMILIES if row.names | {"text"} == names), None)
    if family is None or not isinstance(model.autoencoder, AutoencoderKL):
        encoders = ", ".join(sorted(names)) or "none"
        raise WrongFamily(f"no class of the original has these encoders: {encoders}")
    stage: dict[str, Any] = {} if family.stage is None else {family.stage: NOTHING}
    old = family.old(
        unet_config=dict(NOTHING),
        first_stage_config=NOTHING,
        cond_stage_config=NOTHING,
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
        **stage,
    )
    old.model.diffusion_model = _old_unet(model.unet)
    old.first_stage_model = freeze(_old_autoencoder(model.autoencoder))
    old.cond_stage_model = freeze(_old_text(model.conditioner.encoders["text"]))
    old.num_downs = len(model.autoencoder.layout.ch_mult) - 1
    family.add(old, model.conditioner)
    return old.to(model.device).eval()


def to_modern(model: LatentDiffusion) -> ModernModel:
    """Return a model for `ldm.txt2img` and its like over the weights of an old one.

    Branches that a program has added, such as control networks, are left out.

    Raises:
        WrongFamily: The model has no counterpart here.
    """
    key = model.model.conditioning_key
    rows = [row for row in FAMILIES if isinstance(model, row.old) and row.conditioning_key == key]
    if not rows:
        raise WrongFamily(
            f"a {type(model).__name__} with conditioning_key `{key}` cannot be bridged"
        )
    # In float64, unless a program has registered others since.
    betas = model.exact_betas
    if not torch.equal(betas.float(), model.betas.cpu()):
        betas = model.betas.cpu().double()
    encoders = {"text": _modern_text(model.cond_stage_model), **rows[0].encoders(model)}
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
    """Copy a module, but not its tensors."""
    # deepcopy takes what the memo has as copied already.
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        shared = tensor.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shared, tensor.requires_grad) if is_parameter else shared
    return copy.deepcopy(module, memo)


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
    return encoder


def _open_clip_arch(model: Any, heads: int, layers: int) -> dict[str, Any]:
    """Return the config of open_clip that a text model, ours or open_clip's, was built from."""
    vocabulary, width = model.token_embedding.weight.shape
    text = {
        "context_length": len(model.positional_embedding),
        "vocab_size": vocabulary,
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
    new: AbstractLowScaleModel = SimpleImageConcat()
    if lowres.schedule is not None:
        new = ImageConcatWithNoiseAugmentation({}, lowres.max_noise_level)
        _copy_schedule(new, lowres, lowres.schedule)
    old.low_scale_model = freeze(new)


def _low_scale_encoders(old: LatentUpscaleDiffusion) -> dict[str, Encoder]:
    low_scale = old.low_scale_model
    lowres = LowRes(max_noise_level=low_scale.max_noise_level, low_scale_key=old.low_scale_key)
    if isinstance(low_scale, ImageConcatWithNoiseAugmentation):
        _copy_schedule(lowres, low_scale, low_scale.schedule)
    return {"lowres": lowres, "level": NoiseLevel()}


def _add_embedder(old: ImageEmbeddingConditionedLatentDiffusion, conditioner: Conditioner) -> None:
    image = conditioner.get(ImageEmbedding)
    clip, noise = image.clip, image.noise
    with meta_device():
        kind = (
            old_encoders.ClipImageEmbedder
            if isinstance(clip, CLIPImage)
            else old_encoders.FrozenOpenCLIPImageEmbedder
        )
        embedder = kind(antialias=clip.antialias)
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
    clip.model, clip.antialias, clip.blur = (
        _copy_sharing(embedder.model),
        embedder.antialias,
        embedder.blur,
    )
    width = augmentor.data_mean.shape[1]
    noise = EmbeddingNoise(timestep_dim=width, max_noise_level=augmentor.max_noise_level)
    noise.set_statistics(augmentor.data_mean, augmentor.data_std)
    noise.schedule = augmentor.schedule
    _copy_schedule(noise, augmentor, augmentor.schedule)
    return {"image": ImageEmbedding(clip=clip, noise=noise, embedding_key=old.embed_key)}


def _copy_schedule(new: Any, module: nn.Module, schedule: Schedule) -> None:
    """Give a module the noise schedule of another one, and its tables."""
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
