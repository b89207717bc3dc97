"""Encoders of low-resolution and masked images."""

import pytest
import torch
from encoderhelp import assert_close, make_options

from goldfile import load_golden
from ldm.conditioning import Conditioner
from ldm.encoders.concat_images import (
    LowResImage,
    MaskedImage,
    NoiseLevel,
    PatchesToChannels,
    mask_image,
)
from ldm.loading.config import instantiate
from ldm.nets.autoencoder import AutoencoderKL
from recipe import fill

X4 = {"noise_schedule_config": {"linear_start": 0.0001, "linear_end": 0.02}, "max_noise_level": 350}


def to_nchw(images):
    return images.permute(0, 3, 1, 2)


def test_buffers_of_the_schedule_equal_the_recorded_ones():
    expected = load_golden("low_scale_model").select("state_dict/low_scale/")
    state = LowResImage(**X4).state_dict()
    assert len(state) == 8
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)


def test_noised_images_equal_the_recorded_ones():
    golden = load_golden("low_scale_model")
    inputs, expected = golden.inputs("image"), golden.outputs("image")
    encoder, lr = LowResImage(**X4), inputs["x"]
    noise, *_ = golden.draws("image")
    assert_close(encoder.add_noise(lr, inputs["noise_level"], noise), expected["z"], 1e-6)
    _, seed = golden.info("image")["seeds"]  # of the noise level and then the noise
    prepared = encoder.prepare({"lr": lr}, make_options(seed=seed))
    assert torch.equal(prepared["noise_level"], expected["level_none"])
    assert_close(prepared["lowres"], expected["z_none"], 1e-6)


def test_without_a_schedule_no_noise_is_added():
    expected = load_golden("low_scale_model").outputs("simple")
    encoder = LowResImage(max_noise_level=0, low_scale_key="LR")
    prepared = encoder.prepare({"LR": expected["x"]}, make_options())
    assert torch.equal(prepared["lowres"], expected["x"])
    assert torch.equal(prepared["noise_level"], expected["level"])
    assert not encoder.state_dict()


def test_upscaling_conditions_equal_the_recorded_ones():
    golden = load_golden("get_input_concat")
    expected = golden.outputs("upscale")
    torch.manual_seed(golden.info("upscale")["seed"])
    torch.randn(golden.draws("upscale")[0].shape)  # the original draws it for the posterior first
    conditioner = Conditioner(lowres=LowResImage(**X4), level=NoiseLevel())
    batch = {"lr": to_nchw(golden.inputs("upscale")["lr"])}
    cond = conditioner(conditioner.lowres.prepare(batch, make_options()))
    assert_close(cond.concat, expected["c_concat"], 1e-6)
    assert torch.equal(cond.vector, expected["c_adm"])


def test_one_noise_level_is_used_for_the_whole_batch():
    encoder, lr = LowResImage(**X4), torch.rand(2, 3, 4, 4)
    prepared = encoder.prepare({"lr": lr, "noise_level": 20}, make_options(seed=0))
    noise = torch.randn(lr.shape, generator=torch.Generator().manual_seed(0))
    assert prepared["noise_level"].tolist() == [20, 20]
    assert torch.equal(prepared["lowres"], encoder.add_noise(lr, torch.tensor([20, 20]), noise))


@pytest.mark.parametrize("level", [-1, 1000])
def test_a_level_outside_the_schedule_is_refused(level):
    with pytest.raises(ValueError, match="timesteps must be in 0 … 999, got"):
        LowResImage(**X4).prepare(
            {"lr": torch.zeros(1, 3, 4, 4), "noise_level": level}, make_options()
        )


def test_prepared_batches_are_not_prepared_again():
    assert LowResImage(**X4).prepare({"lowres": torch.zeros(1, 3, 4, 4)}, make_options()) == {}
    assert MaskedImage().prepare({"masked": torch.zeros(1, 5, 4, 4)}, make_options()) == {}


