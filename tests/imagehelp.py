"""What tests of the commands that make images share."""

import numpy as np
import torch
from PIL import Image

from ldm.loading.addons.lora_files import write_lora
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.nets.lora import LoRA, LoRALayer

QUICK = ["--steps=2", "--n_samples=1", "--n_iter=1", "--precision=full", "--skip_grid"]
IDENTICAL = (0, ["identical"])  # exit status and lines of a replay


def random_lora(path, model, seed):
    """Write one that changes every target layer of a model, so that its images differ."""
    torch.manual_seed(seed)
    changes = {}
    for layer in list_lora_targets(model):
        changes[layer.kohya] = low = LoRALayer(layer.target, 2)
        torch.nn.init.normal_(low.lora_up.weight, std=0.1)
    write_lora(LoRA(changes), path, model)
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)
