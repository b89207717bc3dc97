"""Tasks: strength, masks, sizes, embeddings, inversion, errors."""

import copy

import pytest
import torch

import ldm
from goldfile import load_golden
from ldm.model import Defaults
from ldm.nets.karlo import Prior
from ldm.nets.tiled import apply_tiled
from ldm.pipelines import (
    depth2img,
    encode_image,
    img2img,
    inpaint,
    invert,
    sample,
    sample_prior,
    txt2img,
    unclip,
    upscale,
    vary,
)
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling_options import get_sigmas
from nets.nethelp import make_noise
from pipelines.goldmodels import build_recorded_model
from quick import slow_except

QUICK = {"steps": 3, "scale": 3.0, "seeds": 5}
GOLDEN_FILES = {"text": "img2img", "inpaint": "inpaint", "depth": "depth2img", "upscale": "upscale",
         "unclip": "unclip"}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return {
        name: build_recorded_model(load_golden(f"e2e_{file}"), {"text": "base_v"}.get(name, name))
        for name, file in GOLDEN_FILES.items()
    }


@pytest.fixture(scope="module")
def exact_model(models):
    """A text-to-image model whose posterior has almost no variance."""
    model = copy.deepcopy(models["text"])
    model.autoencoder.quant_conv.weight[4:] = 0
    model.autoencoder.quant_conv.bias[4:] = -20
    return model


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def mask():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:40, 24:48] = 1
    return mask


def test_strength_1_ignores_the_image(models, image):
    """The result is that of txt2img from the same initial noise."""
    options = {**QUICK, "x_T": make_noise(1, 4, 8, 8)}
    result = img2img(models["text"], ["a"], image, strength=1.0, **options)
    assert torch.equal(result, txt2img(models["text"], ["a"], **options))


def test_strength_0_keeps_the_image(exact_model, image):
    result = img2img(exact_model, ["a"], image, strength=0.0, **QUICK)
    with torch.no_grad():
        reconstruction = exact_model.decode(exact_model.encode(image)).clamp(-1, 1)
    error = (result - reconstruction).abs().mean()
    assert error < 0.2  # the last noise level leaves a little noise


@pytest.mark.parametrize(("strength", "steps"), [(0.8, 8), (0.33, 3), (0.01, 1), (1.0, 10), (0, 0)])
def test_strength_is_the_fraction_of_steps_that_are_run(models, image, strength, steps):
    calls = []
    options = {"steps": 10, "scale": 1, "callback": lambda i, n, *_: calls.append((i, n))}
    img2img(models["text"], ["a"], image, strength=strength, **options)
    assert calls == [(i, steps) for i in range(steps)]


@pytest.mark.parametrize(
    ("task", "model_name", "steps", "reads_image"),
    [(img2img, "text", 7, True), (depth2img, "depth", 6, False)],
)
def test_legacy_strength_1_with_more_steps_than_requested(
    models, image, task, model_name, steps, reads_image
):
    """The original makes 8 steps of 7, and begins at step 7 with noise of step 8 in the image."""
    counts, results = [], []
    options = {"steps": 7, "strength": 1.0, "legacy": {"steps", "strength"}, "seeds": 1, "scale": 1}
    depth = {"depth": image[:, :1]} if task is depth2img else {}
    for x in (image, -image):
        images = task(
            models[model_name], ["a"], x, callback=lambda i, n, *_: counts.append(n), **options,
            **depth,
        )  # fmt: skip
        results.append(images)
    assert set(counts) == {steps}
    assert torch.equal(*results) != reads_image


@pytest.mark.parametrize(
    "sampler", slow_except(ldm.SAMPLERS, "ddim", "plms", "dpmpp_3m_sde", "restart")
)
def test_img2img_works_with_every_sampler(exact_model, image, sampler):
    options = {**QUICK, "steps": 4, "sampler": sampler}
    weak, strong = (img2img(exact_model, ["a"], image, strength=s, **options) for s in (0.25, 1.0))
    assert weak.isfinite().all()
    assert not torch.allclose(weak, strong, atol=0.1)


@pytest.mark.parametrize("size", [(64, 64), (70, 53), (9, 100)])
def test_the_size_of_an_image_is_kept(models, size):
    image = torch.zeros(1, 3, *size)
    assert img2img(models["text"], ["a"], image, **QUICK).shape == (1, 3, *size)
    assert inpaint(models["inpaint"], ["a"], image, image[:, :1] + 1, **QUICK).shape[2:] == size
    assert depth2img(models["depth"], ["a"], image, **QUICK).shape == (1, 3, *size)


