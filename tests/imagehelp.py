"""Helpers for the tests of commands that make images: quick flags, a LoRA, pixels."""

import numpy as np
import torch
from PIL import Image

from ldm.loading.addons.lora_files import write_lora
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.nets.lora import LoRA, LoRALayer

QUICK_FLAGS = ["--steps=2", "--n_samples=1", "--n_iter=1", "--precision=full"]
ONE_IMAGE_FLAGS = [*QUICK_FLAGS, "--skip_grid"]


def write_random_lora(path, model, seed):
    """Write a LoRA that changes every target layer of a model, so that its images differ."""
    torch.manual_seed(seed)
    layers = {}
    for layer in list_lora_targets(model):
        layers[layer.kohya_name] = lora = LoRALayer(layer.target, 2)
        torch.nn.init.normal_(lora.lora_up.weight, std=0.1)
    write_lora(LoRA(layers), path, model)
    return path


def assert_pixels_close(pixels, expected, max_fraction=0.05):
    """Allow errors of 1 in a fraction of the values; runs of the original differ in 0.2 %."""
    assert pixels.shape == tuple(expected.shape)
    error = np.abs(pixels - expected.numpy().astype(int))
    assert error.max() <= 1
    assert (error > 0).mean() < max_fraction


def read_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)
