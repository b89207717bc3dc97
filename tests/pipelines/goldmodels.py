"""Models of the recorded images: weights by the recipe, depth by a formula."""

import copy
from typing import Any

import torch
from torch import nn

import ldm
from goldfile import GoldenFile
from ldm.loading.weight_names import rename_weights, restore_names
from ldm.model import LatentDiffusion
from recipe import fill

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
DDPM = "ldm.models.diffusion.ddpm"
TINY_DPT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "hooks": [0, 1], "features": 16}
# Classes of SDXL's text encoders, and their sizes in the metadata.
TOWERS = {"FrozenCLIPEmbedder": "tiny_hf_config", "FrozenOpenCLIPEmbedder2": "tiny_arch"}


def build_model(
    unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], kind: str, **params: Any
) -> LatentDiffusion:
    """Build a model with a CLIP text encoder from the sizes of its parts."""
    clip = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
    params |= {
        "image_size": 8,
        "unet_config": {"target": UNET, "params": unet},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 4, "ddconfig": vae},
        },
        "cond_stage_config": {"target": clip, "params": {"arch": text}},
    }
    model: LatentDiffusion = ldm.instantiate({"target": f"{DDPM}.{kind}", "params": params})
    return model


class FakeDepthNetwork(nn.Module):
    """The formula that the recordings have in place of MiDaS."""

    def __init__(self) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(()), requires_grad=False)  # has device and dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x0, x1, x2 = x.split(1, dim=1)
        slope = torch.linspace(0, 1, x.shape[-1]).expand_as(x0)
        return 3 * x0 + 2 * x1 * x2 + 0.25 * slope


def get_config(file: GoldenFile, name: str) -> dict[str, Any]:
    """The recorded config of a model, with the sizes of its encoders."""
    config: dict[str, Any] = copy.deepcopy(file.meta[f"config_{name}"])
    params = config["params"]
    for embedder in params.get("conditioner_config", {}).get("params", {}).get("emb_models", ()):
        kind = embedder["target"].rpartition(".")[2]
        if kind in TOWERS:
            embedder["params"]["arch"] = file.meta[TOWERS[kind]]
    if "cond_stage_config" in params:
        params["cond_stage_config"]["params"]["arch"] = file.meta["tiny_arch"]
    if "embedder_config" in params:
        params["embedder_config"]["params"]["arch"] = file.meta["tiny_arch"]
    if "depth_stage_config" in params:
        target = "ldm.modules.midas.api.MiDaSInference"
        params["depth_stage_config"] = {"target": target, "params": {"arch": TINY_DPT}}
    return config


def build_recorded_model(
    file: GoldenFile, name: str, with_depth_network: bool = False
) -> LatentDiffusion:
    """with_depth_network: with a small depth network, instead of the formula."""
    config = get_config(file, name)
    if "embedder_config" in config["params"]:
        config["params"]["embedder_config"]["params"]["blur"] = "narrow"
    model = ldm.instantiate(config)
    encoder: Any = getattr(model.conditioner, "depth", None)
    if encoder is not None and not with_depth_network:
        encoder.model = nn.Identity()
    state = fill(restore_names(model.state_dict()), file.meta["salt"])
    model.load_state_dict(rename_weights(state))
    if encoder is not None and not with_depth_network:
        encoder.model = FakeDepthNetwork()
    return model.eval().requires_grad_(False)
