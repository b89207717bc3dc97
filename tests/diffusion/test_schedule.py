"""Noise schedules and schedulers against recorded betas, buffers and sigmas."""

import pytest
import torch

from goldfile import load_golden
from ldm.diffusion.names import SCHEDULERS
from ldm.diffusion.schedule import ContinuousSchedule, Schedule, betas_from_sigmas, make_betas
from ldm.diffusion.schedulers import get_sigmas_edm
from ldm.loading.diffusers.schedulers import parse_scheduler
from ldm.pipelines.quirks import Quirks

SCHEDULE = Schedule(make_betas("linear", 1000, linear_start=0.00085, linear_end=0.012))
BETA_OPTIONS = ("linear_start", "linear_end", "cosine_s")


def make_recorded_betas(info):
    name = info.get("schedule") or info["beta_schedule"]
    timesteps = info.get("n_timestep") or info["timesteps"]
    return make_betas(name, timesteps, **{key: info[key] for key in BETA_OPTIONS if key in info})


def list_cases(prefix, name="schedules"):
    """List (info, outputs) of the recorded cases with the prefix that did not fail."""
    golden = load_golden(name)
    cases = [
        case for case in golden.cases if case["name"].startswith(prefix) and "raises" not in case
    ]
    return [(case["info"], golden.outputs(case["name"])) for case in cases]


