"""Load a complete CLIP, with image and text tower, for CLIP score and the Karlo prior.

It is read from a file of open_clip or OpenAI (TorchScript archives, too), a file or folder of
transformers' CLIPModel, or an unCLIP checkpoint.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.encoders.image import VISION_CONFIGS, VISION_DEFAULTS
from ldm.encoders.towers import CLIP
from ldm.loading.build import fill_weights, meta_device
from ldm.loading.diffusers.encoders import get_tower_config, is_openai_clip
from ldm.loading.diffusers.files import read_network_checkpoint
from ldm.loading.diffusers.layout import read_json
from ldm.loading.diffusers.locations import (
    convert_from_diffusers,
    locate_text_encoder,
    locate_vision_tower,
)
from ldm.loading.matching import check_weights
from ldm.loading.published import resolve_checkpoint
from ldm.loading.weight_names import TEXT_PREFIX, rename_weights, select_prefix
from ldm.runtime.errors import FileFormatError

__all__ = ["check_clip", "get_clip_name", "load_clip"]

# Our prefixes in an unCLIP checkpoint: a CLIP, and the text encoder. With ViT-H only the latter has
# the blocks of the text tower.
UNCLIP_PREFIX, TEXT_TOWER_PREFIX = "conditioner.image.clip.model.", f"{TEXT_PREFIX}model."
TRANSFORMERS_PROJECTION = "visual_projection.weight"
IMAGE_PROJECTION, FIRST_BLOCK = "visual.proj", "transformer.resblocks.0.ln_1.weight"  # open_clip
# Prefixes of the weights of `CLIP`.
TOWER_PREFIXES = (
    "visual.", "transformer.", "ln_final.", "token_embedding.", "positional_embedding",
    "text_projection", "logit_scale",
)  # fmt: skip
LAION_PATTERN = re.compile(r"laion|datacomp|open_?clip", re.IGNORECASE)
OPENAI_EMBED_DIMS = (512, 768)  # of ViT-B and ViT-L; larger models are LAION's
HEAD_WIDTHS = {
    int(size["width"]): int(size.get("head_width", VISION_DEFAULTS["head_width"]))
    for size in VISION_CONFIGS.values()
}


def load_clip(path: str | Path, *, device: str | torch.device = "cpu") -> CLIP:
    """Load both towers in float32; sizes are inferred from the weights.

    Weights do not show whether the activation is OpenAI's quick GELU. Without a config it is used
    for models of OpenAI's sizes, unless the file name says that they are LAION's.

    Args:
        path: A file or folder, see the docstring of this module, or a published name.
    Raises:
        FileFormatError: The file does not contain both towers.
    """
    clip, state, memory_mapped = _build_clip(path)
    fill_weights(clip, state, device=device, memory_mapped=memory_mapped)
    return clip.eval()


def check_clip(path: str | Path) -> None:
    """Raise what `load_clip` would raise, without the memory of the weights."""
    _build_clip(path)


def get_clip_name(clip: CLIP) -> str:
    """Return open_clip's name of a size, such as "ViT-g-14"."""
    visual = clip.visual
    patch, _ = visual.conv1.kernel_size
    sizes = {
        (size["width"], size["layers"], size.get("patch_size", 16), size.get("image_size", 224)): n
        for n, size in VISION_CONFIGS.items()
    }
    width = len(visual.class_embedding)
    return sizes.get((width, len(visual.blocks), patch, visual.image_size), f"ViT-{width}-{patch}")


