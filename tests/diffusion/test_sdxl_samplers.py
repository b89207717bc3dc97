"""Samplers against recorded trajectories of SDXL's code, with each call of the denoiser."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from goldfile import GoldenFile, load_golden
from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import add_guidance
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import ContinuousSchedule, Schedule, make_betas
from ldm.nets.unet import UNet
from ldm.train.config.sgm import SAMPLER_NAMES
from nets.nethelp import build_golden_network
from quick import slow_except

CASES = [
    "euler", "euler_edm_disc", "euler_identity", "euler_default_guider", "euler_uc_none",
    "euler_scale1", "euler_scale0", "euler_churn", "euler_churn_max", "euler_v", "euler_edm_model",
    "euler_steps_at_call", "heun", "heun_churn", "heun_edm_disc", "heun_1step", "euler_a",
    "euler_a_eta05", "euler_a_eta2", "dpmpp2s_a", "dpmpp2s_a_eta05", "dpmpp2m", "dpmpp2m_edm_disc",
    "dpmpp2m_v", "dpmpp2m_1step", "dpmpp2m_2steps", "lms", "lms_order2", "lms_order1", "lms_2steps",
]  # fmt: skip
QUICK_CASES = (
    "euler", "euler_uc_none", "euler_churn", "euler_edm_model", "heun_edm_disc", "heun_1step",
    "euler_a_eta05", "dpmpp2s_a_eta05", "dpmpp2m_v", "dpmpp2m_2steps", "lms", "lms_2steps",
)  # fmt: skip
SCHEDULE = Schedule(make_betas("linear", 1000, linear_start=0.00085, linear_end=0.012))


@functools.cache
def load_golden_and_unet() -> tuple[GoldenFile, UNet]:
    golden = load_golden("sdxl_samplers")
    unet = build_golden_network(golden, UNet, golden.meta["config_network"])
    return golden, unet.requires_grad_(False)


def make_denoiser(name: str) -> Denoiser:
    network = load_golden_and_unet()[1]
    if name == "edm":
        return Denoiser(network, ContinuousSchedule(), "edm")
    return Denoiser(
        network, SCHEDULE, {"EpsScaling": "eps", "VScaling": "v"}[name], quantize_sigma=True
    )


def read_conditions(golden: GoldenFile) -> tuple[Cond, Cond]:
    shared = golden.select("shared/")
    cond, uncond = ((shared[f"{c}_crossattn"], shared[f"{c}_vector"]) for c in ("c", "uc"))
    return Cond(cond[0], vector=cond[1]), Cond(uncond[0], vector=uncond[1])


def get_class_name(config: dict) -> str:
    return config["target"].rpartition(".")[2]


@pytest.mark.parametrize("name", slow_except(CASES, *QUICK_CASES))
def test_each_call_of_the_denoiser_and_the_result_equal_the_recorded_ones(name: str) -> None:
    golden, _ = load_golden_and_unet()
    info, draws = golden.info(name), iter(golden.draws(name))
    steps = info["num_steps"] or info["num_steps_at_call"]
    denoiser = make_denoiser(info["denoiser"])
    is_edm = get_class_name(info["discretization"]) == "EDMDiscretization"
    scheduler = "edm" if "params" in info["discretization"] else "karras"
    sigmas = denoiser.schedule.get_step_sigmas(steps, scheduler if is_edm else "sgm_uniform")
    cond, uncond = read_conditions(golden)
    guider = info["guider"] or {}
    scale = guider.get("params", {}).get("scale", 1.0)
    options = dict(info["params"])
    s_noise = options.pop("s_noise", 1.0)
    if golden.draws(name):
        options["noise_source"] = lambda like: s_noise * next(draws)
    calls: list[tuple[Tensor, float, Tensor]] = []
    guided = add_guidance(denoiser, cond, uncond if info["uc"] else None, scale)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        calls.append((x, sigma, guided(x, sigma)))
        return calls[-1][2]

    initial_x = golden.select("shared/")["noise"] * (1 + float(sigmas[0]) ** 2) ** 0.5
    sampler = SAMPLERS[SAMPLER_NAMES[get_class_name({"target": info["sampler"]})]]
    x = sampler(denoise, initial_x, sigmas, **options)
    xs, sigmas_in, denoised = zip(*calls, strict=True)
    sigmas_in = torch.tensor(sigmas_in, dtype=torch.float64)
    expected = golden.outputs(name)["sigma_in"][:, 0].double()
    torch.testing.assert_close(sigmas_in, expected, rtol=1e-5, atol=0)
    golden.assert_close(name, x_in=torch.stack(xs), denoised=torch.stack(denoised), x=x)
    assert next(draws, None) is None


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo_sampling_equals_the_recorded_one(steps: int) -> None:
    golden, _ = load_golden_and_unet()
    name = f"turbo_{steps}"
    seed = golden.info(name)["seed"]
    shape = (1, 4, 8, 8)
    arrays = (np.random.RandomState(seed + k).randn(*shape) for k in range(9))
    noise = (torch.from_numpy(array).float() for array in arrays)
    denoiser = make_denoiser("EpsScaling")
    cond, _ = read_conditions(golden)
    sigmas = SCHEDULE.get_step_sigmas(steps, "turbo")
    initial_x = next(noise) * (1 + float(sigmas[0]) ** 2) ** 0.5
    x = SAMPLERS["euler_a"](
        add_guidance(denoiser, cond[:1]), initial_x, sigmas, noise_source=lambda like: next(noise)
    )
    golden.assert_close(name, x=x)
