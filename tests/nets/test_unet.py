import pytest
import torch
from nethelp import (
    TINY,
    assert_close,
    build,
    build_from,
    keys_of,
    noise_of,
    recorded_keys,
    tiny_inputs,
    tiny_unet,
)

from goldfile import gold
from ldm.loading.build import meta_device
from ldm.loading.diffusers.keys import scatter_weights, unet_keys
from ldm.nets.unet import UNet

SMALL = ["adm", "depth", "inpaint", "misc", "unclip", "upscaler", "v1", "v2"]
SMALL_CASES = ["sq16", "nonsq", "floatt", "odd_mid", "tiny_x", "big_x"]
FAITHFUL = ["v1", "v2", "inpaint", "depth", "x4", "unclip_h", "unclip_l"]
FULL = ["v1", "v2", "inpaint", "depth", "x4", "unclip_h"]

SD2 = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
    "legacy": False,
}
SD1 = {
    **SD2,
    "num_head_channels": -1,
    "num_heads": 8,
    "use_linear_in_transformer": False,
    "context_dim": 768,
}
X4 = {
    **SD2,
    "in_channels": 7,
    "model_channels": 256,
    "channel_mult": [1, 2, 2, 4],
    "attention_resolutions": [2, 4, 8],
    "num_head_channels": -1,
    "num_heads": 8,
    "num_classes": 1000,
    "disable_self_attentions": [True, True, True, False],
}
SIZES = {
    "v1": (SD1, 859_520_964),
    "v2": (SD2, 865_910_724),
    "inpaint": ({**SD2, "in_channels": 9}, 865_925_124),
    "depth": ({**SD2, "in_channels": 5}, 865_913_604),
    "x4": (X4, 473_398_020),
    "unclip_h": ({**SD2, "num_classes": "sequential", "adm_in_channels": 2048}, 870_173_124),
    "unclip_l": ({**SD2, "num_classes": "sequential", "adm_in_channels": 1536}, 869_517_764),
}


def call(unet, inputs):
    with torch.no_grad():
        return unet(inputs["x"], inputs["timesteps"], inputs.get("context"), inputs.get("y"))


@pytest.mark.parametrize("case", SMALL_CASES)
@pytest.mark.parametrize("name", SMALL)
def test_small_unet_equals_the_recorded_one(name, case):
    golden = gold(f"unet_{name}")
    ours = call(build_from(golden, UNet), golden.inputs(case))
    assert_close(ours, golden.outputs(case)["eps"], noise=noise_of(golden, case, "eps"))


@pytest.mark.parametrize("name", FAITHFUL)
def test_narrow_unet_of_each_family_equals_the_recorded_one(name):
    golden = gold("unet_faithful_recipe")
    unet = build_from(golden, UNet, golden.meta[f"config_{name}"])
    ours = call(unet, golden.inputs(name))
    assert_close(ours, golden.outputs(name)["eps"], noise=noise_of(golden, name, "eps"))


ROUTES = {
    "crossattn_tensor": ("crossattn", lambda x, c, g: (x, {"context": c})),
    "crossattn_two": ("crossattn", lambda x, c, g: (x, {"context": torch.cat([c, g["uc"]], 1)})),
    "sequential_crossattn": ("sequential", lambda x, c, g: (x, {"context": [c, g["uc"]]})),
    "concat": ("concat", lambda x, c, g: (torch.cat([x, g["cc"]], 1), {})),
    "hybrid": ("hybrid", lambda x, c, g: (torch.cat([x, g["cc"]], 1), {"context": c})),
    "hybrid-adm": (
        "hybrid-adm",
        lambda x, c, g: (torch.cat([x, g["cc"]], 1), {"context": c, "y": g["y"]}),
    ),
    "crossattn-adm": ("crossattn-adm", lambda x, c, g: (x, {"context": c, "y": g["adm"]})),
    "adm": ("adm", lambda x, c, g: (x, {"y": g["y"]})),
    "uncond": ("uncond", lambda x, c, g: (x, {})),
}


