"""Schedules against the recorded betas, buffers and steps."""

import pytest
import torch

from goldfile import gold
from ldm.diffusion.schedule import SCHEDULERS, Schedule, make_betas
from ldm.pipelines.quirks import Quirks

SD = Schedule(make_betas("linear", 1000, linear_start=0.00085, linear_end=0.012))


OPTIONS = ("linear_start", "linear_end", "cosine_s")


def betas_of(info):
    name = info.get("schedule") or info["beta_schedule"]
    timesteps = info.get("n_timestep") or info["timesteps"]
    return make_betas(name, timesteps, **{key: info[key] for key in OPTIONS if key in info})


def recorded(prefix):
    file = gold("schedules")
    cases = [case for case in file.cases if case["name"].startswith(prefix)]
    return [(case["info"], file.outputs(case["name"])) for case in cases]


def test_betas_equal_the_recorded_ones():
    for info, expected in recorded("betas"):
        torch.testing.assert_close(betas_of(info), expected["betas"], rtol=1e-10, atol=0)


def test_buffers_equal_the_recorded_ones():
    """Weights of the bound: the original takes 1 - ᾱ, 4e-5 at first, of a float32 ᾱ (6e-8)."""
    for info, expected in recorded("buffers"):
        schedule = Schedule(betas_of(info), v_posterior=info["v_posterior"])
        weights = schedule.vlb_weights(info["parameterization"]).float()
        torch.testing.assert_close(weights, expected.pop("lvlb_weights"), rtol=3e-4, atol=1e-9)
        ours = schedule.buffers()
        assert expected.keys() in (ours.keys(), set())  # some cases have only the weights
        for name, table in expected.items():
            torch.testing.assert_close(ours[name], table, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 10, 20, 25, 50, 100, 200, 250, 500])
def test_original_step_counts_are_the_recorded_timesteps(steps):
    expected = gold("schedules").outputs(f"ddim_t_uniform_{steps}")["timesteps"]
    sigmas = Quirks(frozenset({"steps"})).sigmas(SD, steps, "uniform")
    assert torch.equal(sigmas[:-1].flip(0), SD.sigmas[expected.long()])
    if 1000 % steps == 0:
        assert torch.equal(sigmas, SD.step_sigmas(steps))


@pytest.mark.parametrize("steps", [3, 9, 27, 37, 333, 1000])
def test_counts_that_crash_the_original_are_refused_only_when_asked_for(steps):
    with pytest.raises(ValueError, match=f"the original fails at {steps} steps"):
        Quirks(frozenset({"steps"})).sigmas(SD, steps, "uniform")
    assert len(SD.step_sigmas(steps)) == steps + 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 30, 333, 1000])
def test_every_scheduler_descends_in_exactly_the_steps_asked_for(scheduler, steps):
    sigmas = SD.step_sigmas(steps, scheduler)
    assert len(sigmas) == steps + 1
    assert (sigmas.diff() <= 0).all()
    assert sigmas[0] <= SD.sigmas[-1] * (1 + 1e-12)


def test_sigma_and_t_are_inverse():
    t = torch.linspace(0, 999, 501, dtype=torch.float64)
    torch.testing.assert_close(SD.sigma_to_t(SD.t_to_sigma(t)), t, rtol=0, atol=1e-8)
    assert torch.equal(SD.sigma_to_t(SD.sigmas).round(), torch.arange(1000).double())


def test_bad_requests_are_answered_with_what_is_allowed():
    with pytest.raises(ValueError, match="choose one of linear, sqrt_linear"):
        make_betas("quadratic")
    with pytest.raises(ValueError, match="choose one of uniform"):
        SD.step_sigmas(10, "even")
    with pytest.raises(ValueError, match="1 … 1000, got 1001"):
        SD.step_sigmas(1001)
