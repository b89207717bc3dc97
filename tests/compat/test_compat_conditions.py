"""The original's classes for noise augmentation, depth, learning rate schedules and datasets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from encoders.encoderhelp import assert_close
from goldfile import load_golden
from ldm.compat import data, midas
from ldm.compat.encoders import CLIPEmbeddingNoiseAugmentation, SpatialRescaler
from ldm.compat.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler
from ldm.compat.upscaling import ImageConcatWithNoiseAugmentation, SimpleImageConcat

LINEAR = {"linear_start": 1e-4, "linear_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def test_low_resolution_images_equal_the_recorded_ones():
    golden = load_golden("low_scale_model")
    inputs, expected = golden.inputs("image"), golden.outputs("image")
    seeds = golden.info("image")["seeds"]
    model = ImageConcatWithNoiseAugmentation(noise_schedule_config=LINEAR, max_noise_level=350)
    assert len(model.state_dict()) == 8
    torch.manual_seed(seeds[0])
    z, level = model(inputs["x"], inputs["noise_level"])
    assert_close(z, expected["z"], 1e-6)
    assert torch.equal(level, expected["level"])
    torch.manual_seed(seeds[1])
    z, level = model(inputs["x"])
    assert_close(z, expected["z_none"], 1e-6)
    assert torch.equal(level, expected["level_none"])
    expected = golden.outputs("simple")
    x, level = SimpleImageConcat()(expected["x"])
    assert torch.equal(x, expected["x"])
    assert torch.equal(level, expected["level"])


@pytest.mark.parametrize("case", ["clip_stats", "clip_nostats"])
def test_noised_embeddings_equal_the_recorded_ones(case, tmp_path):
    golden = load_golden("low_scale_model")
    inputs, expected = golden.inputs(case), golden.outputs(case)
    path = None
    if case == "clip_stats":
        path = str(tmp_path / "statistics.th")
        torch.save((inputs["data_mean"], inputs["data_std"]), path)
    model = CLIPEmbeddingNoiseAugmentation(COSINE, clip_stats_path=path, timestep_dim=24)
    assert model.time_embed.dim == 24
    assert_close(model.scale(inputs["emb"]), expected["scaled"], 1e-6)
    levels, seeds = {"": inputs["noise_level"], "_none": None}, golden.info(case)["seeds"]
    for (name, level), seed in zip(levels.items(), seeds, strict=True):
        torch.manual_seed(seed)
        z, embedding = model(inputs["emb"], noise_level=level)
        assert_close(z, expected[f"z{name}"], 1e-6)
        assert_close(embedding, expected[f"level_emb{name}"], 1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_spatial_rescaler_resizes_and_maps_channels(mode):
    encoder, x = SpatialRescaler(2, mode, 0.5, 6, 3), torch.randn(1, 6, 16, 9)
    resized = x
    for _ in range(2):
        resized = F.interpolate(resized, scale_factor=0.5, mode=mode)
    weight = encoder.channel_mapper.weight[:, :, 0, 0]
    assert list(encoder.state_dict()) == ["channel_mapper.weight"]
    assert_close(encoder.encode(x), torch.einsum("oc,bchw->bohw", weight, resized), 1e-6)
    assert SpatialRescaler()(x).shape == (1, 6, 8, 4)


def test_the_depth_input_of_a_sample_equals_the_recorded_one():
    golden, case = load_golden("e2e_depth2img"), "midas_transform_320x192"
    image, expected = golden.inputs(case)["image"], golden.outputs(case)
    sample = data.AddMiDaS("dpt_hybrid")({"jpg": image / 127.5 - 1})
    assert isinstance(sample["midas_in"], np.ndarray)
    assert list(sample["midas_in"].shape) == expected["shape"].tolist()
    assert_close(torch.from_numpy(sample["midas_in"])[:, ::8, ::8], expected["sub"], 1e-5)


def test_the_loader_of_depth_networks_can_be_replaced(monkeypatch):
    monkeypatch.setitem(midas.ISL_PATHS, "dpt_hybrid", "elsewhere.pt")
    load_model = lambda name: (nn.Identity(), midas.ISL_PATHS[name])  # noqa: E731
    monkeypatch.setattr(midas.api, "load_model", load_model)
    depth = midas.MiDaSInference("dpt_hybrid")
    assert depth(torch.ones(1, 1, 4, 4)).shape == (1, 1, 4, 4)
    assert depth.train() is depth


def test_learning_rates_follow_lists_of_cycles():
    subclass = type("ThirdPartyScheduler", (LambdaLinearScheduler,), {})
    for cls in (LambdaLinearScheduler, subclass):
        linear = cls([10], [1.0], [1.0], [1e-6], [100000])
        assert linear(0) == 1e-6
        assert linear.schedule(10) == linear(5000) == 1.0
    cosine = LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 0.0, 110)
    assert cosine(5) == 0.5
    assert cosine(60) == pytest.approx(0.55)