def test_an_image_of_any_task_depends_on_its_seed_but_not_on_its_batch(models, image, mask):
    runs = {
        "text": lambda model, *a, **k: img2img(model, *a, image, **k),
        "inpaint": lambda model, *a, **k: inpaint(model, *a, image, mask, **k),
        "depth": lambda model, *a, **k: depth2img(model, *a, image, **k),
        "upscale": lambda model, *a, **k: upscale(model, *a, image[..., :16, :16], **k),
        "unclip": lambda model, *a, **k: unclip(model, *a, [image], size=(64, 64), **k),
    }
    for name, run in runs.items():
        batch = run(models[name], ["a", "b"], **QUICK | {"seeds": [4, 5]})
        single = run(models[name], ["b"], **QUICK)
        # Batches of other sizes run other kernels; guidance magnifies float32 rounding.
        torch.testing.assert_close(batch[1:], single, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("name", ["inpaint", "text"])
def test_pixels_outside_the_mask_stay_bit_exact(models, image, mask, name):
    """With an inpainting model, and with a text-to-image model."""
    inpainted = inpaint(models[name], ["a"], image, mask, **QUICK)
    known = (mask == 0).expand_as(image)
    assert torch.equal(inpainted[known], image[known])
    assert not torch.equal(inpainted, image)
    without_composite = inpaint(models[name], ["a"], image, mask, composite=False, **QUICK)
    assert not torch.equal(without_composite[known], image[known])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("2 negative prompts were given for 1 images", {"negative_prompt": ["b", "c"]}),
        ("DDIM inversion takes no rho", {"inversion": True, "scheduler": "karras", "rho": 5.0}),
        ("DDIM inversion takes no x_T", {"inversion": True, "x_T": torch.zeros(1, 4, 8, 8)}),
        ("source_prompt needs inversion", {"source_prompt": "a"}),
        ("source_prompt is the same at all steps",
         {"inversion": True, "source_prompt": "a AND b", "syntax": "a1111"}),
        ("sld_concept is the same at all steps",
         {"sld": "max", "sld_concept": "a AND b", "syntax": "a1111"}),
        ("x2 latent upscaler", {"upscaling": True}),
    ],
)  # fmt: skip
def test_arguments_are_checked_before_the_image_is_encoded(
    models, image, monkeypatch, message, options
):
    monkeypatch.setattr("ldm.pipelines.tasks.encode_image", lambda *a: pytest.fail("encodes"))
    if "upscaling" in options:
        options = {"upscaling": ldm.Upscaling(models["text"])}
    with pytest.raises(ValueError, match=message):
        img2img(models["text"], ["a"], image, **{**QUICK, **options})


def test_a_mask_of_another_size_is_refused(models, image):
    with pytest.raises(ValueError, match="the image's size 64x64, got 64x32"):
        inpaint(models["inpaint"], ["a"], image, torch.zeros(1, 1, 32, 64))


def test_a_given_depth_map_replaces_the_estimated_one(models, image):
    model = models["depth"]
    with torch.no_grad():
        estimate = model.conditioner.depth.estimate(image)
    same_depth, other_depth = (
        depth2img(model, ["a"], image, depth=d, **QUICK)
        for d in (estimate * 7 + 3, torch.rand(1, 1, 20, 30))
    )
    estimated = depth2img(model, ["a"], image, **QUICK)
    torch.testing.assert_close(same_depth, estimated, rtol=0, atol=1e-3)
    assert not torch.allclose(other_depth, estimated, atol=1e-2)


def test_noise_levels_of_the_upscaler_are_checked(models, image):
    with pytest.raises(ValueError, match=r"levels are 0 … 350, got 351"):
        upscale(models["upscale"], ["a"], image, noise_level=351)
    upscale(models["upscale"], ["a"], image[..., :16, :16], noise_level=350, **QUICK)


