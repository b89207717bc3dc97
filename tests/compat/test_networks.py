"""The networks under the original's names: recorded numbers, types, attributes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compathelp import DDCONFIG, build_tiny_unet, compute_error
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
AUTOENCODERS = ["vae_f8", "vae_f16_attn", pytest.param("vae_f4", marks=SLOW)]


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
            output = module(*(golden.inputs(name)[key] for key in case["inputs"]))
        assert compute_error(output, golden.outputs(name)["out"]) < 1e-5, name


@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_the_recorded_one(name):
    """Observed: 3.8e-6."""
    golden = load_golden(f"unet_{name}")
    unet = instantiate_from_config(golden.meta["config"]).eval()
    unet.load_state_dict(golden.weights(unet.state_dict()))
    for case in ("nonsq", "tiny_x"):
        inputs = golden.inputs(case)
        with torch.no_grad():
            eps = unet(inputs["x"], inputs["timesteps"], inputs.get("context"), inputs.get("y"))
        assert compute_error(eps, golden.outputs(case)["eps"]) < 4e-5, case


class CustomAutoencoder(nn.Module):
    """An autoencoder class of third-party code."""

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
    vae = CustomAutoencoder(params["ddconfig"], params["embed_dim"]).eval()
    vae.load_state_dict(golden.weights(vae.state_dict()))
    for case in (case["name"] for case in golden.cases if case["name"][:3] in ("enc", "dec")):
        with torch.no_grad():
            if case.startswith("enc"):
                name, output = "parameters", vae.quant_conv(vae.encoder(golden.inputs(case)["x"]))
            else:
                z = golden.inputs(case)["z"]
                name, output = "dec", vae.decoder(vae.post_quant_conv(z))
        assert compute_error(output, golden.outputs(case)[name]) < 4e-5, case


def test_an_encoder_without_double_z_has_half_the_channels():
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


UNET_OPTIONS = [
    {"num_classes": "sequential", "adm_in_channels": 6, "transformer_depth": [1, 2]},
    {"num_classes": "timestep", "transformer_depth_middle": 0, "resblock_updown": True},
    {"conv_resample": False, "disable_middle_transformer": True},
]


@pytest.mark.parametrize("options", UNET_OPTIONS)
def test_a_unet_is_swapped_to_the_class_of_the_original(options):
    unet = nethelp.build_tiny_unet(**options)
    swapped = swap_classes(copy.deepcopy(unet))
    assert type(swapped) is UNetModel
    y = {"sequential": torch.ones(2, 6), "timestep": torch.ones(2)}.get(options.get("num_classes"))
    x, t, context = nethelp.make_tiny_inputs()
    with torch.no_grad():
        assert compute_error(swapped(x, t, context, y=y), unet(x, t, context, y)) < 1e-6
    assert type(unet.out[-1]) is not nn.Conv2d
    assert type(swapped.out[-1]) is nn.Conv2d
    assert [swapped.dtype, swapped.image_size] == [torch.float32, 32]


def test_an_autoencoder_is_swapped_to_the_classes_of_the_original():
    vae = nethelp.build_tiny_autoencoder(attn_resolutions=[128])
    x, z = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 4, 4)
    swapped = swap_classes(copy.deepcopy(vae))
    assert [type(swapped.encoder), type(swapped.decoder)] == [model.Encoder, model.Decoder]
    assert type(swapped.decoder.up[1].upsample) is model.Upsample
    encoder, decoder = swapped.encoder, swapped.decoder
    assert (encoder.num_resolutions, encoder.in_channels, decoder.num_res_blocks) == (3, 3, 1)
    with torch.no_grad():
        assert compute_error(swapped.encoder(x), vae.encoder(x)) < 1e-6
        assert compute_error(swapped.decoder(z), vae.decoder(z)) < 1e-6


def test_layers_are_those_of_torch_and_classes_have_the_names_of_the_original():
    unet = build_tiny_unet(num_classes=10, resblock_updown=True)
    spatial = build_tiny_unet(use_spatial_transformer=False, context_dim=None)
    vae = instantiate_from_config({"target": DECODER, "params": {**DDCONFIG}})
    compat_classes = {
        "UNetModel", "TimestepEmbedSequential", "ResBlock", "Upsample", "Downsample",
        "AttentionBlock", "SpatialTransformer", "BasicTransformerBlock", "CrossAttention",
        "FeedForward", "GEGLU", "GroupNorm32", "Decoder", "ResnetBlock", "AttnBlock",
        "ResolutionLevel", "MiddleBlock",
    }  # fmt: skip
    names = set()
    for layer in (m for network in (unet, spatial, vae) for m in network.modules()):
        cls = type(layer)
        assert cls.__module__.startswith("torch.nn.modules.") or cls.__name__ in compat_classes
        names.add(cls.__name__)
    assert names >= compat_classes
