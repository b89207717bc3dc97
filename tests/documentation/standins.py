"""Stand-ins for the documentation: small models with random weights, and small images."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from checkerhelp import write_safety_checker
from goldfile import load_golden
from imagehelp import write_random_lora
from ldm.encoders.towers import CLIP
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.loading.build import build_on_meta
from ldm.loading.config import format_yaml, instantiate, read_yaml
from ldm.loading.files.checkpoint import write_checkpoint
from ldm.loading.load import load
from ldm.loading.weight_names import restore_names
from ldm.nets.tiny_autoencoder import TinyDecoder
from loading import tinyfamilies
from recipe import fill

CHECKPOINTS = {
    "v1-5-pruned.ckpt": "sd1",
    "sd-v1-5": "sd1",
    "anime.safetensors": "sd1",
    "photo.safetensors": "sd1",
    "sd-v1-5-inpainting": "sd1-inpainting",
    "v2-1_768-ema-pruned.ckpt": "sd2-v",
    "v2-1_768-ema-pruned.safetensors": "sd2-v",
    "512-inpainting-ema.ckpt": "inpainting",
    "512-depth-ema.ckpt": "depth",
    "x4-upscaler-ema.safetensors": "x4",
    "sd21-unclip-h.ckpt": "unclip-h",
    "sdxl-base": "xl",
    "sdxl-refiner": "xl-refiner",
    "sdxl-inpainting": "xl-inpainting",
    "sdxl-turbo": "xl",
    "ldm3d-4c": "ldm3d-4c",
    "ldm3d-pano": "ldm3d-4c",
    "ldm3d-sr": "ldm3d-sr",
}
# Models of latent-diffusion -> golden file with a small config, and its name there.
LDM_MODELS = {
    "celeba256": ("ldm_uncond", "config_vq"),
    "cin256-v2": ("ldm_class", "config"),
    "text2img-large": ("ldm_text2img", "config"),
    "bsr_sr": ("ldm_concat", "config_sr"),
    "inpainting_big": ("ldm_concat", "config_inpaint"),
    "semantic_synthesis256": ("ldm_concat", "config_semantic"),
    "layout2img-openimages256": ("ldm_layout", "config"),
    "rdm768x768": ("ldm_rdm", "config"),
}
HUB_OWNER = "Intel"  # of the LDM3D models
UPSCALER_CONFIG = "configs/stable-diffusion/x2-latent-upscaler.yaml"
IMAGES = (
    "sketch.png", "dog.png", "room.png", "small.png", "cat.png", "sea.png",
    "photos/one.png", "photos/two.png", "00000.png", "00000_depth.png",
)  # fmt: skip


def make_small_config(family: str) -> dict[str, Any]:
    """Make the published config with few channels, but with its downscale factor."""
    config = tinyfamilies.make_small_config(family)
    params = config["model"]["params"]
    if family in tinyfamilies.SDXL_CONFIGS:
        unet, vae = params["network_config"]["params"], params["first_stage_config"]["params"]
        unet |= {"attention_resolutions": [4], "use_checkpoint": False}
        vae["ddconfig"] |= {"ch_mult": [1, 1, 1, 1], "attn_resolutions": []}
        return config
    vae, unet = params["first_stage_config"]["params"], params["unet_config"]["params"]
    vae["ddconfig"]["ch_mult"] = [1, 1, 1] if family == "x4" else [1, 1, 1, 1]
    if family != "x4":
        unet["attention_resolutions"] = [2]
    if "disable_self_attentions" in unet:
        unet["disable_self_attentions"] = [True, True]
    return config


def write_stand_ins(folder: Path) -> None:
    """Write all stand-ins into a folder, and replace the files of its `configs` by small ones."""
    for name, family in CHECKPOINTS.items():
        config = make_small_config(family)
        yaml = format_yaml(config)
        state = tinyfamilies.make_weights(config, name)
        if name == "v1-5-pruned.ckpt":
            ema = {k[6:].replace(".", ""): v for k, v in state.items() if k[:6] == "model."}
            state |= {f"model_ema.{k}": v for k, v in ema.items()}
        if family in tinyfamilies.CONFIGS:
            config_path = f"stable-diffusion/{tinyfamilies.CONFIGS[family]}.yaml"
        else:
            config_path = f"stable-diffusion-xl/{tinyfamilies.SDXL_CONFIGS[family]}.yaml"
        (folder / "configs" / config_path).write_text(yaml)
        target = folder / name
        suffix = target.suffix if target.suffix in (".ckpt", ".safetensors") else ".safetensors"
        written = folder / f"written{suffix}"
        write_checkpoint(written, state, {"ldm.config": yaml})
        written.rename(target)
    _write_upscaler(folder)
    _write_ldm_models(folder)
    _write_clip(folder / "ViT-L-14.pt")
    sd1 = load(ckpt=folder / "v1-5-pruned.ckpt")
    state, prefix = restore_names(sd1.state_dict()), "first_stage_model."
    vae = {k.removeprefix(prefix): v.contiguous() for k, v in state.items() if k.startswith(prefix)}
    torch.save({"state_dict": vae}, folder / "vae-ft-mse-840000-ema-pruned.ckpt")
    decoder = {name: torch.ones(value.shape) for name, value in TinyDecoder().state_dict().items()}
    torch.save(fill(decoder, "taesd"), folder / "taesd_decoder.pth")
    for seed, name in enumerate(("style", "detail", "lcm-lora-sdv1-5")):
        write_random_lora(folder / f"{name}.safetensors", sd1, seed)
    name, weight = next((layer.kohya_name, layer.target.weight) for layer in list_lora_targets(sd1)
                        if layer.kohya_name.endswith("attn1_to_q"))  # fmt: skip
    factors = {"w1": torch.ones(4, 4), "w2": torch.ones(weight.shape[0] // 4, weight.shape[1] // 4)}
    kronecker = {f"{name}.lokr_{role}": value for role, value in factors.items()}
    write_checkpoint(folder / "lokr.safetensors", kronecker)
    (folder / "embeddings").mkdir()
    save_file({"<cat>": torch.randn(1, tinyfamilies.WIDTH)}, folder / "embeddings/cat.safetensors")
    write_safety_checker(folder / "sd-safety-checker")
    (folder / "photos").mkdir()
    for i, name in enumerate(IMAGES):
        side = 32 if name == "small.png" else 96
        mode = "L" if name.endswith("_depth.png") else "RGB"
        _draw(i).resize((side, side)).convert(mode).save(folder / name)
    for name in ("one", "two"):
        (folder / f"photos/{name}.txt").write_text(f"photo {name}")
    mask = Image.new("L", (96, 96))
    mask.paste(255, (24, 24, 72, 72))
    mask.save(folder / "mask.png")
    lines = ["a 3d emoji of a cat face", "a noto emoji of a lemon --seed 5"]
    (folder / "prompts.txt").write_text("\n".join(lines))
    Image.new("L", (32, 32), 3).save(folder / "map.png")
    (folder / "boxes.json").write_text('[{"category": 5, "box": [0.1, 0.2, 0.5, 0.5]}]')


def record_downloads(folder: Path, cache: Path) -> None:
    """Record stand-ins as downloaded, so that `hf:OWNER/NAME` finds them."""
    cache.mkdir()
    names = [name for name in CHECKPOINTS if name.startswith("ldm3d")]
    choices = {f"{HUB_OWNER}/{name}": str(folder / name) for name in names}
    (cache / "hub_choices.json").write_text(json.dumps(choices))


def _write_ldm_models(folder: Path) -> None:
    """Write small models of latent-diffusion, with 1,001 classes where there are classes."""
    for name, (golden_name, config_name) in LDM_MODELS.items():
        config = load_golden(golden_name).meta[config_name]
        cond_stage = config["params"]["cond_stage_config"]
        if "n_classes" in str(cond_stage):
            cond_stage["params"]["n_classes"] = 1001
        state = restore_names(instantiate(config).state_dict())
        target = folder / ("models/rdm" if name.startswith("rdm") else "models/ldm") / name
        target.mkdir(parents=True)
        torch.save({"state_dict": fill(state, name)}, target / "model.ckpt")
        (target / "config.yaml").write_text(format_yaml({"model": config}))


def _write_clip(path: Path) -> None:
    """Write a CLIP for the small retrieval-augmented model."""
    text = {"width": 64, "heads": 1, "layers": 1, "embed_dim": 32}
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "heads": 1, "layers": 1}
    torch.save(CLIP(text, vision).state_dict(), path)


def _write_upscaler(folder: Path) -> None:
    """Write an x2 latent upscaler with the VAE and text encoder of our Stable Diffusion 1."""
    config, sd1 = read_yaml(UPSCALER_CONFIG), make_small_config("sd1")["model"]["params"]
    params, width = config["model"]["params"], tinyfamilies.WIDTH
    params["unet"]["params"] |= {
        "channels": [64, 64, 128, 128], "depths": [1, 1, 1, 1], "mapping_out": 128,
        "mapping_cond_dim": 128 + width, "cross_cond_dim": width,
    }  # fmt: skip
    params["autoencoder"]["params"] = sd1["first_stage_config"]["params"]
    text = params["conditioner"]["params"]["text"]["params"]
    arch = tinyfamilies.CLIP_CONFIG
    text |= {"arch": arch, "layer_idx": arch["num_hidden_layers"]}
    model: Any = build_on_meta(config)
    empty = {k: torch.ones(v.shape) if v.is_meta else v for k, v in model.state_dict().items()}
    state = restore_names(empty)
    state |= fill({k: v for k, v in state.items() if not k.endswith(".kernel")}, "x2")
    written = folder / "written.safetensors"
    write_checkpoint(written, state, {"ldm.config": format_yaml(config)})
    written.rename(folder / "sd-x2-latent-upscaler")


def _draw(i: int) -> Image.Image:
    """Draw a gradient with a square in it."""
    image = Image.linear_gradient("L").resize((96, 96)).convert("RGB")
    image.paste((40 * i % 256, 200 - 20 * i, 90), (20, 20, 70, 70))
    return image
