"""Every task against the images that the original's scripts made, on tiny models."""

import numpy as np
import pytest
import torch
from PIL import Image

from goldfile import load_golden
from ldm.imaging.pixels import to_tensor, to_uint8
from ldm.pipelines import LEGACY, depth2img, inpaint, unclip, upscale
from pipelines.goldmodels import build_recorded_model


def compare(task, file, name, model_name, *inputs, seed, **options):
    """Compare with recorded pixels, of which at most 5 % may be 1 apart.

    The original differs from itself by 0.2 %.
    """
    info = file.case(name)["info"]
    model = build_recorded_model(file, model_name)
    torch.manual_seed(seed)
    prompts = [info["prompt"]] * info.get("num_samples", 2)
    images = task(model, prompts, *inputs, scale=info["scale"], legacy=LEGACY, **options)
    expected = file.outputs(name)["images"].numpy().astype(int)
    apart = np.abs(to_uint8(images, truncate=True).astype(int) - expected)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.05


def to_image(pixels):
    return to_tensor(Image.fromarray(pixels.numpy()))


def make_start_code(info, h, w):
    """The original's demos start from numpy's noise."""
    noise = np.random.RandomState(info["seed"]).randn(info["num_samples"], 4, h, w)
    return torch.from_numpy(noise).float()


@pytest.mark.parametrize("name", ["inp0", "inp1"])
def test_inpaint_equals_the_original(name):
    file = load_golden("e2e_inpaint")
    info, inputs = file.case(name)["info"], file.inputs(name)
    image, mask = to_image(inputs["image"]), inputs["mask"][None, None].float() / 255
    compare(
        inpaint, file, name, "inpaint", image, mask, seed=info["torch_seed_before"],
        composite=False, x_T=make_start_code(info, info["h"] // 8, info["w"] // 8),
        steps=info["ddim_steps"], eta=info["eta"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dep0", "dep1"])
def test_depth2img_equals_the_original(name):
    file = load_golden("e2e_depth2img")
    info, image = file.case(name)["info"], to_image(file.inputs(name)["image"])
    compare(
        depth2img, file, name, "depth", image, seed=info["seed"], strength=info["strength"],
        steps=info["steps"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["up0", "up1"])
def test_upscale_equals_the_original(name):
    file = load_golden("e2e_upscale")
    info, image = file.case(name)["info"], to_image(file.inputs(name)["image"])
    compare(
        upscale, file, name, "upscale", image, seed=info["seed"], tile=64,
        noise_level=info["noise_level"], x_T=make_start_code(info, info["h"], info["w"]),
        steps=info["steps"], eta=info["eta"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["uc0_ddim", "uc1_dpm"])
def test_unclip_equals_the_original(name):
    file = load_golden("e2e_unclip")
    info, image = file.case(name)["info"], file.inputs(name)["image"]
    compare(
        unclip, file, name, "unclip", [image], seed=info["seed"], weights=[info["weight"]],
        noise_levels=info["noise_level"], negative_prompt=info["negative_prompt"],
        size=(info["H"], info["W"]), steps=info["steps"], sampler=name.split("_")[1],
    )  # fmt: skip
