"""Samplers against recorded trajectories, k-diffusion, diffusers, theory, and each other."""

import functools
import math
import sys

import pytest
import torch
from torch import Tensor

from goldfile import GoldenFile, load_golden
from ldm.conditioning import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import add_guidance
from ldm.diffusion.names import SAMPLERS as SAMPLER_SPECS
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.samplers.multistep import dpmpp_2m, plms
from ldm.diffusion.samplers.sde import dpmpp_2m_sde
from ldm.diffusion.samplers.single_step import ddim, euler
from ldm.diffusion.schedule import Schedule, make_betas
from ldm.nets.unet import UNet
from ldm.pipelines.quirks import Quirks
from nets.nethelp import build_golden_network
from quick import slow_except

RECORDED_DDIM = [
    "eta0_cfg1", "eta0_cfg", "eta1_cfg1", "eta1_cfg", "eta_half_noxT", "scale0", "scale_uc_none",
    "mask_x0", "ucg_schedule", "longer",
]  # fmt: skip
RECORDED_DPM = ["S5_cfg", "S10_cfg", "S15_cfg", "S20_cfg", "S6_cfg1", "S2"]
RECORDED_PLMS = ["cfg1", "cfg", "longer", "two_steps", "mask"]

STOCHASTIC = {name for name, sampler in SAMPLER_SPECS.items() if sampler.takes_noise}
PARAMETERIZATIONS = pytest.mark.parametrize("parameterization", ["eps", "v"])


@functools.cache
def load_denoiser(name: str, parameterization: str | None = None) -> Denoiser:
    golden = load_golden(name)
    params = golden.meta["config"]["params"]
    unet = build_golden_network(golden, UNet, params["unet_config"], "model.diffusion_model.")
    options = {key: params[key] for key in ("linear_start", "linear_end")}
    betas = make_betas("linear", 1000, **options)
    parameterization = parameterization or params["parameterization"]
    return Denoiser(unet.requires_grad_(False), Schedule(betas), parameterization)


LEGACY_STEPS = Quirks(frozenset({"steps"}))


def replay(golden: GoldenFile, name: str, sampler, denoiser: Denoiser, scheduler: str = "uniform"):
    """Replay a recorded case; return its outputs, with x scaled to z_t, the initial one first."""
    info = golden.info(name)
    kwargs, shared = info["kwargs"], golden.select("shared/")
    draws = sorted(golden.select(f"{name}/rng/").items())
    inpainting_noise = iter([value for key, value in draws if key.endswith("randn_like")])
    step_noise = iter([value for key, value in draws if key.endswith("randn")])
    x_T = shared["x_T"] if "x_T" in kwargs else next(step_noise)
    sigmas = LEGACY_STEPS.get_sigmas(denoiser.schedule, info["S"], scheduler)
    stds = [math.sqrt(1 + sigma**2) for sigma in sigmas.tolist()]  # of x

    def constrain(x: Tensor, sigma: float) -> Tensor:
        known = shared["x0"] + sigma * next(inpainting_noise)
        return known * shared["mask"] + x * (1 - shared["mask"])

    scale = kwargs.get("unconditional_guidance_scale", 1.0)
    if "ucg_schedule" in kwargs:
        scales = dict(zip(sigmas.tolist(), kwargs["ucg_schedule"], strict=False))
        scale = scales.__getitem__
    uncond = Cond(shared["uc"]) if "unconditional_conditioning" in kwargs else None
    trajectory = [(x_T, x_T)]
    options = {"callback": lambda i, x, denoised: trajectory.append((x / stds[i + 1], denoised))}
    if sampler is ddim:
        options |= {"eta": kwargs["eta"], "noise_source": lambda like: next(step_noise)}
    if "mask" in kwargs:
        options |= {"constrain": constrain}
    denoise = add_guidance(denoiser, Cond(shared["c"]), uncond, scale)
    x = sampler(denoise, x_T * stds[0], sigmas, **options)
    xs, denoised = map(torch.stack, zip(*trajectory, strict=True))
    return {"samples": x / stds[-1], "x_inter": xs, "pred_x0": denoised}


@PARAMETERIZATIONS
@pytest.mark.parametrize("name", slow_except(RECORDED_DDIM, *(set(RECORDED_DDIM) - {"longer"})))
def test_ddim_follows_the_recorded_trajectory(parameterization, name):
    golden_name = f"ddim_{parameterization}"
    golden, denoiser = load_golden(golden_name), load_denoiser(golden_name)
    golden.assert_close(name, **replay(golden, name, ddim, denoiser))