def test_betas_equal_the_recorded_ones():
    for info, expected in list_cases("betas"):
        torch.testing.assert_close(make_recorded_betas(info), expected["betas"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("timesteps", ["abc", 1000.0, 0])
def test_invalid_numbers_of_timesteps_are_named(timesteps):
    with pytest.raises(ValueError, match=f"a positive whole number, got `{timesteps}`"):
        make_betas("linear", timesteps)


def test_buffers_equal_the_recorded_ones():
    """For lvlb_weights the original takes 1 - ᾱ from a float32 ᾱ, and so do we."""
    for info, expected in list_cases("buffers"):
        schedule = Schedule(make_recorded_betas(info), v_posterior=info["v_posterior"])
        weights = schedule.compute_vlb_weights(info["parameterization"])
        torch.testing.assert_close(weights, expected.pop("lvlb_weights"), rtol=1e-6, atol=0)
        buffers = schedule.compute_buffers()
        assert expected.keys() in (buffers.keys(), set())  # some cases have only the weights
        for name, value in expected.items():
            torch.testing.assert_close(buffers[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 10, 20, 25, 50, 100, 200, 250, 500])
def test_the_quirk_steps_gives_the_recorded_timesteps(steps):
    expected = load_golden("schedules").outputs(f"ddim_t_uniform_{steps}")["timesteps"]
    sigmas = Quirks(frozenset({"steps"})).get_sigmas(SCHEDULE, steps, "uniform")
    assert torch.equal(sigmas[:-1].flip(0), SCHEDULE.sigmas[expected.long()])
    if 1000 % steps == 0:
        assert torch.equal(sigmas, SCHEDULE.get_step_sigmas(steps))


@pytest.mark.parametrize("steps", [3, 9, 27, 37, 333, 1000])
def test_step_counts_that_crash_the_original_are_refused_only_with_its_quirk(steps):
    with pytest.raises(ValueError, match=f"the original fails at {steps} steps"):
        Quirks(frozenset({"steps"})).get_sigmas(SCHEDULE, steps, "uniform")
    assert len(SCHEDULE.get_step_sigmas(steps)) == steps + 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_descends_in_the_requested_number_of_steps(scheduler):
    limit = SCHEDULERS[scheduler].max_steps or 1000
    for schedule in (SCHEDULE, ContinuousSchedule(0.002, 120)):
        for steps in {min(number, limit) for number in (1, 2, 3, 30, 333, 1000)}:
            sigmas = schedule.get_step_sigmas(steps, scheduler)
            drops_repeats = scheduler == "beta" and steps > 138
            if scheduler != "ddim_uniform" and not drops_repeats:  # the former rounds the number
                assert len(sigmas) == steps + 1
            assert (sigmas.diff() <= 0).all()
            assert sigmas[0] <= schedule.sigmas[-1] * (1 + 1e-12)


def assert_close(sigmas, expected):
    """Compare in float32; the largest errors: 1.0e-6 (the original) and 2.4e-6 (diffusers)."""
    torch.testing.assert_close(sigmas.float(), expected, rtol=1e-5, atol=0)


def test_sigmas_of_sdxl_are_the_recorded_ones():
    for info, expected in list_cases("legacy_", "sdxl_discretization"):
        if "timesteps" in expected:
            sigmas = SCHEDULE.get_step_sigmas(info["n"], "sgm_uniform")
            assert torch.equal(sigmas[:-1], SCHEDULE.sigmas[expected["timesteps"]])
            assert_close(sigmas, expected["sigmas"])
    for _, expected in list_cases("turbo_", "sdxl_discretization"):
        steps = len(expected["sigmas"]) - 1
        assert_close(SCHEDULE.get_step_sigmas(steps, "turbo"), expected["sigmas"])
    for info, expected in list_cases("edm_", "sdxl_discretization"):
        if info["params"]:
            assert_close(get_sigmas_edm(SCHEDULE, info["n"], **info["params"]), expected["sigmas"])
        else:
            assert_close(
                ContinuousSchedule().get_step_sigmas(info["n"], "karras"), expected["sigmas"]
            )
    golden = load_golden("sdxl_discretization")
    short = Schedule(make_betas("linear", 500, linear_start=0.0001, linear_end=0.02))
    assert_close(short.get_step_sigmas(10, "sgm_uniform"), golden.outputs("legacy_other")["s10"])
    assert_close(short.get_step_sigmas(500, "sgm_uniform"), golden.outputs("legacy_other")["all"])
    expected = golden.outputs("discrete_denoiser")
    assert_close(SCHEDULE.sigmas, expected["sigmas"])
    sigma = golden.inputs("discrete_denoiser")["sigma"]
    assert_close(SCHEDULE.get_nearest_sigma(sigma), expected["quantized"])
    assert_close(Schedule(betas_from_sigmas(SCHEDULE.sigmas)).sigmas, expected["sigmas"])


def test_img2img_starts_at_the_sigma_at_which_a_base_ends_for_a_refiner():
    quirks = Quirks(frozenset({"legacy-steps"}))
    for prefix in ("img2img_", "txt2noisy_"):
        for info, expected in list_cases(prefix, "sdxl_discretization"):
            if "n" in info and "strength" in info:
                n = info["n"]
                sigmas = SCHEDULE.get_step_sigmas(n, "sgm_uniform")
                first, _ = quirks.find_first_step(info["strength"], n, n)
                used = sigmas[first:] if prefix == "img2img_" else sigmas[: first + 1]
                assert_close(used, expected["sigmas"])


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("steps", [7, 30, 50])
@pytest.mark.parametrize(
    ("spacing", "limit"),
    [("leading", 1e-5), ("linspace", 2e-4)],  # diffusers interpolates sigma, we its logarithm
)
def test_timestep_spacings_equal_diffusers(diffusers, steps, spacing, limit):
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    options |= {"timestep_spacing": spacing, "steps_offset": 1}
    scheduler = diffusers.EulerDiscreteScheduler(**options)
    scheduler.set_timesteps(steps)
    sigmas = SCHEDULE.get_step_sigmas(steps, parse_scheduler(options, ""))
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas, rtol=limit, atol=0)


def test_sigma_and_t_are_inverse():
    t = torch.linspace(0, 999, 501, dtype=torch.float64)
    torch.testing.assert_close(SCHEDULE.sigma_to_t(SCHEDULE.t_to_sigma(t)), t, rtol=0, atol=1e-8)
    assert torch.equal(SCHEDULE.sigma_to_t(SCHEDULE.sigmas).round(), torch.arange(1000).double())
    continuous = ContinuousSchedule()
    sigmas = continuous.t_to_sigma(continuous.sigma_to_t(continuous.sigmas))
    torch.testing.assert_close(sigmas, continuous.sigmas)


def test_errors_name_the_allowed_values():
    with pytest.raises(ValueError, match="choose one of linear, sqrt_linear"):
        make_betas("quadratic")
    with pytest.raises(ValueError, match="choose one of uniform"):
        SCHEDULE.get_step_sigmas(10, "even")
    with pytest.raises(ValueError, match="1 … 1000, got 1001"):
        SCHEDULE.get_step_sigmas(1001)
    with pytest.raises(ValueError, match="1 … 10 with scheduler `turbo`, got 11"):
        SCHEDULE.get_step_sigmas(11, "turbo")
    with pytest.raises(ValueError, match="`normal` takes no rho, only karras, polyexponential"):
        SCHEDULE.get_step_sigmas(5, "normal", rho=2)


# Five sigmas of Stable Diffusion's schedule, from ComfyUI (`normal`, `simple`, `beta`, `ays`) and
# A1111 (`beta_sigma`, `kl_optimal`, `ays_a1111`).
SIGMAS = {
    "normal": [14.614641, 4.086081, 1.615580, 0.695150, 0.029167],
    "sgm_uniform_a1111": [14.614641, 5.092408, 2.279730, 1.162865, 0.571189],
    "ddim_uniform": [5.134431, 2.292854, 1.168216, 0.574050, 0.041314],
    "simple": [14.614641, 5.087763, 2.276463, 1.160578, 0.569285],
    "beta": [14.614641, 7.371844, 2.615236, 1.027329, 0.395510],
    "beta_sigma": [14.614641, 12.052260, 7.321904, 2.591549, 0.029167],
    "kl_optimal": [14.614641, 2.142741, 0.961588, 0.419836, 0.029167],
    "ays": [14.614641, 3.863675, 1.884192, 0.964258, 0.397746],
    "ays_a1111": [14.614641, 3.226626, 1.394381, 0.509389, 0.029167],
}


@pytest.mark.parametrize("scheduler", SIGMAS)
def test_sigmas_are_those_of_comfyui_and_a1111(scheduler):
    expected = torch.tensor([*SIGMAS[scheduler], 0.0], dtype=torch.float64)
    torch.testing.assert_close(SCHEDULE.get_step_sigmas(5, scheduler), expected, rtol=0, atol=1e-6)


def test_repeated_timesteps_of_beta_are_dropped():
    sigmas = SCHEDULE.get_step_sigmas(200, "beta")
    assert len(sigmas) - 1 == 199  # different timesteps by scipy.stats.beta.ppf
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 4, 8, 50])
def test_sigmas_of_consistency_models_are_those_of_diffusers(diffusers, steps):
    scheduler = diffusers.TCDScheduler()
    scheduler.set_timesteps(steps)
    lcm, tcd = (SCHEDULE.get_step_sigmas(steps, name) for name in ("lcm", "tcd"))
    for sigmas in (lcm, tcd):
        assert torch.equal(sigmas[:-1], SCHEDULE.sigmas[scheduler.timesteps])
    assert tcd[-1] == SCHEDULE.sigmas[0]


def test_polyexponential_sigmas_with_rho_are_those_of_k_diffusion():
    expected = [14.614641, 0.962907, 0.137996, 0.043017, 0.029167, 0.0]
    sigmas = SCHEDULE.get_step_sigmas(5, "polyexponential", rho=2.0)
    assert sigmas.tolist() == pytest.approx(expected, abs=1e-6)


def test_ten_steps_of_align_your_steps_are_not_interpolated():
    sigmas = SCHEDULE.get_step_sigmas(10, "ays_xl")
    assert sigmas[1:3].tolist() == pytest.approx([6.3184485287, 3.7681790315])