@pytest.mark.slow
def test_upscaling_in_tiles_gives_nearly_the_same_and_has_no_seams(models):
    """The difference to the untiled image jumps no more at borders of tiles than elsewhere.

    Measured at 96 x 144 in tiles of 48: PSNR 28 dB, jumps at borders 1.02 of the median; tiles
    that are sampled separately and blended at the end have 9 dB.
    """
    lr = torch.rand(1, 3, 40, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    untiled, tiled = (
        upscale(models["upscale"], ["a"], lr, tile=tile, **QUICK | {"scale": 1})
        for tile in (64, 32)
    )
    assert tiled.shape == (1, 3, 160, 256)
    correlation = torch.corrcoef(torch.stack([untiled.flatten(), tiled.flatten()]))[0, 1]
    assert correlation > 0.9
    jumps = (tiled - untiled).diff(dim=-1).abs().mean(dim=(0, 1, 2))
    borders = jumps[[4 * 16 - 1, 4 * 32 - 1]]  # tiles of 32 begin at 0, 16, 32
    assert borders.max() < 1.5 * jumps.median()


def test_a_pointwise_function_in_tiles_gives_the_same():
    x = torch.randn(2, 3, 37, 50)
    for tile in (8, 16, 37, 50, 64):
        tiled = apply_tiled(lambda patch: 2 * patch[:, :1], x, tile)
        torch.testing.assert_close(tiled, 2 * x[:, :1])


def test_images_are_mixed_by_weight(models, image):
    model, other = models["unclip"], -image.flip(-1)
    options = {**QUICK, "size": (64, 64), "x_T": make_noise(1, 4, 8, 8)}
    first = unclip(model, ["a"], [image], **options)
    mixed = unclip(model, ["a"], [image, other], weights=[1, 0], **options)
    torch.testing.assert_close(mixed, first, rtol=0, atol=1e-3)
    scaled = [unclip(model, ["a"], [image, other], weights=w, **options) for w in ([3, 1], [6, 2])]
    torch.testing.assert_close(*scaled, rtol=0, atol=1e-3)
    assert not torch.allclose(scaled[0], first, atol=1e-2)


def test_images_and_their_mean_may_have_noise_levels(models, image):
    model, options = models["unclip"], {**QUICK, "size": (64, 64)}
    images = [image, image.flip(-1)]
    plain = unclip(model, ["a"], images, **options)
    for changes in ({"noise_levels": [0, 500]}, {"mix_level": 300}):
        noised = unclip(model, ["a"], images, **options, **changes)
        assert not torch.allclose(noised, plain, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1, 2]}, "2 weights were given for 1 images"),
        ({"weights": [0]}, "must not sum to 0"),
        ({"embeddings": [torch.zeros(2, 32)]}, r"embeddings must be tensors \(1 or 1, \d+\), got"),
        ({"weights": 0.5}, "weights must be a list of finite numbers, got 0.5"),
        ({"noise_levels": [1, 2]}, "2 noise levels were given for 1"),
        ({"noise_levels": 1000}, "noise_levels: noise levels are 0 … 999"),
        ({"mix_level": -1}, "mix_level: noise levels are 0 … 999, got -1"),
        ({"images": []}, "no image is given"),
        ({"images": torch.zeros(1, 3, 8, 8)}, r"images must be a list of tensors \(1, 3, H, W\)"),
        ({"embeddings": "x.pt"}, "embeddings must be a list of tensors, got 'x.pt'"),
    ],
)
def test_invalid_inputs_of_unclip_are_refused_in_one_line(
    models, image, monkeypatch, changes, message
):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a network runs"))
    with pytest.raises(ValueError, match=message) as caught:
        unclip(models["unclip"], ["a"], **{"images": [image], **QUICK, **changes})
    assert "\n" not in str(caught.value)
    assert [caught.value.argument] == list(changes)


def test_embeddings_may_replace_images(models, image):
    model, options = models["unclip"], {**QUICK, "size": (64, 64)}
    with torch.no_grad():
        embedding = model.conditioner.image.embed(image)
    result = unclip(model, ["a"], embeddings=[embedding], **options)
    assert torch.equal(result, unclip(model, ["a"], [image], **options))


def test_unclip_takes_embeddings_of_the_prior(models):
    model = copy.deepcopy(models["unclip"])
    clip = copy.deepcopy(model.conditioner.text.model)
    model.conditioner.image.clip.model.transformer = clip.transformer
    torch.manual_seed(0)
    prior = Prior(clip_dim=32, xf_width=32, xf_layers=1, xf_heads=2).eval()
    embeddings = sample_prior(model, prior, ["a", "b"], steps=3)
    assert embeddings.shape == (2, 32)
    with pytest.raises(ValueError, match="1 negative prompts were given for 2 images"):
        sample_prior(model, prior, ["a", "b"], negative_prompt=["c"])
    images = unclip(model, ["a", "b"], embeddings=[embeddings], **QUICK, size=(64, 64))
    assert images.isfinite().all()


