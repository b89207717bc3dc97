"""SDXL, compared with images of generative-models and diffusers on the same tiny models.

Pixels differ by at most 1, latents by 1e-4 of the largest value (observed: 1.8e-5).
"""

import copy
import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from goldfile import GoldenFile, load_golden
from ldm.conditioning import Cond
from ldm.loading.variants import VARIANTS
from ldm.model import LatentDiffusion
from ldm.pipelines import img2img, sample, txt2img
from pipelines.goldmodels import StepRecorder, assert_images_close, build_recorded_model
from quick import slow_except

SAMPLERS_BY_CLASS = {
    "EulerEDMSampler": "euler",
    "HeunEDMSampler": "heun",
    "EulerAncestralSampler": "euler_a",
    "DPMPP2MSampler": "dpmpp_2m",
}
DEMO_QUIRKS = {"noise", "nearest-sigma", "legacy-steps", "unused-draws"}
SIZE_KEYS = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
BLACK = torch.zeros(1, 3, 64, 128)


@functools.cache
def load_model(name: str) -> LatentDiffusion:
    """Build `base`, `refiner` or `base_v`, a v-prediction model with the weights of the base."""
    if name == "base_v":
        base_v = copy.copy(load_model("base"))
        base_v.parameterization = "v"
        return base_v
    with torch.random.fork_rng():  # the recorder built its model before it set the seed
        return build_recorded_model(load_golden("sdxl_e2e_txt2img"), name)


def assert_latents_close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def assert_close(golden: GoldenFile, case: str, images: Tensor, recorder: StepRecorder) -> None:
    assert_images_close(images, golden.outputs(case)["images"].movedim(1, -1))
    assert_latents_close(recorder.xs[-1], golden.outputs(case)["z"])


def make_options(info: dict) -> dict:
    return {
        "negative_prompt": info["negative_prompt"],
        "steps": info["steps"],
        "scale": info["guidance"],
        "sampler": SAMPLERS_BY_CLASS[info["sampler"]],
    }


# The slow cases test little that the others and the golden files of samplers do not.
TXT2IMG = slow_except(
    ["euler_negative", "heun_edm_sizes", "v_model", "euler", "dpmpp2m", "euler_a"],
    "euler_negative", "heun_edm_sizes", "v_model",
)  # fmt: skip
IMG2IMG = slow_except(
    ["base_s075", "base_s1", "base_s0", "refiner_s05", "base_s03_dpmpp2m", "base_euler_a",
     "base_offset_noise", "v_s06"],
    "base_s075", "base_s1", "base_s0", "refiner_s05",
)  # fmt: skip


@pytest.mark.parametrize("case", TXT2IMG)
def test_txt2img_equals_the_original(case: str) -> None:
    golden, recorder = load_golden("sdxl_e2e_txt2img"), StepRecorder()
    info = golden.case(case)["info"]
    options = make_options(info)
    if info["values"]:
        options |= {"original_size": (384, 512), "crop": (32, 16), "target_size": (768, 1024)}
    if "disc" in info["sampler_params"]:
        options["scheduler"] = "edm"
    torch.manual_seed(info["seed_before"])
    images = txt2img(
        load_model(info["model"]),
        [info["prompt"]] * info["num_samples"],
        size=(64, 128),
        legacy=DEMO_QUIRKS | ({"ignore-negative"} if info["force_uc_zero_embeddings"] else set()),
        callback=recorder,
        **options,
    )
    assert_close(golden, case, images, recorder)


def test_the_refiner_alone_equals_the_original() -> None:
    golden, recorder = load_golden("sdxl_e2e_txt2img"), StepRecorder()
    info = golden.case("refiner_alone")["info"]
    torch.manual_seed(info["seed_before"])
    images = img2img(
        load_model("refiner"), [info["prompt"]], BLACK, z=torch.zeros(1, 4, 8, 16), strength=1,
        legacy={"noise", "nearest-sigma"}, callback=recorder, **make_options(info),
    )  # fmt: skip
    assert_close(golden, "refiner_alone", images, recorder)


