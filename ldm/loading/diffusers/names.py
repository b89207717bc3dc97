"""Names of the layers of UNet and text tower in diffusers and transformers.

    input_blocks.1.1.transformer_blocks.0.attn1.to_q  ->  down_blocks.0.attentions.0.transformer_…
    transformer.resblocks.0.mlp.c_fc                  ->  text_model.encoder.layers.0.mlp.fc1

LoRA files call layers so, too.
"""

import re
from collections.abc import Iterable

__all__ = ["text_layers", "unet_layers"]

# Inside a residual block, or at the end of a level.
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "class_embedding.linear_1",
    "label_emb.0.2": "class_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
BLOCK = re.compile(r"(in|out)put_blocks\.(\d+)\.(\d+)\.(in_layers|proj_in|op|conv)\b.*")
KINDS = {"in_layers": "resnets", "proj_in": "attentions"}
TEXT = (
    (r"transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"token_embedding|positional_embedding", r"text_model.embeddings.\g<0>"),
    ("positional_embedding", "position_embedding.weight"),
    (r"ln_final", "text_model.final_layer_norm"),
    (r"\.ln_([12])", r".layer_norm\1"),
    (r"\.attn\b", ".self_attn"),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
)


def unet_layers(names: Iterable[str]) -> dict[str, str]:
    """Our name -> theirs, of the layers (or weights) of a whole UNet with transformers."""
    names = list(names)
    prefixes = {**ENDS, **_blocks(names)}
    renamed = {}
    for name in names:
        prefix = max((p for p in prefixes if f"{name}.".startswith(f"{p}.")), key=len)
        rest = name.removeprefix(prefix)
        for ours, theirs in RESIDUAL.items():
            rest = re.sub(rf"^\.{re.escape(ours)}\b", f".{theirs}", rest)
        renamed[name] = prefixes[prefix] + rest
    return renamed


def text_layers(names: Iterable[str]) -> dict[str, str]:
    """Our name -> that in transformers' CLIP, of the layers (or weights) of a text tower.

    OpenCLIP's fused `attn.in_proj` has no single counterpart: there it is q_proj, k_proj, v_proj.
    """
    renamed = {}
    for name in names:
        theirs = name.removeprefix("model.")
        if theirs.startswith("transformer.text_model."):
            theirs = theirs.removeprefix("transformer.")
        else:
            for pattern, word in TEXT:
                theirs = re.sub(pattern, word, theirs)
        renamed[name] = theirs
    return renamed


def _blocks(names: Iterable[str]) -> dict[str, str]:
    """Prefixes such as `input_blocks.4.1`; levels end where the size is halved or doubled."""
    matches = {match.groups() for match in map(BLOCK.fullmatch, names) if match}
    prefixes = {}
    for direction, side in (("in", "down"), ("out", "up")):
        level, count = 0, 0
        blocks = [(int(n), int(k), kind) for d, n, k, kind in matches if d == direction]
        for n, k, kind in sorted(blocks):
            prefix = f"{direction}put_blocks.{n}.{k}"
            if kind in KINDS:
                count += kind == "in_layers"
                prefixes[prefix] = f"{side}_blocks.{level}.{KINDS[kind]}.{count - 1}"
            else:
                prefixes[prefix] = f"{side}_blocks.{level}.{side}samplers.0"
                level, count = level + 1, 0
    return prefixes
