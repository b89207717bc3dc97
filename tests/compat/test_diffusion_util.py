"""`ldm.modules.diffusionmodules.util`: recorded schedules, and plain torch layers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from goldfile import load_golden
from ldm.compat import diffusion_util as util


@pytest.fixture(scope="module")
def schedules():
    return load_golden("schedules")


def list_cases(golden, prefix):
    return [(c["name"], c["info"]) for c in golden.cases if c["name"].startswith(prefix)]


def test_noise_schedules_equal_the_recorded_ones(schedules):
    for name, info in list_cases(schedules, "betas"):
        betas = util.make_beta_schedule(**info)
        assert betas.dtype == np.float64
        np.testing.assert_allclose(betas, schedules.outputs(name)["betas"], rtol=1e-9)
    with pytest.raises(ValueError, match="beta schedule `other`"):
        util.make_beta_schedule("other", 1000)


def test_ddim_timesteps_equal_the_recorded_ones(schedules):
    for name, info in list_cases(schedules, "ddim_t_"):
        steps = util.make_ddim_timesteps(info["method"], info["num_ddim"], info["num_ddpm"])
        assert steps.dtype == np.int64
        np.testing.assert_array_equal(steps, schedules.outputs(name)["timesteps"])
    with pytest.raises(NotImplementedError):
        util.make_ddim_timesteps("other", 10, 1000)
    with pytest.raises(ValueError, match="num_ddim_timesteps must be in 1 … 1000, got 1001"):
        util.make_ddim_timesteps("uniform", 1001, 1000)


def test_ddim_sampling_parameters_equal_the_recorded_ones(schedules):
    betas = util.make_beta_schedule("linear", 1000, 0.00085, 0.012)
    alphas_cumprod = torch.tensor(np.cumprod(1 - betas), dtype=torch.float32)
    for name, info in list_cases(schedules, "ddim_par_"):
        steps = util.make_ddim_timesteps("uniform", info["S"], 1000)
        parameters = util.make_ddim_sampling_parameters(alphas_cumprod, steps, info["eta"])
        sigmas, alphas, alphas_prev = parameters
        assert (sigmas.dtype, alphas.dtype) == (torch.float64, torch.float32)
        assert alphas_prev.dtype == np.float64
        computed = {"sigmas": sigmas, "alphas": alphas, "alphas_prev": alphas_prev}
        for key, values in computed.items():
            np.testing.assert_allclose(values, schedules.outputs(name)[f"ddim_{key}"], rtol=1e-6)
    sigmas, alphas, _ = util.make_ddim_sampling_parameters(alphas_cumprod.numpy(), steps, 1.0)
    assert (type(sigmas), type(alphas)) == (np.ndarray, np.ndarray)
    with pytest.raises(IndexError):
        util.make_ddim_sampling_parameters(alphas_cumprod, np.array([1000]), 1.0)


def test_repeat_only_repeats_the_timesteps():
    repeated = util.timestep_embedding(torch.tensor([3, 4]), 2, repeat_only=True)
    assert repeated.tolist() == [[3, 3], [4, 4]]


def test_group_norm_computes_in_float32():
    norm = util.normalization(64)
    assert type(norm) is util.GroupNorm32
    x = (torch.randn(2, 64, 8, 8) * 3 + 50).bfloat16()
    exact = norm(x.float())
    for half in (norm(x), norm.bfloat16()(x)):
        assert half.dtype == torch.bfloat16
        assert (half - exact).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_layers_are_those_of_torch():
    for dims, conv, pool in (
        (1, nn.Conv1d, nn.AvgPool1d), (2, nn.Conv2d, nn.AvgPool2d), (3, nn.Conv3d, nn.AvgPool3d),
    ):  # fmt: skip
        assert type(util.conv_nd(dims, 3, 4, 3, padding=1)) is conv
        assert type(util.avg_pool_nd(dims, kernel_size=2)) is pool
    layer = util.linear(3, 4)
    assert type(layer) is nn.Linear
    assert not util.scale_module(nn.Linear(1, 1, bias=False), 0.0).weight.any()
    assert util.zero_module(layer) is layer
    assert layer.weight.count_nonzero() == 0
    with pytest.raises(ValueError, match="unsupported dimensions: 4"):
        util.conv_nd(4, 3, 4, 3)


def test_gradient_checkpointing_accepts_frozen_parameters():
    layer, x = nn.Linear(3, 3).requires_grad_(False), torch.ones(1, 3, requires_grad=True)
    util.checkpoint(lambda x: layer(x).sin(), (x,), layer.parameters(), True).sum().backward()
    checkpointed, x.grad = x.grad, None
    layer(x).sin().sum().backward()
    assert torch.equal(x.grad, checkpointed)


def test_repeated_noise_gathered_values_and_cosine_betas():
    torch.manual_seed(0)
    assert torch.equal(*util.noise_like((2, 3), "cpu", repeat=True).unbind())
    extracted = util.extract_into_tensor(torch.arange(10.0), torch.tensor([3, 5]), (2, 4, 8, 8))
    assert extracted.shape == (2, 1, 1, 1)
    assert extracted.flatten().tolist() == [3, 5]
    half = math.pi / 2
    betas = util.betas_for_alpha_bar(10, lambda t: math.cos((t + 0.008) / 1.008 * half) ** 2)
    np.testing.assert_allclose(betas, util.make_beta_schedule("squaredcos_cap_v2", 10))
