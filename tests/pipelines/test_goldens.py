"""Every task against the images that the original's scripts made, on tiny models."""

import numpy as np
import pytest
import torch
from PIL import Image

from goldfile import gold
from ldm.imaging.pixels import to_tensor, to_uint8
from ldm.pipelines import (
    LEGACY,
    depth2img,
    inpaint,
    unclip,
    upscale,
)
from pipelines.goldmodels import model_of

ALL_LEGACY = frozenset(LEGACY)


def close(ours, theirs):
    """Pixels at most 1 apart, and under 5 % of them: the original differs from itself by 0.2 %."""
    apart = np.abs(to_uint8(ours, truncate=True).astype(int) - theirs.numpy().astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.05


def image_of(pixels):
    return to_tensor(Image.fromarray(pixels.numpy()))


def start_code(info, h, w):
    """The original's demos start from numpy's noise."""
    noise = np.random.RandomState(info["seed"]).randn(info["num_samples"], 4, h, w)
    return torch.from_numpy(noise).float()


@pytest.mark.parametrize("name", ["inp0", "inp1"])
def test_inpaint(name):
    file = gold("e2e_inpaint")
    info, inputs = file.case(name)["info"], file.inputs(name)
    model = model_of(file, "inpaint")
    torch.manual_seed(info["torch_seed_before"])
    images = inpaint(
        model,
        [info["prompt"]] * info["num_samples"],
        image_of(inputs["image"]),
        inputs["mask"][None, None].float() / 255,
        composite=False,
        x_T=start_code(info, info["h"] // 8, info["w"] // 8),
        steps=info["ddim_steps"],
        eta=info["eta"],
        scale=info["scale"],
        legacy=ALL_LEGACY,
    )
    close(images, file.outputs(name)["images"])


@pytest.mark.parametrize("name", ["dep0", "dep1"])
def test_depth2img(name):
    file = gold("e2e_depth2img")
    info = file.case(name)["info"]
    model = model_of(file, "depth")
    torch.manual_seed(info["seed"])
    images = depth2img(
        model,
        [info["prompt"]] * info["num_samples"],
        image_of(file.inputs(name)["image"]),
        strength=info["strength"],
        steps=info["steps"],
        scale=info["scale"],
        legacy=ALL_LEGACY,
    )
    close(images, file.outputs(name)["images"])


@pytest.mark.parametrize("name", ["up0", "up1"])
def test_upscale(name):
    file = gold("e2e_upscale")
    info = file.case(name)["info"]
    model = model_of(file, "upscale")
    torch.manual_seed(info["seed"])
    images = upscale(
        model,
        [info["prompt"]] * info["num_samples"],
        image_of(file.inputs(name)["image"]),
        noise_level=info["noise_level"],
        tile=64,
        x_T=start_code(info, info["h"], info["w"]),
        steps=info["steps"],
        eta=info["eta"],
        scale=info["scale"],
        legacy=ALL_LEGACY,
    )
    close(images, file.outputs(name)["images"])


@pytest.mark.parametrize("name", ["uc0_ddim", "uc1_dpm"])
def test_unclip(name):
    file = gold("e2e_unclip")
    info = file.case(name)["info"]
    model = model_of(file, "unclip")
    torch.manual_seed(info["seed"])
    images = unclip(
        model,
        [info["prompt"]] * 2,
        [file.inputs(name)["image"]],
        weights=[info["weight"]],
        noise_levels=info["noise_level"],
        negative_prompt=info["negative_prompt"],
        size=(info["H"], info["W"]),
        steps=info["steps"],
        sampler=name.split("_")[1],
        scale=info["scale"],
        legacy=ALL_LEGACY,
    )
    close(images, file.outputs(name)["images"])
