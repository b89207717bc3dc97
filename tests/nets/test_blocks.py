import pytest
import torch
from nethelp import assert_close
from torch import nn

from goldfile import gold
from ldm.nets.blocks import (
    Downsample,
    GroupNorm,
    Linear,
    ResBlock,
    Upsample,
    run,
    timestep_embedding,
)
from recipe import fill

RES = {"channels": 64, "emb_channels": 40}
MODULES = {
    "res": lambda: ResBlock(**RES),
    "res_outch": lambda: ResBlock(**RES, out_channels=32),
    "res_small": lambda: ResBlock(**RES),
    "res_scaleshift": lambda: ResBlock(**RES, use_scale_shift_norm=True),
    "res_up": lambda: ResBlock(**RES, up=True),
    "res_down": lambda: ResBlock(**RES, down=True, use_scale_shift_norm=True, out_channels=64),
    "res_conv_skip": lambda: ResBlock(**RES, out_channels=32, use_conv=True),
    "up_conv": lambda: Upsample(64),
    "up_noconv": lambda: Upsample(64, use_conv=False),
    "down_conv": lambda: Downsample(64),
    "down_pool": lambda: Downsample(64, use_conv=False),
    "groupnorm32_bf16_input": lambda: GroupNorm(64),
}


@pytest.mark.parametrize("case", MODULES)
def test_block_equals_the_recorded_one(case):
    golden = gold("modules")
    block = MODULES[case]()
    salt = golden.case(case)["info"].get("salt", golden.meta["salt"])
    block.load_state_dict(fill(block.state_dict(), salt))
    inputs = golden.inputs(case)
    ours = block(*(inputs[name] for name in golden.case(case)["inputs"]))
    assert_close(ours, golden.outputs(case)["out"], tolerance=1e-5)


@pytest.mark.parametrize("case", [c["name"] for c in gold("timestep_embedding").cases])
def test_timestep_embedding_equals_the_recorded_one(case):
    golden = gold("timestep_embedding")
    info = golden.case(case)["info"]
    ours = timestep_embedding(golden.inputs(case)["t"], info["dim"], info["max_period"])
    # Angles reach 999, where neighbouring float32 are 6e-5 apart; 2.9e-5 was seen.
    assert_close(ours, golden.outputs(case)["emb"], tolerance=2e-4)


def test_fractional_timesteps_are_not_rounded():
    whole, fraction = timestep_embedding(torch.tensor([799.0, 799.2]), 32)
    assert (whole - fraction).abs().max() > 0.1


def test_an_odd_width_ends_in_a_zero():
    assert timestep_embedding(torch.tensor([7]), 33)[0, -1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_in_half_precision_keeps_float32_statistics(dtype):
    x = (torch.randn(2, 64, 16, 16) * 3 + 50).to(dtype)
    norm = GroupNorm(64)
    exact = norm(x.float())
    for half in (norm(x), norm.to(dtype)(x)):
        assert half.dtype == dtype
        assert (half - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_width_that_32_groups_cannot_divide_is_refused():
    with pytest.raises(ValueError, match="width 48 is not a multiple of 32"):
        GroupNorm(48)


def test_a_fresh_residual_block_is_the_identity():
    x, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 40)
    assert torch.equal(ResBlock(**RES)(x, emb), x)


def test_recomputing_gives_the_same_output_and_gradients():
    def results(recompute):
        torch.manual_seed(0)
        layer = nn.Sequential(Linear(8, 8), nn.SiLU(), nn.Dropout(0.5))
        x = torch.ones(3, 8, requires_grad=True)
        y = run(layer, x, recompute=recompute)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    for plain, again in zip(results(False), results(True), strict=True):
        assert torch.equal(plain, again)


def test_nothing_is_recomputed_without_gradients():
    calls = []
    with torch.no_grad():
        run(lambda x: calls.append(1) or x, torch.ones(1), recompute=True)
    assert calls == [1]
