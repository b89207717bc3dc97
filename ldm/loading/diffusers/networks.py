"""Convert configs of UNet and autoencoder between our parameters and diffusers' `config.json`.

An option that is not supported on both sides raises ConfigError.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ldm.loading.diffusers.layout import UNET_CONFIG, VAE_CONFIG
from ldm.nets.autoencoder import AutoencoderConfig
from ldm.nets.unet import UNet
from ldm.runtime.errors import ConfigError
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "DEFAULT_SCALE_FACTOR", "check_blocks", "make_unet_config", "make_vae_config",
    "parse_unet_config", "parse_vae_config", "read_uniform", "validate_config",
]  # fmt: skip

Config = JsonMapping

# REQUIRED_VALUES: options of diffusers with only one supported value. KEYS: options with several
# supported values. All others must be null or false.
UNET_REQUIRED_VALUES = {
    "flip_sin_to_cos": True, "freq_shift": 0,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "act_fn": "silu", "norm_num_groups": 32,
    "norm_eps": 1e-5, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
    "addition_embed_type_num_heads": 64,
}  # fmt: skip
UNET_KEYS = frozenset({
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types",
    "only_cross_attention", "mid_block_only_cross_attention", "block_out_channels",
    "layers_per_block", "dropout", "cross_attention_dim", "transformer_layers_per_block",
    "attention_head_dim", "num_attention_heads", "use_linear_projection", "class_embed_type",
    "num_class_embeds", "projection_class_embeddings_input_dim", "resnet_time_scale_shift",
    "upcast_attention", "mid_block_type", "reverse_transformer_layers_per_block",
    "addition_embed_type", "addition_time_embed_dim", "time_cond_proj_dim",
})  # fmt: skip
VAE_REQUIRED_VALUES = {
    "act_fn": "silu", "norm_num_groups": 32, "use_quant_conv": True, "use_post_quant_conv": True,
}  # fmt: skip
VAE_KEYS = frozenset({
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "latent_channels", "sample_size", "scaling_factor", "force_upcast",
    "mid_block_add_attention", "latents_mean", "latents_std",
})  # fmt: skip
MIDDLE_BLOCK, MIDDLE_BLOCK_WITHOUT_ATTENTION = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"
CROSS_ATTENTION_BLOCKS = frozenset({"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"})
UNET_BLOCKS = CROSS_ATTENTION_BLOCKS | {"DownBlock2D", "UpBlock2D"}
VAE_BLOCKS = frozenset({"DownEncoderBlock2D", "AttnDownEncoderBlock2D"})
DEFAULT_SCALE_FACTOR = 0.18215  # scaling_factor of a VAE that has none in its config
RESOLUTION = 256  # as in original configs; only determines which levels have attention


def make_unet_config(
    unet: UNet, sample_size: int | list[int], *, size_embed_dim: int | None = None
) -> JsonObject:
    """Return the config of a UNet.

    Args:
        sample_size: Side of the latent, or [height, width], latent pixels.
        size_embed_dim: Dimension of SDXL's embedding of each size; None = not SDXL.
    """
    head_dim, model_channels = unet.num_head_channels, unet.model_channels
    depth = unet.transformer_depth
    last_depth = depth[-1] if isinstance(depth, Sequence) else depth
    _check_options(
        "UNet",
        {
            "no `context_dim`": unet.context_dim is None,
            "a list as `context_dim`": not isinstance(unet.context_dim, int),
            "`resblock_updown`": unet.resblock_updown,
            "`conv_resample: false`": not unet.conv_resample,
            f"`transformer_depth_middle: {unet.transformer_depth_middle}`": (
                unet.transformer_depth_middle not in (None, 0, last_depth)
            ),
            "`disable_middle_transformer`": unet.disable_middle_transformer,
            "`num_classes: timestep`": unet.num_classes == "timestep",
            "`num_attention_blocks`": unet.num_attention_blocks is not None,
            "`num_classes: continuous`": unet.num_classes == "continuous",
            f"`num_head_channels: {head_dim}`": head_dim > 0
            and model_channels % head_dim
            and not unet.legacy,
        },
    )
    channels = [model_channels * mult for mult in unet.channel_mult]
    has_attention = [2**level in unet.attention_resolutions for level in range(len(channels))]
    heads = [unet.num_heads if head_dim == -1 else max(1, n // head_dim) for n in channels]
    prefixes = ["CrossAttn" if has_attn else "" for has_attn in has_attention]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": channels,
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
        # diffusers' name is wrong: it is the number of heads.
        "attention_head_dim": _to_scalar_if_uniform(heads),
        "cross_attention_dim": unet.context_dim,
        "transformer_layers_per_block": unet.transformer_depth,
        "use_linear_projection": unet.use_linear_in_transformer,
        "only_cross_attention": _to_scalar_if_uniform(unet.disable_self_attentions or [False]),
        "mid_block_only_cross_attention": unet.disable_middle_self_attn,
        "resnet_time_scale_shift": "scale_shift" if unet.use_scale_shift_norm else "default",
        "dropout": unet.dropout,
    }
    if isinstance(unet.num_classes, int):
        config["num_class_embeds"] = unet.num_classes
    elif unet.num_classes == "sequential" and size_embed_dim is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": size_embed_dim,
            "projection_class_embeddings_input_dim": unet.adm_in_channels,
        }
    elif unet.num_classes == "sequential":
        config["class_embed_type"] = "projection"
        config["projection_class_embeddings_input_dim"] = unet.adm_in_channels
    if unet.transformer_depth_middle == 0:
        config["mid_block_type"] = MIDDLE_BLOCK_WITHOUT_ATTENTION
    if unet.transformer_depth_output is not None:
        config |= _make_depths_by_level(unet, has_attention)
    if unet.time_cond_proj_dim is not None:
        config["time_cond_proj_dim"] = unet.time_cond_proj_dim
    return config


def parse_unet_config(config: Config) -> JsonObject:
    """Return the parameters of our UNet."""
    validate_config(config, UNET_CONFIG, UNET_REQUIRED_VALUES, UNET_KEYS)
    channels, down_blocks = config["block_out_channels"], config["down_block_types"]
    check_blocks(UNET_CONFIG, [*down_blocks, *config["up_block_types"]], UNET_BLOCKS)
    if any(n % channels[0] for n in channels):
        raise ConfigError(
            f"{UNET_CONFIG}: `block_out_channels: {channels}` must be multiples of the first"
        )
    params: JsonObject = {
        "image_size": config.get("sample_size"),
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "attention_resolutions": [
            2**level for level, block in enumerate(down_blocks) if block in CROSS_ATTENTION_BLOCKS
        ],
        "num_res_blocks": read_uniform(config, "layers_per_block", UNET_CONFIG, 2),
        "channel_mult": [n // channels[0] for n in channels],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.get("use_linear_projection")),
        "context_dim": read_uniform(config, "cross_attention_dim", UNET_CONFIG),
        "use_checkpoint": True,
        "legacy": False,
        **_parse_heads(config, channels),
        **_parse_class_embedding(config),
    }
    only_cross = config.get("only_cross_attention") or False
    disabled = only_cross if isinstance(only_cross, list) else [only_cross] * len(channels)
    if any(disabled):
        params["disable_self_attentions"] = disabled
    middle_only_cross = config.get("mid_block_only_cross_attention")
    if middle_only_cross or (middle_only_cross is None and only_cross is True):
        params["disable_middle_self_attn"] = True
    if config.get("resnet_time_scale_shift", "default") != "default":
        params["use_scale_shift_norm"] = True
    params |= _parse_depths(config, params["num_res_blocks"])
    return params | {k: config[k] for k in ("time_cond_proj_dim", "dropout") if config.get(k)}


def make_vae_config(params: Config, scale_factor: float | None, sample_size: int) -> JsonObject:
    """Return the config of an autoencoder.

    Args:
        params: Parameters of our AutoencoderKL.
        scale_factor: None = unknown, as for an autoencoder without a model.
        sample_size: Side of the image, pixels.
    """
    ddconfig = AutoencoderConfig.from_ddconfig(params["ddconfig"])
    embed_dim, z_channels = params["embed_dim"], ddconfig.z_channels
    _check_options(
        "AutoencoderKL",
        {
            f"z_channels {z_channels} with embed_dim {embed_dim}": z_channels != embed_dim,
            "`resamp_with_conv: false`": not ddconfig.resamp_with_conv,
            "`give_pre_end`": ddconfig.give_pre_end,
            "`tanh_out`": ddconfig.tanh_out,
        },
    )
    levels = range(len(ddconfig.ch_mult))
    prefixes = ["Attn" if ddconfig.has_attention(level) else "" for level in levels]
    if scale_factor is None:  # the architecture of Stable Diffusion, or an unknown one
        scale_factor = DEFAULT_SCALE_FACTOR if (len(ddconfig.ch_mult), embed_dim) == (4, 4) else 1.0
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": ddconfig.in_channels,
        "out_channels": ddconfig.out_ch,
        "latent_channels": embed_dim,
        "block_out_channels": ddconfig.level_channels,
        "layers_per_block": ddconfig.num_res_blocks,
        "down_block_types": [f"{prefix}DownEncoderBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpDecoderBlock2D" for prefix in reversed(prefixes)],
        "mid_block_add_attention": ddconfig.attn_type != "none",
        "scaling_factor": scale_factor,
    }


def parse_vae_config(config: Config) -> JsonObject:
    """Return the parameters of our AutoencoderKL."""
    validate_config(config, VAE_CONFIG, VAE_REQUIRED_VALUES, VAE_KEYS)
    channels, down_blocks = config["block_out_channels"], config["down_block_types"]
    check_blocks(VAE_CONFIG, down_blocks, VAE_BLOCKS)
    embed_dim = config["latent_channels"]
    has_attention = [block.startswith("Attn") for block in down_blocks]
    ddconfig = {
        "double_z": True,
        "z_channels": embed_dim,
        "resolution": RESOLUTION,
        "in_channels": config.get("in_channels", 3),
        "out_ch": config.get("out_channels", 3),
        "ch": channels[0],
        "ch_mult": [n // channels[0] for n in channels],
        "num_res_blocks": read_uniform(config, "layers_per_block", VAE_CONFIG, 1),
        "attn_resolutions": [
            RESOLUTION >> level for level, has_attn in enumerate(has_attention) if has_attn
        ],
        "dropout": 0.0,
    }
    if not config.get("mid_block_add_attention", True):
        ddconfig["attn_type"] = "none"
    return {"embed_dim": embed_dim, "ddconfig": ddconfig}


def validate_config(
    config: Config, where: str, required: Config, keys: Collection[str] | None = None
) -> None:
    """Raise ConfigError if an option in a config is not supported.

    Args:
        where: Path of the config in the folder, for messages.
        required: The only supported value, by key.
        keys: Keys that may have any value; others must be null or false. None = ignore others.
    """
    for key, value in config.items():
        if key in required:
            if value != required[key]:
                message = f"is not supported (must be `{required[key]}`)"
                raise ConfigError(f"{where}: `{key}: {value}` {message}")
        elif keys is not None and key not in keys and not key.startswith("_") and value:
            raise ConfigError(f"{where}: `{key}: {value}` is not supported")


def read_uniform(config: Config, key: str, where: str, default: int = 0) -> int:
    """Return an option that is a number, or a list of equal numbers (one per level or side).

    Raises:
        ConfigError: The numbers differ.
    """
    value = config.get(key, default)
    values = value if isinstance(value, list) else [value]
    if len(set(values)) != 1:
        raise ConfigError(f"{where}: `{key}: {value}` is not supported, all must be equal")
    return int(values[0])


def _check_options(network: str, unsupported: Mapping[str, object]) -> None:
    """Raise ConfigError for the first option of `unsupported` whose value is true."""
    for option, is_used in unsupported.items():
        if is_used:
            raise ConfigError(f"diffusers' {network} does not support {option}")


def check_blocks(where: str, blocks: Sequence[str], supported: Collection[str]) -> None:
    """Raise ConfigError unless all classes of blocks are supported."""
    for block in blocks:
        if block not in supported:
            raise ConfigError(f"{where}: blocks `{block}` are not supported")


def _make_depths_by_level(unet: UNet, has_attention: Sequence[bool]) -> JsonObject:
    """Return transformer depths per level, for a UNet whose up levels differ from down levels."""
    down_depths, depths = unet.transformer_depth, unet.transformer_depth_output
    if not isinstance(unet.num_res_blocks, int) or isinstance(down_depths, int) or depths is None:
        raise ConfigError("diffusers' UNet does not support these transformer depths")
    count = unet.num_res_blocks + 1  # up levels have one block more than down levels
    up_depths = [list(depths[i : i + count]) for i in range(0, len(depths), count)]
    down_levels = zip(down_depths, has_attention, strict=True)
    up_levels = zip(up_depths, reversed(has_attention), strict=True)
    return {
        "transformer_layers_per_block": [n if has_attn else 1 for n, has_attn in down_levels],
        "reverse_transformer_layers_per_block": [n if has_attn else 1 for n, has_attn in up_levels],
    }


def _parse_depths(config: Config, num_res_blocks: int) -> JsonObject:
    """Return the transformer depths: one, one per level, or one per block if up blocks differ."""
    middle = config.get("mid_block_type", MIDDLE_BLOCK)
    if middle is None:
        raise ConfigError(
            f"{UNET_CONFIG}: a UNet without a middle block, such as KOALA's, is not supported"
        )
    if middle not in (MIDDLE_BLOCK, MIDDLE_BLOCK_WITHOUT_ATTENTION):
        raise ConfigError(f"{UNET_CONFIG}: `mid_block_type: {middle}` is not supported")
    params: JsonObject = {"transformer_depth_middle": 0} if middle != MIDDLE_BLOCK else {}
    depths = config.get("transformer_layers_per_block", 1)
    reverse = config.get("reverse_transformer_layers_per_block")
    if reverse is None:
        uniform = _to_scalar_if_uniform(depths) if isinstance(depths, list) else depths
        return params | {"transformer_depth": uniform}

    def list_depths(value: Any, block: str, count: int) -> list[int]:
        if block not in CROSS_ATTENTION_BLOCKS:
            return [0] * count
        return list(value) if isinstance(value, list) else [value] * count

    down_levels = zip(depths, config["down_block_types"], strict=True)
    up_levels = zip(reverse, config["up_block_types"], strict=True)
    up_depths = [list_depths(depth, block, num_res_blocks + 1) for depth, block in up_levels]
    return params | {
        "transformer_depth": [
            list_depths(depth, block, num_res_blocks) for depth, block in down_levels
        ],
        "transformer_depth_output": [depth for level in up_depths for depth in level],
    }


def _to_scalar_if_uniform(values: Sequence[Any]) -> Any:
    """Return the single value if all are equal, else the list."""
    return values[0] if len(set(values)) == 1 else list(values)


def _parse_heads(config: Config, channels: Sequence[int]) -> dict[str, int]:
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if isinstance(heads, int):
        return {"num_heads": heads}
    head_dims = {n // count for n, count in zip(channels, heads, strict=True)}
    if len(head_dims) == 1:
        return {"num_head_channels": head_dims.pop()}
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    raise ConfigError(
        f"{UNET_CONFIG}: {heads} heads for channels {channels} can be expressed neither as "
        "num_heads nor as num_head_channels"
    )


def _parse_class_embedding(config: Config) -> JsonObject:
    class_type = config.get("class_embed_type")
    addition = config.get("addition_embed_type")
    if addition not in (None, "text_time"):
        raise ConfigError(f"{UNET_CONFIG}: `addition_embed_type: {addition}` is not supported")
    if class_type == "projection" or addition:
        channels = config["projection_class_embeddings_input_dim"]
        return {"num_classes": "sequential", "adm_in_channels": channels}
    if class_type is not None:
        raise ConfigError(f"{UNET_CONFIG}: `class_embed_type: {class_type}` is not supported")
    return {"num_classes": config["num_class_embeds"]} if config.get("num_class_embeds") else {}
