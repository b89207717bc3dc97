"""LPIPS from its published files."""

import pytest
import torch

from ldm.loading.addons.lpips import read_lpips
from ldm.nets.lpips import LPIPS_CHANNELS

# Indices and widths of the convolutions of torchvision's VGG16.
INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def expand_value(value: float, *shape: int) -> torch.Tensor:
    """Make a tensor of equal elements, which takes few bytes in a file."""
    return torch.tensor([value]).expand(shape)


@pytest.fixture
def files(tmp_path):
    heads = {
        f"lin{k}.model.1.weight": expand_value(k, 1, w, 1, 1) for k, w in enumerate(LPIPS_CHANNELS)
    }
    vgg = {"classifier.0.weight": expand_value(0, 4096, 25088)}
    for index, inputs, outputs in zip(INDICES, (3, *WIDTHS), WIDTHS, strict=False):
        vgg[f"features.{index}.weight"] = expand_value(index, outputs, inputs, 3, 3)
        vgg[f"features.{index}.bias"] = expand_value(-index, outputs)
    torch.save(heads, tmp_path / "vgg.pth")
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    return [tmp_path / "vgg.pth", tmp_path / "vgg16-397923af.pth"]


def test_a_network_is_read_from_two_files(files) -> None:
    lpips = read_lpips(files)
    layers = [layer for block in lpips.net.children() for layer in block.named_children()]
    assert [name for name, _ in layers] == [str(n) for n in range(30)]
    for name, layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            assert (layer.weight == int(name)).all()
            assert (layer.bias == -int(name)).all()
    assert all((lpips.get_submodule(f"lin{k}.model.1").weight == k).all() for k in range(5))
    assert lpips.scaling_layer.shift.flatten().tolist() == pytest.approx([-0.030, -0.088, -0.188])


def test_one_of_the_two_files_is_not_enough(files) -> None:
    message = r"vgg.pth`: weights of LPIPS are missing, it needs .* of torchvis"
    with pytest.raises(ValueError, match=message):
        read_lpips(files[0])
