"""Circular padding of convolutions, layers and tiles."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.nets.autoencoder import AsymmetricDownsample
from ldm.nets.blocks import Conv2d, Upsample
from ldm.nets.circular import circular_padding
from ldm.nets.tiled import apply_tiled
from ldm.runtime.errors import ArgumentError
from nets.nethelp import make_noise


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [3, 128])  # 128: the CPU's fast path
@torch.no_grad()
def test_convolutions_wrap_as_torch_does(stride, channels):
    ours, theirs = (
        layer_class(channels, channels, 3, stride=stride, padding=1, **options)
        for layer_class, options in ((Conv2d, {}), (nn.Conv2d, {"padding_mode": "circular"}))
    )
    theirs.load_state_dict(ours.state_dict())
    x = make_noise(1, channels, 32, 48)
    with circular_padding("x"), circular_padding("y"):
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(x), theirs(x), atol=1e-2)


@pytest.mark.parametrize("layer", [AsymmetricDownsample(8), Upsample(8)])
@torch.no_grad()
def test_layers_shift_with_their_input(layer):
    x = make_noise(1, 8, 8, 12)
    with circular_padding("x"):
        y, shifted = layer(x), layer(x.roll(4, dims=3))
    torch.testing.assert_close(shifted, y.roll(4 * y.shape[3] // 12, dims=3))


def test_tiles_overlap_across_circular_edges():
    x = make_noise(1, 1, 10, 40)
    kernel = torch.ones(1, 1, 1, 3) / 3

    def blur(x):
        return F.interpolate(F.conv2d(x, kernel, padding=(0, 1)), scale_factor=2)

    with circular_padding("x"):
        identity = apply_tiled(lambda x: x, x, 16)
        blurred = apply_tiled(blur, x, 16, factor=2)
    torch.testing.assert_close(identity, x)
    torch.testing.assert_close(blurred[..., 0], blur(x.roll(5, dims=3))[..., 10], atol=0.1, rtol=0)


def test_an_unknown_axis_is_refused():
    with pytest.raises(ArgumentError, match="unknown tiling `z`"), circular_padding("z"):
        pass