def test_turbo_equals_the_original() -> None:
    golden = load_golden("sdxl_e2e_txt2img")
    info = golden.case("turbo")["info"]
    seeds = itertools.count(info["seed"])

    def noise(like: Tensor) -> Tensor:
        return torch.from_numpy(np.random.RandomState(next(seeds)).randn(*like.shape)).float()

    images = txt2img(
        load_model("base"), [info["prompt"]], size=(64, 128), steps=2, sampler="euler_a", scale=1,
        scheduler="turbo", seeds=noise,
    )  # fmt: skip
    assert_images_close(images, golden.outputs("turbo")["images_nhwc"])


@pytest.mark.parametrize("case", IMG2IMG)
def test_img2img_equals_the_original(case: str) -> None:
    golden, recorder = load_golden("sdxl_e2e_img2img"), StepRecorder()
    info = golden.case(case)["info"]
    options = make_options(info)
    legacy = DEMO_QUIRKS | ({"ignore-negative"} if info["force_uc_zero_embeddings"] else set())
    if info["kwargs"]:
        posterior, noise, offset = golden.draws(case)
        draws = iter([posterior])
        options["seeds"] = lambda like: next(draws)
        options["x_T"] = noise + 0.1 * offset.reshape(-1, 1, 1, 1)
    torch.manual_seed(info["seed_before"])
    images = img2img(
        load_model(info["model"]),
        [info["prompt"]] * info["num_samples"],
        golden.select("shared/")["image"],
        strength=info["strength"],
        legacy=legacy,
        callback=recorder,
        **options,
    )
    if recorder.xs:
        assert_close(golden, case, images, recorder)
    else:
        assert_images_close(images, golden.outputs(case)["images"].movedim(1, -1))


@pytest.mark.parametrize("case", ["finish_euler", "finish_dpmpp2m", "img2img_finish"])
def test_a_refiner_continues_at_the_noise_level_of_the_base(case: str) -> None:
    golden, recorder = load_golden("sdxl_e2e_refine"), StepRecorder()
    info = golden.case(case)["info"]
    options = {
        **make_options(info), "refiner": load_model("refiner"),
        "refiner_strength": info["strength"], "callback": recorder,
        "legacy": DEMO_QUIRKS | {"ignore-negative", "refiner-empty-negative"},
    }  # fmt: skip
    prompts = [info["prompt"]] * info["num_samples"]
    torch.manual_seed(info["seed_before"])
    if info["img2img_strength"] is None:
        images = txt2img(load_model("base"), prompts, size=(64, 128), **options)
    else:
        image, strength = golden.select("shared/")["image"], info["img2img_strength"]
        images = img2img(load_model("base"), prompts, image, strength=strength, **options)
    assert_close(golden, case, images, recorder)
    base_steps = len(golden.outputs(case)["sigmas_base"]) - 1
    assert_latents_close(recorder.xs[base_steps - 1], golden.outputs(case)["z_base"])


def make_conditions(model: LatentDiffusion, prompt: str) -> tuple[Cond, Cond]:
    """Make the conditions of a prompt and of the empty prompt, for 64 x 128 pixels."""
    sizes = [[(64, 128)], [(0, 0)], [(64, 128)]]
    batch = dict(zip(SIZE_KEYS, sizes, strict=True))
    null = model.conditioner.text.null
    return (
        model.condition({"txt": [prompt], "aesthetic_score": [[6.0]], **batch}),
        model.condition({"txt": [null], "aesthetic_score": [[2.5]], **batch}),
    )