@pytest.mark.parametrize("case", ROUTES)
def test_each_way_of_conditioning_equals_the_recorded_one(case):
    golden = gold("conditioning_routes")
    config, arrange = ROUTES[case]
    unet = build(UNet, golden.meta[f"config_{config}"]["params"]["unet_config"])
    unet.load_state_dict(golden.weights(unet.state_dict(), "model.diffusion_model."))
    given = golden.inputs("crossattn_tensor")
    x, conditions = arrange(given["x"], given["c"], golden.under("shared/"))
    with torch.no_grad():
        ours = unet(x, given["t"], **conditions)
    assert_close(ours, golden.outputs(case)["out"], noise=noise_of(golden, case, "out"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_unet_equals_the_recorded_one(name):
    golden = gold(f"full_unet_{name}")
    with meta_device():
        unet = build(UNet, golden.meta["config"])
    unet.load_state_dict(golden.weights(unet.state_dict()), assign=True)
    ours = call(unet, golden.inputs("a"))
    assert_close(ours, golden.outputs("a")["eps"], noise=noise_of(golden, "a", "eps"))


@pytest.mark.parametrize("family", SIZES)
def test_names_and_shapes_are_the_original_ones_at_full_size(family):
    config, parameters = SIZES[family]
    with meta_device():
        unet = UNet(**config)
    assert keys_of(unet) == recorded_keys(f"unet_{family}")
    assert sum(p.numel() for p in unet.parameters()) == parameters


DIFFUSERS = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "norm_num_groups": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD1_WAY = {"num_heads": 4, "num_head_channels": -1, "use_linear_in_transformer": False}


@pytest.mark.parametrize(
    ("ours", "theirs", "y"),
    [
        (SD1_WAY, {"attention_head_dim": 4}, None),
        ({}, {"attention_head_dim": (2, 4), "use_linear_projection": True}, None),
        (
            {"num_res_blocks": 2, "num_classes": 10},
            {
                "attention_head_dim": (2, 4),
                "use_linear_projection": True,
                "layers_per_block": 2,
                "num_class_embeds": 10,
            },
            torch.tensor([3, 9]),
        ),
        (
            {"num_classes": "sequential", "adm_in_channels": 12},
            {
                "attention_head_dim": (2, 4),
                "use_linear_projection": True,
                "class_embed_type": "projection",
                "projection_class_embeddings_input_dim": 12,
            },
            torch.linspace(-1, 1, 24).view(2, 12),
        ),
    ],
    ids=["SD1", "SD2", "x4", "unCLIP"],
)
def test_diffusers_computes_the_same(ours, theirs, y):
    diffusers = pytest.importorskip("diffusers")
    unet = tiny_unet(**{"attention_resolutions": [1], **ours})
    other = diffusers.UNet2DConditionModel(**{**DIFFUSERS, **theirs}).eval()
    other.load_state_dict(scatter_weights(unet_keys(unet.state_dict()), unet.state_dict()))
    x, t, context = tiny_inputs()
    for z in (x, x[:, :, :7, :5]):
        with torch.no_grad():
            expected = other(z, t, context, class_labels=y).sample
            assert_close(unet(z, t, context, y), expected, tolerance=1e-5)


def test_a_fresh_unet_outputs_exact_zeros():
    assert UNet(**TINY)(*tiny_inputs()).count_nonzero() == 0


def test_every_parameter_gets_a_gradient():
    unet = tiny_unet(num_classes="continuous", use_scale_shift_norm=True, resblock_updown=True)
    unet(*tiny_inputs(), y=torch.ones(2, 1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())


@pytest.mark.parametrize("changes", [{}, {"use_spatial_transformer": False, "context_dim": None}])
def test_checkpointing_gives_the_same_gradients(changes):
    def gradients(use_checkpoint):
        unet = tiny_unet(use_checkpoint=use_checkpoint, **changes)
        x, t, context = tiny_inputs()
        x.requires_grad_()
        return torch.autograd.grad(unet(x, t, context).square().sum(), [x, *unet.parameters()])

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)


def test_checkpointing_works_without_a_context():
    settings = {"channel_mult": [1], "context_dim": 32, "use_checkpoint": True}
    unet = tiny_unet(**settings)
    x, t, _ = tiny_inputs()
    unet(x, t).sum().backward()
    assert all(p.grad is not None for p in unet.parameters())


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-5)]
)
def test_weights_decide_the_precision_and_x_the_dtype_of_the_result(dtype, limit):
    unet = tiny_unet()
    x, t, context = tiny_inputs()
    with torch.no_grad():
        exact = unet(x, t, context)
        ours = unet.to(dtype)(x, t, context)
    assert unet.dtype == dtype
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= limit * exact.norm()


def test_autocast_on_a_cpu_gives_nearly_the_same():
    unet = tiny_unet()
    exact = unet(*tiny_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = unet(*tiny_inputs())
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 2e-2 * exact.norm()


def test_depth_may_differ_by_level():
    unet = UNet(**{**TINY, "transformer_depth": [1, 2]})
    assert len(unet.input_blocks[1][1].transformer_blocks) == 1
    assert len(unet.middle_block[1].transformer_blocks) == 2


def test_samples_of_a_batch_do_not_touch_each_other():
    unet = tiny_unet()
    x, t, context = tiny_inputs()
    both = unet(x, t, context)
    for i in range(2):
        one = unet(x[i : i + 1], t[i : i + 1], context[i : i + 1])
        assert (one - both[i : i + 1]).abs().max() < 1e-5


BAD = [
    ({"model_channels": 48}, "width 48 is not a multiple of 32"),
    ({"num_head_channels": -1}, "either num_heads or num_head_channels"),
    ({"num_head_channels": 128}, "num_head_channels 128 exceeds the width 32"),
    ({"context_dim": None}, "use_spatial_transformer and context_dim go together"),
    ({"num_res_blocks": [1, 1, 1]}, "num_res_blocks has 3 entries for 2 levels"),
    ({"disable_self_attentions": [True]}, "disable_self_attentions has 1 entries for 2 levels"),
    ({"num_classes": "sequential"}, "`sequential` with adm_in_channels"),
    ({"num_classes": "timestep"}, "num_classes `timestep`"),
    ({"dims": 3}, "dims `3` is not supported"),
    ({"n_embed": 8}, "n_embed"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY, **changes})


def test_any_latent_size_comes_back():
    unet, (x, t, context) = tiny_unet(), tiny_inputs()
    assert unet(x[:, :, :7, :5], t, context).shape == (*x.shape[:2], 7, 5)


def test_inputs_that_cannot_work_are_refused():
    unet, (x, t, context) = tiny_unet(), tiny_inputs()
    with pytest.raises(ValueError, match="7 x 8 does not fit this UNet, .* multiples of 2"):
        tiny_unet(resblock_updown=True)(x[:, :, :7], t, context)
    with pytest.raises(ValueError, match="takes 4 channels, got 3"):
        unet(x[:, :3], t, context)
    with pytest.raises(ValueError, match="takes no `y`"):
        unet(x, t, context, y=torch.ones(2))
    with pytest.raises(ValueError, match="needs `y`"):
        tiny_unet(num_classes=10)(x, t, context)
