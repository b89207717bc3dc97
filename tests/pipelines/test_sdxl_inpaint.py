"""SDXL on diffusers' grid and SDXL inpainting, against recorded runs of diffusers.

Pixels are at most 1 apart; latents, 1e-4 of the largest value. diffusers drops fractions of a step,
so its strength 0.8 of 6 steps is 4 steps here.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.encoders.text import OpenCLIPText
from ldm.imaging.pixels import to_tensor
from ldm.model import LatentDiffusion
from ldm.pipelines import img2img, inpaint, txt2img
from pipelines.goldmodels import build_recorded_model
from pipelines.test_sdxl_goldens import (
    LatentRecorder,
    assert_images_close,
    assert_latents_close,
    load_model,
    recorded,
)


@functools.cache
def build_inpainting_model() -> LatentDiffusion:
    return build_recorded_model(recorded("sdxl_inpaint"), "inpaint9")


def load_image_and_mask() -> tuple[Tensor, Tensor]:
    shared = recorded("sdxl_inpaint").select("shared/")
    return to_tensor(Image.fromarray(shared["image"].numpy())), shared["mask"][None, None] / 255


def make_options(name: str, order: tuple[int, ...]) -> dict:
    """Options of a case, whose draws we make in another order."""
    file = recorded("sdxl_inpaint")
    info, rng = file.case(name)["info"], file.draws(name)
    draws = iter([rng[k] for k in order])
    return {
        "prompts": [info["prompt"]],
        "negative_prompt": info.get("negative_prompt", ""),
        "steps": info["num_inference_steps"],
        "scale": info["guidance_scale"],
        "scheduler": "leading",
        "sampler": "euler",
        "seeds": lambda like: next(draws),
    }


def assert_close(name: str, images: Tensor, latents: LatentRecorder) -> None:
    expected = recorded("sdxl_inpaint").outputs(name)
    assert_images_close(images, expected["images"], truncate=False)
    assert_latents_close(latents.xs[-1], expected["z"])


@pytest.mark.parametrize(
    ("name", "strength", "order"),
    [
        ("inpaint_s1", 1.0, (1, 0)),
        ("inpaint_default_strength", 5 / 6, (2, 0, 1)),
        ("inpaint_s05", 0.5, (2, 0, 1)),
        ("inpaint_no_cfg", 0.8, (2, 0, 1)),
    ],
)
def test_nine_channels_equal_diffusers(name: str, strength: float, order: tuple[int, ...]) -> None:
    image, mask = load_image_and_mask()
    latents = LatentRecorder()
    images = inpaint(
        build_inpainting_model(), image=image, mask=mask, strength=strength, composite=False,
        callback=latents, **make_options(name, order),
    )  # fmt: skip
    assert_close(name, images, latents)


def test_four_channels_keep_what_is_outside_the_mask() -> None:
    """diffusers takes the mask at one pixel in 8 x 8, we wherever it touches them."""
    image, mask = load_image_and_mask()
    latents = LatentRecorder()
    small = F.interpolate((mask >= 0.5).float(), size=(8, 12))
    mask = small.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    images = inpaint(
        load_model("base"), image=image, mask=mask, strength=4 / 6, callback=latents,
        **make_options("blend4_s08", (0, 1)),
    )  # fmt: skip
    expected = recorded("sdxl_inpaint").outputs("blend4_s08")["z"]
    inside = small.bool().expand_as(expected)
    assert_latents_close(latents.xs[-1][inside], expected[inside])
    outside = ~mask.bool().expand_as(image)
    assert torch.equal(images[outside], image[outside])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_refiner_of_nine_channels_keeps_what_is_outside_the_mask(strength: float) -> None:
    base, refiner, draws, inputs = build_inpainting_model(), load_model("refiner"), [], []

    def noise(like: Tensor) -> Tensor:
        draws.append(torch.randn(like.shape, generator=torch.Generator().manual_seed(len(draws))))
        return draws[-1]

    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9)) * 2 - 1
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    hook = refiner.unet.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    options = {"steps": 4, "sampler": "euler", "scale": 1.0, "seeds": noise, "strength": strength}
    inpaint(base, ["a fox"], image, mask, refiner=refiner, refiner_strength=0.25, **options)
    hook.remove()
    (z_t,) = inputs
    order = (1, 2) if strength == 1 else (2, 1)  # of the initial noise and the image's
    posterior = base.autoencoder.encode(image)
    z = base.normalize(posterior.mean + posterior.std * draws[order[1]])
    sigma = float(base.schedule.get_step_sigmas(4, "sgm_uniform")[3])
    expected = (z + sigma * draws[order[0]]) / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(z_t[..., 4:], expected[..., 4:], rtol=0, atol=1e-5)
    assert (z_t[..., :4] - expected[..., :4]).abs().max() > 0.01


SIZES = {
    "original_size": (512, 384), "crop": (8, 16), "target_size": (1024, 768),
    "negative_original_size": (256, 256), "negative_crop": (1, 2),
    "negative_target_size": (640, 512),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"), [("txt2img_leading", {}), ("txt2img_sizes_negative", SIZES)]
)
def test_txt2img_equals_diffusers(name: str, options: dict) -> None:
    base, latents = load_model("base"), LatentRecorder()
    images = txt2img(base, size=(64, 96), callback=latents, **make_options(name, (0,)), **options)
    assert_close(name, images, latents)


def test_txt2img_with_rescaled_guidance_and_clip_skip_equals_diffusers(monkeypatch) -> None:
    latents, name = LatentRecorder(), "txt2img_clip_skip_rescale"
    base = load_model("base")
    monkeypatch.setattr(base.conditioner.text, "blocks_run", 10)
    monkeypatch.setattr(OpenCLIPText, "num_blocks", 2)
    images = txt2img(
        base, size=(64, 96), guidance_rescale=0.7, callback=latents, **make_options(name, (0,))
    )
    assert_close(name, images, latents)


def test_a_refiner_begins_where_diffusers_ends_the_base(monkeypatch) -> None:
    """The recorded latent is not a multiple of 8, which our check of the size requires."""
    monkeypatch.setattr("ldm.pipelines.sdxl.REFINER_SIZE_MULTIPLE", 32)
    latents, name = LatentRecorder(), "txt2img_denoising_end"
    txt2img(
        load_model("base"), original_size=(64, 96), target_size=(64, 96), callback=latents,
        refiner=load_model("refiner"), refiner_start=0.7, **make_options(name, (0,)),
    )  # fmt: skip
    assert len(latents.xs) == 10
    assert_latents_close(latents.xs[6], recorded("sdxl_inpaint").outputs(name)["z"])


def test_img2img_equals_diffusers() -> None:
    image, _ = load_image_and_mask()
    latents = LatentRecorder()
    options = make_options("img2img_s03", (0, 1))
    images = img2img(load_model("base"), image=image, strength=0.3, callback=latents, **options)
    assert_close("img2img_s03", images, latents)
