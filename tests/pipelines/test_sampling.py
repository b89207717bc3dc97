"""txt2img and sample: seeds, options, errors."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import Tensor

import ldm
from goldfile import load_golden
from ldm.conditioning import Cond
from ldm.diffusion.guidance import Guidance
from ldm.loading.weight_names import rename_weights, restore_names
from ldm.model import LatentDiffusion
from ldm.pipelines import NonFinite, Stop, invert, sample, txt2img
from ldm.pipelines.quirks import Quirks
from ldm.pipelines.sampling_options import get_sigmas
from ldm.runtime.errors import ArgumentError
from pipelines.goldmodels import build_recorded_model
from quick import slow_except
from recipe import fill

LATENT = torch.zeros(1, 4, 8, 8)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build_recorded_model(load_golden("e2e_txt2img"), "base_v")


@pytest.fixture(scope="module")
def generate(model: LatentDiffusion):
    """A function (sampler, **options) -> image of a fixed seed."""
    return lambda sampler, **options: run(model, ["a"], seeds=7, sampler=sampler, **options)


def run(model: LatentDiffusion, prompts: list[str], **options) -> Tensor:
    return txt2img(model, prompts, **{"size": (64, 64), "steps": 3, "scale": 3.0, **options})


@pytest.mark.parametrize(
    "sampler", slow_except(ldm.SAMPLERS, "ddim", "euler", "dpmpp_2s_a", "dpmpp_sde", "restart")
)
def test_an_image_depends_on_its_seed_but_not_on_its_batch(model, sampler):
    if sampler == "dpm_adaptive":
        pytest.skip("its step sizes depend on the whole batch")
    eta = {"eta": 0.7} if sampler == "ddim" else {}
    batch = run(model, ["a", "b", "c"], sampler=sampler, seeds=[5, 6, 7], **eta)
    single = run(model, ["c"], sampler=sampler, seeds=7, **eta)
    # Batches of 1 and 3 run other kernels; guidance and 3 steps magnify float32 rounding.
    torch.testing.assert_close(batch[2:], single, rtol=0, atol=1e-3)
    assert not torch.allclose(batch[0], batch[1])


def test_without_seeds_the_global_generator_of_torch_is_used(model):
    images = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        images.append(run(model, ["a"]))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_seeds_may_be_numbers_of_numpy_or_torch(model):
    seeds = (5, np.int64(5), np.array([5]), torch.tensor(5))
    images = [run(model, ["a"], steps=1, scale=1, seeds=seed) for seed in seeds]
    assert all(torch.equal(images[0], image) for image in images)


def test_a_model_without_conditions_is_sampled_as_recorded():
    golden, case = load_golden("ldm_uncond"), "kl_churches_like"
    info, model = golden.case(case)["info"], ldm.instantiate(golden.meta["config_kl"]).eval()
    weights = fill(restore_names(model.state_dict()), golden.meta["salt"])
    model.load_state_dict(rename_weights(weights))
    model.scale_factor = info["scale_factor"]
    options = {"x_T": golden.draws(case)[0], "steps": info["steps"], "eta": info["eta"]}
    z = sample(model, model.condition({}), **options)
    golden.assert_close(case, latents=z, images=model.decode(z))
    for seeds, n in (([1, 2, 3], 3), (torch.tensor(5), 1), (None, 1)):
        assert len(sample(model, model.condition({}), seeds=seeds, steps=1)) == n


def test_the_negative_prompt_matters_only_under_guidance(model):
    plain, negative = (run(model, ["a"], seeds=1, negative_prompt=p) for p in ("", "blurry"))
    assert not torch.allclose(plain, negative)
    plain, negative = (run(model, ["a"], seeds=1, negative_prompt=p, scale=1) for p in ("", "no"))
    assert torch.equal(plain, negative)


def test_the_callback_is_called_after_each_step_and_can_stop_the_run(model):
    calls = []
    run(model, ["a"], steps=7, callback=lambda step, steps, *_: calls.append((step, steps)))
    assert calls == [(i, 7) for i in range(7)]

    def stop(step, steps, x, denoised):
        raise Stop

    with pytest.raises(Stop):
        run(model, ["a"], callback=stop)


def test_decoding_in_tiles_gives_nearly_the_same_image(model):
    """Each tile has its own GroupNorm statistics; gaps or shifts would lower the correlation."""
    z = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        untiled, tiled = model.decode(z), model.decode(z, tile=16)
    assert tiled.shape == untiled.shape
    correlation = torch.corrcoef(torch.stack([untiled.flatten(), tiled.flatten()]))[0, 1]
    assert correlation > 0.95


def test_the_cause_of_non_finite_values_is_named(model):
    broken = copy.deepcopy(model)
    broken.provenance["checkpoint"] = "x/broken.ckpt"
    broken.autoencoder.decoder.conv_out.bias[0] = float("nan")
    message = "the VAE returned .*: 1 of its weights in `broken.ckpt` are not, such as `autoenc"
    with pytest.raises(NonFinite, match=message) as caught:
        run(broken, ["a"])
    assert caught.value.cause
    broken.unet.out[2].bias[0] = float("inf")
    with pytest.raises(NonFinite, match="the UNet .* `unet.out.2.bias`: download it again"):
        run(broken, ["a"])


@pytest.mark.parametrize(("options", "message"), [
    ({"sampler": "dmp"}, "`dmp`, did you mean `dpm`"), ({"grid": "even"}, "scheduler `even`"),
    ({"legacy": {"nois"}}, "legacy name `nois`, did you mean `noise`"),
    ({"legacy": "nois"}, "legacy name `nois`, did you mean `noise`"),
    ({"steps": 0}, "steps must be in 1 … 1000, got 0"),
    ({"seeds": 1 << 64}, "seeds must be in -2^63 … 2^64 - 1, got 18446744073709551616"),
    ({"seeds": [1, 2]}, "2 seeds were given for 1 images"),
    ({"sampler": "plms", "eta": 1.0}, "sampler `plms` takes no eta, only ddim, euler_a, "),
    ({"s_churn": 1.0}, "sampler `ddim` takes no s_churn, only euler, heun, dpm2 do"),
    ({"sampler": "lms", "s_noise": 0.5}, "sampler `lms` takes no s_noise, only ddim, euler, "),
    ({"sampler": "heun", "s_churn": -1.0}, "s_churn must be 0 or more, got -1"),
    ({"sampler": "euler", "s_tmin": 2.0, "s_tmax": 1.0}, "s_tmax must be s_tmin (2) or more"),
    ({"rho": 2.0}, "scheduler `uniform` takes no rho, only karras, polyexponential, edm do"),
    ({"scheduler": "karras", "rho": 0.0}, "rho must be greater than 0, got 0"),
    ({"sigmas": [1.0, 5.0, 0.0], "steps": None}, "sigmas must descend, but 5 follows 1"),
    ({"sigmas": [99.0, 1.0, 0.0], "steps": 2}, "has noise levels up to 14.6146, not 99"),
    ({"sigmas": [9.0, 1.0, 0.0], "steps": 7}, "sigmas have 2 steps, not 7"),
    ({"sigmas": [9.0, 1.0, 0.0], "steps": 2, "scheduler": "karras"}, "given, leave out scheduler"),
])  # fmt: skip
def test_invalid_options_are_refused_in_one_line(model, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        run(model, ["a"], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("prompts", [], "one text or a list of texts, got []"),
    ("prompts", torch.zeros(1, 3, 64, 64), "texts, got a tensor (1, 3, 64, 64)"),
    ("size", 64, "two whole numbers (height, width), got 64"),
    ("steps", 2.5, "a whole number, got 2.5"),
    ("scale", "7", "a finite number or a function, got '7'"),
    ("scale", float("nan"), "a finite number or a function, got nan"),
    ("pag", "x", "a finite number, got 'x'"),
    ("image", torch.zeros(3, 64, 64), "a tensor (1, 3, H, W) in [-1, 1], got a tensor (3, 64, 64)"),
    ("image", torch.zeros(1, 4, 8, 8), "(1, 3, H, W) in [-1, 1], got a tensor (1, 4, 8, 8)"),
    ("image", "x.png", "a tensor (1, 3, H, W) in [-1, 1], got 'x.png'"),
    ("image", torch.zeros(2, 3, 64, 64), "(1, 3, H, W) in [-1, 1], got a tensor (2, 3, 64, 64)"),
    ("mask", "x.png", "a tensor (1, 1, H, W), got 'x.png'"),
    ("mask", torch.zeros(1, 3, 64, 64), "a tensor (1, 1, H, W), got a tensor (1, 3, 64, 64)"),
    ("negative_prompt", 5, "one text or a list of texts, got 5"),
    ("seeds", "5", "a whole number or a list of whole numbers or a function, got '5'"),
    ("seeds", [1.5], "a list of whole numbers or a function, got [1.5]"),
    ("brownian", "no", "True or False, got 'no'"),
    ("sampler", ["ddim"], "a text, got ['ddim']"),
    ("sigmas", 5.0, "a list of finite numbers, got 5.0"),
    ("sigmas", torch.ones(2, 2), "a list of finite numbers, got a tensor (2, 2)"),
    ("apg", ("a", 1, 2), "a list of finite numbers or of type APG, got ('a', 1, 2)"),
    ("guidance_interval", (1,), "two finite numbers (low, high), got (1,)"),
    ("guidance_interval", (5, 1), "(low, high), got (5, 1)"),
    ("legacy", None, "one text or a list of texts, got None"),
    ("callback", 3, "a function, got 3"),
    ("x_T", torch.ones(1, 3, 8, 8), "a tensor (1, 4, 8, 8), got a tensor (1, 3, 8, 8)"),
    ("x_T", torch.ones(2, 4, 8, 8), "a tensor (1, 4, 8, 8), got a tensor (2, 4, 8, 8)"),
    ("upscaling", b"x", "of type Upscaling, got b'x'"),
    ("unet_tile", 0, "1 or more, got 0"),
    ("tiling", torch.zeros(2, 2), "a text, got a tensor (2, 2)"),
    ("clip_skip", "2", "a whole number, got '2'"),
    ("pag", True, "a finite number, got True"),
    ("pag", torch.ones(1), "a finite number, got a tensor (1,)"),
    ("image", torch.full((1, 3, 64, 64), 200), "have values in -1 … 1, got 200 … 200"),
    ("image", torch.full((1, 3, 64, 64), torch.nan), "have values in -1 … 1, got nan … nan"),
    ("mask", torch.full((1, 1, 64, 64), 255), "have values in 0 … 1, got 255 … 255"),
])  # fmt: skip
def test_values_of_a_wrong_type_or_shape_are_refused_before_a_network_runs(
    model, monkeypatch, name, value, message
):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a network runs"))
    task = {"image": ldm.img2img, "mask": ldm.inpaint}.get(name, txt2img)
    image = {"image": torch.zeros(1, 3, 64, 64)} if name in ("image", "mask") else {}
    with pytest.raises(ValueError, match=f"{name} must .*{re.escape(message)}$") as caught:
        task(model, **{"prompts": ["a"], **image, name: value})
    assert caught.value.argument == name


@pytest.mark.parametrize(("options", "message"), [
    ({"z": torch.zeros(4, 8, 8)}, "z must be a tensor of 4 dimensions, got a tensor (4, 8, 8)"),
    ({"steps": "7"}, "steps must be a whole number, got '7'"),
    ({"strength": None}, "strength must be a finite number, got None"),
    ({"unet_tile": 0}, "unet_tile must be 1 or more, got 0"),
    ({"freeu_version": "2"}, "freeu_version needs freeu"),
    ({"sigmas": torch.zeros(0)}, "sigmas must be one or more, in descending"),
    ({"scale": 7}, "scale needs uncond"),
    ({"guidance_rescale": 0.7}, "guidance_rescale needs uncond"),
    ({"guidance_interval": (0, 5)}, "guidance_interval needs uncond"),
    ({"guidance": Guidance()}, "guidance needs uncond"),
    ({"extra_conds": [Cond(torch.zeros(1, 77, 32))]}, "extra_conds needs guidance"),
    ({"strength": 0.5}, "strength needs z"),
    ({"strength": 0.5, "z_t": LATENT}, "strength needs z"),
    ({"z": LATENT, "z_t": LATENT}, "z_t is given, leave out z"),
    ({"x_T": LATENT, "z_t": LATENT}, "z_t is given, leave out x_T"),
    ({"seeds": 1, "noise_source": torch.randn_like}, "noise_source is given, leave out seeds"),
    ({"seeds": 1 << 64}, "seeds must be in -2^63 … 2^64 - 1, got 18446744073709551616"),
    ({"seeds": [-(1 << 63) - 1]}, "seeds must be in -2^63 … 2^64 - 1, got -9223372036854775809"),
    ({"scheduler": "karras", "grid": "edm"}, "scheduler is given, leave out grid"),
    ({"sigmas": torch.ones(2), "scheduler": "karras"}, "sigmas are given, leave out scheduler"),
    ({"sigmas": torch.ones(2), "rho": 7.0}, "sigmas are given, leave out rho"),
    ({"sigmas": torch.ones(2), "steps": 7}, "sigmas have 1 steps, not 7"),
    ({"rho": 7.0, "legacy": "steps"}, "scheduler `uniform` takes no rho"),
    ({"steps": 4, "end_step": 5}, "end_step must be in 0 … 4, the levels of the run, got 5"),
    ({"steps": 4, "end_step": -1}, "end_step must be in 0 … 4, the levels of the run, got -1"),
    ({"steps": 4, "end_step": 1, "z": LATENT, "strength": 0.5}, "end_step must be in 2 … 4, the"),
    ({"uncond": Cond(torch.zeros(2, 77, 32))}, "as many rows as cond, 1, got 2"),
])  # fmt: skip
def test_sample_checks_its_arguments(model, monkeypatch, options, message):
    cond = model.condition({"txt": ["a"]})
    monkeypatch.setattr(model.unet, "forward", lambda *_, **__: pytest.fail("a network runs"))
    with pytest.raises(ArgumentError, match=re.escape(message)) as caught:
        sample(model, cond, **options)
    assert caught.value.argument in options


@pytest.mark.parametrize(("options", "message"), [
    ({"guidance_rescale": 0.7}, "guidance_rescale has no effect at a guidance scale of 1"),
    ({"guidance_interval": (0, 5)}, "guidance_interval has no effect at a guidance scale of 1"),
    ({"s_tmin": 0.1}, "s_tmin and s_tmax have no effect without s_churn"),
    ({"s_tmax": 9.0}, "s_tmin and s_tmax have no effect without s_churn"),
])  # fmt: skip
def test_options_without_effect_are_warned_of(model, options, message):
    with pytest.warns(UserWarning, match=message):
        run(model, ["a"], steps=1, scale=1, **options)


def test_an_inversion_without_guidance_takes_no_scale(model):
    cond, sigmas = model.condition({"txt": ["a"]}), model.schedule.get_step_sigmas(2)
    with pytest.raises(ArgumentError, match="scale needs uncond"):
        invert(model, LATENT, cond, sigmas=sigmas, scale=3.0)


@pytest.mark.parametrize("z", [None, torch.zeros(1, 4, 8, 8)])
def test_noise_of_a_wrong_shape_is_refused_before_the_image_is_encoded(model, monkeypatch, z):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a network runs"))
    image, x_T = torch.zeros(1, 3, 60, 60), torch.zeros(1, 4, 9, 8)
    with pytest.raises(ValueError, match=r"x_T must be a tensor \(1, 4, 8, 8\), got a tensor"):
        ldm.img2img(model, ["a"], image, z=z, x_T=x_T)


def test_numbers_may_be_those_of_numpy_or_tensors(model):
    image, options = torch.zeros(1, 3, 64, 64), {"steps": 4, "seeds": 1}
    images = [
        ldm.img2img(model, ["a"], image, strength=to_float(0.5), clip_skip=to_int(1), **options)
        for to_float, to_int in ((float, int), (torch.tensor, np.int64))
    ]
    assert torch.equal(*images)


def test_brownian_without_seeds_is_refused_before_a_network_runs(model, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a network runs"))
    with pytest.raises(ValueError, match="brownian needs seeds, not a noise source"):
        run(model, ["a"], sampler="dpmpp_sde", brownian=True, seeds=torch.randn_like)


def test_legacy_may_be_a_single_name(model):
    images = [run(model, ["a"], steps=7, seeds=1, legacy=names) for names in (["steps"], "steps")]
    assert torch.equal(*images)


def test_noise_options_replace_the_defaults_of_a_sampler(generate):
    assert torch.equal(generate("euler_a", eta=1.0), generate("euler_a"))
    torch.testing.assert_close(generate("euler_a", eta=0.0), generate("euler"), rtol=0, atol=1e-3)
    assert not torch.equal(generate("euler", s_churn=2.0), generate("euler"))
    assert torch.equal(generate("euler", s_churn=2.0, s_tmax=0.0), generate("euler"))
    assert torch.equal(generate("euler", s_churn=2.0, s_tmin=99.0), generate("euler"))
    for sampler, options in (("heun", {"s_churn": 2.0}), ("dpmpp_2m_sde", {}), ("lcm", {})):
        assert not torch.equal(
            generate(sampler, s_noise=0.5, **options), generate(sampler, **options)
        )


def test_cfg_pp_uses_the_negative_prompt_at_any_scale(generate):
    at_scale_1 = generate("euler_cfg_pp", scale=1)
    assert torch.equal(at_scale_1, generate("euler_cfg_pp", scale=None))
    assert not torch.allclose(at_scale_1, generate("euler", scale=1), atol=1e-3)
    assert not torch.equal(at_scale_1, generate("euler_cfg_pp", scale=1, negative_prompt="blurry"))


def test_given_sigmas_are_used(model):
    sigmas = model.schedule.get_step_sigmas(3, "karras").tolist()
    images = [
        run(model, ["a"], seeds=7, sampler="euler", **options)
        for options in (
            {"scheduler": "karras"}, {"sigmas": sigmas}, {"sigmas": torch.tensor(sigmas)}
        )
    ]  # fmt: skip
    assert torch.equal(images[0], images[1])
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=1e-3)


def test_the_penultimate_noise_level_is_skipped_for_the_samplers_of_a1111(model):
    def get_five_steps(sampler, **options):
        return get_sigmas(model, Quirks(), {"sampler": sampler, "steps": 5, **options})

    five, six = (model.schedule.get_step_sigmas(steps, "karras") for steps in (5, 6))
    without_penultimate = torch.cat([six[:-2], six[-1:]])
    assert torch.equal(get_five_steps("dpm2", scheduler="karras"), without_penultimate)
    assert torch.equal(get_five_steps("dpmpp_2m", scheduler="karras"), five)
    assert len(get_five_steps("dpm2_a", scheduler="uniform")) == 6


def test_plms_converges_for_v_prediction_except_with_legacy(model):
    """With many steps, PLMS and DDIM solve one ODE; the original's PLMS takes v for eps."""
    cond = model.condition({"txt": ["a"]})
    options = {"size": (64, 64), "scale": 1.0, "seeds": 3}
    exact = sample(model, cond, steps=40, sampler="ddim", **options)
    plms = sample(model, cond, steps=20, sampler="plms", **options)
    legacy = sample(model, cond, steps=20, sampler="plms", legacy={"plms-v"}, **options)
    assert (plms - exact).square().mean() < 0.02 * (legacy - exact).square().mean()


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_legacy_inversion_equals_the_recorded_one(parameterization):
    from diffusion.test_samplers import load_denoiser

    name = f"ddim_{parameterization}"
    golden, denoiser = load_golden(name), load_denoiser(name)
    shared = golden.select("shared/")
    model = LatentDiffusion(
        unet=denoiser.network,
        autoencoder=torch.nn.Identity(),
        conditioner=torch.nn.Identity(),
        schedule=denoiser.schedule,
        parameterization=parameterization,
    )
    cond, uncond = Cond(shared["c"]), Cond(shared["uc"])
    options = {"sigmas": denoiser.schedule.get_step_sigmas(10)[-7:], "legacy": {"encode"}}
    z = invert(model, shared["x0"], cond, **options)
    guided = invert(model, shared["x0"], cond, uncond, scale=2.0, **options)
    golden.assert_close("encode", z=z, z_cfg=guided)