def _build_clip(path: str | Path) -> tuple[CLIP, dict[str, Tensor], bool]:
    """Return a CLIP on the meta device, its weights, and whether these are memory-mapped."""
    path = resolve_checkpoint(path)
    file, config_path = read_network_checkpoint(path), path / "config.json"
    state, is_unclip = file.state, False
    if TRANSFORMERS_PROJECTION in state:
        state = _to_open_clip_names(state)
    elif IMAGE_PROJECTION not in state:
        state, is_unclip = _extract_unclip_towers(state), True
    state = _select_towers(state, path)
    if config_path.is_file():
        config = get_tower_config(read_json(config_path), "text")
        quick_gelu = is_openai_clip(config, f"{path.name}/config.json")
    else:
        is_openai = state["text_projection"].shape[1] in OPENAI_EMBED_DIMS
        quick_gelu = is_openai and (is_unclip or not LAION_PATTERN.search(path.name))
    with meta_device():
        clip = CLIP(_infer_text_size(state) | {"quick_gelu": quick_gelu}, _infer_vision_size(state))
    check_weights(clip.state_dict(), state, f"`{path}` does not fit CLIP")
    return clip, state, file.memory_mapped


def _to_open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of transformers' CLIPModel under open_clip's names."""
    text_layers = _count_blocks(state, "text_model.encoder.layers.")
    vision_layers = _count_blocks(state, "vision_model.encoder.layers.")
    with meta_device():  # only for the names of its weights, so any size
        size = {"width": 64, "heads": 1}
        text = {**size, "layers": text_layers, "embed_dim": 1}
        vision = {**size, "layers": vision_layers, "image_size": 1, "patch_size": 1}
        names = CLIP(text, vision).state_dict()
    locations = locate_text_encoder(name for name in names if not name.startswith("visual."))
    locations |= locate_vision_tower(names)
    weights = convert_from_diffusers(locations, state)
    return weights | {"logit_scale": state["logit_scale"]} if "logit_scale" in state else weights


def _extract_unclip_towers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CLIP's weights in an unCLIP checkpoint, under open_clip's names."""
    weights = rename_weights(state)
    towers, text = select_prefix(weights, UNCLIP_PREFIX), select_prefix(weights, TEXT_TOWER_PREFIX)
    norm, text_norm = towers.get("ln_final.weight"), text.get("ln_final.weight")
    is_same_tower = norm is not None and text_norm is not None and norm.shape == text_norm.shape
    if is_same_tower and FIRST_BLOCK not in towers:
        towers |= text
    return towers


def _select_towers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the weights of both towers only; raise FileFormatError if one is missing."""
    needed = (IMAGE_PROJECTION, FIRST_BLOCK, "text_projection", "token_embedding.weight")
    if any(name not in state for name in needed):
        raise FileFormatError(
            f"`{path}` does not contain CLIP's image and text tower: use a file of open_clip, "
            "OpenAI or transformers' CLIPModel, or an unCLIP checkpoint"
        )
    return {name: value for name, value in state.items() if name.startswith(TOWER_PREFIXES)}


def _infer_text_size(state: Mapping[str, Tensor]) -> dict[str, Any]:
    vocab_size, width = state["token_embedding.weight"].shape
    return {
        "width": width,
        "heads": max(width // 64, 1),
        "layers": _count_blocks(state, "transformer.resblocks."),
        "embed_dim": state["text_projection"].shape[1],
        "context_length": len(state["positional_embedding"]),
        "vocab_size": vocab_size,
        "mlp_ratio": _compute_mlp_ratio(state, "transformer.resblocks.0."),
    }


def _infer_vision_size(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    patches = len(state["visual.positional_embedding"]) - 1
    return {
        "image_size": round(patches**0.5) * patch,
        "patch_size": patch,
        "width": width,
        "layers": _count_blocks(state, "visual.transformer.resblocks."),
        "heads": max(width // HEAD_WIDTHS.get(width, 64), 1),
        "mlp_ratio": _compute_mlp_ratio(state, "visual.transformer.resblocks.0."),
    }


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[0] for name in select_prefix(state, prefix)})


def _compute_mlp_ratio(state: Mapping[str, Tensor], block: str) -> float:
    hidden, width = state[f"{block}mlp.c_fc.weight"].shape
    return (hidden + 0.5) / width  # as the towers round `width * mlp_ratio` down
