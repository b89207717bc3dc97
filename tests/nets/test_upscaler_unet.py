"""The network of the x2 latent upscaler against recordings of k-diffusion's."""

import pytest
import torch

from goldfile import load_golden
from ldm.loading.config import read_yaml
from ldm.nets.latent_upscaler import LatentUpscalerUNet
from tinyupscaler import CONFIG, build_tiny_upscaler


@pytest.fixture(scope="module")
def network():
    return build_tiny_upscaler().unet


def test_the_network_equals_the_recorded_one(network):
    golden, case = load_golden("seed_x2_unet"), "net_nonsq"
    inputs = golden.inputs(case)
    with torch.no_grad():
        out = network.inner_model(
            torch.cat([inputs["x"], inputs["unet_cond"]], dim=1),
            inputs["sigma"].log() / 4,
            inputs["mapping_cond"],
            inputs["cross_cond"],
            inputs["cross_cond_padding"] == 0,
        )
    golden.assert_close(case, out=out[:, :4], logvar=out[:, 4:].mean((1, 2, 3)))


def test_the_published_config_has_the_published_parameters():
    with torch.device("meta"):
        network = LatentUpscalerUNet(**read_yaml(CONFIG)["model"]["params"]["unet"]["params"])
    assert sum(parameter.numel() for parameter in network.parameters()) == 372_560_261
    assert len(network.state_dict()) == 566


@pytest.mark.parametrize("side", [8, 20])
def test_invalid_sides_are_refused(network, side):
    x = torch.zeros(1, 8, side, side)
    with pytest.raises(ValueError, match="multiples of 8, at least 16"):
        network(x, torch.zeros(1), torch.zeros(1, 5, 32), torch.zeros(1, 33))


def test_an_unsupported_setting_is_refused():
    params = read_yaml(CONFIG)["model"]["params"]["unet"]["params"]
    with pytest.raises(ValueError, match="augment_wrapper is not supported"):
        LatentUpscalerUNet(**params, augment_wrapper=True)