def test_a_model_built_on_the_meta_device_has_a_schedule():
    with torch.device("meta"):
        encoder = LowResImage(**X4)
    lr, level = torch.zeros(1, 3, 2, 2), torch.zeros(1, dtype=torch.int64)
    noised = encoder.add_noise(lr, level, torch.ones_like(lr))
    assert_close(noised, torch.full_like(lr, 0.01), 1e-6)


def test_patches_become_channels():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    channels = PatchesToChannels(patches_per_side=2)(image)
    assert channels[0].flatten(1).tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]
    ]  # fmt: skip
    assert torch.equal(PatchesToChannels(patches_per_side=1)(image), image)


@pytest.mark.parametrize("key", ["jpg", "masked_image"])
def test_inpainting_conditions_equal_the_recorded_ones(key):
    golden = load_golden("get_input_concat")
    config = golden.meta["config_inpaint"]["params"]
    first_stage = config["first_stage_config"]["params"]
    autoencoder = AutoencoderKL(ddconfig=first_stage["ddconfig"], embed_dim=4)
    weights = fill(autoencoder.state_dict(), golden.meta["salt"], "first_stage_model.")
    autoencoder.load_state_dict(weights)

    def encode(image):
        posterior = autoencoder.encode(image)
        noise = golden.draws("inpaint")[1]
        return (posterior.mean + posterior.std * noise) * config["scale_factor"]

    image, mask = (to_nchw(golden.inputs("inpaint")[k]) for k in ("jpg", "mask"))
    batch = {key: image if key == "jpg" else mask_image(image, mask), "mask": mask}
    conditioner = Conditioner(masked=MaskedImage())
    with torch.no_grad():
        cond = conditioner(conditioner.masked.prepare(batch, make_options(encode=encode)))
    assert_close(cond.concat, golden.outputs("inpaint")["c_concat"])


@pytest.mark.parametrize("case", ["inp0", "inp1"])
def test_masked_images_equal_the_recorded_ones(case):
    golden = load_golden("e2e_inpaint")
    expected = golden.outputs(case)
    image = to_nchw(golden.inputs(case)["image"][None]) / 127.5 - 1
    mask = golden.inputs(case)["mask"][None, None] / 255
    channels = MaskedImage().concat_mask(mask, torch.zeros(1, 4, *mask.shape[-2:]))
    assert torch.equal(channels[:, :1].expand_as(expected["batch_mask"]), expected["batch_mask"])
    mean = mask_image(image, mask).mean(dim=(2, 3))
    assert_close(mean.expand_as(expected["batch_masked_mean"]), expected["batch_masked_mean"], 1e-6)


def test_masks_are_rounded_and_resized_to_the_nearest_pixel():
    mask = torch.tensor([[0.0, 0.49, 0.5, 0.9], [1, 1, 1, 1]])[None, None]
    assert MaskedImage().concat_mask(mask, torch.full((1, 1, 1, 2), 7.0)).tolist() == [
        [[[0, 1]], [[7, 7]]]
    ]
    assert mask_image(torch.ones(1, 3, 2, 4), mask)[0, 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="the mask must have the image's size 8x8, got 4x8"):
        mask_image(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 4))


@torch.no_grad()
@pytest.mark.parametrize(
    "case",
    [
        "rescale_nearest_1_0.5", "rescale_bilinear_2_0.5", "rescale_bicubic_1_0.25",
        "rescale_area_1_0.5", "rescale_mapped", "rescale_mapped_bias", "rescale_zero_stages",
    ],
)  # fmt: skip
def test_segmentation_maps_are_rescaled_as_recorded(case):
    golden = load_golden("ldm_cond")
    config = golden.info(case)["config"]
    encoder = instantiate(config)
    encoder.load_state_dict(golden.weights(encoder.state_dict()))
    image = golden.inputs("rescale_nearest_1_0.5")["x"]
    assert encoder.condition(image).concat is not None
    golden.assert_close(case, y=encoder(image))
