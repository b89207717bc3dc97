"""Normalize names of weights, and convert them between the original's names and ours.

    in a file        model._orig_mod.diffusion_model.x     diffusion_model.x      vae.decoder.x
    the original's   model.diffusion_model.x                            first_stage_model.decoder.x
    ours             unet.x                                                   autoencoder.decoder.x

Text encoders are `cond_stage_model.` in files of SD 1 and 2, and `conditioner.embedders.N.` in
those of sgm's `DiffusionEngine` (SDXL). Within the networks our names are the original's. Names of
diffusers depend on the network, and are translated by `matching`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "AUXILIARY_TENSORS", "MARKERS", "SECOND_TEXT_PREFIX", "TEXT_2_PREFIX", "TEXT_PREFIX",
    "UNET_PREFIX", "VAE_PREFIX", "has_prefix", "has_sgm_names", "normalize_layer_name",
    "pair_names", "remove_wrappers", "rename_weights", "restore_names", "select_buffers",
    "select_loss_state", "select_prefix", "to_original_name",
]  # fmt: skip

T = TypeVar("T")
# (the original's prefix, ours); `to_original_name` uses the first that matches.
PREFIXES = (
    # Of k-diffusion's upscaler.
    ("inner_model.", "unet.inner_model."),
    ("low_res_noise_embed.", "unet.low_res_noise_embed."),
    ("model.diffusion_model.time_embedding.cond_proj.", "unet.time_embed_cond."),
    ("model.diffusion_model.", "unet."),
    ("first_stage_model.", "autoencoder."),
    ("cond_stage_model.", "conditioner.text."),
    ("depth_model.", "conditioner.depth."),
    ("low_scale_model.", "conditioner.lowres."),
    ("embedder.", "conditioner.image.clip."),
    ("noise_augmentor.", "conditioner.image.noise."),
    # In files with all components of a diffusers pipeline.
    ("vae.", "autoencoder."),
    ("text_encoder.", "conditioner.text."),
    ("text_encoder_2.", "conditioner.text_2."),
)
EMBEDDER_PREFIX = re.compile(
    r"conditioner\.embedders\.(\d+)\.(?P<tower>(?=transformer\.|model\.|token_ids$))?"
)
ENCODER_PREFIX = re.compile(r"conditioner\.(text|text_2|embedder_(?P<index>\d+))\.")
# Wrapper modules in the names of weights: of DataParallel, torch.compile, FSDP …
WRAPPER_MODULES = frozenset({
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
})  # fmt: skip
# Prefix of a component, which may be repeated, or follow the prefix of an outer model.
COMPONENT_PREFIX = re.compile(
    r"(?P<outer>(?:.*?\.)??)"
    r"(?:(?:(?:model\.)?(?P<unet>diffusion_model)|(?P<component>first_stage_model|cond_stage_model))\.)+"
)
# Layers of the autoencoder's attention in diffusers, also older ones -> our layers.
ATTENTION_LAYER = re.compile(r"(?<=\.)(attn_1|attn\.\d+)\.([a-z_]+(?:\.0)?)(?=\.(?:weight|bias)$)")
ATTENTION_LAYER_NAMES = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
UNET_PREFIX, VAE_PREFIX = "unet.", "autoencoder."  # our prefixes
TEXT_PREFIX, TEXT_2_PREFIX = "conditioner.text.", "conditioner.text_2."
SECOND_TEXT_PREFIX = "2_"  # from `normalize_layer_name`, for layers of the second text encoder
# `transformer.text_model.` of SD 1's text encoder, in full or in part, after ComfyUI's name of it.
TEXT_MODEL_PREFIX = re.compile(
    r"conditioner\.text\.(?:clip_\w\.)?"
    r"(?:transformer\.(?!token_emb\.|pos_emb\.|attn_layers\.|norm\.)(?:text_model\.)?|text_model\."
    r"|(?=(?:encoder|embeddings|final_layer_norm)\.))"
)

# Prefixes of layer names in LoRA files, with `_` for dots; `second` is SDXL's second text encoder.
LAYER_PREFIX = re.compile(
    r"""( lycoris_ | lora_(?=unet_|te[12]?_) | base_model_model_ | unet_ | te1?_
    | (model_)?diffusion_model_ | cond_stage_model_ | (conditioner_)?embedders_0_
    | (?P<second> te2_ | text_encoder_2_ | clip_g_ | (conditioner_)?embedders_1_ )
    | text_encoders?_ | clip_[lh]_ | model_(?=transformer_)
    | transformer_(?=text_model_|resblocks_) | text_model_ )*""",
    re.VERBOSE,
)
# Older diffusers' names of a text encoder's attention.
TEXT_ATTENTION = re.compile(r"(?<=self_attn_)to_([qkv]|out)$")

# Tensors of checkpoints that our models do not have, under the original's names: noise schedule,
# constants, markers, EMA, losses, unused towers of CLIP and layers of BERT, and the copy of the
# autoencoder that encodes the condition of latent-diffusion's inpainting models.
AUXILIARY_TENSORS = re.compile(
    r"""betas | (sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?
    | posterior_(variance|log_variance_clipped|mean_coef[12]) | lvlb_weights | denoiser\.sigmas
    | logvar | scale_factor | noise_augmentor\.data_(mean|std) | cond_stage_model\.(mean|std)
    | model_ema\..* | (first_stage_model\.)?(loss|model_ema)\..*
    | .*\.embeddings\.position_ids | .*\.attn_mask | v_pred | ztsnr
    | edm_mean | edm_std | edm_vpred\.sigma_(min|max)
    | (cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?
      ((text|visual)_projection(\.weight)?|logit_scale)
    | cond_stage_model\.transformer\.vision_model\..*
    | cond_stage_model\.transformer\.to_logits\..*
    | (first_stage_model\.)?(quantize\.used | colorize)
    | cond_stage_model\.((en|de)coder\.(conv_in|conv_out|norm_out|mid|down|up) | (post_)?quant_conv
      | quantize | loss)\..*""",
    re.VERBOSE,
)
# Marker tensors of the prediction type or noise levels; the first two are empty.
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_min", "edm_vpred.sigma_max")
# Only in diffusers' UNet of the x2 latent upscaler.
UPSCALER_UNET_NAMES = frozenset({"time_proj.weight", "time_embedding.cond_proj.weight"})
# A CLIP whose vision tower is used, and whose text encoder is not.
ORIGINAL_VISION_PROJECTION = "cond_stage_model.model.visual.proj"
UNUSED_TEXT_PREFIX = "cond_stage_model.model.transformer."
# AUXILIARY_TENSORS that are buffers, see `select_buffers`.
BUFFER = re.compile(
    r"scale_factor|betas|\w*alphas_cumprod\w*|posterior_.*|noise_augmentor\.data_(mean|std)"
    r"|denoiser\.sigmas|edm_mean|edm_std|edm_vpred\.sigma_(min|max)"
)
LOSS_WEIGHT = re.compile(r"(first_stage_model\.)?loss\.(.+)")
POSITION_EMBEDDING = "transformer.text_model.embeddings.position_embedding.weight"


def remove_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove wrapper modules, such as `_orig_mod.`, from names, unless two would become equal."""
    names = [
        ".".join(word for word in name.split(".") if word not in WRAPPER_MODULES) for name in state
    ]
    are_unique = all(names) and len(set(names)) == len(names)
    return dict(zip(names if are_unique else state, state.values(), strict=True))


def pair_names(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (our name, name in the file) of weights, without AUXILIARY_TENSORS."""
    names = list(names)
    if UPSCALER_UNET_NAMES.issubset(names):  # the UNet of a diffusers folder alone
        yield from ((f"unet.{name}", name) for name in names)
        return
    file_names = _normalize_prefixes(names)
    unused = UNUSED_TEXT_PREFIX if ORIGINAL_VISION_PROJECTION in file_names else ()
    for original_name, file_name in file_names.items():
        if not AUXILIARY_TENSORS.fullmatch(original_name) and not original_name.startswith(unused):
            yield _to_our_name(original_name), file_name


def rename_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under our names, without AUXILIARY_TENSORS."""
    return {ours: state[name] for ours, name in pair_names(state)}


def normalize_layer_name(name: str) -> str:
    """Convert any name of a layer in LoRA files to a common form.

    It has `_` for dots, and no prefix of a network except SECOND_TEXT_PREFIX.
    """
    flat = name.replace(".", "_").replace("_processor_to_out", "_to_out_0")
    flat = TEXT_ATTENTION.sub(r"\1_proj", flat.replace("_processor_", "_"))
    return LAYER_PREFIX.sub(
        lambda match: SECOND_TEXT_PREFIX if match["second"] else "", flat, count=1
    )


def select_loss_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the training loss: `discriminator.…`, `perceptual_loss.…`, `logvar`."""
    matches = ((LOSS_WEIGHT.fullmatch(name), value) for name, value in state.items())
    return {match[2]: value for match, value in matches if match}


def select_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return buffers under the original's names: noise schedule, scale factor, statistics."""
    file_names = _normalize_prefixes(list(state))
    return {
        name: state[file_name] for name, file_name in file_names.items() if BUFFER.fullmatch(name)
    }


def has_prefix(names: Iterable[str], prefix: str) -> bool:
    """Return whether any of the names begins with a prefix."""
    return any(name.startswith(prefix) for name in names)


def select_prefix(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the values whose names begin with a prefix, under names without it."""
    return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}


def has_sgm_names(names: Iterable[str]) -> bool:
    """Return whether the original model is sgm's (SDXL), by our names of its weights."""
    names = set(names)
    sgm_prefixes = ("conditioner.text_2.", "conditioner.embedder_")
    if any(name.startswith(sgm_prefixes) for name in names):
        return True
    is_unclip = any(name.startswith("conditioner.image.") for name in names)
    return "unet.label_emb.0.0.weight" in names and not is_unclip


def to_original_name(name: str, *, sgm: bool = False) -> str:
    """Convert our name, or a prefix of it, to the original's, or to sgm's with `sgm`."""
    if sgm and (match := ENCODER_PREFIX.match(name)):
        index = match["index"] or ("1" if match[1] == "text_2" else "0")
        return f"conditioner.embedders.{index}.{name[match.end() :]}"
    for theirs, ours in PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def restore_names(
    state: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor] | None = None,
    *,
    sgm: bool | None = None,
) -> dict[str, Tensor]:
    """Return weights under the original's names.

    Args:
        buffers: Tensors to put first, under the original's names; None = no buffers.
        sgm: See `to_original_name`; None = `has_sgm_names`, for whole models.
    """
    original_state = dict(buffers or {})
    is_sgm = has_sgm_names(state) if sgm is None else sgm
    for name, value in state.items():
        original_name = to_original_name(name, sgm=is_sgm)
        if original_name.endswith(POSITION_EMBEDDING):
            ids = torch.arange(len(value), device="cpu")[None]
            original_state[original_name.replace("embedding.weight", "ids")] = ids
        original_state[original_name] = value
    return original_state


def _normalize_prefixes(names: list[str]) -> dict[str, str]:
    """Map names without outer models and repeated prefixes to the names in the file."""
    matches = {name: COMPONENT_PREFIX.match(name) for name in names}
    outer_prefixes = {match["outer"] for match in matches.values() if match} - {""}
    file_names: dict[str, str] = {}
    for name, match in matches.items():
        if match:
            prefix = "model.diffusion_model" if match["unet"] else match["component"]
            normalized = f"{prefix}.{name[match.end() :]}"
        else:
            prefixes = (prefix for prefix in outer_prefixes if name.startswith(prefix))
            normalized = name.removeprefix(max(prefixes, key=len, default=""))
        file_names.setdefault(normalized if normalized not in file_names else name, name)
    return file_names


def _to_our_name(name: str) -> str:
    """Convert the original's name of a weight to ours."""
    if match := EMBEDDER_PREFIX.match(name):
        names = {"0": "text", "1": "embedder_1" if match["tower"] is None else "text_2"}
        encoder = names.get(match[1], f"embedder_{match[1]}")
        name = f"conditioner.{encoder}.{name[match.end() :]}"
    theirs, ours = next((pair for pair in PREFIXES if name.startswith(pair[0])), ("", ""))
    name = ours + name.removeprefix(theirs)
    if name.startswith(TEXT_PREFIX):
        return TEXT_MODEL_PREFIX.sub(f"{TEXT_PREFIX}transformer.text_model.", name, count=1)
    return ATTENTION_LAYER.sub(
        lambda match: f"{match[1]}.{ATTENTION_LAYER_NAMES.get(match[2], match[2])}", name
    )
