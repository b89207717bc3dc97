"""The denoiser: networks that predict eps, v, x0 or edm give the same denoised latent."""

import pytest
import torch

from goldfile import load_golden
from ldm.conditioning import Cond
from ldm.diffusion.denoiser import PARAMETERIZATIONS, Denoiser, get_scalings
from ldm.diffusion.schedule import (
    ContinuousSchedule,
    NoiseSchedule,
    Schedule,
    betas_from_sigmas,
    make_betas,
)

SCHEDULE = Schedule(make_betas("linear", 1000, linear_start=0.00085, linear_end=0.012))


@pytest.fixture
def z_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 4, 3, 3, generator=generator).unbind(0)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("t", [0, 500, 999])
def test_a_perfect_network_gives_the_clean_latent_and_no_loss(z_and_noise, parameterization, t):
    z, noise = z_and_noise

    def network(z_t, t, **slots):
        return denoiser.compute_target(z, noise, t.round().long())

    denoiser = Denoiser(network, SCHEDULE, parameterization)
    sigma = float(SCHEDULE.sigmas[t])
    # eps is multiplied by sigma: float32 rounding of x shows as sigma * 1e-7.
    torch.testing.assert_close(denoiser(z + sigma * noise, sigma), z, rtol=0, atol=2e-5)
    residual = denoiser.compute_error(z, None, torch.tensor([t, t]), noise)
    assert residual.shape == z.shape
    assert residual.square().mean() < 1e-10


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_factors_convert_differences_of_predictions(z_and_noise, parameterization):
    x, prediction = z_and_noise
    schedule = ContinuousSchedule()
    denoiser = Denoiser(lambda *_: prediction, schedule, parameterization, sigma_data=1.0)
    denoised, reference = (denoiser.convert_prediction(x, 2.0, p) for p in (prediction, x))
    change = denoised - reference
    torch.testing.assert_close(denoiser.compute_denoised_factor(x, 2.0) * (prediction - x), change)
    torch.testing.assert_close(
        denoiser.compute_eps_factor(x, 2.0) * (prediction - x), -change / 2.0
    )


@pytest.mark.parametrize("parameterization", ["v", "edm"])
def test_continuous_timesteps_have_the_right_training_target(z_and_noise, parameterization):
    z, noise = z_and_noise
    timesteps = torch.tensor([-1.0, 0.9], dtype=torch.float64)
    schedule, inputs = ContinuousSchedule(), []

    def network(z_t, t, **slots):
        inputs.append((z_t, t))
        return denoiser.compute_target(z, noise, timesteps)

    denoiser = Denoiser(network, schedule, parameterization)
    assert denoiser.compute_error(z, None, timesteps, noise).abs().max() == 0
    sigma = schedule.t_to_sigma(timesteps)
    x = z + sigma.reshape(-1, 1, 1, 1).float() * noise
    torch.testing.assert_close(denoiser(x, sigma), z, rtol=0, atol=2e-5)
    torch.testing.assert_close(*inputs)


SCALINGS = {
    "scaling_eps": ("eps", SCHEDULE),
    "scaling_v": ("v", SCHEDULE),
    "scaling_edm_05": ("edm", ContinuousSchedule()),
    "scaling_edm_1": ("edm", ContinuousSchedule()),
    "scaling_v_edm_cnoise": ("v", ContinuousSchedule()),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_are_the_recorded_ones(name):
    golden = load_golden("sdxl_denoiser")
    (parameterization, schedule), sigma = SCALINGS[name], golden.inputs(name)["sigma"]
    params = golden.info(name)["params"]
    c_skip, c_out = get_scalings(parameterization, sigma, **params)
    expected = golden.outputs(name)
    torch.testing.assert_close(c_skip, expected["c_skip"])
    torch.testing.assert_close(c_out, expected["c_out"])
    if isinstance(schedule, ContinuousSchedule):
        torch.testing.assert_close(schedule.sigma_to_t(sigma).float(), expected["c_noise"])


SIGMAS_50 = SCHEDULE.get_step_sigmas(50, "sgm_uniform")[:-1].flip(0)
DENOISERS: dict[str, tuple[str, NoiseSchedule]] = {
    "discrete_eps": ("eps", SCHEDULE),
    "discrete_v": ("v", SCHEDULE),
    "discrete_eps_no_quantize_c_noise": ("eps", Schedule(SCHEDULE.betas, quantize_c_noise=False)),
    "discrete_edm": ("edm", Schedule(SCHEDULE.betas, uses_log_sigma=True)),
    "discrete_eps_50": ("eps", Schedule(betas_from_sigmas(SIGMAS_50))),
    "discrete_eps_noflip": ("eps", Schedule(SCHEDULE.betas, flip_timesteps=True)),
    "discrete_eps_zero": ("eps", Schedule(SCHEDULE.betas, append_zero=True)),
    "continuous_edm": ("edm", ContinuousSchedule()),
    "continuous_eps": ("eps", ContinuousSchedule(uses_log_sigma=False)),
    "continuous_v_edm": ("v", ContinuousSchedule()),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_of_sdxl_are_the_recorded_ones(name):
    golden = load_golden("sdxl_denoiser")
    inputs, expected = golden.inputs(name), golden.outputs(name)

    def network(z_t, t, context=None, y=None):
        torch.testing.assert_close(z_t, expected["net_x"])
        torch.testing.assert_close(t, expected["net_t"].float())
        shift = 0.01 * t + context.mean(dim=(1, 2))
        return 0.3 * z_t + shift.reshape(-1, 1, 1, 1)

    parameterization, schedule = DENOISERS[name]
    denoiser = Denoiser(network, schedule, parameterization, quantize_sigma=True)
    denoised = denoiser(inputs["x"], inputs["sigma"], Cond(inputs["crossattn"]))
    torch.testing.assert_close(denoised, expected["denoised"], rtol=1e-5, atol=1e-4)


def test_fractional_timesteps_are_flipped_and_shifted_for_the_network():
    t = torch.tensor([0.0, 0.25, 500.5, 999.0], dtype=torch.float64)
    sigma = SCHEDULE.t_to_sigma(t)
    flipped, shifted, flipped_and_shifted = (
        Schedule(SCHEDULE.betas, **options).sigma_to_c_noise(sigma)
        for options in ({"flip_timesteps": True}, {"append_zero": True},
                        {"flip_timesteps": True, "append_zero": True})
    )  # fmt: skip
    torch.testing.assert_close(flipped, 999 - t)
    torch.testing.assert_close(shifted, t + 1)
    torch.testing.assert_close(flipped_and_shifted, 999 - t)
    assert Schedule(SCHEDULE.betas, append_zero=True).sigma_to_c_noise(0.0) == 0


def test_an_unknown_parameterization_is_named():
    with pytest.raises(ValueError, match="unknown parameterization `u`, choose one of eps, v, x0"):
        Denoiser(lambda *a, **k: a[0], SCHEDULE, "u")(torch.ones(1, 4, 2, 2), 1.0)
