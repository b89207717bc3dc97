"""UNet and autoencoder: their sizes in our keywords and in diffusers' `config.json`, both ways.

    unet_config(UNet) -> unet/config.json        unet_params(unet/config.json) -> UNet's keywords
    vae_config(ddconfig …) -> vae/config.json    vae_params(vae/config.json) -> AutoencoderKL's

What one side can say and the other cannot is an error that names it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.nets.autoencoder import Layout
from ldm.nets.unet import UNet

__all__ = ["checked", "unet_config", "unet_params", "vae_config", "vae_params"]

Config = Mapping[str, Any]

# What diffusers can vary and our networks cannot; anything not named here must be null or false.
UNET_FIXED = {
    "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1, "mid_block_scale_factor": 1, "act_fn": "silu", "norm_num_groups": 32,
    "norm_eps": 1e-5, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
    "addition_embed_type_num_heads": 64,
}  # fmt: skip
UNET_READ = frozenset({
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types",
    "only_cross_attention", "mid_block_only_cross_attention", "block_out_channels",
    "layers_per_block", "dropout", "cross_attention_dim", "transformer_layers_per_block",
    "attention_head_dim", "num_attention_heads", "use_linear_projection", "class_embed_type",
    "num_class_embeds", "projection_class_embeddings_input_dim", "resnet_time_scale_shift",
    "upcast_attention",
})  # fmt: skip
VAE_FIXED = {
    "act_fn": "silu", "norm_num_groups": 32, "use_quant_conv": True, "use_post_quant_conv": True,
}  # fmt: skip
VAE_READ = frozenset({
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "latent_channels", "sample_size", "scaling_factor", "force_upcast",
    "mid_block_add_attention",
})  # fmt: skip
SHIFTS = {False: "default", True: "scale_shift"}
RESOLUTION = 256  # what original configs say of autoencoders; it counts for attention alone


def unet_config(unet: UNet, sample_size: int) -> dict[str, Any]:
    """sample_size: side of the latent that the model was trained at.

    Raises ValueError for what diffusers' UNet cannot be.
    """
    _can_be_theirs(unet)
    levels = len(unet.channel_mult)
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [2**level in unet.attention_resolutions for level in range(levels)]
    each = unet.num_head_channels
    heads = [unet.num_heads if each == -1 else max(1, width // each) for width in widths]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": [_block("Down", attends[i]) for i in range(levels)],
        "up_block_types": [_block("Up", attends[i]) for i in reversed(range(levels))],
        "attention_head_dim": _one(heads),  # the number of heads: a misnomer that stuck
        "cross_attention_dim": unet.context_dim,
        "transformer_layers_per_block": unet.transformer_depth,
        "use_linear_projection": unet.use_linear_in_transformer,
        "only_cross_attention": _one(list(unet.disable_self_attentions or [False])),
        "mid_block_only_cross_attention": unet.disable_middle_self_attn,
        "resnet_time_scale_shift": SHIFTS[unet.use_scale_shift_norm],
        "dropout": unet.dropout,
    }
    if isinstance(unet.num_classes, int):
        config["num_class_embeds"] = unet.num_classes
    elif unet.num_classes == "sequential":
        config["class_embed_type"] = "projection"
        config["projection_class_embeddings_input_dim"] = unet.adm_in_channels
    return config


def unet_params(config: Config) -> dict[str, Any]:
    """The keywords of our UNet. Raises ValueError for what it cannot be, naming the key."""
    config = checked(config, "unet/config.json", UNET_FIXED, UNET_READ)
    widths, downs = config["block_out_channels"], config["down_block_types"]
    unknown = {*downs, *config["up_block_types"]} - BLOCKS
    if unknown or any(width % widths[0] for width in widths):
        what = f"blocks `{min(unknown)}`" if unknown else f"widths {widths}"
        raise ValueError(f"unet/config.json: {what} have no counterpart here")
    params: dict[str, Any] = {
        "image_size": config.get("sample_size"),
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "attention_resolutions": [2**i for i, kind in enumerate(downs) if kind in ATTEND],
        "num_res_blocks": config.get("layers_per_block", 2),
        "channel_mult": [width // widths[0] for width in widths],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.get("use_linear_projection")),
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "context_dim": config["cross_attention_dim"],
        "use_checkpoint": True,
        "legacy": False,
        **_heads(config, widths),
        **_labels(config),
    }
    lone, middle = config.get("only_cross_attention"), config.get("mid_block_only_cross_attention")
    if lone is True or (isinstance(lone, list) and any(lone)):
        params["disable_self_attentions"] = [True] * len(widths) if lone is True else lone
    if middle or (middle is None and lone is True):
        params["disable_middle_self_attn"] = True
    if config.get("resnet_time_scale_shift", "default") != "default":
        params["use_scale_shift_norm"] = True
    if config.get("dropout"):
        params["dropout"] = config["dropout"]
    return params


def vae_config(params: Config, scale_factor: float | None, sample_size: int) -> dict[str, Any]:
    """params: keywords of our AutoencoderKL. scale_factor: None = not known.

    Raises ValueError for what diffusers' AutoencoderKL cannot be.
    """
    layout = Layout.read(params["ddconfig"])
    embed = params["embed_dim"]
    for trouble, what in (
        (layout.z_channels != embed, f"z_channels {layout.z_channels} beside embed_dim {embed}"),
        (not layout.resamp_with_conv, "`resamp_with_conv: false`"),
        (layout.give_pre_end, "`give_pre_end`"),
        (layout.tanh_out, "`tanh_out`"),
    ):
        if trouble:
            raise ValueError(f"diffusers' AutoencoderKL cannot have {what}")
    levels = range(len(layout.ch_mult))
    attends = [layout.has_attention(level) for level in levels]
    if scale_factor is None:  # of an autoencoder alone: that of Stable Diffusion if it looks so
        scale_factor = 0.18215 if (len(levels), embed) == (4, 4) else 1.0
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": layout.in_channels,
        "out_channels": layout.out_ch,
        "latent_channels": embed,
        "block_out_channels": layout.widths,
        "layers_per_block": layout.num_res_blocks,
        "down_block_types": [f"{'Attn' * attends[i]}DownEncoderBlock2D" for i in levels],
        "up_block_types": [f"{'Attn' * attends[i]}UpDecoderBlock2D" for i in reversed(levels)],
        "mid_block_add_attention": layout.attn_type != "none",
        "scaling_factor": scale_factor,
    }


def vae_params(config: Config) -> dict[str, Any]:
    """The keywords of our AutoencoderKL. Raises ValueError for what it cannot be."""
    config = checked(config, "vae/config.json", VAE_FIXED, VAE_READ)
    widths, downs = config["block_out_channels"], config["down_block_types"]
    known = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"}
    if unknown := set(downs) - known:
        raise ValueError(f"vae/config.json: blocks `{min(unknown)}` have no counterpart here")
    channels = config["latent_channels"]
    ddconfig = {
        "double_z": True,
        "z_channels": channels,
        "resolution": RESOLUTION,
        "in_channels": config.get("in_channels", 3),
        "out_ch": config.get("out_channels", 3),
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 1),
        "attn_resolutions": [RESOLUTION >> i for i, b in enumerate(downs) if b.startswith("Attn")],
        "dropout": 0.0,
    }
    if not config.get("mid_block_add_attention", True):
        ddconfig["attn_type"] = "none"
    return {"embed_dim": channels, "ddconfig": ddconfig}


def checked(
    config: Config, where: str, fixed: Config, read: frozenset[str] | None = None
) -> Config:
    """The config itself, if it says nothing that would be lost here.

    fixed: key -> the value that it must have. read: keys that are looked at; others must be null
        or false. None = they are trifles.
    Raises ValueError naming the first key that asks for something else.
    """
    for key, value in config.items():
        if key not in fixed and (read is None or key in read or key.startswith("_") or not value):
            continue
        if key not in fixed or value != fixed[key]:
            wanted = f", only `{fixed[key]}` is known here" if key in fixed else " is unknown here"
            raise ValueError(f"{where}: `{key}: {value}`{wanted}")
    return config


def _can_be_theirs(unet: UNet) -> None:
    heads, width = unet.num_head_channels, unet.model_channels
    for trouble, what in (
        (not unet.use_spatial_transformer, "levels without a prompt (`use_spatial_transformer`)"),
        (not isinstance(unet.context_dim, int), "a list as `context_dim`"),
        (unet.resblock_updown, "`resblock_updown`"),
        (not unet.conv_resample, "`conv_resample: false`"),
        (unet.num_attention_blocks is not None, "`num_attention_blocks`"),
        (unet.num_classes == "continuous", "`num_classes: continuous`"),
        (heads > 0 and width % heads and not unet.legacy, f"`num_head_channels: {heads}`"),
    ):
        if trouble:
            raise ValueError(f"diffusers' UNet cannot have {what}")


BLOCKS = frozenset({"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"})
ATTEND = frozenset({"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"})


def _block(way: str, attends: bool) -> str:
    return f"{'CrossAttn' * attends}{way}Block2D"


def _one(values: list[Any]) -> Any:
    """What all have in common, else the list."""
    return values[0] if len(set(values)) == 1 else values


def _heads(config: Config, widths: Sequence[int]) -> dict[str, int]:
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if isinstance(heads, int):
        return {"num_heads": heads}
    per_head = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(per_head) == 1:
        return {"num_head_channels": per_head.pop()}
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    raise ValueError(f"unet/config.json: {heads} heads for widths {widths} fit no single number")


def _labels(config: Config) -> dict[str, Any]:
    kind = config.get("class_embed_type")
    if kind == "projection":
        width = config["projection_class_embeddings_input_dim"]
        return {"num_classes": "sequential", "adm_in_channels": width}
    if kind is not None:
        raise ValueError(f"unet/config.json: `class_embed_type: {kind}` is unknown here")
    return {"num_classes": config["num_class_embeds"]} if config.get("num_class_embeds") else {}
