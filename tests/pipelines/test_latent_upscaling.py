"""The x2 latent upscaler, compared with recordings of k-diffusion's notebook and of diffusers."""

import functools

import pytest
import torch
from PIL import Image

import ldm
from goldfile import load_golden
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders.concat_images import LowResLatent
from ldm.imaging.pixels import to_tensor
from ldm.loading.addons.lora_targets import list_lora_targets
from ldm.pipelines.latent_upscaling import sample_upscaled_latent
from ldm.runtime.errors import ArgumentError, MissingArgument, WeightsMismatch, WrongFamily
from nets.nethelp import assert_close
from pipelines.goldmodels import StepRecorder, assert_images_close, build_recorded_model
from quick import slow_except
from tinyupscaler import build_tiny_upscaler, make_random_latent, make_recorded_noise

SAMPLERS = {
    "k_euler": "euler", "k_euler_ancestral": "euler_a", "k_dpm_2_ancestral": "dpm2_a",
    "k_dpm_fast": "dpm_fast", "k_dpm_adaptive": "dpm_adaptive",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build_tiny_upscaler()


@pytest.fixture(scope="module")
def base():
    """A tiny text-to-image model, whose autoencoder reduces images by a factor of 8."""
    return build_recorded_model(load_golden("e2e_txt2img"), "base_eps")


def test_the_loss_with_variance_equals_the_recorded_one(model):
    """The fifth channel is the log variance of the error."""
    golden, case = load_golden("seed_x2_unet"), "loss_variance"
    inputs, expected = golden.inputs(case), golden.outputs(case)
    sigma, low_res_sigma = inputs["sigma"], inputs["low_res_sigma"]
    sigma_4d, low_res_sigma_4d = (s[:, None, None, None] for s in (sigma, low_res_sigma))
    x = inputs["clean"] + sigma_4d * inputs["noise"]
    low_res = inputs["low_res"] / (1 + low_res_sigma_4d**2).sqrt()
    low_res = model.conditioner.get(LowResLatent)(low_res)
    z_t = torch.cat([x / (1 + sigma_4d**2).sqrt(), low_res], dim=1)
    vector = torch.cat([inputs["pooled"], low_res_sigma[:, None]], dim=1)
    prediction, log_variance = model.unet.predict_with_log_variance(
        z_t, sigma.log() / 4, inputs["hidden"], vector, inputs["padding"] == 0
    )
    error = prediction - model.denoiser.compute_target(
        inputs["clean"], inputs["noise"], sigma.log() / 4
    )
    loss = ((error.square().mean((1, 2, 3)) * (-log_variance).exp()) + log_variance) / 2
    loss.mean().backward()
    assert_close(loss.detach(), expected["loss"])
    for layer in ("proj_out", "proj_in", "mapping.0"):
        gradient = model.unet.inner_model.get_submodule(layer).bias.grad
        assert_close(gradient, expected[f"grad_{layer}.bias"])
    model.zero_grad()


@pytest.mark.parametrize(
    "case",
    slow_except(
        ("euler10_cfg0", "euler10_gaussian0.3", "euler10_fake0.3", "euler_a10_eta1",
         "dpm2_a15_eta0.1", "dpm_fast12_eta0", "dpm_adaptive_eta0"),
        "euler10_gaussian0.3", "euler10_fake0.3", "euler_a10_eta1",
    ),
)  # fmt: skip
def test_latents_equal_those_of_the_notebook(model, case, monkeypatch):
    golden = load_golden("seed_x2_sample")
    info, inputs = golden.case(case)["info"], golden.inputs(case)
    tolerance = info["tol_scale"]
    settings = {"rtol": 0.05 * tolerance, "atol": tolerance / 127.5, "pcoeff": 0.2, "icoeff": 0.4}
    adaptive = functools.partial(ldm.SAMPLERS["dpm_adaptive"], **settings)
    monkeypatch.setitem(ldm.SAMPLERS, "dpm_adaptive", adaptive)
    z = sample_upscaled_latent(
        model,
        [info["prompt"]],
        [info["uncond"]],
        inputs["low_res"],
        noise_source=make_recorded_noise(golden, case),
        noise_sigma=info["noise_aug_level"],
        noise_kind=info["noise_aug_type"],
        scale=info["scale"],
        x_T=inputs["noise"],
        steps=info["steps"],
        sampler=SAMPLERS[info["sampler"]],
        **({"eta": info["eta"]} if info["sampler"] != "k_euler" else {}),
    )
    golden.assert_close(case, latents=z)


@pytest.mark.parametrize(
    "case",
    slow_except(
        ("log_gs0", "log_gs1", "log_gs9_neg", "lin_gs2", "log_image", "batch2"),
        "log_gs9_neg", "lin_gs2", "log_image",
    ),
)  # fmt: skip
def test_images_equal_those_of_diffusers(model, case, monkeypatch):
    """Its guidance up to 1 is `legacy`; above 1 it is the same in both."""
    golden = load_golden("seed_x2_diffusers")
    info, inputs, expected = golden.case(case)["info"], golden.inputs(case), golden.outputs(case)
    if info["interpolation_type"] == "linear":
        betas = make_betas("linear", linear_start=0.00085, linear_end=0.012)
        schedule = Schedule(betas, uses_log_sigma=True, quantize_c_noise=False)
        monkeypatch.setattr(model, "schedule", schedule)
    image, recorder = inputs.get("image"), StepRecorder()
    images = ldm.upscale_latent(
        model,
        info["prompt"],
        None if image is None else to_tensor(Image.fromarray(image.numpy())),
        latent=inputs.get("low_res"),
        negative_prompt=info["negative_prompt"] or "",
        scale=info["guidance_scale"],
        steps=info["steps"],
        scheduler="normal" if info["interpolation_type"] == "linear" else "time_uniform",
        x_T=inputs["latents"],
        seeds=make_recorded_noise(golden, case),
        callback=recorder,
        legacy=["unmasked"],
    )
    golden.assert_close(case, final_latents=recorder.xs[-1])
    if "images" in expected:
        assert_images_close(images, expected["images"], truncate=False)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (9, 8)])
