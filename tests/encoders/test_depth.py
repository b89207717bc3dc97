"""Depth encoders: preprocessing, MiDaS, and the depth channel."""

import copy
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from encoderhelp import assert_close, make_options

from goldfile import load_golden
from ldm.encoders import depth
from ldm.encoders.depth import (
    MiDaSDepth,
    compute_midas_size,
    normalize_depth,
    preprocess_for_midas,
    resize_depth,
)
from recipe import fill

ARCH = {
    "embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 64, "hooks": (1, 2), "features": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def midas() -> MiDaSDepth:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm and torchvision
        encoder = MiDaSDepth(arch=ARCH)
    encoder.load_state_dict(fill(encoder.state_dict(), "tiny"))
    return encoder.eval()


def to_tensor(image):
    return image.permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize("size", ["64x64", "64x128", "320x192"])
def test_the_input_of_the_network_equals_the_recorded_one(size):
    golden, case = load_golden("e2e_depth2img"), f"midas_transform_{size}"
    expected = golden.outputs(case)
    (pixels,) = preprocess_for_midas(to_tensor(golden.inputs(case)["image"]))
    assert list(pixels.shape) == expected["shape"].tolist()
    assert_close(pixels[:, ::8, ::8], expected["sub"])
    assert_close(pixels.double().mean(dim=(1, 2)), expected["mean"])


def test_a_large_image_is_downscaled_without_antialiasing():
    """As the original does by OpenCV; all recorded images are enlarged."""
    cv2 = pytest.importorskip("cv2")
    image = torch.rand(900, 700, 3, generator=torch.Generator().manual_seed(0))
    (pixels,) = preprocess_for_midas(2 * image.permute(2, 0, 1)[None] - 1)
    resized = cv2.resize(image.numpy(), (384, 480), interpolation=cv2.INTER_CUBIC)
    expected = 2 * torch.from_numpy(resized).permute(2, 0, 1) - 1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-3)  # observed: 1.3e-4


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 333), (576, 384)),
        ((384, 384), (384, 384)),
        ((512, 768), (384, 576)),
        ((768, 768), (384, 384)),
        ((8, 4000), (32, 384)),
    ],
)
def test_the_side_nearer_to_384_decides(size, expected):
    assert compute_midas_size(*size) == expected


def test_the_depth_channel_equals_the_recorded_one():
    """The recorded network computed 3 red + 2 green blue + a ramp."""
    golden = load_golden("get_input_concat")
    red, green, blue = golden.inputs("depth")["midas_in"].split(1, dim=1)
    ramp = torch.linspace(0, 1, red.shape[-1])
    depth_map = 3 * red + 2 * green * blue + 0.25 * ramp
    channel = normalize_depth(resize_depth(depth_map, (8, 12)), eps=0.001)
    assert_close(channel, golden.outputs("depth")["c_concat"])


def test_a_depth_map_of_any_range_gives_the_same_channel(midas):
    depth_map = torch.rand(2, 1, 8, 12)
    channel = midas(depth_map)
    assert (channel.amin(), channel.amax()) == (-1, 1)
    assert_close(midas(3000 * depth_map - 7), channel)
    assert_close(midas(-depth_map), -channel)
    assert_close(midas(channel), channel)


def test_a_constant_depth_map_gives_a_finite_channel(midas):
    assert torch.equal(midas(torch.full((1, 1, 4, 4), 7.0)), -torch.ones(1, 1, 4, 4))


def test_weights_of_any_dtype_give_float32_depth(midas):
    half = copy.deepcopy(midas).to(torch.bfloat16)
    depth_map = half.run_network(torch.rand(1, 3, 64, 64) * 2 - 1)
    assert depth_map.dtype == torch.float32
    assert depth_map.isfinite().all()


def test_sides_must_be_multiples_of_32(midas):
    with pytest.raises(ValueError, match="64x48 pixels .* both sides must be multiples of 32"):
        midas.run_network(torch.zeros(1, 3, 48, 64))


def test_depth_comes_from_a_depth_map_or_the_input_of_the_network_or_an_image(midas, monkeypatch):
    monkeypatch.setattr(depth, "compute_midas_size", lambda height, width: (64, 32))
    image = torch.rand(1, 3, 80, 48) * 2 - 1
    estimated = midas.estimate(image)
    batches = [{"depth": estimated}, {"midas_in": preprocess_for_midas(image)}, {"jpg": image}]
    maps = [midas.prepare(batch, make_options((10, 6)))["depth"] for batch in batches]
    assert maps[0].shape == (1, 1, 10, 6)
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])
    assert torch.equal(midas.prepare({"depth": maps[0]}, make_options((10, 6)))["depth"], maps[0])
    with pytest.raises(KeyError, match="the batch has `txt`"):
        midas.prepare({"txt": ["a"]}, make_options((10, 6)))


def test_wrong_shapes_and_names_are_refused():
    with pytest.raises(ValueError, match=r"expected depth maps \(B, 1, H, W\), got \(1, 3, 8"):
        resize_depth(torch.zeros(1, 3, 8, 8), (4, 4))
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\)"):
        preprocess_for_midas(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="unknown depth model `midas_v21`"):
        MiDaSDepth(model_type="midas_v21")


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'ldm-revived\[depth\]'"):
        MiDaSDepth()


def test_depth_equals_that_of_transformers(midas):
    """Recorded from DPTForDepthEstimation of transformers 5.24 with the same weights."""
    x = torch.linspace(-3, 3, 3 * 96 * 96).reshape(1, 3, 96, 96).mul(7).sin()
    expected = torch.tensor([
        [1.048307, 0.652528, 0.408596, 0.30964], [1.046137, 0.0, 0.361485, 0.893068],
        [2.336523, 2.111539, 2.296764, 1.786007], [1.683947, 1.366399, 2.29234, 0.9711],
    ])  # fmt: skip
    with torch.no_grad():
        assert_close(midas.run_network(x)[0, 0, 5::24, 5::24], expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["1x384x384", "2x256x448"])
def test_full_size_depth_equals_the_recorded_one(case):
    golden = load_golden("full_midas_dpt_hybrid")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        encoder = MiDaSDepth()
    encoder.load_state_dict(golden.weights(encoder.state_dict()), assign=True)
    info = golden.info(case)
    x = F.interpolate(golden.inputs(case)["small"], (info["h"], info["w"]), mode="bilinear")
    with torch.no_grad():
        depth_map = encoder.eval().run_network(x)
    assert_close(depth_map, golden.outputs(case)["depth"], 1e-4)


def test_without_a_network_only_depth_maps_are_accepted():
    encoder = MiDaSDepth(model_type=None)
    assert not encoder.state_dict()
    prepared = encoder.prepare({"depth": torch.rand(2, 1, 32, 32)}, make_options((8, 8)))
    assert encoder(prepared["depth"]).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="cannot estimate depth"):
        encoder.prepare({"jpg": torch.zeros(1, 3, 32, 32)}, make_options((8, 8)))
