import pytest
import torch
from torch.func import functional_call

from goldfile import load_golden
from ldm.loading.build import meta_device
from ldm.loading.diffusers.locations import convert_to_diffusers, locate_unet
from ldm.loading.diffusers.names import rename_unet_layers
from ldm.nets.blocks import timestep_embedding
from ldm.nets.unet import UNet
from nets.nethelp import (
    TINY_UNET,
    assert_close,
    build_golden_network,
    build_network,
    build_tiny_unet,
    get_shapes,
    make_tiny_inputs,
    read_original_shapes,
)
from quick import slow_except
from recipe import fill, fill_on_demand

SMALL_FILES = ["adm", "depth", "inpaint", "misc", "unclip", "upscaler", "v1", "v2"]
NARROW_CONFIGS = ["v1", "v2", "inpaint", "depth", "x4", "unclip_h", "unclip_l"]
FULL_SIZE_FILES = ["v1", "v2", "inpaint", "depth", "x4", "unclip_h"]


def run_unet(unet, inputs):
    with torch.no_grad():
        return unet(inputs["x"], inputs["timesteps"], inputs.get("context"), inputs.get("y"))


@pytest.mark.parametrize("name", SMALL_FILES)
def test_small_unet_equals_the_recorded_one(name):
    golden = load_golden(f"unet_{name}")
    unet = build_golden_network(golden, UNet)
    for case in ("sq16", "nonsq", "floatt", "odd_mid", "tiny_x", "big_x"):
        ours = run_unet(unet, golden.inputs(case))
        golden.assert_close(case, eps=ours)


@pytest.mark.parametrize("name", slow_except(NARROW_CONFIGS, "v1", "v2", "x4", "unclip_h"))
def test_narrow_unet_of_each_family_equals_the_recorded_one(name):
    golden = load_golden("unet_faithful_recipe")
    unet = build_golden_network(golden, UNet, golden.meta[f"config_{name}"])
    ours = run_unet(unet, golden.inputs(name))
    golden.assert_close(name, eps=ours)


SDXL_CASES = {
    "base": "sq nonsq floatt tiny_x big_x small",
    "refiner": "sq nonsq",
    "inpaint": "",
    "convproj_all_levels": "",
    "timestep_class": "",
    "continuous_updown": "",
    "int_class_nomid": "",
    "depth0_noclass": "",
}


@pytest.mark.parametrize("name", SDXL_CASES)
def test_sdxl_unet_equals_the_recorded_one(name):
    golden = load_golden("sdxl_unet")
    unet = build_golden_network(golden, UNet, golden.meta[f"config_{name}"])
    for case in [f"{name}_{size}" for size in SDXL_CASES[name].split()] or [name]:
        ours = run_unet(unet, golden.inputs(case))
        golden.assert_close(case, eps=ours)


def test_each_block_of_an_sdxl_unet_equals_the_recorded_one():
    golden = load_golden("sdxl_unet")
    unet = build_golden_network(golden, UNet, golden.meta["config_base"])
    blocks = {f"in_{i}": block for i, block in enumerate(unet.input_blocks)}
    blocks |= {f"out_{i}": block for i, block in enumerate(unet.output_blocks)}
    outputs = {}
    for name, block in {**blocks, "mid": unet.middle_block}.items():
        block.register_forward_hook(lambda *args, name=name: outputs.update({name: args[-1]}))
    run_unet(unet, golden.inputs("base_small"))
    expected = golden.outputs("base_inter")
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        assert_close(output, expected[name])


@pytest.fixture(scope="module", params=["base", "refiner"])
def full_sdxl(request):
    """`base` or `refiner`, the golden file of the full-size UNet, and the UNet without weights."""
    golden = load_golden(f"sdxl_full_unet_{request.param}")
    with meta_device():
        return request.param, golden, build_network(UNet, golden.meta["config"])


def test_full_size_sdxl_unet_has_the_names_and_shapes_of_published_files(full_sdxl):
    name, _, unet = full_sdxl
    prefix = "model.diffusion_model."
    published = read_original_shapes(f"sd_xl_{name}").items()
    assert get_shapes(unet) == {k.removeprefix(prefix): v for k, v in published if prefix in k}


