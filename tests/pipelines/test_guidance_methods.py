"""Guidance methods and FreeU as arguments of tasks: effects, combinations and errors."""

import dataclasses

import pytest
import torch

from goldfile import load_golden
from ldm.diffusion.names import FREEU_PRESETS
from ldm.loading.build import meta_device
from ldm.loading.config import read_yaml
from ldm.nets.unet import UNet
from ldm.pipelines import sample, txt2img
from ldm.pipelines.freeu import make_freeu, resolve_freeu_factors
from pipelines.goldmodels import StepRecorder, build_recorded_model, sample_latents
from quick import slow_except
from tinyupscaler import build_tiny_upscaler


@pytest.fixture(scope="module")
def model():
    return build_recorded_model(load_golden("e2e_txt2img"), "base_v")


@pytest.fixture(scope="module")
def sdxl():
    return build_recorded_model(load_golden("sdxl_e2e_txt2img"), "base")


METHODS = {
    "apg": {"apg": (0.2, 3, -0.5)},
    "perp_neg": {"perp_neg": 1.0, "negative_prompt": "a dog"},
    "pag": {"pag": 3.0},
    "pag at scale 1": {"pag": 3.0, "scale": 1.0},
    "pag and apg": {
        "pag": 2.0,
        "apg": (0, 3, -0.5),
        "guidance_rescale": 0.5,
        "guidance_interval": (0.3, 9),
    },
    "pag and sld": {"pag": 2.0, "sld": [1, 20, 0.1, 0.3, 0.4]},
    "freeu": {"freeu": "sdxl", "pag": 3.0},
    "freeu 2": {"freeu": "sdxl", "freeu_version": "2"},
}


@pytest.mark.parametrize("name", slow_except(METHODS, "apg", "perp_neg", "pag and sld", "freeu"))
def test_methods_act_on_each_sample_independently(model, name):
    """Kernels round differently in a batch: observed difference 2e-4."""
    options = {"sampler": "dpmpp_2m", **METHODS[name]}
    single, pair = (
        sample_latents(model, ["a cat", "a red apple"][:n], **options)[-1] for n in (1, 2)
    )
    torch.testing.assert_close(single, pair[:1], rtol=0, atol=3e-3)
    scale = options.get("scale", 5.0)
    plain = sample_latents(model, ["a cat"], sampler="dpmpp_2m", scale=scale)[-1]
    assert (plain - single).abs().max() > 0.02


@pytest.mark.parametrize(
    "options",
    slow_except([{"pag": 2.0, "apg": (0, 3, -0.5)}, {"freeu": "auto"}], {"freeu": "auto"}),
)
def test_methods_change_sdxl_with_a_refiner(sdxl, options):
    refiner = build_recorded_model(load_golden("sdxl_e2e_refine"), "refiner")
    latents = [
        sample_latents(sdxl, ["a cat"], refiner=refiner, refiner_strength=0.5, **changes)[-1]
        for changes in ({}, options)
    ]
    assert (latents[0] - latents[1]).abs().max() > 0.02


