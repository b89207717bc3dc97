"""Convert configs of encoders between our parameters and transformers' `config.json`.

text_encoder, tokenizer             CLIPText, OpenCLIPText
image_encoder, feature_extractor    CLIPImage, OpenCLIPImage
depth_estimator                     MiDaSDepth
"""

from typing import Any, Literal

from ldm.encoders import tokenizer
from ldm.encoders.depth import ARCHS as DEPTH_ARCHS, MIDAS_SIZE, MiDaSDepth
from ldm.encoders.image import PIXEL_MEAN, PIXEL_STD, VISION_CONFIGS, VISION_DEFAULTS
from ldm.encoders.text import (
    CLIP_LARGE_CONFIG,
    TEXT_SIZES,
    CLIPText,
    OpenCLIPText,
    TextEncoder,
    TextSize,
)
from ldm.encoders.towers import VOCAB_SIZE, CLIPBlock, OpenCLIPBlock, VisionTower, quick_gelu
from ldm.loading.diffusers.networks import read_uniform, validate_config
from ldm.runtime.errors import ConfigError, check_name
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "get_tower_config", "is_openai_clip", "make_depth_config", "make_processor_config",
    "make_text_files", "make_tokenizer_files", "make_vision_config", "parse_depth_config",
    "parse_sdxl_text_config", "parse_text_config", "parse_vision_config", "read_added_tokens",
]  # fmt: skip

Config = JsonMapping  # of transformers

# Options of transformers' DPT with only one supported value.
DEPTH_REQUIRED_VALUES = {
    "head_in_index": -1, "hidden_act": "gelu", "num_channels": 3, "qkv_bias": True,
    "readout_type": "project", "neck_ignore_stages": [0, 1], "is_hybrid": True,
}  # fmt: skip
ACTIVATIONS = ("quick_gelu", "gelu")
# Common options of image processors; filter 3 is PIL's bicubic.
PROCESSOR_DEFAULTS = {
    "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True,
}  # fmt: skip
# Other options by class: like the original, resize without cropping and without padding.
PROCESSOR_OPTIONS = {
    "CLIPImageProcessor": {
        "do_center_crop": False, "do_convert_rgb": True,
        "image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD),
    },
    "DPTImageProcessor": {
        "keep_aspect_ratio": False, "ensure_multiple_of": 1,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    },
}  # fmt: skip


def make_text_config(encoder: TextEncoder) -> JsonObject:
    """Return transformers' config of a text encoder, with only the blocks that are run.

    SDXL's have all blocks, as diffusers' pipeline reads the penultimate hidden state.
    """
    class_name = "CLIPTextModel"
    block: OpenCLIPBlock | CLIPBlock
    if isinstance(encoder, OpenCLIPText):
        block, num_blocks = encoder.model.blocks[0], encoder.num_blocks
        norm = encoder.model.ln_final
        heads, mlp_width = block.attn.heads, len(block.mlp["c_fc"].get_parameter("bias"))
        projection = encoder.model.text_projection.shape[1]
        if encoder.always_return_pooled:
            class_name, num_blocks = "CLIPTextModelWithProjection", len(encoder.model.blocks)
    else:
        assert isinstance(encoder, CLIPText)
        block, num_blocks = encoder.tower.blocks[0], len(encoder.tower.blocks)
        if encoder.layer == "pooled" or encoder.blocks_run < num_blocks - 1:
            description = f"CLIPText with `layer: {encoder.layer}`"
            raise ConfigError(f"transformers' CLIPTextModel does not support {description}")
        norm, projection = encoder.tower.final_layer_norm, encoder.width
        heads, mlp_width = block.self_attn.heads, len(block.mlp["fc1"].get_parameter("bias"))
    return {
        "architectures": [class_name],
        "model_type": "clip_text_model",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": encoder.width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": heads,
        "max_position_embeddings": encoder.length,
        "hidden_act": _get_activation(block),
        "layer_norm_eps": norm.eps,
        "projection_dim": projection,
        "bos_token_id": tokenizer.BOS_ID,
        "eos_token_id": tokenizer.EOS_ID,
        "pad_token_id": encoder.tokenizer_variant.pad_id,
    }


def make_text_files(encoder: TextEncoder, component: str = "text_encoder") -> JsonObject:
    """Return config and tokenizer files of a text encoder, by their paths in the folder."""
    tokenizer_folder = component.replace("text_encoder", "tokenizer")
    files = {f"{tokenizer_folder}/{n}": file for n, file in make_tokenizer_files(encoder).items()}
    return {f"{component}/config.json": make_text_config(encoder), **files}


