import pytest
import torch

from ldm.encoders.towers import FusedAttention
from ldm.nets.blocks import Conv2d, Linear, UpsampleConv2d
from ldm.nets.lora import LoRA, LoRALayer, Target, merge_changes

LAYERS = {
    "linear": lambda: Linear(12, 20),
    "1x1": lambda: Conv2d(12, 20, 1),
    "3x3": lambda: Conv2d(12, 20, 3, padding=1),
    "stride 2": lambda: Conv2d(12, 20, 3, stride=2, padding=1),
    "upsampled": lambda: UpsampleConv2d(12, 20, 3, padding=1),
    "fused": lambda: FusedAttention(12, 3),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    layer = LAYERS[request.param]().requires_grad_(False)
    if request.param == "fused":
        torch.nn.init.normal_(layer.in_proj_weight)
    return layer


def make_lora(layer, *, rank=4, alpha=2.0):
    indices = range(3) if isinstance(layer, FusedAttention) else [None]
    layers = {f"layer{index}": LoRALayer(Target(layer, index), rank, alpha) for index in indices}
    for lora_layer in layers.values():
        torch.nn.init.normal_(lora_layer.lora_up.weight)
    return LoRA(layers)


def set_strength(lora, strength):
    for lora_layer in lora.layers.values():
        lora_layer.strength = strength
    return lora


def merge(*loras):
    merge_changes(lora_layer for lora in loras for lora_layer in lora.layers.values())


def make_input(layer):
    shape = (2, 12, 6, 8) if isinstance(layer, Conv2d) else (2, 5, 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_new_lora_changes_nothing(layer):
    x = make_input(layer)
    plain = layer(x)
    index = 1 if isinstance(layer, FusedAttention) else None
    LoRA({"new": LoRALayer(Target(layer, index), 4)}).attach()
    assert torch.equal(layer(x), plain)


def test_loras_add_up_in_proportion_to_their_strengths(layer):
    first, second = make_lora(layer), make_lora(layer, rank=2)
    targets = [lora_layer.target for lora_layer in first.values()]
    expected = [
        target.weight + 0.75 * first[name].compute_delta() - 0.5 * second[name].compute_delta()
        for name, target in zip(first, targets, strict=True)
    ]
    x, plain = make_input(layer), layer(make_input(layer))
    set_strength(first, 0.75).attach()
    set_strength(second, -0.5).attach()
    attached = layer(x)
    first.detach()
    second.detach()
    assert torch.equal(layer(x), plain)
    merge(first, second)
    for target, weight in zip(targets, expected, strict=True):
        torch.testing.assert_close(target.weight, weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x), attached, rtol=1e-5, atol=1e-5)


def test_merging_does_not_write_into_a_memory_mapped_file(layer):
    name = "in_proj_weight" if isinstance(layer, FusedAttention) else "weight"
    weight = getattr(layer, name)
    copy = weight.clone()
    merge(make_lora(layer))
    assert torch.equal(weight, copy)
    assert not torch.equal(getattr(layer, name), copy)
    assert not getattr(layer, name).requires_grad


def test_only_the_lora_is_trained(layer):
    lora = make_lora(layer)
    lora.attach()
    layer(make_input(layer)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.parameters())
    assert all(p.grad is None for p in layer.parameters())


def test_half_precision_weights_are_rounded_once():
    layer = Linear(64, 64).to(torch.bfloat16).requires_grad_(False)
    loras = [set_strength(make_lora(layer), 0.001) for _ in range(2)]
    delta = sum(lora["layerNone"].compute_delta() for lora in loras)
    expected = (layer.weight.float() + delta).to(torch.bfloat16)
    merge(*loras)
    assert torch.equal(layer.weight, expected)