@torch.no_grad()
def test_the_empty_prompt_of_perp_neg_is_the_unconditional_one(model):
    """A negative prompt that equals the prompt has no perpendicular component."""
    recorders = StepRecorder(), StepRecorder()
    options = {"steps": 1, "size": (64, 64), "x_T": torch.ones(1, 4, 8, 8), "scale": 5.0}
    texts = {"negative_prompt": "a cat", "perp_neg": 1.0}
    txt2img(model, ["a cat"], callback=recorders[0], **texts, **options)
    cond, uncond = (model.condition({"txt": [text]}) for text in ("a cat", ""))
    sample(model, cond, uncond, callback=recorders[1], **options)
    torch.testing.assert_close(*(r.denoised for r in recorders), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pag": 0.0}, "pag must be above 0, got 0"),
        ({"pag": float("nan")}, "pag must be a finite number, got nan"),
        ({"perp_neg": -1.0, "negative_prompt": "a dog"}, "perp_neg must be above 0"),
        ({"perp_neg": 1.0}, "perp_neg needs a negative prompt"),
        ({"perp_neg": 1.0, "negative_prompt": [""]}, "perp_neg needs a negative prompt"),
        ({"perp_neg": 1.0, "apg": (0, 3, 0)}, "apg and perp_neg are both guidance"),
        ({"apg": (0, 3, 0), "scale": 1.0}, "apg needs a guidance scale other than 1"),
        ({"apg": (0, 3, 0), "sampler": "euler_cfg_pp", "scale": None},
         "apg needs a guidance scale"),
        ({"apg": (0, 3)}, "apg takes 3 numbers"),
        ({"apg": (0, -3, 0)}, "norm not negative"),
        ({"freeu": True}, "freeu must be a text or a list .*, got True"),
        ({"freeu": "sd3"}, "unknown preset of freeu `sd3`"),
        ({"freeu": "sd1", "freeu_version": "3"}, "unknown version of freeu `3`"),
        ({"freeu_version": "2"}, "freeu_version needs freeu"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused_before_a_network_runs(model, options, message, monkeypatch):
    monkeypatch.setattr(model.conditioner, "forward", None)
    with pytest.raises(ValueError, match=message):
        sample_latents(model, ["a cat"], **options)


def test_methods_that_a_model_does_not_support_are_refused(sdxl, model):
    with pytest.raises(ValueError, match="which `ignore-negative` ignores"):
        sample_latents(sdxl, ["a"], perp_neg=1.0, negative_prompt="b", legacy=["ignore-negative"])
    unet = model.unet
    try:
        params = dataclasses.asdict(unet)
        model.unet = UNet(**{**params, "transformer_depth_middle": 0}).eval()
        with pytest.raises(ValueError, match="pag needs self-attention in the middle block"):
            sample_latents(model, ["a cat"], pag=3.0)
        params |= {"channel_mult": [1, 1], "attention_resolutions": [1], "num_res_blocks": 1}
        model.unet = UNet(**params).eval()
        with pytest.raises(ValueError, match=r"freeu has no effect .* \[32\] channels: it changes"):
            sample_latents(model, ["a cat"], freeu="auto")
    finally:
        model.unet = unet
    with pytest.raises(ValueError, match="freeu is not for the x2 latent upscaler"):
        make_freeu(build_tiny_upscaler(), "auto")


def test_an_interval_outside_the_noise_levels_is_warned_of(model):
    with pytest.warns(UserWarning, match="pag had no effect: there was no guidance at any noise"):
        sample_latents(model, ["a cat"], pag=3.0, guidance_interval=(900, 901))


CONFIGS = {"sd1": "stable-diffusion/v1-inference", "sd2": "stable-diffusion/v2-inference",
           "sdxl": "stable-diffusion-xl/sd_xl_base"}  # fmt: skip
# Factors of the output blocks: 1 = b1 and s1, 2 = b2 and s2, 0 = none.
BLOCK_FACTORS = {
    ("sd1", "1"): "111111122200", ("sd2", "2"): "111111122200", ("sdxl", "1"): "111122200",
    ("sd1", "diffusers"): "111222000000", ("sdxl", "diffusers"): "111222000",
}  # fmt: skip


@pytest.mark.parametrize(("family", "version"), BLOCK_FACTORS)
def test_freeu_selects_blocks_by_channels_but_version_diffusers_by_level(
    model, sdxl, family, version, monkeypatch
):
    params = read_yaml(f"configs/{CONFIGS[family]}.yaml")["model"]["params"]
    config = (params.get("unet_config") or params["network_config"])["params"]
    with meta_device():
        unet = UNet(**{k: v for k, v in config.items() if k not in UNet.IGNORED_PARAMS})
    owner = sdxl if family == "sdxl" else model
    monkeypatch.setitem(owner._modules, "unet", unet)
    factors = FREEU_PRESETS[family]
    digits = {(factors.b1, factors.s1): "1", (factors.b2, factors.s2): "2", None: "0"}
    freeu = make_freeu(owner, family, version)
    assert "".join(digits[pair] for pair in freeu.factors) == BLOCK_FACTORS[family, version]
    assert resolve_freeu_factors(sdxl, "auto") == FREEU_PRESETS["sdxl"]