def parse_sdxl_text_config(config: Config, *, pooled: bool) -> JsonObject:
    """Return the parameters of SDXL's CLIPText, or of its OpenCLIPText if `pooled`."""
    layers = config["num_hidden_layers"]
    if not pooled:
        return {"layer_idx": layers - 1, **_parse_openai_arch(config)}
    width, embed_dim = config["hidden_size"], config["projection_dim"]
    name = _find_arch_name(width, config["num_attention_heads"], layers)
    uses_quick_gelu = is_openai_clip(config, "text_encoder_2/config.json")
    has_default_widths = embed_dim == width and config["intermediate_size"] == 4 * width
    if name is not None and has_default_widths and not uses_quick_gelu:
        return {"arch": name}
    arch = {"embed_dim": embed_dim, "text_cfg": _make_text_cfg(config, layers)}
    return {"arch": arch | ({"quick_gelu": True} if uses_quick_gelu else {})}


def _parse_openai_arch(config: Config) -> JsonObject:
    """Return the parameter `arch` of CLIPText: keys that differ from the config of ViT-L/14."""
    defaults = {key: v for key, v in CLIP_LARGE_CONFIG.items() if key != "vocab_size"}
    arch = {key: config[key] for key, v in defaults.items() if config.get(key, v) != v}
    return {"arch": arch} if arch else {}


def _find_arch_name(width: int, heads: int, layers: int) -> str | None:
    """Return open_clip's name of a text tower; of several the first: ViT-H-14, not ViT-g-14."""
    size = TextSize(width, heads, layers)
    return next((name for name, other in TEXT_SIZES.items() if other == size), None)


def _make_text_cfg(config: Config, layers: int) -> JsonObject:
    return {
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "layers": layers,
        "context_length": config.get("max_position_embeddings", 77),
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
    }


def parse_text_config(config: Config) -> JsonObject:
    """Return the parameters of our text encoder: CLIPText for quick GELU, else OpenCLIPText.

    A folder usually does not contain OpenCLIP's last block, which Stable Diffusion 2 does not use:
    our encoder then has one block more, and `layer: penultimate`. If the folder has all blocks of a
    known architecture, it has `layer: last`.
    """
    if is_openai_clip(config, "text_encoder/config.json"):
        return _parse_openai_arch(config)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    params: JsonObject = {"freeze": True, "layer": "last"}
    name = _find_arch_name(width, heads, layers)
    if name is None:
        params["layer"] = "penultimate"
        layers += 1
        name = _find_arch_name(width, heads, layers)
    if name is not None:
        return params if name == "ViT-H-14" else params | {"arch": name}
    return params | {"arch": {"embed_dim": width, "text_cfg": _make_text_cfg(config, layers)}}


def make_tokenizer_files(encoder: TextEncoder) -> JsonObject:
    """Return the files of CLIP's tokenizer, by name, with the padding token of an encoder."""
    ids, ranks = tokenizer.load_vocabulary()
    # transformers uses CLIP's names of these tokens also for open_clip's models.
    bos, eos = tokenizer.CLIP.bos, tokenizer.CLIP.eos
    tokens = {token_id: token for token, token_id in ids.items()}
    pad = tokens.get(encoder.tokenizer_variant.pad_id, eos)
    specials = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": pad}
    tokenizer_config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": encoder.length}
    return {
        "vocab.json": ids | {bos: tokenizer.BOS_ID, eos: tokenizer.EOS_ID},
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, ranks)]) + "\n",
        "tokenizer_config.json": tokenizer_config | specials | {"do_lower_case": True},
        "special_tokens_map.json": specials,
    }


def read_added_tokens(files: JsonMapping, folder: str) -> dict[str, int]:
    """Return the ids of a tokenizer's added tokens, from files of any version of transformers."""
    decoder = files.get(f"{folder}/tokenizer_config.json", {}).get("added_tokens_decoder", {})
    tokens = {entry["content"]: int(token_id) for token_id, entry in decoder.items()}
    entries = files.get(f"{folder}/tokenizer.json", {}).get("added_tokens", [])
    tokens |= {entry["content"]: int(entry["id"]) for entry in entries}
    return tokens | dict(files.get(f"{folder}/added_tokens.json", {}))


def make_vision_config(visual: VisionTower) -> JsonObject:
    """Return the config of a vision tower."""
    block = visual.blocks[0]
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": len(visual.class_embedding),
        "intermediate_size": len(block.mlp["c_fc"].get_parameter("bias")),
        "num_hidden_layers": len(visual.blocks),
        "num_attention_heads": block.attn.heads,
        "image_size": visual.image_size,
        "patch_size": visual.conv1.kernel_size[0],
        "projection_dim": visual.proj.shape[1],
        "hidden_act": _get_activation(block),
        "layer_norm_eps": visual.ln_post.eps,
    }