@pytest.mark.parametrize("case", ["finish_euler_a", "finish_other_steps"])
def test_base_and_refiner_may_sample_differently(case: str) -> None:
    """The original passes x on unchanged, even if the refiner starts at another noise level."""
    golden = load_golden("sdxl_e2e_refine")
    info, base, refiner = golden.case(case)["info"], load_model("base"), load_model("refiner")
    draws = iter(golden.draws(case))
    sigmas = base.schedule.get_step_sigmas(info["steps"], "sgm_uniform")
    end_step = len(golden.outputs(case)["sigmas_base"]) - 1
    options = {
        "scale": info["guidance"],
        "legacy": DEMO_QUIRKS,
        "noise_source": lambda like: next(draws),
    }
    z_t = sample(
        base, *make_conditions(base, info["prompt"]), size=(64, 128), sigmas=sigmas,
        end_step=end_step, sampler=SAMPLERS_BY_CLASS[info["sampler"]], **options,
    )  # fmt: skip
    std = float(1 + sigmas[end_step] ** 2) ** 0.5
    assert_latents_close(z_t * std, golden.outputs(case)["z_base"])
    sigmas = refiner.schedule.get_step_sigmas(info["refiner_steps"], "sgm_uniform")
    sigmas = sigmas[-len(golden.outputs(case)["sigmas_refiner"]) :]
    z = sample(
        refiner, *make_conditions(refiner, info["prompt"]), sigmas=sigmas,
        z_t=z_t * std / float(1 + sigmas[0] ** 2) ** 0.5,
        sampler=SAMPLERS_BY_CLASS[info["refiner_sampler"]], **options,
    )  # fmt: skip
    assert_latents_close(z, golden.outputs(case)["z"])


def test_a_refiner_after_all_steps_of_the_base_is_img2img() -> None:
    golden, base_recorder, recorder = load_golden("sdxl_e2e_refine"), StepRecorder(), StepRecorder()
    info = golden.case("renoise_euler")["info"]
    options = {**make_options(info), "legacy": DEMO_QUIRKS}
    torch.manual_seed(info["seed_before"])
    txt2img(load_model("base"), [info["prompt"]], size=(64, 128), callback=base_recorder, **options)
    images = img2img(
        load_model("refiner"), [info["prompt"]], BLACK, z=base_recorder.xs[-1],
        strength=info["strength"], callback=recorder, **options,
    )  # fmt: skip
    assert_close(golden, "renoise_euler", images, recorder)


def test_the_refiner_of_the_api_starts_from_full_noise() -> None:
    golden, recorder = load_golden("sdxl_e2e_refine"), StepRecorder()
    info, refiner = golden.case("api_refiner")["info"], load_model("refiner")
    torch.manual_seed(info["seed_before"])
    images = img2img(
        refiner, [golden.case("finish_euler")["info"]["prompt"]], BLACK,
        z=golden.inputs("api_refiner")["z0"], strength=0.3, steps=info["steps"], sampler="euler",
        scale=2.5, negative_prompt=info["negative_prompt"], callback=recorder,
        legacy=DEMO_QUIRKS | {"refiner-from-noise"},
    )  # fmt: skip
    assert_close(golden, "api_refiner", images, recorder)


def test_a_refiner_samples_with_the_defaults_of_the_base(monkeypatch) -> None:
    """As the commands do, which record one sampler, eta and scale."""
    base, defaults = load_model("base"), replace(VARIANTS["turbo"].defaults, eta=0.5)
    monkeypatch.setattr(base, "defaults", defaults)
    options = {"refiner": load_model("refiner"), "refiner_strength": 0.5, "steps": 4, "seeds": 1}
    image, expected = (
        txt2img(base, ["a cat"], size=(64, 64), **options, **sampling)
        for sampling in ({}, {"sampler": "euler_a", "eta": 0.5, "scale": 1.0})
    )
    assert torch.equal(image, expected)


def test_safe_latent_diffusion_continues_its_warmup_in_the_refiner() -> None:
    def run(sld: list[float] | None) -> Tensor:
        return txt2img(
            load_model("base"), ["a cat"], refiner=load_model("refiner"), refiner_strength=0.5,
            steps=4, scale=5.0, seeds=1, sampler="euler", size=(64, 64), sld=sld,
        )  # fmt: skip

    plain = run(None)
    assert (plain - run([3, 20, 0.1, 0.3, 0.4])).abs().max() > 1e-3
    with pytest.warns(UserWarning, match="not below the 4 evaluations"):
        torch.testing.assert_close(plain, run([4, 20, 0.1, 0.3, 0.4]), rtol=0, atol=1e-4)
