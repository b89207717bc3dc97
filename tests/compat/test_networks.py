"""The networks under the original's names: recorded numbers, types, attributes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compathelp import compute_error, tiny_unet
from torch import nn

from goldfile import load_golden
from ldm.compat import model
from ldm.compat.class_swap import swap_classes
from ldm.compat.openaimodel import UNetModel
from ldm.compat.util import get_obj_from_str, instantiate_from_config
from nets import nethelp
from quick import slow_except
from recipe import fill

SLOW = pytest.mark.slow
QUICK_UNETS = ("v1", "v2", "misc")
UNETS = slow_except([*QUICK_UNETS, "adm", "depth", "inpaint", "unclip", "upscaler"], *QUICK_UNETS)
DECODER = "ldm.modules.diffusionmodules.model.Decoder"
DDCONFIG = {
    "ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16],
    "in_channels": 3, "resolution": 32, "z_channels": 4, "double_z": True,
}  # fmt: skip
AUTOENCODERS = ["vae_f8", "vae_f16_attn", pytest.param("vae_f4", marks=SLOW)]


def load(golden, config):
    network = instantiate_from_config(config).eval()
    network.load_state_dict(golden.weights(network.state_dict()))
    return network


def unet_error(golden, unet, case):
    inputs = golden.inputs(case)
    with torch.no_grad():
        ours = unet(inputs["x"], inputs["timesteps"], inputs.get("context"), inputs.get("y"))
    return compute_error(ours, golden.outputs(case)["eps"])


def test_each_module_equals_the_recorded_one():
    """Observed: 1.1e-6."""
    golden = load_golden("modules")
    for case in golden.cases:
        info, name = case["info"], case["name"]
        if "args" not in info:
            continue
        module = get_obj_from_str(info["cls"])(**info["args"])
        module.load_state_dict(fill(module.state_dict(), info["salt"]))
        with torch.no_grad():
            ours = module(*(golden.inputs(name)[key] for key in case["inputs"]))
        assert compute_error(ours, golden.outputs(name)["out"]) < 1e-5, name


@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_the_recorded_one(name):
    """Observed: 3.8e-6."""
    golden = load_golden(f"unet_{name}")
    unet = load(golden, golden.meta["config"])
    for case in ("nonsq", "tiny_x"):
        assert unet_error(golden, unet, case) < 4e-5, case


class OwnAutoencoder(nn.Module):
    """As programs write their own."""

    def __init__(self, ddconfig, embed_dim):
        super().__init__()
        z_channels = ddconfig["z_channels"]
        self.encoder, self.decoder = model.Encoder(**ddconfig), model.Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_encoder_and_decoder_equal_the_recorded_ones(name):
    """Observed: 1.9e-6."""
    golden = load_golden(name)
    params = golden.meta["config"]["params"]
    vae = OwnAutoencoder(params["ddconfig"], params["embed_dim"]).eval()
    vae.load_state_dict(golden.weights(vae.state_dict()))
    for case in (case["name"] for case in golden.cases if case["name"][:3] in ("enc", "dec")):
        with torch.no_grad():
            if case.startswith("enc"):
                ours = vae.quant_conv(vae.encoder(golden.inputs(case)["x"]))
                recorded = golden.outputs(case)["parameters"]
            else:
                z = golden.inputs(case)["z"]
                ours, recorded = vae.decoder(vae.post_quant_conv(z)), golden.outputs(case)["dec"]
        assert compute_error(ours, recorded) < 4e-5, case


def test_an_encoder_without_variances_has_half_the_channels():
    encoder = model.Encoder(**DDCONFIG | {"double_z": False})
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 16, 16)


def test_a_residual_block_adds_an_embedding_and_widens_its_shortcut():
    block = model.ResnetBlock(
        in_channels=32, out_channels=64, conv_shortcut=True, dropout=0.0, temb_channels=16
    )
    x, temb = torch.randn(2, 32, 4, 6), torch.randn(2, 16)
    h = block.conv1(F.silu(block.norm1(x))) + block.temb_proj(F.silu(temb))[:, :, None, None]
    expected = block.conv_shortcut(x) + block.conv2(F.silu(block.norm2(h)))
    torch.testing.assert_close(block(x, temb), expected)


MODERN = [
    {"num_classes": "sequential", "adm_in_channels": 6, "transformer_depth": [1, 2]},
    {"num_classes": "timestep", "transformer_depth_middle": 0, "resblock_updown": True},
    {"conv_resample": False, "disable_middle_transformer": True},
]


@pytest.mark.parametrize("changes", MODERN)
def test_a_network_of_ours_becomes_one_of_the_original(changes):
    unet = nethelp.build_tiny_unet(**changes)
    swapped = swap_classes(copy.deepcopy(unet))
    assert type(swapped) is UNetModel
    y = {"sequential": torch.ones(2, 6), "timestep": torch.ones(2)}.get(changes.get("num_classes"))
    x, t, context = nethelp.make_tiny_inputs()
    with torch.no_grad():
        assert compute_error(swapped(x, t, context, y=y), unet(x, t, context, y)) < 1e-6
    assert type(unet.out[-1]) is not nn.Conv2d
    assert type(swapped.out[-1]) is nn.Conv2d
    assert [swapped.dtype, swapped.image_size] == [torch.float32, 32]


def test_an_autoencoder_of_ours_becomes_one_of_the_original():
    vae = nethelp.build_tiny_autoencoder(attn_resolutions=[128])
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 4, 4)
    swapped = swap_classes(copy.deepcopy(vae))
    assert [type(swapped.encoder), type(swapped.decoder)] == [model.Encoder, model.Decoder]
    assert [type(swapped.decoder.up[1].upsample), swapped.encoder.num_resolutions] == [
        model.Upsample,
        3,
    ]
    assert [swapped.decoder.num_res_blocks, swapped.encoder.in_channels] == [1, 3]
    with torch.no_grad():
        assert compute_error(swapped.encoder(x), vae.encoder(x)) < 1e-6
        assert compute_error(swapped.decoder(z), vae.decoder(z)) < 1e-6


def test_layers_are_those_of_torch_and_classes_have_the_names_of_the_original():
    unet = tiny_unet(num_classes=10, resblock_updown=True)
    spatial = tiny_unet(use_spatial_transformer=False, context_dim=None)
    vae = instantiate_from_config({"target": DECODER, "params": {**DDCONFIG}})
    own = {
        "UNetModel", "TimestepEmbedSequential", "ResBlock", "Upsample", "Downsample",
        "AttentionBlock", "SpatialTransformer", "BasicTransformerBlock", "CrossAttention",
        "FeedForward", "GEGLU", "GroupNorm32", "Decoder", "ResnetBlock", "AttnBlock",
        "ResolutionLevel", "MiddleBlock",
    }  # fmt: skip
    names = set()
    for layer in (m for network in (unet, spatial, vae) for m in network.modules()):
        kind = type(layer)
        assert kind.__module__.startswith("torch.nn.modules.") or kind.__name__ in own
        names.add(kind.__name__)
    assert names >= own
