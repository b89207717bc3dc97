"""Small models with LoRA, ours and those of diffusers and transformers with the same weights."""

import sys
import warnings
from pathlib import Path

import torch

from ldm.conditioning import Conditioner
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders.text import CLIPText, OpenCLIPText
from ldm.loading.addons.lora import kohya_name, lora_targets
from ldm.loading.diffusers.keys import scatter_weights, text_keys
from ldm.loading.diffusers.names import unet_layers
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import PixelSpace
from ldm.nets.lora import LoRA, LoRALayer

sys.path.append(str(Path(__file__).parents[1] / "nets"))

from nethelp import tiny_unet

WIDTH = 24
PROMPTS = ["a red apple on a table", "", "the cat, sleeping"]
KINDS = ("sd1", "sd2")
UNETS = {
    "sd1": {"num_heads": 4, "num_head_channels": -1, "use_linear_in_transformer": False},
    "sd2": {},
}
TEXT = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 3}
THEIR_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
THEIR_KINDS = {
    "sd1": {"attention_head_dim": 4},
    "sd2": {"attention_head_dim": (2, 4), "use_linear_projection": True},
}


def tiny_model(kind: str = "sd2") -> LatentDiffusion:
    unet = tiny_unet(attention_resolutions=[1], **UNETS[kind])
    if kind == "sd1":
        text: CLIPText | OpenCLIPText = CLIPText(arch={**TEXT, "num_hidden_layers": 2})
    else:
        arch = {"width": WIDTH, "heads": 3, "layers": 3, "context_length": 77}
        text = OpenCLIPText(arch=arch, layer="penultimate")
    schedule = Schedule(make_betas("linear"))
    parts = {"unet": unet, "autoencoder": PixelSpace(), "conditioner": Conditioner(text=text)}
    return LatentDiffusion(**parts, schedule=schedule).eval().requires_grad_(False)


def random_adapter(model: LatentDiffusion, *, rank: int = 3, alpha=None, seed=0) -> LoRA:
    """Of every place there is."""
    torch.manual_seed(seed)
    changes = {}
    for name, place in lora_targets(model).items():
        low = LoRALayer(place, rank, alpha)
        torch.nn.init.normal_(low.lora_up.weight, std=0.05)
        changes[kohya_name(name)] = low
    return LoRA(changes).requires_grad_(False)


@torch.no_grad()
def outputs(model: LatentDiffusion) -> tuple[torch.Tensor, torch.Tensor]:
    """(prediction, context) for fixed inputs."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    context = model.condition({"txt": PROMPTS}).crossattn
    return model.unet(x, torch.tensor([1, 400, 999]), context), context


def their_parts(model: LatentDiffusion, kind: str):
    """(UNet, text tower) of diffusers and transformers, with the weights of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        from transformers import CLIPTextConfig, CLIPTextModel
    unet = diffusers.UNet2DConditionModel(**THEIR_UNET, **THEIR_KINDS[kind]).eval()
    state = model.unet.state_dict()
    names = unet_layers(state)
    unet.load_state_dict({names[name]: value for name, value in state.items()})
    activation = "quick_gelu" if kind == "sd1" else "gelu"
    config = CLIPTextConfig(**TEXT, num_hidden_layers=2, hidden_act=activation, eos_token_id=49407)
    text = CLIPTextModel(config).eval()
    state = model.conditioner.text.state_dict()
    state = scatter_weights(text_keys(state), state)
    if "final_layer_norm.weight" in text.state_dict():  # transformers 5 has one level less
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    missing = text.load_state_dict(state, strict=False).missing_keys
    assert [name for name in missing if "position_ids" not in name] == []
    return unet, text
