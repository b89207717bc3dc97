"""Convert names of layers of the UNet and text encoders to diffusers' and transformers' names.

    input_blocks.1.1.transformer_blocks.0.attn1.to_q  ->  down_blocks.0.attentions.0.transformer_…
    transformer.resblocks.0.mlp.c_fc                  ->  text_model.encoder.layers.0.mlp.fc1

LoRA files use these names, too.
"""

import re
from collections.abc import Iterable

__all__ = ["rename_text_layers", "rename_unet_layers", "replace_all"]

# (pattern, replacement) for layers of a residual block, and of a down- or upsampler.
BLOCK_RULES = (
    (r"^\.in_layers\.0\b", ".norm1"),
    (r"^\.in_layers\.2\b", ".conv1"),
    (r"^\.emb_layers\.1\b", ".time_emb_proj"),
    (r"^\.out_layers\.0\b", ".norm2"),
    (r"^\.out_layers\.3\b", ".conv2"),
    (r"^\.skip_connection\b", ".conv_shortcut"),
    (r"^\.op\b", ".conv"),
)
# Our prefix -> diffusers', outside of the numbered blocks, see `_map_blocks`.
PREFIXES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "class_embedding.linear_1",
    "label_emb.0.2": "class_embedding.linear_2",
    "label_emb": "class_embedding",
    "time_embed_cond": "time_embedding.cond_proj",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# Prefixes that differ for SDXL, whose UNet has no transformers in the first level.
SDXL_PREFIXES = {
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
FIRST_TRANSFORMER = "input_blocks.1.1."
BLOCK_LAYER = re.compile(r"(in|out)put_blocks\.(\d+)\.(\d+)\.(in_layers|proj_in|op|conv)\b.*")
BLOCK_TYPES = {"in_layers": "resnets", "proj_in": "attentions"}  # by a layer of the block
TEXT_RULES = (
    (r"transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"token_embedding|positional_embedding", r"text_model.embeddings.\g<0>"),
    ("positional_embedding", "position_embedding.weight"),
    (r"ln_final", "text_model.final_layer_norm"),
    (r"\.ln_([12])", r".layer_norm\1"),
    (r"\.attn\b", ".self_attn"),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
)


def rename_unet_layers(names: Iterable[str]) -> dict[str, str]:
    """Map our names of all layers (or weights) of a UNet to diffusers' names."""
    names = list(names)
    is_sdxl = not any(name.startswith(FIRST_TRANSFORMER) for name in names)
    prefixes = {**PREFIXES, **(SDXL_PREFIXES if is_sdxl else {}), **_map_blocks(names)}
    renamed = {}
    for name in names:
        prefix = max((p for p in prefixes if f"{name}.".startswith(f"{p}.")), key=len)
        renamed[name] = prefixes[prefix] + replace_all(BLOCK_RULES, name.removeprefix(prefix))
    return renamed


def rename_text_layers(names: Iterable[str]) -> dict[str, str]:
    """Map our names of layers (or weights) of a text encoder to those of transformers' CLIP.

    OpenCLIP's fused `attn.in_proj` keeps its name: transformers has q_proj, k_proj and v_proj.
    """
    renamed = {}
    for name in names:
        diffusers_name = name.removeprefix("model.")
        if diffusers_name.startswith("transformer.text_model."):
            diffusers_name = diffusers_name.removeprefix("transformer.")
        else:
            diffusers_name = replace_all(TEXT_RULES, diffusers_name)
        renamed[name] = diffusers_name
    return renamed


def replace_all(rules: Iterable[tuple[str, str]], name: str) -> str:
    """Apply (pattern, replacement) rules, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _map_blocks(names: Iterable[str]) -> dict[str, str]:
    """Map our prefixes of blocks, such as `input_blocks.4.1`, to diffusers' prefixes.

    A down- or upsampler ends each level but the last.
    """
    matches = {match.groups() for match in map(BLOCK_LAYER.fullmatch, names) if match}
    prefixes = {}
    for side, direction in (("in", "down"), ("out", "up")):
        level, num_resnets = 0, 0
        blocks = [(int(i), int(j), layer) for name, i, j, layer in matches if name == side]
        for i, j, layer in sorted(blocks):
            prefix = f"{side}put_blocks.{i}.{j}"
            if layer in BLOCK_TYPES:
                if layer == "in_layers":  # an attention has the index of the resnet before it
                    num_resnets += 1
                block = f"{BLOCK_TYPES[layer]}.{num_resnets - 1}"
                prefixes[prefix] = f"{direction}_blocks.{level}.{block}"
            else:
                prefixes[prefix] = f"{direction}_blocks.{level}.{direction}samplers.0"
                level, num_resnets = level + 1, 0
    return prefixes
