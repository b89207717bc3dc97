"""Layers of the UNet and the autoencoder, one by one."""

import pytest
import torch
from torch import nn

from goldfile import load_golden
from ldm.loading.build import meta_device
from ldm.nets import autoencoder
from ldm.nets.blocks import Downsample, GroupNorm, ResBlock, Upsample, timestep_embedding
from ldm.nets.transformer import (
    GEGLU,
    AttentionBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
    TransformerBlock,
)
from nets.nethelp import assert_close
from recipe import fill, fill_on_demand

RES = {"channels": 64, "emb_channels": 40}
SPATIAL = {"in_channels": 64, "n_heads": 4, "d_head": 16, "context_dim": 24}
LINEAR = {**SPATIAL, "use_linear": True}
BLOCK = {"dim": 64, "n_heads": 4, "d_head": 16}
CROSS = {"query_dim": 64, "context_dim": 24, "heads": 4, "dim_head": 16}
NEW_ORDER = {"channels": 64, "num_head_channels": 16, "use_new_attention_order": True}
MODULES = {
    "res": (ResBlock, RES),
    "res_outch": (ResBlock, {**RES, "out_channels": 32}),
    "res_small": (ResBlock, RES),
    "res_scaleshift": (ResBlock, {**RES, "use_scale_shift_norm": True}),
    "res_up": (ResBlock, {**RES, "up": True}),
    "res_down": (
        ResBlock, {**RES, "down": True, "use_scale_shift_norm": True, "out_channels": 64}
    ),
    "res_conv_skip": (ResBlock, {**RES, "out_channels": 32, "use_conv": True}),
    "up_conv": (Upsample, {"channels": 64}),
    "up_noconv": (Upsample, {"channels": 64, "use_conv": False}),
    "down_conv": (Downsample, {"channels": 64}),
    "down_pool": (Downsample, {"channels": 64, "use_conv": False}),
    "groupnorm32_bf16_input": (GroupNorm, {"channels": 64}),
    "st_linear": (SpatialTransformer, LINEAR),
    "st_conv": (SpatialTransformer, SPATIAL),
    "st_small_input": (SpatialTransformer, LINEAR),
    "st_conv_small_input": (SpatialTransformer, SPATIAL),
    "st_disable_self": (SpatialTransformer, {**LINEAR, "disable_self_attn": True}),
    "btb": (TransformerBlock, {**BLOCK, "context_dim": 24}),
    "btb_small": (TransformerBlock, {**BLOCK, "context_dim": 24}),
    "btb_nocontext_gelu_ff": (TransformerBlock, {**BLOCK, "gated_ff": False}),
    "xattn": (CrossAttention, CROSS),
    "xattn_mask": (CrossAttention, CROSS),
    "xattn_self_rect": (CrossAttention, {"query_dim": 64, "heads": 3, "dim_head": 8}),
    "ff_glu": (FeedForward, {"dim": 64, "glu": True}),
    "ff_plain": (FeedForward, {"dim": 64, "dim_out": 20, "mult": 2}),
    "geglu": (GEGLU, {"dim_in": 64, "dim_out": 12}),
    "attn_block_legacy": (AttentionBlock, {"channels": 64, "num_heads": 4}),
    "attn_block_new": (AttentionBlock, NEW_ORDER),
    "vae_res": (autoencoder.ResnetBlock, {"in_channels": 64, "out_channels": 32}),
    "vae_res_small": (autoencoder.ResnetBlock, {"in_channels": 64, "out_channels": 64}),
    "vae_attn": (autoencoder.AttnBlock, {"in_channels": 64}),
    "vae_attn_small": (autoencoder.AttnBlock, {"in_channels": 64}),
    "vae_down": (autoencoder.AsymmetricDownsample, {"channels": 64}),
    "vae_down_pool": (autoencoder.AsymmetricDownsample, {"channels": 64, "use_conv": False}),
    "vae_up": (Upsample, {"channels": 64}),
    "vae_up_noconv": (Upsample, {"channels": 64, "use_conv": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    return load_golden("modules")


@pytest.mark.parametrize("case", MODULES)
def test_a_module_equals_the_recorded_one(golden, case):
    module_class, options = MODULES[case]
    module = module_class(**options)
    info = golden.case(case)
    salt = info["info"].get("salt", golden.meta["salt"])
    module.load_state_dict(fill(module.state_dict(), salt))
    inputs = golden.inputs(case)
    with torch.no_grad():
        ours = module(*(inputs[name] for name in info["inputs"]))
    assert_close(ours, golden.outputs(case)["out"], tolerance=1e-5)  # observed: 1.1e-6


@pytest.mark.parametrize(
    "case",
    [
        "base_640_depth2",
        "base_640_small_input",
        pytest.param("base_1280_depth10", marks=pytest.mark.slow),
        "refiner_768_depth4",
        pytest.param("refiner_1536_depth4", marks=pytest.mark.slow),
    ],
)
def test_a_full_width_transformer_of_sdxl_equals_the_recorded_one(case):
    golden = load_golden("sdxl_modules")
    info = golden.case(case)["info"]
    with meta_device():
        module = SpatialTransformer(**{k: v for k, v in info["params"].items() if k != "attn_type"})
    fill_on_demand(module, golden.meta["salt"], info["prefix"])
    with torch.no_grad():
        ours = module(**golden.inputs(case))
    assert_close(ours, golden.outputs(case)["y"], tolerance=2e-5)


def test_timestep_embeddings_equal_the_recorded_ones():
    """float32 angles of up to 1000 are rounded by 3e-5. Observed: 2.9e-5."""
    golden = load_golden("timestep_embedding")
    for case in golden.cases:
        info, name = case["info"], case["name"]
        ours = timestep_embedding(golden.inputs(name)["t"], info["dim"], info["max_period"])
        assert_close(ours, golden.outputs(name)["emb"], tolerance=2e-4)


def test_fractional_timesteps_are_not_rounded_and_odd_widths_end_in_a_zero():
    integer, fractional = timestep_embedding(torch.tensor([799.0, 799.2]), 33)
    assert (integer - fractional).abs().max() > 0.1
    assert integer[-1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_in_half_precision_keeps_float32_statistics(dtype):
    x = (torch.randn(2, 64, 16, 16) * 3 + 50).to(dtype)
    norm = GroupNorm(64)
    exact = norm(x.float())
    for half in (norm(x), norm.to(dtype)(x)):
        assert half.dtype == dtype
        assert (half - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_residual_branches_start_at_zero():
    x, emb, context = torch.randn(2, 64, 4, 6), torch.randn(2, 40), torch.randn(2, 5, 24)
    assert torch.equal(ResBlock(**RES)(x, emb), x)
    assert torch.equal(SpatialTransformer(**SPATIAL)(x, context), x)
    assert torch.equal(SpatialTransformer(**LINEAR)(x, context), x)


def test_each_block_attends_to_its_own_context():
    torch.manual_seed(0)
    module = SpatialTransformer(**{**SPATIAL, "context_dim": [24, 40]}, depth=2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, contexts = torch.randn(2, 64, 4, 6), [torch.randn(2, 5, 24), torch.randn(2, 3, 40)]
    h = module.proj_in(module.norm(x)).flatten(2).transpose(1, 2)
    for block, context in zip(module.transformer_blocks, contexts, strict=True):
        h = block(h, context)
    expected = x + module.proj_out(h.transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(module(x, contexts), expected, rtol=0, atol=1e-5)


INVALID = [
    (lambda: GroupNorm(48), "48 channels are not a multiple of 32"),
    (
        lambda: AttentionBlock(channels=64, num_heads=3),
        "64 channels cannot be divided among 3 heads",
    ),
    (lambda: SpatialTransformer(**{**SPATIAL, "context_dim": [24]}, depth=2), "1 entries for 2"),
    (
        lambda: SpatialTransformer(**SPATIAL)(torch.ones(1, 64, 4, 4), [torch.ones(1, 5, 24)] * 3),
        "context has 3 entries for 1 transformer blocks",
    ),
    (
        lambda: CrossAttention(**CROSS)(torch.ones(1, 3, 64), torch.ones(1, 5, 768)),
        "the context needs 24 features, got 768",
    ),
]


@pytest.mark.parametrize(("function", "message"), INVALID)
def test_invalid_settings_and_inputs_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()