def parse_vision_config(config: Config) -> JsonObject:
    """Return the parameters of CLIPImage for quick GELU, else of OpenCLIPImage."""
    width, embed_dim = config["hidden_size"], config["projection_dim"]
    where = "image_encoder/config.json"
    is_openai = is_openai_clip(config, where)
    vision_cfg = {
        "width": width,
        "layers": config["num_hidden_layers"],
        "patch_size": read_uniform(config, "patch_size", where),
        "image_size": read_uniform(config, "image_size", where, 224),
        "head_width": width // config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / width,
    }
    name, key = ("ViT-L-14", "model") if is_openai else ("ViT-H-14", "arch")
    if vision_cfg == VISION_DEFAULTS | VISION_CONFIGS[name] and embed_dim == TEXT_SIZES[name].width:
        return {"model": "ViT-L/14"} if is_openai else {}
    text_cfg = {"width": embed_dim, "heads": 1, "layers": 0}  # the folder has no text encoder
    return {key: {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}}


def make_processor_config(class_name: str, size: int) -> JsonObject:
    """Return the config of an image processor, which resizes to a square of `size` pixels."""
    options = PROCESSOR_DEFAULTS | PROCESSOR_OPTIONS[class_name]
    square = {"height": size, "width": size}
    return options | {"image_processor_type": class_name, "size": square}


def make_depth_config(encoder: MiDaSDepth) -> JsonObject:
    """Return transformers' config of the depth estimator."""
    dpt = encoder.model
    assert dpt is not None
    vit: Any = dpt.pretrained["model"]
    cnn, block = vit.patch_embed.backbone, vit.blocks[0]
    channels = [stage["num_chs"] for stage in cnn.feature_info][1:]
    patches_per_side = round((vit.pos_embed.shape[1] - 1) ** 0.5)
    return (
        DEPTH_REQUIRED_VALUES
        | {
            "architectures": ["DPTForDepthEstimation"],
            "model_type": "dpt",
            "hidden_size": vit.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(vit.blocks),
            "num_attention_heads": block.attn.num_heads,
            "layer_norm_eps": block.norm1.eps,
            "image_size": 16 * patches_per_side,
            "patch_size": 16,
            "backbone_out_indices": [2, 5, *dpt.hooks],  # the first two are stages, not blocks
            "backbone_featmap_shape": [1, channels[-1], patches_per_side, patches_per_side],
            "neck_hidden_sizes": [*channels[:2], vit.embed_dim, vit.embed_dim],
            "fusion_hidden_size": len(dpt.scratch["layer1_rn"].get_parameter("weight")),
            "backbone_config": {
                "model_type": "bit",
                "layer_type": "bottleneck",
                "depths": [len(stage.blocks) for stage in cnn.stages],
                "hidden_sizes": [*channels, 2 * channels[-1]],
                "embedding_size": cnn.stem.conv.out_channels,
                "global_padding": "SAME",
                "embedding_dynamic_padding": True,
                "out_features": ["stage1", "stage2", "stage3"],
            },
        }
    )


def parse_depth_config(config: Config) -> JsonObject:
    """Return the parameters of our MiDaSDepth."""
    where = "depth_estimator/config.json"
    validate_config(config, where, DEPTH_REQUIRED_VALUES)
    kwargs = {
        "embed_dim": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "img_size": read_uniform(config, "image_size", where, MIDAS_SIZE),
        "hooks": tuple(config.get("backbone_out_indices", (2, 5, 8, 11))[2:]),
        "features": config.get("fusion_hidden_size", 256),
    }
    default = DEPTH_ARCHS["dpt_hybrid"]
    arch = {k: list(v) if k == "hooks" else v for k, v in kwargs.items() if v != default[k]}
    return {"model_type": "dpt_hybrid"} | ({"arch": arch} if arch else {})


def get_tower_config(config: Config, tower: Literal["text", "vision"]) -> JsonObject:
    """Return the section of a tower in the config of transformers' CLIPModel."""
    # Older versions of transformers wrote both; the second one takes precedence.
    return (config.get(f"{tower}_config") or {}) | (config.get(f"{tower}_config_dict") or {})


def is_openai_clip(config: Config, where: str) -> bool:
    """Return whether a CLIP is OpenAI's, by its activation."""
    activation = config.get("hidden_act", "quick_gelu")
    check_name("hidden_act", activation, ACTIVATIONS, where)
    return bool(activation == "quick_gelu")


def _get_activation(block: OpenCLIPBlock | CLIPBlock) -> str:
    return "quick_gelu" if block.activation is quick_gelu else "gelu"
