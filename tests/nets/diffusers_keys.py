"""Our parameter names in the words of diffusers, so that it can be an oracle for ours."""

import re
from collections.abc import Iterable

from torch import Tensor

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
}
KINDS = {
    "in_layers.0": "resnets",
    "proj_in": "attentions",
    "op": "downsamplers",
    "conv": "upsamplers",
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


def to_diffusers_unet(state: dict[str, Tensor], res_blocks: int) -> dict[str, Tensor]:
    """A UNet's state dict; res_blocks: num_res_blocks, the same at each level."""
    places = {**ENDS, **dict(_places(state, res_blocks))}
    renamed = {}
    for key, value in state.items():
        place = max((p for p in places if key.startswith(p + ".")), key=len)
        rest = key[len(place) + 1 :]
        for ours, theirs in RESNET.items():
            rest = re.sub(f"^{ours}", theirs, rest)
        renamed[f"{places[place]}.{rest}"] = value
    return renamed


def _places(state: Iterable[str], res_blocks: int) -> Iterable[tuple[str, str]]:
    layers = {".".join(key.split(".")[:3]) for key in state if "put_blocks" in key}
    for layer in layers - {"input_blocks.0.0"}:
        way, n = layer.split(".")[:2]
        kind = next(kind for part, kind in KINDS.items() if f"{layer}.{part}.weight" in state)
        if way == "input_blocks":
            level, i = divmod(int(n) - 1, res_blocks + 1)
            side = "down_blocks"
        else:
            level, i = divmod(int(n), res_blocks + 1)
            side = "up_blocks"
        yield layer, f"{side}.{level}.{kind}.{0 if 'samplers' in kind else i}"


def to_diffusers_vae(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """An AutoencoderKL's state dict; levels: length of ch_mult."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"mid\.block_([12])", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", key)
        key = key.replace("mid.attn_1", "mid_block.attentions.0")
        key = re.sub(r"down\.(\d+)\.block", r"down_blocks.\1.resnets", key)
        key = re.sub(r"down\.(\d+)\.downsample", r"down_blocks.\1.downsamplers.0", key)
        if match := re.search(r"up\.(\d+)\.(block|upsample)", key):
            part = {"block": "resnets", "upsample": "upsamplers.0"}[match[2]]
            key = key.replace(match[0], f"up_blocks.{levels - 1 - int(match[1])}.{part}")
        key = key.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
        if "attentions" in key:
            key = re.sub(r"\.([qkv])\.", r".to_\1.", key).replace("proj_out", "to_out.0")
            key = key.replace("0.norm.", "0.group_norm.")
            value = value.flatten(1) if value.dim() == 4 else value
        renamed[key] = value
    return renamed
