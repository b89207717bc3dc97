"""`ldm.util`, `ldm.data.base`, `ldm.modules.ema`, `ldm.modules.distributions.distributions`."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from goldfile import load_golden
from ldm.compat import distributions, ema, util
from ldm.compat.data import Txt2ImgIterableBaseDataset


def test_a_config_builds_any_class():
    config = OmegaConf.create({"target": "torch.nn.Linear", "params": {"in_features": 3}})
    layer = util.instantiate_from_config(config, out_features=2, bias=False)
    assert type(layer) is nn.Linear
    assert layer.weight.shape == (2, 3)
    empty = OmegaConf.create("{target: torch.nn.Identity, params: }")
    assert type(util.instantiate_from_config(empty)) is nn.Identity
    assert util.instantiate_from_config("__is_first_stage__") is None
    assert util.instantiate_from_config("__is_unconditional__") is None
    with pytest.raises(KeyError, match="Expected key `target` to instantiate."):
        util.instantiate_from_config({})


def test_small_helpers():
    assert util.default(0, 1) == 0
    assert util.default(None, lambda: 1) == 1
    assert util.default(None, dict) is dict
    x = torch.zeros(1, 3, 2, 2)
    assert util.isimage(x)
    assert not util.isimage(x.numpy())
    assert util.ismap(x.repeat(1, 2, 1, 1))
    assert util.count_params(nn.Linear(3, 2), verbose=True) == 8
    assert torch.equal(util.mean_flat(torch.arange(6.0).view(2, 3)), torch.tensor([1.0, 4.0]))


def test_iterable_datasets_have_a_length():
    samples = Txt2ImgIterableBaseDataset(3, size=8)
    assert isinstance(samples, torch.utils.data.IterableDataset)
    assert len(samples) == 3


def test_captions_are_drawn_as_images():
    images = util.log_txt_as_img((64, 32), ["", "a cat on a mat"])
    assert images.shape == (2, 3, 32, 64)
    assert images.dtype == torch.float64
    assert images[0].min() == 1
    assert images[1].min() < -0.5
    assert images[1, :, 14:].min() < 0  # 10 characters a line


def test_distribution_equals_the_recorded_one():
    golden = load_golden("diag_gaussian")
    inputs, outputs = golden.inputs("extreme"), golden.outputs("extreme")
    build, moments = distributions.DiagonalGaussianDistribution, inputs["moments_other"]
    extreme, other, flipped = map(build, (inputs["moments"], moments, moments.flip(0)))
    deterministic = build(moments, deterministic=True)
    torch.manual_seed(golden.info("extreme")["seed"])
    computed = {
        "sample": extreme.sample(),
        "var": extreme.var,
        "kl": other.kl(),
        "kl_other": other.kl(flipped),
        "nll": other.nll(0.5 * moments[:, :3]),
        "det_kl": deterministic.kl(),
        "normal_kl": distributions.normal_kl(other.mean, other.logvar, 0.0, 0.0),
    }
    for name, value in computed.items():
        torch.testing.assert_close(value, outputs[name], rtol=1e-6, atol=1e-6)  # observed: 1.8e-7
    with pytest.raises(AssertionError):
        distributions.normal_kl(0.0, 0.0, 0.0, 0.0)


def test_ema_follows_trainable_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    litema = ema.LitEma(model, decay=0.5)
    assert litema.state_dict().keys() == {"decay", "num_updates", "0weight", "0bias"}
    initial = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    for _ in range(10):
        litema(model)
    initial_weight = math.prod(min(0.5, (1 + n) / (10 + n)) for n in range(1, 11))
    assert torch.allclose(litema.state_dict()["0weight"], initial + 1 - initial_weight)
    litema.store(model.parameters())
    litema.copy_to(model)
    assert torch.equal(model[0].weight, litema.state_dict()["0weight"])
    litema.restore(model.parameters())
    assert torch.allclose(model[0].weight, initial + 1)
    litema.reset_num_updates()
    assert litema.num_updates == 0
    assert litema.num_updates.dtype == torch.int32