def test_full_size_sdxl_embeddings_equal_the_recorded_ones(full_sdxl):
    name, _, unet = full_sdxl
    golden = load_golden("sdxl_modules")
    inputs, expected = golden.inputs(f"emb_{name}"), golden.outputs(f"emb_{name}")
    t = timestep_embedding(inputs["timesteps"], unet.model_channels)
    for layer_name, value in {"time_embed": t, "label_emb": inputs["y"]}.items():
        layer = unet.get_submodule(layer_name)
        weights = fill(layer.state_dict(), golden.meta["salt"], f"{layer_name}.")
        with torch.no_grad():
            ours = functional_call(layer, weights, value)
        assert_close(ours, expected[layer_name])


@pytest.mark.slow
def test_full_size_sdxl_unet_equals_the_recorded_one(full_sdxl):
    """Takes 0.9 GB of memory. Observed error: 2.2e-5 (base), 1e-5 (refiner)."""
    _, golden, unet = full_sdxl
    fill_on_demand(unet, golden.meta["salt"])
    ours = run_unet(unet, golden.inputs("a"))
    golden.assert_close("a", eps=ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE_FILES)
def test_full_size_unet_equals_the_recorded_one(name):
    golden = load_golden(f"full_unet_{name}")
    with meta_device():
        unet = build_network(UNet, golden.meta["config"])
    unet.load_state_dict(golden.weights(unet.state_dict()), assign=True)
    ours = run_unet(unet, golden.inputs("a"))
    golden.assert_close("a", eps=ours)


def test_pruned_sdxl_unets_have_the_parameters_of_their_depths():
    """diffusers counts as many parameters for the configs of their folders."""
    base = load_golden("sdxl_full_unet_base").meta["config"]
    for depths, output_depths, num_parameters in (
        ([[0, 0], [2, 2], [4, 4]], [4, 4, 10, 2, 1, 1, 0, 0, 0], 1_331_334_404),  # SSD-1B
        ([[0, 0], [1, 1], [2, 2]], [2, 2, 2, 1, 1, 1, 0, 0, 0], 745_225_604),  # Segmind Vega
    ):
        changes = {
            "transformer_depth": depths,
            "transformer_depth_output": output_depths,
            "transformer_depth_middle": 0,
        }
        with meta_device():
            unet = build_network(UNet, {"params": {**base["params"], **changes}})
        assert sum(p.numel() for p in unet.parameters()) == num_parameters


DIFFUSERS_CONFIG = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
    "cross_attention_dim": 24, "norm_num_groups": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SD1 = {"num_heads": 4, "num_head_channels": -1, "use_linear_in_transformer": False}
