"""Load a complete CLIP, with vision and text tower, for CLIP score and the Karlo prior.

Sources are files of open_clip or OpenAI (also TorchScript archives), files or folders of
transformers' CLIPModel, and unCLIP checkpoints.
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

# Our prefixes in an unCLIP checkpoint: of a CLIP, and of the text encoder. With ViT-H only the text
# encoder has the blocks of the text tower.
UNCLIP_PREFIX, TEXT_TOWER_PREFIX = "conditioner.image.clip.model.", f"{TEXT_PREFIX}model."
TRANSFORMERS_IMAGE_PROJECTION = "visual_projection.weight"
OPEN_CLIP_IMAGE_PROJECTION = "visual.proj"
OPEN_CLIP_TEXT_NORM = "transformer.resblocks.0.ln_1.weight"
# Prefixes of the weights of `CLIP`.
TOWER_PREFIXES = (
    "visual.", "transformer.", "ln_final.", "token_embedding.", "positional_embedding",
    "text_projection", "logit_scale",
)  # fmt: skip
LAION_PATTERN = re.compile(r"laion|datacomp|open_?clip", re.IGNORECASE)
OPENAI_EMBED_DIMS = (512, 768)  # of ViT-B and ViT-L; larger models are LAION's
HEAD_WIDTHS = {  # by width of the vision tower
    int(config["width"]): int(config.get("head_width", VISION_DEFAULTS["head_width"]))
    for config in VISION_CONFIGS.values()
}


def load_clip(path: str | Path, *, device: str | torch.device = "cpu") -> CLIP:
    """Load both towers in float32; their configs are inferred from the weights.

    Weights do not show whether the activation is OpenAI's quick GELU. Without a `config.json` it is
    used for models with OpenAI's embedding dimensions, unless the file name is one of LAION.

    Args:
        path: File or folder of a source in the module docstring, or a published name.
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
    """Return open_clip's name of an architecture, such as "ViT-g-14"."""
    visual = clip.visual
    patch_size, _ = visual.conv1.kernel_size
    names = {
        (c["width"], c["layers"], c.get("patch_size", 16), c.get("image_size", 224)): name
        for name, c in VISION_CONFIGS.items()
    }
    width = len(visual.class_embedding)
    key = (width, len(visual.blocks), patch_size, visual.image_size)
    return names.get(key, f"ViT-{width}-{patch_size}")


def _build_clip(path: str | Path) -> tuple[CLIP, dict[str, Tensor], bool]:
    """Return a CLIP on the meta device, its weights, and whether these are memory-mapped."""
    path = resolve_checkpoint(path)
    file, config_path = read_network_checkpoint(path), path / "config.json"
    state, is_unclip = file.state_dict, False
    if TRANSFORMERS_IMAGE_PROJECTION in state:
        state = _to_open_clip_names(state)
    elif OPEN_CLIP_IMAGE_PROJECTION not in state:
        state, is_unclip = _extract_unclip_towers(state), True
    state = _select_towers(state, path)
    if config_path.is_file():
        config = get_tower_config(read_json(config_path), "text")
        quick_gelu = is_openai_clip(config, f"{path.name}/config.json")
    else:
        is_openai = state["text_projection"].shape[1] in OPENAI_EMBED_DIMS
        quick_gelu = is_openai and (is_unclip or not LAION_PATTERN.search(path.name))
    with meta_device():
        clip = CLIP(
            _infer_text_config(state) | {"quick_gelu": quick_gelu}, _infer_vision_config(state)
        )
    check_weights(clip.state_dict(), state, f"`{path}` does not fit CLIP")
    return clip, state, file.memory_mapped


def _to_open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of transformers' CLIPModel under open_clip's names."""
    text_layers = _count_layers(state, "text_model.encoder.layers.")
    vision_layers = _count_layers(state, "vision_model.encoder.layers.")
    with meta_device():  # built for the names of its weights: widths are arbitrary
        common = {"width": 64, "heads": 1}
        text = {**common, "layers": text_layers, "embed_dim": 1}
        vision = {**common, "layers": vision_layers, "image_size": 1, "patch_size": 1}
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
    if is_same_tower and OPEN_CLIP_TEXT_NORM not in towers:
        towers |= text
    return towers


def _select_towers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the weights of both towers only; raise FileFormatError if one is missing."""
    text_names = (OPEN_CLIP_TEXT_NORM, "text_projection", "token_embedding.weight")
    if any(name not in state for name in (OPEN_CLIP_IMAGE_PROJECTION, *text_names)):
        raise FileFormatError(
            f"`{path}` does not contain CLIP's vision and text tower: use a file of open_clip, "
            "OpenAI or transformers' CLIPModel, or an unCLIP checkpoint"
        )
    return {name: value for name, value in state.items() if name.startswith(TOWER_PREFIXES)}


def _infer_text_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    vocab_size, width = state["token_embedding.weight"].shape
    return {
        "width": width,
        "heads": max(width // 64, 1),
        "layers": _count_layers(state, "transformer.resblocks."),
        "embed_dim": state["text_projection"].shape[1],
        "context_length": len(state["positional_embedding"]),
        "vocab_size": vocab_size,
        "mlp_ratio": _compute_mlp_ratio(state, "transformer.resblocks.0."),
    }


def _infer_vision_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    num_patches = len(state["visual.positional_embedding"]) - 1
    return {
        "image_size": round(num_patches**0.5) * patch_size,
        "patch_size": patch_size,
        "width": width,
        "layers": _count_layers(state, "visual.transformer.resblocks."),
        "heads": max(width // HEAD_WIDTHS.get(width, 64), 1),
        "mlp_ratio": _compute_mlp_ratio(state, "visual.transformer.resblocks.0."),
    }


def _count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[0] for name in select_prefix(state, prefix)})


def _compute_mlp_ratio(state: Mapping[str, Tensor], block: str) -> float:
    hidden, width = state[f"{block}mlp.c_fc.weight"].shape
    return (hidden + 0.5) / width  # + 0.5, as the towers round `width * mlp_ratio` down
