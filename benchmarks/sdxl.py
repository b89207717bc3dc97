"""Networks of Stable Diffusion XL, ours and diffusers', with the same random weights.

Each is built separately, so that no process needs memory for the complete model.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import ROOT
from make_checkpoint import draw_weights
from torch import Tensor, nn

from ldm.loading.build import build_on_meta
from ldm.loading.config import read_yaml
from ldm.loading.legacy import translate_config
from ldm.nets.blocks import timestep_embedding

CONFIG = ROOT / "configs/stable-diffusion-xl/sd_xl_base.yaml"
EOS_TOKEN_ID = 49407
BIG_G_CONFIG = {  # of transformers
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 0,
}
MICRO_CONDITIONS = (1024, 1024, 0, 0, 1024, 1024)  # original size, crop, target size

Call = Callable[..., Tensor]


def write_configs(checkpoint: Path) -> None:
    """Write the folder of configs and tokenizers that diffusers needs to load a single file."""
    # Here, as an older revision that is compared with does not have all of these.
    from ldm.loading.convert import plan_conversion
    from ldm.loading.diffusers.files import write_text_files

    folder = checkpoint.with_suffix("")
    write_text_files(folder, plan_conversion(checkpoint, folder, config=CONFIG).text_files)


def build_ours(name: str) -> tuple[nn.Module, Call]:
    """Return our "unet", "vae" or "text" (ViT-bigG) in float16, and the call to time."""
    model: Any = build_on_meta(translate_config(read_yaml(CONFIG)), where=str(CONFIG))
    conditioner = model.conditioner
    network: Any = {"unet": model.unet, "vae": model.autoencoder, "text": conditioner.text_2}[name]
    weights = draw_weights(network.state_dict(), torch.float16)
    network.load_state_dict(weights, assign=True)
    network.eval()
    if name == "vae":
        return network, network.decode
    if name == "unet":
        return network, network

    def encode(tokens: Tensor) -> Tensor:
        cond = network(tokens)
        return concat_outputs(cond.crossattn, cond.vector)

    return network, encode


def build_diffusers(name: str) -> tuple[nn.Module, Call]:
    """Return the network of diffusers or transformers, and the call to time."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    # Imported here, as another revision may not have these modules.
    from ldm.loading.diffusers.locations import (
        convert_to_diffusers,
        locate_text_encoder,
        locate_unet,
        locate_vae,
    )
    from ldm.loading.diffusers.networks import make_unet_config, make_vae_config

    ours: Any = build_ours(name)[0]
    our_weights = ours.state_dict()
    locate = {"unet": locate_unet, "vae": locate_vae, "text": locate_text_encoder}[name]
    weights = convert_to_diffusers(locate(our_weights), our_weights)
    network: Any
    with torch.device("meta"):
        if name == "unet":
            network = UNet2DConditionModel.from_config(
                make_unet_config(ours, 128, size_embed_dim=256)
            )
        elif name == "vae":
            params = {"ddconfig": asdict(ours.config), "embed_dim": ours.embed_dim}
            network = AutoencoderKL.from_config(make_vae_config(params, None, 1024))
        else:
            network = CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G_CONFIG))
            projection = our_weights["model.text_projection"].mT.contiguous()
            weights["text_projection.weight"] = projection
    network.load_state_dict({name: weights[name] for name in network.state_dict()}, assign=True)
    network.eval()
    if name == "vae":
        return network, lambda z: network.decode(z, return_dict=False)[0]
    if name == "text":
        # This buffer is not in the state dict, so that it is still on the meta device.
        for module in (m for m in network.modules() if hasattr(m, "position_ids")):
            module.position_ids = torch.arange(77).expand(1, -1)

        def encode(tokens: Tensor) -> Tensor:
            output = network(tokens, output_hidden_states=True)
            return concat_outputs(output.hidden_states[-2], output.text_embeds)

        return network, encode

    def denoise(x: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
        time_ids = torch.tensor([MICRO_CONDITIONS] * len(x), device=x.device)
        added_cond = {"text_embeds": y[:, :1280], "time_ids": time_ids}
        out: Tensor = network(x, t, context, added_cond_kwargs=added_cond, return_dict=False)[0]
        return out

    return network, denoise


def make_example_inputs(name: str, side: int, prompts: int = 2) -> list[Tensor]:
    """Return the inputs of a network, for latents of height and width `side`, or for prompts."""
    if name == "vae":
        return [torch.randn(1, 4, side, side)]
    if name == "text":
        tokens = torch.randint(1, EOS_TOKEN_ID - 1, (prompts, 77))
        tokens[:, 20] = EOS_TOKEN_ID
        return [tokens]
    size_embedding = timestep_embedding(torch.tensor(MICRO_CONDITIONS), 256).flatten()
    y = torch.cat([torch.randn(2, 1280), size_embedding.expand(2, -1)], dim=1)
    return [torch.randn(2, 4, side, side), torch.tensor([500, 500]), torch.randn(2, 77, 2048), y]


def concat_outputs(context: Tensor, pooled: Tensor) -> Tensor:
    """Concatenate both outputs of a text encoder, (B, 77, D) and (B, D): (B, 78, D)."""
    return torch.cat([context, pooled[:, None]], dim=1)