HEADS = {"attention_head_dim": (2, 4), "use_linear_projection": True}
DIFFUSERS_CASES = {  # parameters of our UNet, of diffusers' UNet, and y
    "SD1": (SD1, {"attention_head_dim": 4}, None),
    "SD2": ({}, HEADS, None),
    "x4": (
        {"num_res_blocks": 2, "num_classes": 10},
        {**HEADS, "layers_per_block": 2, "num_class_embeds": 10},
        torch.tensor([3, 9]),
    ),
    "unCLIP": (
        {"num_classes": "sequential", "adm_in_channels": 12},
        {**HEADS, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        torch.linspace(-1, 1, 24).view(2, 12),
    ),
    "SDXL, pruned": (
        {
            "attention_resolutions": [1, 2],
            "transformer_depth": [[1], [2]],
            "transformer_depth_middle": 0,
            "transformer_depth_output": [3, 1, 2, 1],
        },
        {
            **HEADS,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "transformer_layers_per_block": [[1], [2]],
            "reverse_transformer_layers_per_block": [[3, 1], [2, 1]],
        },
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", DIFFUSERS_CASES)
def test_diffusers_computes_the_same(diffusers, family):
    our_params, their_params, y = DIFFUSERS_CASES[family]
    unet = build_tiny_unet(**{"attention_resolutions": [1], **our_params})
    theirs = diffusers.UNet2DConditionModel(**{**DIFFUSERS_CONFIG, **their_params}).eval()
    theirs.load_state_dict(convert_to_diffusers(locate_unet(unet.state_dict()), unet.state_dict()))
    x, t, context = make_tiny_inputs()
    for z in (x, x[:, :, :7, :5]):
        with torch.no_grad():
            expected = theirs(z, t, context, class_labels=y).sample
            assert_close(unet(z, t, context, y), expected, tolerance=1e-5)


def test_diffusers_adds_the_same_guidance_embedding(diffusers):
    unet = build_tiny_unet(attention_resolutions=[1], time_cond_proj_dim=6)
    theirs = diffusers.UNet2DConditionModel(
        **DIFFUSERS_CONFIG, **HEADS, time_cond_proj_dim=6
    ).eval()
    names = {"time_embed_cond.weight": "time_embedding.cond_proj.weight"}
    names |= rename_unet_layers(unet.state_dict().keys() - names)
    theirs.load_state_dict({names[k]: v for k, v in unet.state_dict().items()})
    x, t, context = make_tiny_inputs()
    embedding = torch.linspace(-1, 1, 12).view(2, 6)
    with torch.no_grad():
        expected = theirs(x, t, context, timestep_cond=embedding).sample
        ours = unet(x, t, context, guidance_embedding=embedding)
        assert_close(ours, expected, tolerance=1e-5)
        assert not torch.equal(ours, unet(x, t, context))


def test_a_new_unet_outputs_zeros():
    assert UNet(**TINY_UNET)(*make_tiny_inputs()).count_nonzero() == 0


def test_every_parameter_gets_a_gradient():
    unet = build_tiny_unet(
        num_classes="continuous", use_scale_shift_norm=True, resblock_updown=True
    )
    unet(*make_tiny_inputs(), y=torch.ones(2, 1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-5)]
)
def test_weights_determine_the_precision_and_x_the_dtype_of_the_result(dtype, limit):
    unet = build_tiny_unet()
    x, t, context = make_tiny_inputs()
    with torch.no_grad():
        exact = unet(x, t, context)
        ours = unet.to(dtype)(x, t, context)
    assert unet.dtype == dtype
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= limit * exact.norm()


def test_autocast_on_a_cpu_changes_little():
    unet = build_tiny_unet()
    exact = unet(*make_tiny_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = unet(*make_tiny_inputs())
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 2e-2 * exact.norm()


INVALID = [
    ({"model_channels": 48}, "48 channels are not a multiple of 32"),
    ({"num_head_channels": -1}, "num_head_channels must be at least 1, or -1 with num_heads"),
    ({"num_head_channels": 0, "num_heads": 4}, "num_head_channels must be at least 1"),
    ({"num_head_channels": 128}, "num_head_channels 128 exceeds 32 channels"),
    ({"context_dim": None}, "use_spatial_transformer and context_dim must be given together"),
    ({"num_res_blocks": [1, 1, 1]}, "num_res_blocks has 3 entries for 2 levels"),
    ({"disable_self_attentions": [True]}, "disable_self_attentions has 1 entries for 2 levels"),
    ({"num_classes": "sequential"}, "`sequential` with adm_in_channels"),
    ({"num_classes": "discrete"}, "with adm_in_channels, got `discrete`"),
    ({"transformer_depth": [[1], [2]]}, "by block needs transformer_depth_output"),
    (
        {"transformer_depth": [[1], []], "transformer_depth_output": [1] * 4},
        "transformer_depth has 0 entries for the 1 blocks of level 1",
    ),
    ({"transformer_depth_output": [1] * 5}, "has 5 entries for 4 output blocks"),
    ({"dims": 3}, "dims `3` is not supported"),
    ({"n_embed": 8}, "n_embed"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY_UNET, **changes})


def test_invalid_inputs_are_refused():
    unet, (x, t, context) = build_tiny_unet(), make_tiny_inputs()
    with pytest.raises(ValueError, match="8x7 does not fit this UNet: .* multiples of 2"):
        build_tiny_unet(resblock_updown=True)(x[:, :, :7], t, context)
    with pytest.raises(ValueError, match="takes 4 channels, got 3"):
        unet(x[:, :3], t, context)
    with pytest.raises(ValueError, match="takes no `y`"):
        unet(x, t, context, y=torch.ones(2))
    with pytest.raises(ValueError, match="needs `y`"):
        build_tiny_unet(num_classes=10)(x, t, context)