@PARAMETERIZATIONS
@pytest.mark.parametrize("steps", slow_except([8, 5, 1], 5, 1))
def test_ddim_decodes_from_an_intermediate_step_as_recorded(parameterization, steps):
    golden = load_golden(f"ddim_{parameterization}")
    name = f"img2img_tenc{steps}"
    denoiser, shared = load_denoiser(f"ddim_{parameterization}"), golden.select("shared/")
    sigmas = denoiser.schedule.get_step_sigmas(10)[-steps - 1 :]
    x = golden.outputs(name)["z_enc"] * (1 + sigmas[0] ** 2).sqrt().float()
    for output, uncond, scale in (("decoded_cfg1", None, 1.0), ("decoded_cfg", shared["uc"], 7.5)):
        conds = Cond(shared["c"]), None if uncond is None else Cond(uncond)
        decoded = ddim(add_guidance(denoiser, *conds, scale), x, sigmas)
        golden.assert_close(name, **{output: decoded / (1 + sigmas[-1] ** 2).sqrt().float()})


@PARAMETERIZATIONS
@pytest.mark.parametrize("name", slow_except(RECORDED_PLMS, "cfg", "two_steps", "mask"))
def test_plms_follows_the_recorded_trajectory(parameterization, name):
    golden_name = f"plms_{parameterization}"
    golden, denoiser = load_golden(golden_name), load_denoiser(golden_name, "eps")
    golden.assert_close(name, **replay(golden, name, plms, denoiser))


@PARAMETERIZATIONS
@pytest.mark.parametrize("name", slow_except(RECORDED_DPM, "S15_cfg", "S6_cfg1", "S2"))
def test_dpm_gives_the_recorded_samples_at_the_recorded_times(parameterization, name):
    golden = load_golden(f"dpm_{parameterization}")
    denoiser = load_denoiser(f"dpm_{parameterization}")
    outputs = replay(golden, name, dpmpp_2m, denoiser, scheduler="time_uniform")
    golden.assert_close(name, samples=outputs["samples"])
    steps = golden.info(name)["S"]
    t = denoiser.schedule.sigma_to_t(denoiser.schedule.get_step_sigmas(steps, "time_uniform")[:-1])
    torch.testing.assert_close(t, golden.outputs(name)["model_times"].double(), rtol=0, atol=1e-3)


SIGMAS = torch.logspace(1, -1.3, 201, dtype=torch.float64)


def denoise_gaussian(x: Tensor, sigma: float) -> Tensor:
    """The ideal denoiser of data ~ N(0, 1)."""
    return x / (1 + sigma**2)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde", "restart"])
def test_stochastic_samplers_keep_the_distribution(name):
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    x = noise(torch.empty(20000, 1, 1, 1, dtype=torch.float64)) * math.sqrt(101)
    options = {"eta": 1.0} if name == "ddim" else {}
    x = SAMPLERS[name](denoise_gaussian, x, SIGMAS, noise_source=noise, **options)
    expected = math.sqrt(1 + float(SIGMAS[-1]) ** 2)
    assert float(x.std()) == pytest.approx(expected, rel=0.03)  # first order, 200 steps


def test_ddim_without_noise_is_euler():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    samples = (sampler(denoise_gaussian, x, SIGMAS) for sampler in (ddim, euler))
    torch.testing.assert_close(*samples)


