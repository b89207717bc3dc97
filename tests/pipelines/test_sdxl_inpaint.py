"""SDXL with diffusers' scheduler and SDXL inpainting, compared with recorded runs of diffusers.

Pixels differ by at most 1, latents by 1e-4 of the largest value. diffusers drops fractions of a
step: its strength 0.8 of 6 steps is 4 steps.
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
from pipelines.goldmodels import StepRecorder, assert_images_close, build_recorded_model
from pipelines.test_sdxl_goldens import (
    assert_latents_close,
    load_golden,
    load_model,
)


@functools.cache
def build_inpainting_model() -> LatentDiffusion:
    return build_recorded_model(load_golden("sdxl_inpaint"), "inpaint9")


def load_image_and_mask() -> tuple[Tensor, Tensor]:
    shared = load_golden("sdxl_inpaint").select("shared/")
    return to_tensor(Image.fromarray(shared["image"].numpy())), shared["mask"][None, None] / 255


def make_options(case: str, order: tuple[int, ...]) -> dict:
    """Make the options of a case; `order` is that in which we draw its recorded noise."""
    golden = load_golden("sdxl_inpaint")
    info, noise = golden.case(case)["info"], golden.draws(case)
    draws = iter([noise[k] for k in order])
    return {
        "prompts": [info["prompt"]],
        "negative_prompt": info.get("negative_prompt", ""),
        "steps": info["num_inference_steps"],
        "scale": info["guidance_scale"],
        "scheduler": "leading",
        "sampler": "euler",
        "seeds": lambda like: next(draws),
    }


def assert_close(case: str, images: Tensor, recorder: StepRecorder) -> None:
    expected = load_golden("sdxl_inpaint").outputs(case)
    assert_images_close(images, expected["images"], truncate=False)
    assert_latents_close(recorder.xs[-1], expected["z"])


@pytest.mark.parametrize(
    ("case", "strength", "order"),
    [
        ("inpaint_s1", 1.0, (1, 0)),
        ("inpaint_default_strength", 5 / 6, (2, 0, 1)),
        ("inpaint_s05", 0.5, (2, 0, 1)),
        ("inpaint_no_cfg", 0.8, (2, 0, 1)),
    ],
)
def test_inpainting_equals_diffusers(case: str, strength: float, order: tuple[int, ...]) -> None:
    image, mask = load_image_and_mask()
    recorder = StepRecorder()
    images = inpaint(
        build_inpainting_model(), image=image, mask=mask, strength=strength, composite=False,
        callback=recorder, **make_options(case, order),
    )  # fmt: skip
    assert_close(case, images, recorder)


def test_inpainting_with_four_channels_keeps_pixels_outside_the_mask() -> None:
    """diffusers reads one pixel of the mask in 8 x 8; we mark 8 x 8 pixels if any of them is."""
    image, mask = load_image_and_mask()
    recorder = StepRecorder()
    latent_mask = F.interpolate((mask >= 0.5).float(), size=(8, 12))
    mask = latent_mask.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    images = inpaint(
        load_model("base"), image=image, mask=mask, strength=4 / 6, callback=recorder,
        **make_options("blend4_s08", (0, 1)),
    )  # fmt: skip
    expected = load_golden("sdxl_inpaint").outputs("blend4_s08")["z"]
    inside = latent_mask.bool().expand_as(expected)
    assert_latents_close(recorder.xs[-1][inside], expected[inside])
    outside = ~mask.bool().expand_as(image)
    assert torch.equal(images[outside], image[outside])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_refiner_after_nine_channels_keeps_latents_outside_the_mask(strength: float) -> None:
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
    initial, posterior = (1, 2) if strength == 1 else (2, 1)  # indices of draws
    encoded = base.autoencoder.encode(image)
    z = base.normalize(encoded.mean + encoded.std * draws[posterior])
    sigma = float(base.schedule.get_step_sigmas(4, "sgm_uniform")[3])
    expected = (z + sigma * draws[initial]) / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(z_t[..., 4:], expected[..., 4:], rtol=0, atol=1e-5)
    assert (z_t[..., :4] - expected[..., :4]).abs().max() > 0.01


MICRO_CONDITIONS = {
    "original_size": (512, 384), "crop": (8, 16), "target_size": (1024, 768),
    "negative_original_size": (256, 256), "negative_crop": (1, 2),
    "negative_target_size": (640, 512),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "options"), [("txt2img_leading", {}), ("txt2img_sizes_negative", MICRO_CONDITIONS)]
)
def test_txt2img_equals_diffusers(case: str, options: dict) -> None:
    base, recorder = load_model("base"), StepRecorder()
    images = txt2img(base, size=(64, 96), callback=recorder, **make_options(case, (0,)), **options)
    assert_close(case, images, recorder)


def test_txt2img_with_rescaled_guidance_and_clip_skip_equals_diffusers(monkeypatch) -> None:
    recorder, case = StepRecorder(), "txt2img_clip_skip_rescale"
    base = load_model("base")
    monkeypatch.setattr(base.conditioner.text, "blocks_run", 10)
    monkeypatch.setattr(OpenCLIPText, "num_blocks", 2)
    images = txt2img(
        base, size=(64, 96), guidance_rescale=0.7, callback=recorder, **make_options(case, (0,))
    )
    assert_close(case, images, recorder)


def test_a_refiner_starts_where_the_base_of_diffusers_ends(monkeypatch) -> None:
    """Sides of the recorded latent are not multiples of 8, which we usually require."""
    monkeypatch.setattr("ldm.pipelines.sdxl.REFINER_SIZE_MULTIPLE", 32)
    recorder, case = StepRecorder(), "txt2img_denoising_end"
    txt2img(
        load_model("base"), original_size=(64, 96), target_size=(64, 96), callback=recorder,
        refiner=load_model("refiner"), refiner_start=0.7, **make_options(case, (0,)),
    )  # fmt: skip
    assert len(recorder.xs) == 10
    assert_latents_close(recorder.xs[6], load_golden("sdxl_inpaint").outputs(case)["z"])


def test_img2img_equals_diffusers() -> None:
    image, _ = load_image_and_mask()
    recorder = StepRecorder()
    options = make_options("img2img_s03", (0, 1))
    images = img2img(load_model("base"), image=image, strength=0.3, callback=recorder, **options)
    assert_close("img2img_s03", images, recorder)
