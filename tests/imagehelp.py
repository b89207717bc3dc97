"""Helpers for the tests of the commands that make images."""

import numpy as np
import torch
from PIL import Image

from ldm.loading.addons.lora_files import write_lora
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.nets.lora import LoRA, LoRALayer

QUICK = ["--steps=2", "--n_samples=1", "--n_iter=1", "--precision=full", "--skip_grid"]
IDENTICAL = (0, ["identical"])  # exit status and lines of a replay


def write_random_lora(path, model, seed):
    """Write a LoRA that changes every target layer of a model, so that its images differ."""
    torch.manual_seed(seed)
    layers = {}
    for layer in list_lora_targets(model):
        layers[layer.kohya_name] = lora = LoRALayer(layer.target, 2)
        torch.nn.init.normal_(lora.lora_up.weight, std=0.1)
    write_lora(LoRA(layers), path, model)
    return path


def read_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)
