"""A small safety checker in a file."""

import torch
from safetensors.torch import save_file

from ldm.encoders.safety import SafetyChecker
from ldm.encoders.towers import VisionTower
from ldm.loading.diffusers.locations import convert_to_diffusers, locate_vision_tower


def write_safety_checker(path):
    """Write a safety checker that flags every image by concept 2, and by no other."""
    torch.manual_seed(0)
    visual = VisionTower(image_size=28, patch_size=14, width=64, layers=1, heads=1, embed_dim=8)
    checker = SafetyChecker(visual)
    for name, value in checker.named_parameters():
        if "embeds" in name:
            value.data = torch.randn_like(value) if value.dim() > 1 else torch.full_like(value, 2)
    checker.concept_embeds_weights.data[2] = -2
    state = checker.state_dict()
    locations = locate_vision_tower(f"model.{name}" for name in state)
    locations = {name.removeprefix("model."): location for name, location in locations.items()}
    tensors = convert_to_diffusers(locations, state)
    tensors |= {name: value for name, value in state.items() if "embeds" in name}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path
