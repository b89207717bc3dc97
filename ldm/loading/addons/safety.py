"""Load the safety checker of Stable Diffusion 1 from a file or a diffusers folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.encoders.safety import SafetyChecker
from ldm.encoders.towers import VisionTower
from ldm.loading.build import fill_weights, meta_device
from ldm.loading.config import parse_yaml
from ldm.loading.diffusers.files import read_component
from ldm.loading.diffusers.keys import gather_weights, vision_keys
from ldm.loading.files.checkpoint import Checkpoint, read_checkpoint
from ldm.loading.matching import check_weights, guess_kind
from ldm.loading.published import find_checkpoint
from ldm.loading.weights import identify_weights
from ldm.runtime.errors import FileFormatError, MissingFile
from ldm.runtime.files import read_text

__all__ = ["COMPONENT", "find_safety_checker", "load_safety_checker"]

COMPONENT = "safety_checker"  # its folder in the folder of a pipeline
MARK = "concept_embeds"
HEAD_WIDTH = 64


def find_safety_checker(path: str | Path) -> Path:
    """Return the file or folder of a safety checker.

    Args:
        path: the file or folder itself, a published name, or the folder of a pipeline with one.
    Raises:
        MissingFile: there is none.
    """
    found = find_checkpoint(path)
    if found.is_dir() and (found / COMPONENT).is_dir():
        found = found / COMPONENT
    if not found.exists() or (found.is_dir() and not (found / "config.json").is_file()):
        raise MissingFile(f"no safety checker in `{path}`", COMPONENT)
    return found


def load_safety_checker(
    path: str | Path, *, device: str | torch.device = "cpu", heads: int | None = None
) -> SafetyChecker:
    """Load the safety checker, in float32.

    Args:
        path: see `find_safety_checker`.
        heads: attention heads of CLIP's vision tower; None = from the folder's config, else one per
            64 features.
    Raises:
        MissingFile: there is no such file.
        FileFormatError, WeightsMismatch: it is another model, or damaged.
    """
    path = find_safety_checker(path)
    if path.is_dir():
        state, mapped = read_component(path, None), True
        heads = heads or _heads_of_folder(path)
    else:
        file = read_checkpoint(path)
        state, mapped = file.state, file.mapped
        _check_kind(path, file)
    state = {_usual_name(name): value for name, value in state.items()}
    state.pop("vision_model.embeddings.position_ids", None)
    misfit = f"`{path}` is not a complete safety checker"
    with meta_device():
        checker = _build(state, heads, misfit)
    expected = checker.state_dict()
    locations = vision_keys(expected)
    ours = gather_weights(locations, state, expected)
    taken = {part for name in ours for part in locations[name].names}
    ours |= {name: value for name, value in state.items() if name not in taken}
    check_weights(expected, ours, misfit)
    fill_weights(checker, ours, device=device, dtype=torch.float32, mapped=mapped)
    return checker.eval().requires_grad_(False)


def _check_kind(path: Path, file: Checkpoint) -> None:
    """Raise FileFormatError if a file is not a safety checker."""
    if any(name.endswith(MARK) for name in file.state):
        return
    family = identify_weights(file).family
    kind = family.title if family else guess_kind(file.state) or "another model"
    raise FileFormatError(f"`{path}` is {kind}, not a safety checker")


def _usual_name(name: str) -> str:
    """Return a name without the prefixes of older versions of transformers and pipelines."""
    name = name.removeprefix(f"{COMPONENT}.")
    return name.removeprefix("vision_model.") if name.startswith("vision_model.vision_") else name


def _heads_of_folder(path: Path) -> int | None:
    config: dict[str, Any] = parse_yaml(read_text(path / "config.json"), where="config.json")
    vision = config.get("vision_config") or {}
    return (vision | (config.get("vision_config_dict") or {})).get("num_attention_heads")


def _build(state: dict[str, Tensor], heads: int | None, misfit: str) -> SafetyChecker:
    """Build the checker with sizes inferred from its weights."""
    try:
        width = len(state["vision_model.embeddings.class_embedding"])
        patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
        positions = len(state["vision_model.embeddings.position_embedding.weight"])
        hidden = len(state["vision_model.encoder.layers.0.mlp.fc1.bias"])
        embed_dim = len(state["visual_projection.weight"])
        concepts, special = len(state[MARK]), len(state["special_care_embeds"])
    except KeyError as error:
        raise FileFormatError(f"{misfit}: `{error.args[0]}` is missing") from error
    visual = VisionTower(
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        width=width,
        layers=len({name.split(".")[3] for name in state if ".encoder.layers." in name}),
        heads=heads or max(width // HEAD_WIDTH, 1),
        embed_dim=embed_dim,
        mlp_ratio=hidden / width,
        quick_gelu=True,
    )
    return SafetyChecker(visual, concepts=concepts, special=special)
