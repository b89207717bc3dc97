"""What third-party code does with the networks: replace, subclass, hook, freeze, build on meta."""

import copy
import pickle
from importlib import import_module
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from compathelp import DDCONFIG, TINY, attend, build_tiny_unet, compute_error, randomize_zeros
from torch import nn

import ldm
from ldm.compat.attention import (
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
)
from ldm.compat.diffusion_util import conv_nd, timestep_embedding, zero_module
from ldm.compat.model import Decoder
from ldm.compat.openaimodel import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    UNetModel,
)
from ldm.compat.util import instantiate_from_config
from nets.nethelp import get_shapes, make_tiny_inputs, read_original_shapes

WITHOUT_TRANSFORMERS = {"use_spatial_transformer": False, "context_dim": None}


@pytest.fixture(scope="module")
def networks():
    """A UNet with transformers, one with AttentionBlock, and a decoder: built before any change."""
    return (
        build_tiny_unet(),
        build_tiny_unet(**WITHOUT_TRANSFORMERS),
        randomize_zeros(Decoder(**DDCONFIG)),
    )


@torch.no_grad()
def run(networks):
    unet, pixel_unet, decoder = networks
    x, t, context = make_tiny_inputs()
    return [unet(x, t, context), pixel_unet(x, t), decoder(x)]


@pytest.fixture(scope="module")
def expected(networks):
    return run(networks)


# "MODULE NAME" of what third-party code replaces: the class of the layers that each call it once.
REPLACEMENTS = {
    "attention CrossAttention.forward": CrossAttention,
    "attention BasicTransformerBlock.forward": BasicTransformerBlock,
    "attention BasicTransformerBlock._forward": BasicTransformerBlock,
    "attention SpatialTransformer.forward": SpatialTransformer,
    "attention GEGLU.forward": FeedForward,
    "diffusionmodules.openaimodel ResBlock.forward": ResBlock,
    "diffusionmodules.openaimodel ResBlock._forward": ResBlock,
    "diffusionmodules.openaimodel AttentionBlock.forward": AttentionBlock,
    "diffusionmodules.openaimodel UNetModel.forward": UNetModel,
    "diffusionmodules.openaimodel TimestepEmbedSequential.forward": TimestepEmbedSequential,
    "diffusionmodules.openaimodel timestep_embedding": UNetModel,
    "diffusionmodules.util GroupNorm32.forward": "GroupNorm32",
    "diffusionmodules.model AttnBlock.forward": "AttnBlock",
    "diffusionmodules.model nonlinearity": None,
    "torch.nn Linear.forward": nn.Linear,
    "torch.nn Conv2d.forward": nn.Conv2d,
    "torch.nn GroupNorm.forward": nn.GroupNorm,
    "torch.nn LayerNorm.forward": nn.LayerNorm,
}


@pytest.mark.parametrize("target", REPLACEMENTS)
def test_replacements_act_on_networks_already_built(target, networks, expected, monkeypatch):
    module, _, path = target.partition(" ")
    owner = import_module(module if module == "torch.nn" else f"ldm.modules.{module}")
    *classes, name = path.split(".")
    for class_name in classes:
        owner = getattr(owner, class_name)
    original, calls = getattr(owner, name), []

    def replacement(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)
    outputs = run(networks)
    cls = REPLACEMENTS[target]
    layers = [layer for network in networks for layer in network.modules()]
    if cls is None:
        assert len(calls) == 2 * sum(type(m).__name__ == "ResnetBlock" for m in layers) + 1
    else:
        has_class = [type(m).__name__ == cls if isinstance(cls, str) else isinstance(m, cls)
                     for m in layers]  # fmt: skip
        assert len(calls) == sum(has_class) > 0
    assert all(map(torch.equal, outputs, expected))


def test_feature_maps_of_odd_sizes_are_concatenated_by_a_replaced_torch(networks, monkeypatch):
    class ResizingTorch:
        calls = 0

        def __getattr__(self, name):
            return getattr(torch, name)

        def cat(self, tensors, *args, **kwargs):
            self.calls += 1
            first, second = tensors
            if first.shape[-2:] != second.shape[-2:]:
                first = F.interpolate(first, second.shape[-2:], mode="nearest")
            return torch.cat([first, second], *args, **kwargs)

    (x, t, context), replaced = make_tiny_inputs(), ResizingTorch()
    with pytest.raises(RuntimeError):
        networks[0](x[:, :, :7, :5], t, context)
    monkeypatch.setattr(import_module("ldm.modules.diffusionmodules.openaimodel"), "th", replaced)
    assert networks[0](x[:, :, :7, :5], t, context).shape == (2, 4, 7, 5)
    assert replaced.calls == len(networks[0].output_blocks)