def test_inputs_of_any_size_are_upscaled_by_two(model, height, width):
    images = ldm.upscale_latent(
        model, ["a cat"], latent=make_random_latent(1, height, width), seeds=0, steps=1
    )
    assert images.shape == (1, 3, 16 * height, 16 * width)
    image = torch.zeros(1, 3, 8 * height - 3, 8 * width + 1)
    images = ldm.upscale_latent(model, ["a cat"], image, seeds=0, steps=1)
    assert images.shape == (1, 3, 2 * image.shape[2], 2 * image.shape[3])


def test_latents_are_upscaled_without_being_decoded(model, base, monkeypatch):
    """txt2img with `upscaling` equals txt2img followed by the upscaler."""
    latents = []
    options = {"seeds": [3], "steps": 3}
    monkeypatch.setattr(base, "decode", lambda z, tile=None: latents.append(z) or torch.zeros(1))
    ldm.txt2img(base, ["a cat"], size=(64, 64), scale=2, **options)
    calls = []
    ldm.txt2img(
        base, ["a cat"], size=(64, 64), scale=2, upscaling=ldm.Upscaling(model, steps=2),
        callback=lambda step, steps, x, denoised: calls.append((step, steps)), **options,
    )  # fmt: skip
    noise_source = ldm.pipelines.make_seeded_noise_source([3])
    noise_source(latents[0])  # the base's initial noise
    expected = sample_upscaled_latent(
        model, ["a cat"], [""], latents[0], noise_source=noise_source, steps=2
    )
    assert torch.equal(latents[1], expected)
    assert calls == [(step, 5) for step in range(5)]


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (MissingArgument, "neither an image nor a latent", {}),
        (ArgumentError, "not both",
         {"latent": make_random_latent(), "image": torch.zeros(1, 3, 8, 8)}),
        (ArgumentError, r"\(1 or 1, 4, height, width\), got \(1, 16, 8, 8\)",
         {"latent": torch.zeros(1, 16, 8, 8)}),
        (ArgumentError, "unknown kind of noise `gausian`",
         {"latent": make_random_latent(), "noise_kind": "gausian"}),
        (ArgumentError, "must be 0 or more", {"latent": make_random_latent(), "noise_sigma": -0.1}),
        (ArgumentError, r"x_T must be a tensor of at most the shape \(1, 4, 16, 16\), got a",
         {"latent": make_random_latent(), "x_T": torch.zeros(1, 4, 8, 18)}),
    ],
)  # fmt: skip
def test_invalid_inputs_are_refused(model, error, message, options):
    with pytest.raises(error, match=message):
        ldm.upscale_latent(model, ["a cat"], seeds=0, **options)


