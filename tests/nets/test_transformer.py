import pytest
import torch
from nethelp import assert_close

from goldfile import gold
from ldm.nets.transformer import (
    GEGLU,
    AttentionBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
    TransformerBlock,
)
from recipe import fill

SPATIAL = {"in_channels": 64, "n_heads": 4, "d_head": 16, "context_dim": 24}
BLOCK = {"dim": 64, "n_heads": 4, "d_head": 16}
CROSS = {"query_dim": 64, "context_dim": 24, "heads": 4, "dim_head": 16}
MODULES = {
    "st_linear": lambda: SpatialTransformer(**SPATIAL, use_linear=True),
    "st_conv": lambda: SpatialTransformer(**SPATIAL),
    "st_small_input": lambda: SpatialTransformer(**SPATIAL, use_linear=True),
    "st_conv_small_input": lambda: SpatialTransformer(**SPATIAL),
    "st_disable_self": lambda: SpatialTransformer(
        **SPATIAL, use_linear=True, disable_self_attn=True
    ),
    "btb": lambda: TransformerBlock(**BLOCK, context_dim=24),
    "btb_small": lambda: TransformerBlock(**BLOCK, context_dim=24),
    "btb_nocontext_gelu_ff": lambda: TransformerBlock(**BLOCK, gated_ff=False),
    "xattn": lambda: CrossAttention(**CROSS),
    "xattn_mask": lambda: CrossAttention(**CROSS),
    "xattn_self_rect": lambda: CrossAttention(query_dim=64, heads=3, dim_head=8),
    "ff_glu": lambda: FeedForward(dim=64, glu=True),
    "ff_plain": lambda: FeedForward(dim=64, dim_out=20, mult=2),
    "geglu": lambda: GEGLU(dim_in=64, dim_out=12),
    "attn_block_legacy": lambda: AttentionBlock(channels=64, num_heads=4),
    "attn_block_new": lambda: AttentionBlock(
        channels=64, num_head_channels=16, use_new_attention_order=True
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_module_equals_the_recorded_one(case):
    golden = gold("modules")
    module = MODULES[case]()
    module.load_state_dict(fill(module.state_dict(), golden.case(case)["info"]["salt"]))
    inputs = golden.inputs(case)
    ours = module(*(inputs[name] for name in golden.case(case)["inputs"]))
    assert_close(ours, golden.outputs(case)["out"], tolerance=1e-5)


def test_a_fresh_transformer_is_the_identity():
    x, context = torch.randn(2, 64, 4, 6), torch.randn(2, 5, 24)
    for use_linear in (True, False):
        assert torch.equal(SpatialTransformer(**SPATIAL, use_linear=use_linear)(x, context), x)


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


def test_each_block_hears_its_own_context():
    settings = {**SPATIAL, "context_dim": [24, 40], "depth": 2}
    module = randomised(SpatialTransformer(**settings))
    x, contexts = torch.randn(2, 64, 4, 6), [torch.randn(2, 5, 24), torch.randn(2, 3, 40)]
    h = module.proj_in(module.norm(x)).flatten(2).transpose(1, 2)
    for block, context in zip(module.transformer_blocks, contexts, strict=True):
        h = block(h, context)
    expected = x + module.proj_out(h.transpose(1, 2).reshape(x.shape))
    assert (module(x, contexts) - expected).abs().max() < 1e-5


def test_one_context_serves_all_blocks():
    module = randomised(SpatialTransformer(**SPATIAL, depth=2))
    x, context = torch.randn(2, 64, 4, 6), torch.randn(2, 5, 24)
    assert torch.equal(module(x, context), module(x, [context, context]))


def test_a_wrong_number_of_contexts_is_refused():
    module = SpatialTransformer(**SPATIAL, depth=2)
    with pytest.raises(ValueError, match="context has 3 entries for 2 transformer blocks"):
        module(torch.randn(1, 64, 4, 4), [torch.randn(1, 5, 24)] * 3)
    with pytest.raises(ValueError, match="context_dim has 1 entries for 2"):
        SpatialTransformer(**{**SPATIAL, "context_dim": [24]}, depth=2)


def test_a_context_of_another_encoder_is_refused():
    with pytest.raises(ValueError, match="to 24 features cannot take 768"):
        CrossAttention(**CROSS)(torch.randn(1, 3, 64), torch.randn(1, 5, 768))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 64 cannot be divided among 3 heads"):
        AttentionBlock(channels=64, num_heads=3)


@pytest.mark.parametrize("context", [None, torch.randn(2, 5, 64)])
def test_recomputing_a_block_gives_the_same_gradients(context):
    def gradients(use_checkpoint):
        block = randomised(TransformerBlock(**BLOCK, context_dim=64, use_checkpoint=use_checkpoint))
        x = torch.ones(2, 6, 64, requires_grad=True)
        return torch.autograd.grad(block(x, context).square().sum(), [x, *block.parameters()])

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)