class ControlledUNet(UNetModel):
    """Adds feature maps of a control branch to the skip connections, as ControlNet does."""

    def forward(self, x, timesteps=None, context=None, control=None, **kwargs):
        skips = []
        with torch.no_grad():
            emb = timestep_embedding(timesteps, self.model_channels, repeat_only=False)
            emb = self.time_embed(emb)
            h = x.type(self.dtype)
            for block in self.input_blocks:
                h = block(h, emb, context)
                skips.append(h)
            h = self.middle_block(h, emb, context)
        if control is not None:
            h += control.pop()
        for block in self.output_blocks:
            skip = skips.pop()
            if control is not None:
                skip = skip + control.pop()
            h = block(torch.cat([h, skip], dim=1), emb, context)
        return self.out(h.type(x.dtype))


class ControlBranch(nn.Module):
    """A copy of the encoder that takes a hint in pixels and ends in zero convolutions."""

    def __init__(self, image_size, in_channels, hint_channels, model_channels, **sizes):
        super().__init__()
        self.model_channels, mults = model_channels, sizes["channel_mult"]
        width = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        layers = [conv_nd(2, hint_channels, 16, 3, padding=1), nn.SiLU()]
        for ch_in, ch in ((16, 32), (32, 96), (96, 32)):
            layers += [conv_nd(2, ch_in, ch, 3, padding=1, stride=2), nn.SiLU()]
        last = zero_module(conv_nd(2, 32, model_channels, 3, padding=1))
        self.input_hint_block = TimestepEmbedSequential(*layers, last)
        first = conv_nd(2, in_channels, model_channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        ch, widths = model_channels, [model_channels]
        common = {"dims": 2, "use_checkpoint": False, "use_scale_shift_norm": False}

        def attention(ch):
            return SpatialTransformer(
                ch, ch // 16, 16, depth=1, context_dim=24, disable_self_attn=False,
                use_linear=True, use_checkpoint=False,
            )  # fmt: skip

        for level, mult in enumerate(mults):
            for _ in range(sizes["num_res_blocks"]):
                block = [ResBlock(ch, width, 0, out_channels=mult * model_channels, **common)]
                ch = mult * model_channels
                if 2**level in sizes["attention_resolutions"]:
                    block.append(attention(ch))
                self.input_blocks.append(TimestepEmbedSequential(*block))
                widths.append(ch)
            if level < len(mults) - 1:
                downsample = Downsample(ch, True, dims=2, out_channels=ch)
                self.input_blocks.append(TimestepEmbedSequential(downsample))
                widths.append(ch)
        self.middle_block = TimestepEmbedSequential(
            ResBlock(ch, width, 0, **common), attention(ch), ResBlock(ch, width, 0, **common)
        )
        self.zero_convs = nn.ModuleList(self._zero_conv(ch) for ch in widths)
        self.middle_block_out = self._zero_conv(ch)

    def _zero_conv(self, ch):
        return TimestepEmbedSequential(zero_module(conv_nd(2, ch, ch, 1, padding=0)))

    def forward(self, x, hint, timesteps, context, **kwargs):
        emb = timestep_embedding(timesteps, self.model_channels, repeat_only=False)
        emb = self.time_embed(emb)
        guided_hint = self.input_hint_block(hint, emb, context)
        h, residuals = x, []
        for block, zero_conv in zip(self.input_blocks, self.zero_convs, strict=True):
            h = block(h, emb, context)
            if not residuals:
                h = h + guided_hint
            residuals.append(zero_conv(h, emb, context))
        h = self.middle_block(h, emb, context)
        return [*residuals, self.middle_block_out(h, emb, context)]


def test_only_a_control_branch_is_trained_which_starts_without_effect():
    sizes = {
        "num_res_blocks": 2, "channel_mult": [1, 1, 1, 2], "attention_resolutions": [1, 2],
    }  # fmt: skip
    plain = build_tiny_unet(**sizes)
    config = {"image_size": 8, "in_channels": 4, "model_channels": 32, **sizes}
    target = {"target": f"{__name__}.ControlBranch", "params": {**config, "hint_channels": 3}}
    branch = randomize_zeros(instantiate_from_config(target))
    for conv in (*branch.zero_convs, branch.middle_block_out, branch.input_hint_block[-1:]):
        zero_module(conv)
    added = {"input_hint_block", "zero_convs", "middle_block_out"}
    shared = {key for key in branch.state_dict() if key.split(".")[0] not in added}
    weights = plain.state_dict()
    assert shared == {k for k in weights if k.startswith(("time_", "input_", "middle_"))}
    branch.load_state_dict({key: weights[key] for key in shared}, strict=False)
    unet = ControlledUNet(**{**TINY, **sizes}).eval()
    unet.load_state_dict(weights)
    unet.requires_grad_(False)

    x, t, context = make_tiny_inputs()
    hint = torch.rand(2, 3, 64, 64)
    residuals = branch(x, hint, t, context)
    assert [len(residuals), len(branch.input_hint_block)] == [13, 9]
    with torch.no_grad():
        assert torch.equal(unet(x, t, context), plain(x, t, context))
        assert torch.equal(unet(x, t, context, control=list(residuals)), plain(x, t, context))
    unet(x, t, context, control=residuals).square().sum().backward()
    assert all(p.grad is None for p in unet.parameters())
    assert all(conv[0].weight.grad.count_nonzero() for conv in branch.zero_convs)
    assert branch.middle_block_out[0].weight.grad.count_nonzero()


def test_attention_is_replaced_layer_by_layer_and_only_its_weights_are_trained(networks, expected):
    unet = copy.deepcopy(networks[0])
    calls = []

    def forward(self, x, context=None, mask=None):
        calls.append("self" if context is None else "cross")
        return attend(self, x, context)

    for layer in unet.modules():
        if type(layer) is CrossAttention and layer.__class__.__name__ == "CrossAttention":
            layer.forward = MethodType(forward, layer)
        if isinstance(layer, BasicTransformerBlock):
            assert layer.checkpoint is False
            layer.checkpoint = True
    for name, parameter in unet.named_parameters():
        parameter.requires_grad = "attn2.to_k" in name or "attn2.to_v" in name
    output = unet(*make_tiny_inputs())
    num_blocks = sum(type(layer) is BasicTransformerBlock for layer in unet.modules())
    assert calls == ["self", "cross"] * num_blocks
    assert compute_error(output, expected[0]) < 1e-5
    output.square().sum().backward()
    assert len(calls) == 4 * num_blocks  # activations were computed again
    trained = {name for name, p in unet.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * num_blocks


def test_features_are_read_by_hooks_and_wrapped_methods(networks, expected, monkeypatch):
    monkeypatch.setattr("ldm.nets.cpu.layers.BLOCK_BYTES", 1)  # the code path of full-size inputs
    unet = copy.deepcopy(networks[0])
    features = {}

    def make_hook(name):
        return lambda module, args, output: features.setdefault(name, output)

    transformer = unet.output_blocks[-1][1]
    for name, layer in {
        "input 1": unet.input_blocks[1],
        "in_layers": unet.output_blocks[-1][0].in_layers,
        "out_layers": unet.output_blocks[-1][0].out_layers,
        "attn1": transformer.transformer_blocks[0].attn1,
        "geglu": transformer.transformer_blocks[0].ff.net[0],
        "norm": transformer.norm,
    }.items():
        layer.register_forward_hook(make_hook(name))
    for i, block in enumerate(unet.output_blocks):

        def forward(self, h, emb, context, i=i, original=block.forward):
            return features.setdefault(f"output {i}", original(h, emb, context))

        block.forward = MethodType(forward, block)
    with torch.no_grad():
        assert torch.equal(unet(*make_tiny_inputs()), expected[0])
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    assert shapes == {
        "input 1": (2, 32, 8, 8),
        "in_layers": (2, 32, 8, 8),
        "out_layers": (2, 32, 8, 8),
        "attn1": (2, 64, 32),
        "geglu": (2, 64, 128),
        "norm": (2, 32, 8, 8),
        "output 0": (2, 64, 4, 4),
        "output 1": (2, 64, 8, 8),
        "output 2": (2, 32, 8, 8),
        "output 3": (2, 32, 8, 8),
    }
    assert all(value.is_contiguous() for value in features.values())


def test_blocks_may_be_inserted_and_removed(networks):
    class Motion(nn.Module):
        def forward(self, x):
            return x + 1

    unet = copy.deepcopy(networks[0])
    before = unet(*make_tiny_inputs())
    unet.middle_block.insert(-1, Motion())
    unet.output_blocks[0].append(Motion())
    assert not torch.equal(unet(*make_tiny_inputs()), before)
    unet.middle_block.pop(-2)
    del unet.output_blocks[0][-1]
    assert torch.equal(unet(*make_tiny_inputs()), before)


def test_gradient_checkpointing_gives_the_same_gradients_even_to_a_frozen_network():
    gradients = []
    for use_checkpoint in (False, True):
        unet = build_tiny_unet(use_checkpoint=use_checkpoint).requires_grad_(False)
        x, t, context = make_tiny_inputs()
        context.requires_grad_()
        unet(x, t, context).square().sum().backward()
        gradients.append(context.grad)
    assert gradients[0].count_nonzero()
    assert torch.allclose(*gradients, atol=1e-6)
    block = BasicTransformerBlock(32, 2, 16)
    assert block.checkpoint
    block(torch.ones(1, 4, 32)).sum().backward()  # the original fails here without a context
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_attributes_are_those_of_the_original(networks):
    unet = build_tiny_unet(use_fp16=True)
    assert [unet.dtype, build_tiny_unet(use_bf16=True).dtype] == [torch.float16, torch.bfloat16]
    assert unet.num_res_blocks == [1, 1]
    assert [unet.image_size, unet._feature_size, unet.predict_codebook_ids] == [8, 416, False]
    unet.dtype = torch.float32
    assert torch.equal(unet(*make_tiny_inputs()), networks[0](*make_tiny_inputs()))
    block = unet.output_blocks[0][0]
    assert [block.channels, block.out_channels, block.emb_channels] == [128, 64, 128]
    assert [block.updown, block.use_conv, block.dropout] == [False, False, 0.0]
    assert ResBlock(32, 128, 0.0, use_conv=True).use_conv
    transformer = unet.middle_block[1]
    assert [transformer.in_channels, transformer.use_linear] == [64, True]
    attention = transformer.transformer_blocks[0].attn2
    assert [attention.heads, attention.scale] == [4, 0.25]
    decoder = networks[2]
    assert [decoder.num_resolutions, decoder.num_res_blocks, decoder.resolution] == [2, 1, 32]
    resnet = decoder.up[0].block[0]
    assert [resnet.in_channels, resnet.out_channels, resnet.use_conv_shortcut] == [64, 32, False]
    assert not hasattr(decoder.mid.block_1, "nin_shortcut")


def test_a_network_computes_in_the_dtype_that_is_assigned(networks):
    unet = copy.deepcopy(networks[0]).bfloat16()
    unet.dtype = torch.bfloat16
    x, t, context = make_tiny_inputs()
    with torch.no_grad():
        half, exact = unet(x.bfloat16(), t, context.bfloat16()), networks[0](x, t, context)
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 3e-2 * exact.norm()


def test_networks_are_copied_and_pickled(networks, expected):
    copies = [pickle.loads(pickle.dumps(copy.deepcopy(network))) for network in networks]
    assert all(map(torch.equal, run(copies), expected))


SD2_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "attention_resolutions": [4, 2, 1], "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64, "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "transformer_depth": 1, "context_dim": 1024, "legacy": False, "use_checkpoint": False,
    "use_fp16": False,
}  # fmt: skip


def test_a_full_size_network_is_built_on_the_meta_device_by_replaced_constructors(monkeypatch):
    for cls in (nn.Linear, nn.Conv2d):

        def init_on_meta(self, *args, original=cls.__init__, **kwargs):
            original(self, *args, **{**kwargs, "device": "meta"})

        monkeypatch.setattr(cls, "__init__", init_on_meta)
    unet = UNetModel(**SD2_UNET)
    prefix = "model.diffusion_model."
    published = read_original_shapes("v2-inference").items()
    assert get_shapes(unet) == {k.removeprefix(prefix): v for k, v in published if prefix in k}
    layers = [layer for layer in unet.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    assert all(layer.weight.is_meta for layer in layers)


def test_our_own_models_use_no_class_of_compat():
    """No config can name the classes of the original's modules, which are imported here."""
    config = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel"}
    unet = ldm.instantiate({**config, "params": TINY})
    assert not isinstance(unet, UNetModel)
    assert {type(m).__module__.split(".")[0] for m in unet.modules()} <= {"ldm", "torch"}
    assert not any("compat" in type(layer).__module__ for layer in unet.modules())
    for target in ("ldm.modules.attention.CrossAttention", "ldm.compat.attention.CrossAttention"):
        with pytest.raises(ValueError, match="unknown target"):
            ldm.instantiate({"target": target, "params": {"query_dim": 32}})
