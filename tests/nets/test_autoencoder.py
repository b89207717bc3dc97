import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from goldfile import load_golden
from ldm.loading.build import meta_device
from ldm.loading.diffusers.locations import convert_to_diffusers, locate_vae
from ldm.nets.autoencoder import AttnBlock, AutoencoderKL, DiagonalGaussian
from nets.nethelp import (
    assert_close,
    build_golden_network,
    build_network,
    build_tiny_autoencoder,
    get_shapes,
    read_original_shapes,
)

SMALL_CASES = {
    "vae_f8": ["0_2x64x64", "1_1x96x48", "2_1x100x68"],
    "vae_f4": ["0_1x64x64", "1_2x40x72"],
    "vae_f16_attn": ["0_1x64x64", "1_2x64x128"],
}
NARROW_CONFIGS = ["kl_f8", "x4_f4", "kl_f4", "kl_f16", "kl_f32"]
DDCONFIG = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4}
DDCONFIG_F16 = {"z_channels": 16, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}
DDCONFIG_F32 = {"z_channels": 64, "ch_mult": [1, 1, 2, 2, 4, 4], "attn_resolutions": [16, 8]}
FULL_SIZE_CONFIGS = {
    "kl_f4": (3, {**DDCONFIG, "z_channels": 3, "ch_mult": [1, 2, 4]}),
    "kl_f16": (16, {**DDCONFIG, **DDCONFIG_F16}),
    "kl_f32": (64, {**DDCONFIG, **DDCONFIG_F32}),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=SMALL_CASES)
def small_model(request):
    """A golden file, its autoencoder, and the names of its cases."""
    golden = load_golden(request.param)
    return golden, build_golden_network(golden, AutoencoderKL), SMALL_CASES[request.param]


def test_encoding_equals_the_recorded_one(small_model):
    golden, autoencoder, names = small_model
    for case in (f"enc{name}" for name in names):
        posterior = autoencoder.encode(golden.inputs(case)["x"])
        torch.manual_seed(golden.case(case)["info"]["seed_before_sample"])
        kl, sample = posterior.kl(), posterior.sample()
        golden.assert_close(case, parameters=posterior.parameters, kl=kl, sample=sample)


def test_decoding_equals_the_recorded_one(small_model):
    golden, autoencoder, names = small_model
    prefixes = tuple(f"dec{name[:2]}" for name in names)
    for case in (c["name"] for c in golden.cases if c["name"].startswith(prefixes)):
        ours = autoencoder.decode(golden.inputs(case)["z"])
        golden.assert_close(case, dec=ours)


def test_eps_of_norms_equals_the_recorded_one(small_model):
    """Only a faint image shows the difference."""
    golden, autoencoder, _ = small_model
    case = "forward_small_input"
    ours = autoencoder.decode(autoencoder.encode(golden.inputs(case)["x"]).mode())
    golden.assert_close(case, dec_mode=ours)


@pytest.mark.parametrize("name", NARROW_CONFIGS)
def test_narrow_autoencoder_of_each_config_equals_the_recorded_one(name):
    golden = load_golden("vae_faithful_recipe")
    assert_encoder_and_decoder_close(
        build_golden_network(golden, AutoencoderKL, golden.meta[f"config_{name}"]), golden, name
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_vae_f8", "full_vae_x4"])
def test_full_size_autoencoder_equals_the_recorded_one(name):
    golden = load_golden(name)
    with meta_device():
        autoencoder = build_network(AutoencoderKL, golden.meta["config"])
    autoencoder.load_state_dict(golden.weights(autoencoder.state_dict()), assign=True)
    assert_encoder_and_decoder_close(autoencoder, golden, "a")


def assert_encoder_and_decoder_close(autoencoder, golden, case):
    inputs = golden.inputs(case)
    moments = autoencoder.encode(inputs["x"]).parameters
    golden.assert_close(case, moments=moments, dec=autoencoder.decode(inputs["z"]))


def test_distribution_equals_the_recorded_one():
    golden = load_golden("diag_gaussian")
    inputs, outputs = golden.inputs("extreme"), golden.outputs("extreme")
    torch.manual_seed(golden.case("extreme")["info"]["seed"])
    posterior, other = (DiagonalGaussian(inputs[key]) for key in ("moments", "moments_other"))
    deterministic = DiagonalGaussian(inputs["moments_other"], deterministic=True)
    ours = {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "sample": posterior.sample(),
        "mode": posterior.mode(),
        "kl": other.kl(),
        "det_kl": deterministic.kl(),
        "det_std": deterministic.std,
        "det_sample": deterministic.sample(),
    }
    for name, value in ours.items():
        assert_close(value, outputs[name], tolerance=1e-6)


@pytest.mark.parametrize("name", FULL_SIZE_CONFIGS)
def test_names_and_shapes_at_full_size_equal_the_originals(name):
    embed_dim, ddconfig = FULL_SIZE_CONFIGS[name]
    with meta_device():
        autoencoder = AutoencoderKL(ddconfig=ddconfig, embed_dim=embed_dim)
    assert get_shapes(autoencoder) == read_original_shapes(f"vae_{name}")
    assert autoencoder.downscale_factor == 2 ** (len(ddconfig["ch_mult"]) - 1)


def test_diffusers_computes_the_same(diffusers):
    ours = build_tiny_autoencoder()
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
    ).eval()
    theirs.load_state_dict(convert_to_diffusers(locate_vae(ours.state_dict()), ours.state_dict()))
    image = torch.rand(2, 3, 32, 24) * 2 - 1
    moments = theirs.encode(image).latent_dist.parameters
    assert_close(ours.encode(image).parameters, moments, tolerance=1e-5)
    z = torch.randn(2, 4, 8, 6)
    assert_close(ours.decode(z), theirs.decode(z).sample, tolerance=1e-5)


