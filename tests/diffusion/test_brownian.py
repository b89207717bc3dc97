"""Brownian paths: additivity, the numbers of torchsde, and samples that depend little on steps."""

import pytest
import torch

from ldm.diffusion.brownian import BrownianPaths
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule, make_betas

LIKE = torch.empty(2, 4, 50, 50)
SIGMA_MIN, SIGMA_MAX = 0.0291675, 14.614642
SCHEDULE = Schedule(make_betas("linear", linear_start=0.00085, linear_end=0.012))


def test_the_noise_of_a_step_is_the_sum_over_its_substeps():
    paths = BrownianPaths([5, 6], SIGMA_MIN, SIGMA_MAX)
    step = paths(LIKE, 9.0, 0.5) * (9.0 - 0.5) ** 0.5
    substeps = paths(LIKE, 9.0, 3.3) * 5.7**0.5 + paths(LIKE, 3.3, 0.5) * 2.8**0.5
    torch.testing.assert_close(step, substeps, rtol=0, atol=1e-5)
    second_path = BrownianPaths([6], SIGMA_MIN, SIGMA_MAX)
    assert torch.equal(paths(LIKE, 9.0, 3.3)[1:], second_path(LIKE[:1], 9.0, 3.3))


TORCHSDE = {
    (14.614642, 11.2): [-0.611975, 0.284412, -0.005466, -1.283199, 0.032171, -0.004805],
    (3.3, 0.4): [0.978452, 0.162547, 0.594985, 0.428757, 1.694149, -0.766286],
    (0.4, 0.0291675): [1.075864, -0.336962, 0.604235, -0.032676, 1.116892, 0.393112],
}


def test_paths_equal_those_of_torchsde():
    """Recorded from torchsde 0.2.6, as k-diffusion calls it; the largest error is 1e-6."""
    paths = BrownianPaths([123, 2**40], SIGMA_MIN, SIGMA_MAX)
    for (sigma, sigma_next), expected in TORCHSDE.items():
        noise = paths(torch.empty(2, 1, 1, 3), sigma, sigma_next)
        torch.testing.assert_close(noise.flatten(), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun"])
def test_twice_the_steps_give_almost_the_same_sample(sampler):
    """For data of variance 0.25; independent noise gives a difference of 1.4 deviations."""

    def denoise(x, sigma):
        return x * 0.25 / (0.25 + sigma**2)

    def sample(steps, paths):
        sigmas = SCHEDULE.get_step_sigmas(steps, "karras")
        x = torch.randn(2, 4, 20, 20, generator=torch.Generator().manual_seed(1)) * sigmas[0]
        generator = torch.Generator().manual_seed(2)
        noise = lambda like: torch.randn(like.shape, generator=generator)  # noqa: E731
        return SAMPLERS[sampler](
            denoise, x.float(), sigmas, noise_source=noise, interval_noise=paths
        )

    def compute_difference(make_paths):
        coarse, fine = (sample(steps, make_paths()) for steps in (30, 60))
        return float((coarse - fine).std() / fine.std())

    sigma_range = SCHEDULE.sigmas[[0, -1]].tolist()
    assert compute_difference(lambda: BrownianPaths([3, 4], *sigma_range)) < 0.5
    assert compute_difference(lambda: None) > 1