def test_dpmpp_2m_sde_without_noise_is_dpmpp_2m():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    sigmas = torch.cat([SIGMAS, torch.zeros(1)])
    expected = dpmpp_2m(denoise_gaussian, x, sigmas)
    torch.testing.assert_close(dpmpp_2m_sde(denoise_gaussian, x, sigmas, eta=0.0), expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_last_step_to_zero_gives_the_last_denoised(name):
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    calls = []
    x = torch.ones(1, 1, 1, 1)
    options = {"noise_source": torch.zeros_like} if name in STOCHASTIC else {}
    options |= {"callback": lambda *arguments: calls.append(arguments)}
    sample = SAMPLERS[name](denoise_gaussian, x, sigmas, **options)
    assert [i for i, _, _ in calls] == [0, 1, 2]
    assert sample.isfinite().all()
    if name not in ("plms", "lms", "dpm_fast", "dpm_adaptive"):
        _, _, denoised = calls[-1]
        torch.testing.assert_close(sample, denoised)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_step_to_zero_gives_the_denoised(name):
    sigmas, x = torch.tensor([10.0, 0.0], dtype=torch.float64), torch.ones(1, 1, 1, 1)
    steps = []
    sample = SAMPLERS[name](denoise_gaussian, x, sigmas, callback=lambda i, *_: steps.append(i))
    torch.testing.assert_close(sample, denoise_gaussian(x, 10.0))
    assert steps == [0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_without_steps_returns_x(name):
    """As with a strength of 0, or a refiner that starts before the first or after the last step."""
    x = torch.ones(1, 1, 1, 1)
    for sigma in (10.0, 0.0):
        sigmas = torch.tensor([sigma], dtype=torch.float64)
        assert torch.equal(SAMPLERS[name](denoise_gaussian, x, sigmas), x)


# Results of k-diffusion 0.1.1 from x = 9 with D(x, sigma) = tanh(x / (1 + sigma)), all noise 0.3.
K_DIFFUSION = [
    ("dpm2", {}, 0.4776607833330908),
    ("dpm2", {"s_churn": 2.0}, 0.5013168868396733),
    ("dpm2_a", {"eta": 1.0}, 0.3180574628788474),
    ("dpm2_a", {"eta": 0.5}, 0.5369466470017958),
    ("dpmpp_sde", {"eta": 1.0}, 0.4195202160212129),
    ("dpmpp_sde", {"eta": 0.5}, 0.6006162370371476),
    ("dpmpp_3m_sde", {"eta": 1.0}, 0.38302329131876917),
    ("dpmpp_3m_sde", {"eta": 0.5}, 0.4559013212002897),
    ("dpmpp_2m_sde_heun", {"eta": 1.0}, 0.36669820927255464),
    ("dpmpp_2m_sde_heun", {"eta": 0.5}, 0.4834600985378635),
]


def saturating_denoise(x: Tensor, sigma: float) -> Tensor:
    return torch.tanh(x / (1 + sigma))


@pytest.mark.parametrize(("name", "options", "expected"), K_DIFFUSION)
def test_samplers_of_k_diffusion_give_its_numbers(name, options, expected):
    sigmas = torch.tensor([14.0, 6.0, 2.5, 1.0, 0.3, 0.05], dtype=torch.float64)
    noise = functools.partial(torch.full_like, fill_value=0.3) if options else None
    x = torch.full((1, 1), 9.0, dtype=torch.float64)
    x = SAMPLERS[name](saturating_denoise, x, sigmas, noise_source=noise, **options)
    assert float(x) == pytest.approx(expected, rel=1e-12)  # observed: 4e-16


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012))


def run_scheduler(scheduler, initial_x: Tensor, sigmas: Tensor, **options) -> Tensor:
    """Run all steps of a diffusers scheduler from `initial_x`; return the final z_t."""
    z = initial_x / math.sqrt(1 + float(sigmas[0]) ** 2)
    for t, sigma in zip(scheduler.timesteps, sigmas.tolist(), strict=False):
        x = z * math.sqrt(1 + sigma**2)
        eps = (x - saturating_denoise(x, sigma)) / sigma
        z = scheduler.step(eps, t, z, **options).prev_sample
    return z


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", ["deis", "unipc"])
def test_unipc_and_deis_give_the_numbers_of_diffusers(diffusers, name, steps, order):
    """Observed: 2.5e-7 for UniPC, 6.8e-6 for DEIS of order 3; diffusers computes in float32."""
    options = {**BETAS, "solver_order": order, "timestep_spacing": "linspace"}
    if name == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(**options, final_sigmas_type="zero")
    else:
        scheduler = diffusers.DEISMultistepScheduler(**options)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    initial_x = torch.linspace(-2, 2, 5).view(1, 1, 1, 5) * sigmas[0].float()
    expected = run_scheduler(scheduler, initial_x, sigmas) * math.sqrt(1 + float(sigmas[-1]) ** 2)
    if sigmas[-1] == sigmas[-2]:  # DEIS of diffusers ends at the lowest sigma, not at 0
        sigmas = sigmas[:-1]
    ours = SAMPLERS[name](saturating_denoise, initial_x.double(), sigmas, order=order)
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("name", "evaluations", "eta", "expected"),
    [
        ("dpm_fast", 12, 0.0, 0.5006263557468443),
        ("dpm_fast", 12, 1.0, 0.37485349554618624),
        ("dpm_fast", 13, 0.0, 0.502741404470676),
        ("dpm_fast", 14, 0.0, 0.4883846811918469),
        ("dpm_adaptive", 20, 0.0, 0.48678143092454773),
        ("dpm_adaptive", 20, 1.0, 0.38754853616437746),
    ],
)
def test_dpm_solver_gives_the_numbers_of_k_diffusion(name, evaluations, eta, expected):
    sigmas = torch.linspace(14, 0.05, evaluations + 1, dtype=torch.float64)
    noise = functools.partial(torch.full_like, fill_value=0.3) if eta else None
    x, calls = torch.full((1, 1), 9.0, dtype=torch.float64), []
    options = {"eta": eta, "noise_source": noise, "callback": lambda i, *_: calls.append(i)}
    x = SAMPLERS[name](saturating_denoise, x, sigmas, **options)
    # Observed: 1e-15; 2e-13 for the adaptive one, whose steps magnify rounding.
    assert float(x) == pytest.approx(expected, rel=1e-11)
    assert calls == list(range(evaluations))