def test_an_image_variation_model_reads_images_instead_of_prompts(image):
    golden = load_golden("e2e_img2img")
    config = copy.deepcopy(golden.meta["config_base_eps"])
    config["params"]["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPImageEmbedder",
        "params": {"model": golden.meta["tiny_arch"]},
    }
    torch.manual_seed(0)
    model = ldm.instantiate(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    options = {**QUICK, "size": (64, 64)}
    first, other = (vary(model, [""] * 2, [x], **options) for x in (image, -image))
    assert first.shape == (2, 3, 64, 64)
    assert not torch.equal(first, other)
    assert model.defaults.scale == 3  # and not 10 as for unCLIP
    model.defaults = Defaults()  # as in a config of our own classes
    assert torch.equal(first, vary(model, [""] * 2, [image], **options))
    euler, cfg_pp = (
        vary(model, [""], [image], **options | {"sampler": sampler, "scale": 1.0})
        for sampler in ("euler", "euler_cfg_pp")
    )
    assert not torch.equal(euler, cfg_pp)
    with pytest.warns(UserWarning, match="does not read a negative prompt: ignored"):
        vary(model, [""], [image], negative_prompt="blurry", **options)


def test_the_low_resolution_condition_does_not_depend_on_the_prompt(models, image):
    generator = torch.Generator().manual_seed(0)
    model = models["upscale"]
    batch = model.prepare({"lr": image, "noise_level": 20}, (64, 64), generator)
    cond, uncond = (model.condition({**batch, "txt": [text]}) for text in ("a", ""))
    assert torch.equal(cond.concat, uncond.concat)
    assert batch["noise_level"].tolist() == [20]


@pytest.mark.slow
def test_sampling_from_the_inverted_latent_reconstructs_the_image():
    """Mean difference without guidance, with the demo model: 0.017; from random noise: 0.080."""
    model, prompt = ldm.load(), "a 3d emoji of a red apple on a blue background"
    image = txt2img(model, [prompt], steps=5, scale=3.0, seeds=3, sampler="dpm")
    z = encode_image(model, image, 1, torch.zeros_like)
    options = {"z": z, "strength": 0.6, "steps": 10, "scale": 1.0, "seeds": 5}
    inverted, noised = (
        img2img(model, [prompt], image, **inversion, **options)
        for inversion in ({"inversion": True, "source_prompt": prompt}, {})
    )
    decoded = model.decode(z).clamp(-1, 1)
    assert (inverted - decoded).abs().mean() < 0.5 * (noised - decoded).abs().mean()


@pytest.mark.parametrize("scheduler", ["karras", "trailing"])
def test_ddim_inversion_skips_a_noise_level_of_0(models, image, scheduler):
    images = img2img(models["text"], ["a"], image, inversion=True, scheduler=scheduler, **QUICK)
    assert images.isfinite().all()


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("dpm2", "karras"), ("euler", "ddim_uniform"), ("ddim", "uniform")]
)
def test_sampling_starts_from_the_inverted_latent(models, image, sampler, scheduler):
    """dpm2 skips a noise level of karras, and ddim_uniform has 8 steps instead of 7."""
    model, options = models["text"], {"sampler": sampler, "scheduler": scheduler, "steps": 7}
    z = encode_image(model, image, 1, torch.zeros_like)
    sigmas = get_sigmas(model, Quirks(), options)
    sigmas = sigmas[-1 - round(0.5 * (len(sigmas) - 1)) :]
    source, cond = (model.condition({"txt": [text]}) for text in ("", "a"))
    z_t = invert(model, z, source, sigmas=sigmas)
    expected = sample(model, cond, z_t=z_t, sigmas=sigmas, sampler=sampler, scale=1.0, seeds=0)
    latents = []
    img2img(
        model, ["a"], image, z=z, inversion=True, strength=0.5, scale=1.0, seeds=0,
        on_latent=latents.append, **options,
    )  # fmt: skip
    torch.testing.assert_close(latents[0], expected, atol=1e-4, rtol=1e-4)


def test_unclip_takes_the_default_scale_of_a_sampler(models, image):
    options = {"steps": 2, "seeds": 5, "sampler": "euler_cfg_pp"}
    images = unclip(models["unclip"], ["a"], [image], **options)
    assert torch.equal(images, unclip(models["unclip"], ["a"], [image], scale=1.0, **options))


def test_guidance_acts_only_inside_its_interval(models):
    options = {**QUICK, "size": (64, 64)}
    guided = txt2img(models["text"], ["a"], **options)
    everywhere = txt2img(models["text"], ["a"], guidance_interval=(0.0, 1e6), **options)
    options_by_sigma = {**options, "scale": lambda sigma: 9.0}
    nowhere = txt2img(models["text"], ["a"], guidance_interval=(1e5, 1e6), **options_by_sigma)
    assert torch.equal(guided, everywhere)
    torch.testing.assert_close(nowhere, txt2img(models["text"], ["a"], **options | {"scale": 1}))
    assert not torch.allclose(guided, nowhere, atol=1e-3)
