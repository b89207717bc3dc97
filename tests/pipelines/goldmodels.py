"""Models of the golden files, with weights by the recipe; x and images that they sample."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import ldm
from goldfile import GoldenFile
from imagehelp import assert_pixels_close
from ldm.imaging.pixels import to_uint8
from ldm.loading.weight_names import rename_weights, restore_names
from ldm.model import LatentDiffusion
from recipe import fill

UNET_TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
DDPM = "ldm.models.diffusion.ddpm"
TINY_DPT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "hooks": [0, 1], "features": 16}
# Classes of SDXL's text encoders, and the keys of their configs in the metadata.
TEXT_ENCODERS = {"FrozenCLIPEmbedder": "tiny_hf_config", "FrozenOpenCLIPEmbedder2": "tiny_arch"}


def build_model(
    unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], class_name: str, **params: Any
) -> LatentDiffusion:
    """Build a model with a CLIP text encoder from the configs of its components."""
    clip = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
    params |= {
        "image_size": 8,
        "unet_config": {"target": UNET_TARGET, "params": unet},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 4, "ddconfig": vae},
        },
        "cond_stage_config": {"target": clip, "params": {"arch": text}},
    }
    model: LatentDiffusion = ldm.instantiate({"target": f"{DDPM}.{class_name}", "params": params})
    return model


class FakeDepthNetwork(nn.Module):
    """A formula, which the recorder had in place of MiDaS."""

    def __init__(self) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(()), requires_grad=False)  # has device and dtype

    def forward(self, x: Tensor) -> Tensor:
        x0, x1, x2 = x.split(1, dim=1)
        slope = torch.linspace(0, 1, x.shape[-1]).expand_as(x0)
        return 3 * x0 + 2 * x1 * x2 + 0.25 * slope


def get_config(golden: GoldenFile, name: str) -> dict[str, Any]:
    """Return the recorded config of a model, with the configs of its encoders."""
    config: dict[str, Any] = copy.deepcopy(golden.meta[f"config_{name}"])
    params = config["params"]
    for embedder in params.get("conditioner_config", {}).get("params", {}).get("emb_models", ()):
        class_name = embedder["target"].rpartition(".")[2]
        if class_name in TEXT_ENCODERS:
            embedder["params"]["arch"] = golden.meta[TEXT_ENCODERS[class_name]]
    for section in ("cond_stage_config", "embedder_config"):
        if section in params:
            params[section]["params"]["arch"] = golden.meta["tiny_arch"]
    if "depth_stage_config" in params:
        target = "ldm.modules.midas.api.MiDaSInference"
        params["depth_stage_config"] = {"target": target, "params": {"arch": TINY_DPT}}
    return config


def build_recorded_model(
    golden: GoldenFile, name: str, with_depth_network: bool = False
) -> LatentDiffusion:
    """Build a model of a golden file.

    Args:
        with_depth_network: Estimate depth by a small network instead of the recorder's formula.
    """
    config = get_config(golden, name)
    if "embedder_config" in config["params"]:
        config["params"]["embedder_config"]["params"]["blur"] = "narrow"
    model = ldm.instantiate(config)
    encoder: Any = getattr(model.conditioner, "depth", None)
    if encoder is not None and not with_depth_network:
        encoder.model = nn.Identity()
    state = fill(restore_names(model.state_dict()), golden.meta["salt"])
    model.load_state_dict(rename_weights(state))
    if encoder is not None and not with_depth_network:
        encoder.model = FakeDepthNetwork()
    return model.eval().requires_grad_(False)


def assert_images_close(
    ours: Tensor, theirs: Tensor, *, truncate: bool = True, max_fraction: float = 0.01
) -> None:
    """Compare images (B, 3, H, W) in [-1, 1] with (B, H, W, 3) uint8."""
    pixels = to_uint8(ours, truncate=truncate).astype(int)
    assert_pixels_close(pixels, theirs, max_fraction)


class StepRecorder:
    """A callback that records x and the denoised estimate of each step."""

    def __init__(self) -> None:
        self.xs: list[Tensor] = []
        self.denoised: list[Tensor] = []

    def __call__(self, step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        assert step == len(self.xs) < steps
        self.xs.append(x)
        self.denoised.append(denoised)


def sample_latents(model: LatentDiffusion, prompts: list[str], **options: Any) -> list[Tensor]:
    """Run txt2img with a few steps; return x after each of them."""
    recorder = StepRecorder()
    defaults = {"steps": 3, "scale": 5.0, "seeds": 5, "size": (64, 64)}
    ldm.txt2img(model, prompts, callback=recorder, **{**defaults, **options})
    return recorder.xs