@pytest.mark.parametrize(
    ("steps", "restart_steps", "restarts"), [(10, 0, 0), (20, 9, 1), (40, 10, 2)]
)
def test_restart_repeats_steps_from_a_higher_sigma(steps, restart_steps, restarts):
    sigmas, evaluated, callbacks = SCHEDULE.get_step_sigmas(steps, "karras"), [], []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        evaluated.append(sigma)
        return torch.zeros_like(x)

    x = torch.ones(1, dtype=torch.float64) * sigmas[0]
    options = {"callback": lambda i, *_: callbacks.append(i), "noise_source": torch.zeros_like}
    SAMPLERS["restart"](denoise, x, sigmas, **options)
    assert callbacks == list(range(steps))
    used = torch.tensor(evaluated[::2])  # Heun's method evaluates at both ends of a step
    raised = [i for i in range(1, len(used)) if used[i] > used[i - 1]]
    assert len(raised) == restarts
    if not restarts:
        assert torch.equal(used, sigmas[:-1].float())
        return
    base = SCHEDULE.get_step_sigmas(steps - restart_steps * restarts, "karras")
    low, high = (base[(base - sigma).abs().argmin()] ** (1 / 7) for sigma in (0.1, 2.0))
    expected = torch.linspace(high, low, restart_steps + 1, dtype=torch.float64)[:-1] ** 7
    for i in raised:
        repeated = used[i : i + restart_steps].double()
        torch.testing.assert_close(repeated, expected, rtol=1e-6, atol=0)
    others = torch.cat([used[: raised[0]], used[raised[-1] + restart_steps :]]).double()
    torch.testing.assert_close(others, base[:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cfg_pp_steps_along_the_unconditional_denoised(eta):
    sigmas = torch.tensor([14.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    name = "euler_a_cfg_pp" if eta else "euler_cfg_pp"
    options = {"noise_source": torch.ones_like} if eta else {}
    initial_x = torch.full((1,), 9.0, dtype=torch.float64)
    x = SAMPLERS[name](
        lambda x, sigma: x / 2,
        initial_x,
        sigmas,
        get_uncond_denoised=lambda: torch.ones(1),
        **options,
    )
    expected = 9.0
    for sigma, sigma_next in ((14.0, 2.0), (2.0, 0.5), (0.5, 0.0)):
        up = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        down = math.sqrt(sigma_next**2 - up**2)
        expected = expected / 2 + (expected - 1) / sigma * down + up
    assert float(x) == pytest.approx(expected, rel=1e-12)
    plain = SAMPLERS["euler_a" if eta else "euler"](denoise_gaussian, initial_x, sigmas, **options)
    without_uncond = SAMPLERS[name](denoise_gaussian, initial_x, sigmas, **options)
    torch.testing.assert_close(without_uncond, plain)


def test_ddpm_gives_the_numbers_of_diffusers(diffusers, monkeypatch):
    """Observed: 8.9e-7; diffusers computes in float32."""
    scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.ones(shape))
    sigmas = SCHEDULE.get_step_sigmas(8, "trailing")
    initial_x = torch.linspace(-2, 2, 5).view(1, 1, 1, 5) * sigmas[0].float()
    expected = run_scheduler(scheduler, initial_x, sigmas)
    x = SAMPLERS["ddpm"](
        saturating_denoise, initial_x.double(), sigmas, noise_source=torch.ones_like
    )
    torch.testing.assert_close(x.float(), expected, rtol=0, atol=5e-6)


def test_lcm_adds_new_noise_to_each_denoised_but_the_last():
    sigmas = torch.tensor([14.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    x = SAMPLERS["lcm"](lambda x, sigma: x / 2, torch.ones(1), sigmas, noise_source=torch.ones_like)
    assert float(x) == ((1 / 2 + 2.0) / 2 + 0.5) / 2


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tcd_gives_the_numbers_of_diffusers(diffusers, steps, eta, monkeypatch):
    """Observed: 1.8e-6; diffusers computes in float32."""
    scheduler = diffusers.TCDScheduler(**BETAS)
    scheduler.set_timesteps(steps)
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.ones(shape))
    sigmas = SCHEDULE.get_step_sigmas(steps, "tcd")
    initial_x = torch.linspace(-2, 2, 5).view(1, 1, 1, 5) * sigmas[0].float()
    expected = run_scheduler(scheduler, initial_x, sigmas, eta=eta)
    options = {
        "eta": eta,
        "scale_timestep": SCHEDULE.scale_timestep,
        "noise_source": torch.ones_like,
    }
    x = SAMPLERS["tcd"](saturating_denoise, initial_x.double(), sigmas, **options)
    ours = x / math.sqrt(1 + float(sigmas[-1]) ** 2)
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=2e-5)
