"""Tiny text towers of SDXL: ours, and those of transformers with the same weights."""

import torch

from ldm.conditioning import Conditioner
from ldm.encoders.sizes import SizeEmbedding
from ldm.encoders.text import CLIPText, OpenCLIPText
from ldm.loading.diffusers.locations import convert_to_diffusers, locate_text_encoder

L_WIDTH, G_WIDTH, POOLED_WIDTH, LAYERS = 24, 32, 32, 3
CLIP_L = {
    "hidden_size": L_WIDTH, "intermediate_size": 4 * L_WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
}  # fmt: skip
CLIP_G = {"width": G_WIDTH, "heads": 4, "layers": LAYERS, "context_length": 77}
SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")


def tiny_conditioner() -> Conditioner:
    clip_g = OpenCLIPText(
        arch={"embed_dim": POOLED_WIDTH, "text_cfg": CLIP_G},
        layer="penultimate",
        always_return_pooled=True,
        legacy=False,
        null=None,
    )
    clip_l = CLIPText(arch=CLIP_L, layer="hidden", layer_idx=LAYERS - 1, null=None)
    sizes = {key: SizeEmbedding(key=key, outdim=8) for key in SIZES}
    return Conditioner(join="features", text=clip_l, text_2=clip_g, **sizes).requires_grad_(False)


def their_towers(conditioner: Conditioner):
    """CLIPTextModel and CLIPTextModelWithProjection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**CLIP_L, hidden_act="quick_gelu", eos_token_id=49407)
    sizes = {"hidden_size": G_WIDTH, "intermediate_size": 4 * G_WIDTH, "num_attention_heads": 4}
    config_2 = CLIPTextConfig(
        **sizes,
        num_hidden_layers=LAYERS,
        projection_dim=POOLED_WIDTH,
        hidden_act="gelu",
        eos_token_id=49407,
        pad_token_id=0,
    )
    towers = CLIPTextModel(config).eval(), CLIPTextModelWithProjection(config_2).eval()
    for ours, theirs in zip((conditioner.text, conditioner.text_2), towers, strict=True):
        state = ours.state_dict()
        weights = convert_to_diffusers(locate_text_encoder(state), state)
        names = theirs.state_dict().keys()
        if "final_layer_norm.weight" in names:  # transformers 5 has one level less
            weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
        if "text_projection.weight" in names:
            weights["text_projection.weight"] = ours.model.text_projection.mT.contiguous()
        missing = theirs.load_state_dict(weights, strict=False).missing_keys
        assert [name for name in missing if "position_ids" not in name] == []
    return towers


@torch.no_grad()
def their_cond(towers, tokens):
    """Context and pooled output as diffusers' pipeline uses them, for the tokens of each tower."""
    outputs = [
        tower(ids, output_hidden_states=True) for tower, ids in zip(towers, tokens, strict=True)
    ]
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return context, outputs[1].text_embeds
