"""Schedules against the recorded betas, buffers and steps."""

import pytest
import torch

from goldfile import gold
from ldm.diffusion.schedule import SCHEDULERS, Schedule, make_betas
from ldm.pipelines.quirks import Quirks

SD = Schedule(make_betas("linear", 1000, linear_start=0.00085, linear_end=0.012))


@pytest.mark.parametrize("index", range(6))
def test_betas_equal_the_recorded_ones(index):
    file = gold("schedules")
    case = next(c for c in file.cases if c["name"].startswith(f"betas{index}_"))
    info = case["info"]
    betas = make_betas(
        info["schedule"],
        info["n_timestep"],
        linear_start=info.get("linear_start", 1e-4),
        linear_end=info.get("linear_end", 2e-2),
        cosine_s=info.get("cosine_s", 8e-3),
    )
    torch.testing.assert_close(betas, file.outputs(case["name"])["betas"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("index", range(4))
def test_buffers_equal_the_recorded_ones(index):
    file = gold("schedules")
    case = next(c for c in file.cases if c["name"].startswith(f"buffers{index}_"))
    info = case["info"]
    betas = make_betas(
        info["beta_schedule"],
        info["timesteps"],
        linear_start=info["linear_start"],
        linear_end=info["linear_end"],
    )
    expected = file.outputs(case["name"])
    ours = Schedule(betas, v_posterior=info["v_posterior"]).buffers()
    assert ours.keys() == expected.keys() - {"lvlb_weights"}
    for name, table in ours.items():
        torch.testing.assert_close(table, expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("index", range(8))
def test_weights_of_the_bound_equal_the_recorded_ones(index):
    """Tolerance: the original takes 1 - ᾱ, 4e-5 at first, of an ᾱ rounded to float32 (6e-8)."""
    file = gold("schedules")
    case = next(c for c in file.cases if c["name"].startswith(f"buffers{index}_"))
    info = case["info"]
    keys = ("linear_start", "linear_end")
    betas = make_betas(info["beta_schedule"], info["timesteps"], **{k: info[k] for k in keys})
    schedule = Schedule(betas, v_posterior=info["v_posterior"])
    expected = file.outputs(case["name"])["lvlb_weights"]
    ours = schedule.vlb_weights(info["parameterization"]).float()
    torch.testing.assert_close(ours, expected, rtol=3e-4, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 10, 20, 25, 50, 100, 200, 250, 500])
def test_original_step_counts_are_the_recorded_timesteps(steps):
    expected = gold("schedules").outputs(f"ddim_t_uniform_{steps}")["timesteps"]
    sigmas = Quirks(frozenset({"steps"})).sigmas(SD, steps, "uniform")
    assert torch.equal(sigmas[:-1].flip(0), SD.sigmas[expected.long()])
    if 1000 % steps == 0:
        assert torch.equal(sigmas, SD.steps(steps))


@pytest.mark.parametrize("steps", [3, 9, 27, 37, 333, 1000])
def test_counts_that_crash_the_original_are_refused_only_when_asked_for(steps):
    with pytest.raises(ValueError, match=f"the original fails at {steps} steps"):
        Quirks(frozenset({"steps"})).sigmas(SD, steps, "uniform")
    assert len(SD.steps(steps)) == steps + 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 30, 333, 1000])
def test_every_scheduler_descends_in_exactly_the_steps_asked_for(scheduler, steps):
    sigmas = SD.steps(steps, scheduler)
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
        SD.steps(10, "even")
    with pytest.raises(ValueError, match="1 … 1000, got 1001"):
        SD.steps(1001)