def test_a_generator_determines_the_sample_and_leaves_the_global_one_alone():
    posterior = DiagonalGaussian(torch.randn(1, 8, 4, 4))
    before = torch.get_rng_state()
    first, second = (posterior.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, posterior.sample(torch.Generator().manual_seed(8)))


def test_half_precision_draws_the_noise_of_float32():
    parameters = torch.zeros(1, 8, 4, 4)
    full = DiagonalGaussian(parameters).sample(torch.Generator().manual_seed(7))
    half = DiagonalGaussian(parameters.bfloat16()).sample(torch.Generator().manual_seed(7))
    assert torch.equal(full.bfloat16(), half)


class LargestTensorMode(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    max_numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.max_numel = max(self.max_numel, tensor.numel())
        return out


def test_attention_over_many_positions_never_allocates_all_scores():
    block, x = AttnBlock(32), torch.randn(1, 32, 48, 48)
    with LargestTensorMode() as mode:
        block(x)
    assert mode.max_numel < (48 * 48) ** 2 / 8


def test_forward_decodes_a_sample_and_every_parameter_gets_a_gradient():
    autoencoder = build_tiny_autoencoder()
    with torch.enable_grad():
        image, posterior = autoencoder(torch.rand(2, 3, 16, 16), torch.Generator().manual_seed(7))
        assert torch.equal(
            image, autoencoder.decode(posterior.sample(torch.Generator().manual_seed(7)))
        )
        image.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in autoencoder.parameters())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_weights_determine_the_precision_and_the_input_the_dtype_of_the_result(dtype, limit):
    autoencoder = build_tiny_autoencoder()
    image, z = torch.rand(1, 3, 16, 16), torch.randn(1, 4, 4, 4)
    moments, decoded = autoencoder.encode(image).parameters, autoencoder.decode(z)
    autoencoder.to(dtype)
    for ours, exact in [
        (autoencoder.encode(image).parameters, moments),
        (autoencoder.decode(z), decoded),
    ]:
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= limit * exact.norm()


def test_the_decoder_may_apply_tanh_or_return_features():
    z = torch.randn(1, 4, 4, 4)
    plain = build_tiny_autoencoder().decode(z)
    assert torch.equal(build_tiny_autoencoder(tanh_out=True).decode(z), plain.tanh())
    assert build_tiny_autoencoder(give_pre_end=True).decode(z).shape == (1, 32, 16, 16)


def test_attn_type_decides_whether_there_is_attention():
    plain, xformers, none = (
        get_shapes(build_tiny_autoencoder(attn_resolutions=[128], attn_type=name))
        for name in ("vanilla", "vanilla-xformers", "none")
    )
    assert plain == xformers
    assert none == {key: shape for key, shape in plain.items() if "attn" not in key}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch": 48}, "48 channels are not a multiple of 32"),
        ({"attn_type": "linear"}, "unknown attn_type `linear`.* choose one of vanilla"),
        ({"use_linear_attn": True}, "use_linear_attn is not supported"),
        ({"double_z": False}, "needs `double_z: true`"),
        ({"channel_mult": [1, 2]}, "unknown parameter `channel_mult`, did you mean `ch_mult`"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_tiny_autoencoder(**changes)


def test_an_image_smaller_than_one_latent_pixel_is_refused():
    with pytest.raises(ValueError, match="16x3 pixels is too small: .* at least 4"):
        build_tiny_autoencoder().encode(torch.zeros(1, 3, 3, 16))