def test_models_for_other_tasks_are_refused(model, base):
    with pytest.raises(WrongFamily, match="is an x2 latent upscaler: use `upscale_latent`"):
        ldm.upscale(model, ["a cat"], torch.zeros(1, 3, 64, 64))
    with pytest.raises(ArgumentError, match="this is not an x2 latent upscaler"):
        ldm.txt2img(base, ["a cat"], upscaling=ldm.Upscaling(base))
    for options, message in (
        ({"steps": "9"}, "steps must be a whole number"),
        ({"model": None}, "model must be of type LatentDiffusion"),
    ):
        with pytest.raises(ArgumentError, match=f"{message}, got"):
            ldm.Upscaling(**{"model": model, **options})


def test_another_latent_space_is_refused(model, base, monkeypatch):
    monkeypatch.setattr(base, "scale_factor", 0.13025)
    with pytest.raises(ArgumentError, match="another latent space than the upscaler"):
        ldm.txt2img(base, ["a cat"], upscaling=ldm.Upscaling(model))


def test_an_image_that_tiles_has_no_seam(model):
    """A shifted latent with shifted noise gives the shifted image; observed error: 5e-6."""
    latent, x_T = make_random_latent(1, 8, 16), torch.randn(1, 4, 16, 32)

    def upscale(shift, tiling, latent=latent):
        inputs = {"latent": latent.roll(shift, dims=3), "x_T": x_T.roll(2 * shift, dims=3)}
        return ldm.upscale_latent(model, ["a cat"], steps=2, tiling=tiling, **inputs)

    torch.testing.assert_close(upscale(4, "x"), upscale(0, "x").roll(64, dims=3), atol=1e-4, rtol=0)
    assert (upscale(4, "none") - upscale(0, "none").roll(64, dims=3)).abs().max() > 0.1
    with pytest.raises(ArgumentError, match="multiples of 32 pixels, from 64, got 72"):
        upscale(0, "x", make_random_latent(1, 8, 9))


@pytest.mark.slow
def test_tiles_of_the_unet_have_valid_sides_and_offloading_changes_nothing(model):
    options = {"latent": make_random_latent(1, 8, 16), "steps": 2, "seeds": 1}
    untiled = ldm.upscale_latent(model, ["a cat"], **options)
    tiled = [ldm.upscale_latent(model, ["a cat"], unet_tile=side, **options) for side in (5, 16)]
    assert torch.equal(*tiled)
    assert 1e-3 < (tiled[0] - untiled).abs().mean() < 0.3
    offloaded = build_tiny_upscaler()
    offloaded.offload(torch.device("cpu"))
    assert torch.equal(ldm.upscale_latent(offloaded, ["a cat"], **options), untiled)


def test_a_lora_is_refused(model):
    with pytest.raises(WeightsMismatch, match="the x2 latent upscaler does not support LoRAs"):
        list_lora_targets(model)
