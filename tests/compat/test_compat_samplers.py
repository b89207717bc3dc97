"""DDIM, PLMS and DPM-Solver under the original's names: recorded runs, types of buffers, hooks.

Worst errors, as a fraction of the largest value: ddim 5.0e-5, plms 5.1e-5, dpm 1.0e-4, dpm_schedule
6e-8; the original's own noise on another build of torch is 3e-5 there.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compathelp import build_recorded_model, get_kwargs

from goldfile import load_golden
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling_util import append_dims, spatial_norm_thresholding

SLOW = pytest.mark.slow
PARAMETERIZATIONS = pytest.mark.parametrize(
    "parameterization", ["eps", pytest.param("v", marks=SLOW)]
)
SHAPE = (4, 8, 12)
# The cases of the default run; all others are slow.
QUICK_CASES = {
    "ddim_eps": ["list_cond", "eta_half_noxT", "mask_x0", "temperature_dropout", "ucg_schedule"],
    "ddim_v": ["dict_cond"],
    "plms_eps": ["mask", "thresh"],
    "plms_v": ["two_steps"],
    "dpm_eps": ["dict", "noxT"],
    "dpm_v": ["S6_cfg1"],
}


def list_cases(*names):
    """List (golden file, case) of the recorded calls of `sample`."""
    return [
        pytest.param(name, case["name"], marks=[] if case["name"] in QUICK_CASES[name] else SLOW)
        for name in names
        for case in load_golden(name).cases
        if "kwargs" in case["info"] and "raises" not in case
    ]


@pytest.mark.parametrize(("name", "case"), list_cases("ddim_eps", "ddim_v", "plms_eps", "plms_v"))
def test_trajectories_equal_the_recorded_ones(name, case):
    golden, build = load_golden(name), DDIMSampler if name.startswith("ddim") else PLMSSampler
    info, sampler = golden.info(case), build(build_recorded_model(name))
    torch.manual_seed(info["seed_before"])
    samples, intermediates = sampler.sample(info["S"], 2, SHAPE, **get_kwargs(golden, case))
    stacked = {name: torch.stack(tensors) for name, tensors in intermediates.items()}
    golden.assert_close(case, samples=samples, **stacked)


@PARAMETERIZATIONS
def test_ddim_encodes_and_decodes_as_recorded(parameterization):
    name = f"ddim_{parameterization}"
    golden, model = load_golden(name), build_recorded_model(name)
    shared = golden.select("shared/")
    x0, c, uc = shared["x0"], shared["c"], shared["uc"]
    guidance = {"unconditional_guidance_scale": 7.5, "unconditional_conditioning": uc}
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, verbose=False)
    for steps in (8, 5, 1):
        case, t = f"img2img_tenc{steps}", torch.tensor([steps] * 2)
        z = sampler.stochastic_encode(x0, t, noise=golden.inputs(case)["noise"])
        torch.manual_seed(1003)
        seeded = sampler.stochastic_encode(x0, t)
        decoded, guided = sampler.decode(z, c, steps), sampler.decode(z, c, steps, **guidance)
        outputs = {"z_enc": z, "z_enc_seeded": seeded, "decoded_cfg1": decoded}
        golden.assert_close(case, **outputs, decoded_cfg=guided)
    inputs = golden.inputs("stochastic_encode_original_steps")
    z = sampler.stochastic_encode(x0, inputs["t"], True, inputs["noise"])
    golden.assert_close("stochastic_encode_original_steps", z=z)
    z, _ = sampler.encode(x0, c, 6)
    z_original, _ = sampler.encode(x0, c, 12, use_original_steps=True)
    guidance["unconditional_guidance_scale"] = 2.0
    z_cfg, info = sampler.encode(x0, c, 6, return_intermediates=2, **guidance)
    outputs = {"z": z, "z_cfg": z_cfg, "z_original": z_original}
    outputs |= {"inter": torch.stack(info["intermediates"])}
    golden.assert_close("encode", **outputs, inter_steps=info["intermediate_steps"])


def test_a_step_count_that_runs_past_the_last_timestep_fails_as_in_the_original():
    with pytest.raises(IndexError, match="1000 is out of bounds"):
        DDIMSampler(build_recorded_model("ddim_eps")).sample(3, 2, SHAPE)


@pytest.mark.parametrize(("name", "case"), list_cases("dpm_eps", "dpm_v"))
def test_dpm_solver_equals_the_recorded_runs(name, case, monkeypatch):
    golden, model, times = load_golden(name), build_recorded_model(name), []
    info, apply_model = golden.info(case), model.apply_model

    def record_time(x, t, c):
        times.append(float(t[0]))
        return apply_model(x, t, c)

    monkeypatch.setattr(model, "apply_model", record_time)
    torch.manual_seed(info["seed_before"])
    sampler, kwargs = DPMSolverSampler(model), get_kwargs(golden, case)
    samples, intermediates = sampler.sample(info["S"], 2, SHAPE, **kwargs)
    assert intermediates is None
    golden.assert_close(case, samples=samples, model_times=times)


@SLOW
@PARAMETERIZATIONS
def test_every_order_and_method_of_the_solver_equals_the_recorded_ones(parameterization):
    name = f"dpm_{parameterization}"
    golden, model = load_golden(name), build_recorded_model(name)
    shared = golden.select("shared/")
    schedule = NoiseScheduleVP("discrete", alphas_cumprod=model.alphas_cumprod)
    for case in golden.cases:
        info = case["info"]
        if "raises" in case or "sample" not in info:
            continue
        predict = model_wrapper(
            model.apply_model, schedule, model_type=info["model_type"],
            guidance_type="classifier-free", guidance_scale=info["guidance_scale"],
            condition=shared["c"], unconditional_condition=shared["uc"],
        )  # fmt: skip
        solver = DPM_Solver(predict, schedule, **info["DPM_Solver"])
        x = solver.sample(shared["x_T"], **info["sample"])
        golden.assert_close(case["name"], x=x)


def test_a_classifier_guides_the_solver_by_its_gradient():
    schedule, x = NoiseScheduleVP("linear"), torch.randn(2, 3)
    predict = model_wrapper(
        lambda x, t: torch.zeros_like(x), schedule, guidance_type="classifier", guidance_scale=2.0,
        classifier_fn=lambda x, t, condition: condition * (x**2).sum(dim=1), condition=3.0,
    )  # fmt: skip
    t = torch.tensor([0.5, 0.5])
    expected = -2.0 * schedule.marginal_std(t)[:, None] * 3.0 * 2.0 * x
    torch.testing.assert_close(predict(x, t), expected)


def test_noise_schedules_and_times_of_the_solver_equal_the_recorded_ones():
    golden = load_golden("dpm_schedule")
    alphas_cumprod = golden.inputs("ns_discrete_ac")["alphas_cumprod"]
    betas = golden.inputs("ns_discrete_betas")["betas"]
    schedules = {
        "ns_discrete_ac": NoiseScheduleVP(alphas_cumprod=alphas_cumprod),
        "ns_discrete_betas": NoiseScheduleVP(betas=betas),
        "ns_linear": NoiseScheduleVP("linear"),
        "ns_cosine": NoiseScheduleVP("cosine"),
    }
    for case, schedule in schedules.items():
        t, expected = golden.inputs(case)["t"], golden.outputs(case)
        assert pytest.approx(float(expected["T"])) == schedule.T
        outputs = {
            "log_mean": schedule.marginal_log_mean_coeff(t),
            "alpha": schedule.marginal_alpha(t),
            "std": schedule.marginal_std(t),
            "lam": schedule.marginal_lambda(t),
            "inverse_lambda": schedule.inverse_lambda(expected["lam"]),
        }
        golden.assert_close(case, **outputs)
    solver = DPM_Solver(lambda x, t: x, schedules["ns_discrete_ac"])
    for case in golden.cases:
        info, name = case["info"], case["name"]
        if "t_T" in info:
            options = (info["skip_type"], info["t_T"], info["t_0"], info["N"], "cpu")
            golden.assert_close(name, times=solver.get_time_steps(*options))
        elif "order" in info:
            options = (info["steps"], info["order"], info["skip_type"], 1.0, 1e-3, "cpu")
            outer, orders = solver.get_orders_and_timesteps_for_singlestep_solver(*options)
            golden.assert_close(name, outer=outer, orders=orders)


def test_single_steps_of_order_1_may_be_uniform_in_the_log_snr():
    """The original fails, as its times are those of one step."""
    solver, x = DPM_Solver(lambda x, t: x.cos(), NoiseScheduleVP("linear")), torch.ones(1, 2)
    options = {"steps": 6, "order": 1, "skip_type": "logSNR"}
    single, multi = (solver.sample(x, method=f"{m}step", **options) for m in ("single", "multi"))
    assert torch.equal(single, multi)


def test_adaptive_steps_end_where_the_error_is_zero():
    schedule, x = NoiseScheduleVP("linear"), torch.ones(1, 2)
    solver = DPM_Solver(lambda x, t: torch.zeros_like(x), schedule)
    alphas = schedule.marginal_alpha(torch.tensor([1.0, 1e-3]))
    out = solver.sample(x, method="adaptive", order=2)
    torch.testing.assert_close(out, (alphas[1] / alphas[0]).expand_as(x))


def test_buffers_have_the_types_that_third_party_code_expects():
    sampler = DDIMSampler(build_recorded_model("ddim_eps"))
    sampler.make_schedule(ddim_num_steps=5, ddim_eta=0.5)
    assert sampler.ddim_timesteps.dtype == np.int64
    assert sampler.ddim_timesteps.tolist() == [1, 201, 401, 601, 801]
    assert (sampler.ddim_alphas.dtype, sampler.ddim_sigmas.dtype) == (torch.float32, torch.float64)
    assert isinstance(sampler.ddim_alphas_prev, np.ndarray)
    assert sampler.ddim_alphas_prev.dtype == np.float64
    with pytest.raises(ValueError, match="ddim_eta must be 0"):
        PLMSSampler(sampler.model).make_schedule(5, ddim_eta=0.5)


def test_buffers_on_mps_have_a_dtype_that_it_supports(monkeypatch):
    sampler, moved = DDIMSampler(build_recorded_model("ddim_eps"), device="mps"), []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append((device, self.dtype)))
    sampler.register_buffer("ddim_sigmas", torch.ones(2, dtype=torch.float64))
    assert moved == [(torch.device("mps"), torch.float32)]


@pytest.mark.parametrize("build", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_samplers_take_any_model_class_and_conditioning(build):
    """A model with only the attributes that are read; conditioning None, or a dict with None."""
    betas = torch.linspace(1e-4, 2e-2, 1000)
    alphas = (1 - betas).cumprod(0)
    conditions = []

    def apply_model(x, t, c):
        conditions.append(c and (len(x), c["c_concat"], len(c["y"][0])))
        return 0.1 * x

    model = SimpleNamespace(
        num_timesteps=1000, betas=betas, alphas_cumprod=alphas, device=torch.device("cpu"),
        alphas_cumprod_prev=torch.cat([alphas.new_ones(1), alphas[:-1]]), parameterization="eps",
        apply_model=apply_model,
    )  # fmt: skip
    cond = {"c_concat": None, "y": [torch.zeros(2, 3)]}
    samples, _ = build(model).sample(
        4, 2, (1, 4, 4), conditioning=cond, unconditional_conditioning=cond, verbose=False,
        unconditional_guidance_scale=2.0, features_adapter=None,
    )  # fmt: skip
    assert samples.shape == (2, 1, 4, 4)
    assert set(conditions) == {(4, None, 4)}
    build(model).sample(4, 2, (1, 4, 4), verbose=False)
    assert conditions[-1] is None


def test_callbacks_and_overridden_steps_are_called():
    class Sampler(DDIMSampler):
        num_steps = 0

        def __init__(self, model):  # sets what the one of CompVis sets
            self.model, self.schedule = model, "linear"
            self.ddpm_num_timesteps = model.num_timesteps

        def p_sample_ddim(self, x, c, t, index, *, unconditional_guidance_scale, **kwargs):
            """Takes the arguments of a version without `dynamic_threshold`."""
            assert "dynamic_threshold" not in kwargs
            type(self).num_steps += 1
            return super().p_sample_ddim(x, c, t, index, **kwargs)

    shared = load_golden("ddim_eps").select("shared/")
    steps, images = [], []
    Sampler(build_recorded_model("ddim_eps")).sample(
        5, 2, SHAPE, shared["c"], callback=steps.append,
        img_callback=lambda x0, i: images.append((x0.shape, i)),
    )  # fmt: skip
    assert steps == [0, 1, 2, 3, 4]
    assert images == [((2, *SHAPE), i) for i in range(5)]
    assert Sampler.num_steps == 5


class ScalingCorrector:
    def modify_score(self, model, e_t, x, t, c, factor):
        return factor * e_t


@pytest.mark.parametrize("build", [DDIMSampler, PLMSSampler])
def test_a_score_corrector_changes_the_predicted_noise(build):
    sampler = build(build_recorded_model("ddim_eps"))
    shared = load_golden("ddim_eps").select("shared/")
    options = {"score_corrector": ScalingCorrector(), "corrector_kwargs": {"factor": 0.0}}
    samples, _ = sampler.sample(5, 2, SHAPE, shared["c"], x_T=shared["x_T"], **options)
    scale = (sampler.ddim_alphas_prev[0] / float(sampler.ddim_alphas[-1])) ** 0.5
    torch.testing.assert_close(samples, shared["x_T"] * scale)


def test_a_ucg_schedule_needs_one_scale_per_step():
    with pytest.raises(ValueError, match="ucg_schedule must have 5 values, got 4"):
        DDIMSampler(build_recorded_model("ddim_eps")).sample(5, 2, SHAPE, ucg_schedule=[1.0] * 4)


def test_spatial_norm_thresholding_and_append_dims():
    x = torch.tensor([3.0, 0.5]).reshape(1, 1, 1, 2).repeat(1, 4, 1, 1)
    assert spatial_norm_thresholding(x, 1.0)[0, 0, 0].tolist() == pytest.approx([1.0, 0.5])
    assert append_dims(torch.zeros(2), 4).shape == (2, 1, 1, 1)
