"""Load the safety checker of Stable Diffusion 1 from a file or a diffusers folder."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.encoders.safety import SafetyChecker
from ldm.encoders.towers import VisionTower
from ldm.loading.build import fill_weights, meta_device
from ldm.loading.diffusers.encoders import get_tower_config
from ldm.loading.diffusers.files import read_network_checkpoint
from ldm.loading.diffusers.layout import read_json
from ldm.loading.diffusers.locations import convert_from_diffusers, locate_vision_tower
from ldm.loading.files.checkpoint import Checkpoint
from ldm.loading.matching import check_weights, guess_file_type
from ldm.loading.published import resolve_checkpoint
from ldm.loading.weights import identify_weights
from ldm.runtime.errors import FileFormatError, MissingFile

__all__ = ["SAFETY_CHECKER", "find_safety_checker", "load_safety_checker"]

SAFETY_CHECKER = "safety_checker"  # its component in a diffusers folder
CONCEPT_EMBEDS = "concept_embeds"  # a weight that no other network has
HEAD_WIDTH = 64  # features per attention head of CLIP ViT-L


def find_safety_checker(path: str | Path) -> Path:
    """Return the file or folder of a safety checker.

    Args:
        path: The file or folder itself, a published name, or the folder of a pipeline with one.
    Raises:
        MissingFile: The path has no safety checker.
    """
    local_path = resolve_checkpoint(path)
    if (local_path / SAFETY_CHECKER).is_dir():
        local_path /= SAFETY_CHECKER
    has_config = (local_path / "config.json").is_file()
    if not local_path.exists() or (local_path.is_dir() and not has_config):
        raise MissingFile(f"no safety checker in `{path}`", SAFETY_CHECKER)
    return local_path


def load_safety_checker(
    path: str | Path, *, device: str | torch.device = "cpu", heads: int | None = None
) -> SafetyChecker:
    """Load the safety checker, in float32.

    Args:
        path: See `find_safety_checker`.
        heads: Attention heads of CLIP's vision tower; None = from the folder's config, else one per
            64 features.
    Raises:
        FileFormatError, WeightsMismatch: The file is another model, or damaged.
    """
    path = find_safety_checker(path)
    file, config_path = read_network_checkpoint(path), path / "config.json"
    _check_is_safety_checker(file)
    if heads is None and config_path.is_file():
        config = get_tower_config(read_json(config_path), "vision")
        heads = config.get("num_attention_heads")
    state = {_to_current_name(name): value for name, value in file.state_dict.items()}
    state.pop("vision_model.embeddings.position_ids", None)
    error_prefix = f"`{path}` is not a complete safety checker"
    with meta_device():
        checker = _build_checker(state, heads, error_prefix)
    expected = checker.state_dict()
    locations = locate_vision_tower(expected)
    weights = convert_from_diffusers(locations, state)
    converted_keys = {key for name in weights for key in locations[name].keys}
    weights |= {name: value for name, value in state.items() if name not in converted_keys}
    check_weights(expected, weights, error_prefix)
    fill_weights(checker, weights, device=device, memory_mapped=file.memory_mapped)
    return checker.eval().requires_grad_(False)


def _check_is_safety_checker(file: Checkpoint) -> None:
    """Raise FileFormatError if a file is not a safety checker."""
    if any(name.endswith(CONCEPT_EMBEDS) for name in file.state_dict):
        return
    family = identify_weights(file).family
    title = family.title if family else guess_file_type(file.state_dict) or "another model"
    raise FileFormatError(f"`{file.path}` is {title}, not a safety checker")


def _to_current_name(name: str) -> str:
    """Return a name without prefixes of a component and of older versions of transformers."""
    name = name.removeprefix(f"{SAFETY_CHECKER}.")
    return name.removeprefix("vision_model.") if name.startswith("vision_model.vision_") else name


def _build_checker(state: dict[str, Tensor], heads: int | None, error_prefix: str) -> SafetyChecker:
    """Build the checker with a config inferred from its weights."""
    try:
        width = len(state["vision_model.embeddings.class_embedding"])
        patch_size = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
        num_positions = len(state["vision_model.embeddings.position_embedding.weight"])
        mlp_width = len(state["vision_model.encoder.layers.0.mlp.fc1.bias"])
        embed_dim = len(state["visual_projection.weight"])
        num_concepts, num_special = len(state[CONCEPT_EMBEDS]), len(state["special_care_embeds"])
    except KeyError as error:
        raise FileFormatError(f"{error_prefix}: `{error.args[0]}` is missing") from error
    visual = VisionTower(
        image_size=patch_size * round((num_positions - 1) ** 0.5),
        patch_size=patch_size,
        width=width,
        layers=len({name.split(".")[3] for name in state if ".encoder.layers." in name}),
        heads=heads or max(width // HEAD_WIDTH, 1),
        embed_dim=embed_dim,
        mlp_ratio=mlp_width / width,
        quick_gelu=True,
    )
    return SafetyChecker(visual, num_concepts=num_concepts, num_special_concepts=num_special)
