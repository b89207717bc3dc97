"""LDM3D and LDM3D-SR, compared with recordings of diffusers' pipelines on tiny weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from goldfile import load_golden
from ldm.generate.tasks.upscale import resize_with_depth
from ldm.imaging.pixels import to_tensor, to_uint8
from ldm.imaging.rgbd import join_depth, split_color, split_depth
from ldm.loading.weight_names import rename_weights, restore_names, select_prefix
from ldm.pipelines import img2img, sample, txt2img, upscale_rgbd
from ldm.runtime.errors import ArgumentError
from nets.nethelp import make_noise
from pipelines.goldmodels import build_model
from quick import slow_except
from recipe import fill

PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")


def build_ldm3d_model(golden, unet, vae, class_name="LatentDiffusion", **params):
    config = golden.meta["config"]
    model = build_model(
        config[unet], config[vae], config["text"], class_name, linear_start=0.00085,
        linear_end=0.012, scale_factor=config["scaling_factor"], **params,
    )  # fmt: skip
    state = restore_names(model.state_dict())
    weights = {}
    for prefix in PREFIXES:
        filled = fill(select_prefix(state, prefix), golden.meta["salt"])
        weights |= {prefix + name: value for name, value in filled.items()}
    model.load_state_dict(rename_weights(weights))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def golden():
    return load_golden("seed_ldm3d")


@pytest.fixture(scope="module")
def sr_golden():
    return load_golden("seed_ldm3d_sr")


def get_depth(images):
    return torch.stack([torch.from_numpy(np.array(depth)).int() for depth in split_depth(images)])


@pytest.mark.parametrize("name", ["post_6c_rand", "post_6c_ramp", "post_4c_rand", "post_4c_ramp"])
def test_color_and_depth_are_split(golden, name):
    pixels, expected = golden.inputs(name)["pixels"], golden.outputs(name)
    assert np.array_equal(to_uint8(split_color(pixels)), expected["rgb"])
    assert torch.equal(get_depth(pixels), expected["depth"])


@pytest.mark.parametrize("channels", [4, 6])
def test_depth_survives_a_round_trip(channels):
    depth = (torch.arange(65536, dtype=torch.float64) / 65535).reshape(1, 1, 256, 256)
    images = join_depth(torch.zeros(1, 3, 256, 256).double(), depth, channels)
    assert images.shape == (1, channels, 256, 256)
    expected = (depth[0] * 65535).round().int()
    limit = 1 if channels == 4 else 0  # 4 channels truncate it
    assert (get_depth(images) - expected).abs().max() <= limit


@pytest.mark.parametrize("name", ["e2e_6c_ddim", "e2e_4c_ddim"])
def test_txt2img_equals_diffusers(golden, name):
    """Observed error: 1.1e-5; two runs of diffusers differ by 1.2e-5."""
    info, model = (
        golden.case(name)["info"],
        build_ldm3d_model(golden, "unet", f"vae_{name[4:6]}"),
    )
    images = txt2img(
        model,
        info["prompt"],
        negative_prompt=info["negative_prompt"] or "",
        scale=info["guidance_scale"],
        steps=info["steps"],
        size=(info["height"], info["width"]),
        x_T=golden.inputs(name)["latents"],
    )
    torch.testing.assert_close(
        images, golden.outputs(name)["decoded"].clamp(-1, 1), atol=1e-4, rtol=0
    )


def test_a_second_depth_map_is_refused(golden):
    image = torch.zeros(1, 4, 16, 16)
    with pytest.raises(ArgumentError, match="the image has depth already, leave it out"):
        img2img(build_ldm3d_model(golden, "unet", "vae_4c"), ["a"], image, depth=image[:, :1])


@pytest.mark.parametrize("name", ["e2e_4c_pndm", "e2e_4c_rescale", "e2e_6c_scale1"])
def test_latents_equal_diffusers(golden, name):
    """PNDM; rescaled guidance; no guidance. Observed error: 1.3e-4, of diffusers itself 1.2e-4."""
    info, model = (
        golden.case(name)["info"],
        build_ldm3d_model(golden, "unet", f"vae_{name[4:6]}"),
    )
    t = sorted(set(info["timesteps"]), reverse=True)  # PNDM repeats one
    z = sample(
        model,
        model.condition({"txt": info["prompt"]}),
        model.condition({"txt": [""]}),
        sampler="plms" if name == "e2e_4c_pndm" else "ddim",
        sigmas=torch.cat([model.schedule.sigmas[t], model.schedule.sigmas[:1]]),
        scale=info["guidance_scale"],
        guidance_rescale=info["guidance_rescale"],
        x_T=golden.inputs(name)["latents"],
    )
    theirs = golden.outputs(name)["latents"][-1]
    torch.testing.assert_close(z, theirs, atol=1.3e-3, rtol=0)


def run_upscaling(sr_golden, name):
    info, inputs = sr_golden.case(name)["info"], sr_golden.inputs(name)
    unet = "unet_with_level" if info["class_embedding"] else "unet"
    encoder = {"target": "ldm.encoders.concat_images.RGBDLatent"}
    model = build_ldm3d_model(
        sr_golden, unet, "vae", "LatentUpscaleDiffusion", low_scale_config=encoder
    )
    draws = iter(sr_golden.draws(name))
    return upscale_rgbd(
        model,
        [info["prompt"]],
        inputs["pre_rgb"],
        (inputs["pre_depth"] + 1) / 2,
        noise_level=info["noise_level"],
        negative_prompt=info["negative_prompt"] or "",
        scale=info["guidance_scale"],
        steps=info["steps"],
        sampler="ddim",
        x_T=inputs["latents"],
        seeds=lambda like: next(draws),
    )


@pytest.mark.parametrize("name", slow_except(["sr_plain", "sr_level"], "sr_level"))
def test_upscale_rgbd_equals_diffusers(sr_golden, name):
    """With and without a noise level. Observed error: 2.0e-5, of diffusers itself 2.1e-5."""
    theirs = sr_golden.outputs(name)["decoded"].clamp(-1, 1)
    torch.testing.assert_close(run_upscaling(sr_golden, name), theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["sr_plain", "sr_level", "sr_float"])
def test_image_and_depth_are_resized_as_recorded(sr_golden, name):
    """Equal, except that rounded depth is off by 1 of 65535."""
    inputs = sr_golden.inputs(name)
    image = to_tensor(Image.fromarray(inputs["rgb"].numpy()))
    depth = inputs["depth"][None, None].float() / 65535
    resized, resized_depth = resize_with_depth(
        image, depth, tuple(sr_golden.case(name)["info"]["target_res"])
    )
    assert torch.equal(resized, inputs["pre_rgb"])
    tolerance = 1e-6 if name == "sr_float" else 4e-5
    torch.testing.assert_close(2 * resized_depth - 1, inputs["pre_depth"], atol=tolerance, rtol=0)


def test_a_panorama_has_no_seam(golden):
    """With circular padding along x, shifted noise gives the shifted image."""
    model = build_ldm3d_model(golden, "unet", "vae_4c")
    x = make_noise(1, 4, 8, 16)
    options = {"size": (64, 128), "steps": 2, "scale": 1, "tiling": "x"}
    image, shifted = (txt2img(model, ["a cat"], x_T=x.roll(n, dims=3), **options) for n in (0, 4))
    torch.testing.assert_close(shifted, image.roll(32, dims=3), atol=1e-4, rtol=0)
    plain = txt2img(model, ["a cat"], x_T=x, **options | {"tiling": "none"})
    assert (plain - image).abs().max() > 0.1
