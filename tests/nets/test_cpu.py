import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from nethelp import tiny_inputs, tiny_unet
from torch import nn

from ldm.nets import cpu
from ldm.nets.attention import attention
from ldm.nets.blocks import Conv2d, DoublingConv2d, GroupNorm, Linear, Upsample

pytestmark = pytest.mark.skipif(not cpu._dtypes(), reason="this CPU has no fast paths")

BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(torch.bfloat16 not in cpu._dtypes(), reason="needs bfloat16"),
)
DTYPES = [torch.float32, BFLOAT16]
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 3e-3}  # relative, of one layer


@pytest.fixture(autouse=True)
def small_layers_count(monkeypatch):
    """Packs are made of layers small enough for tests, at their second use."""
    for name in ("LINEAR_WORK", "CONV_WORK", "DOUBLED_WORK"):
        monkeypatch.setattr(cpu, name, 1.0)
    yield
    cpu.enable()


def linear():
    torch.manual_seed(0)
    return Linear(48, 80).eval(), torch.randn(2, 7, 48)


def conv(kind=Conv2d, channels=(128, 160), size=(6, 10), **options):
    torch.manual_seed(0)
    return kind(*channels, 3, **{"padding": 1, **options}).eval(), torch.randn(
        2, channels[0], *size
    )


def twice(layer, x):
    with torch.no_grad():
        layer(x)
        return layer(x)


def plain(layer, x):
    cpu.enable(False)
    with torch.no_grad():
        y = layer(x)
    cpu.enable()
    return y


def distance(x, y):
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


CASES = {
    "linear": linear,
    "linear without bias": lambda: (Linear(48, 80, bias=False), torch.randn(3, 48)),
    "conv": lambda: conv(size=(5, 7)),
    "conv with stride": lambda: conv(stride=2),
    "conv without padding": lambda: conv(padding=0, bias=False),
    "conv in groups": lambda: conv(groups=4),
    "winograd": conv,
    "winograd without bias": lambda: conv(bias=False),
    "doubled": lambda: conv(DoublingConv2d, size=(5, 7)),
    "doubled and narrow": lambda: conv(DoublingConv2d, channels=(16, 24)),
}
KINDS = {case: "linear" if "linear" in case else "conv" for case in CASES} | {
    "winograd": "winograd",
    "winograd without bias": "winograd",
    "doubled": "doubled",
    "doubled and narrow": "phases",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_packed_equals_plain(case, dtype):
    layer, x = CASES[case]()
    layer, x = layer.to(dtype), x.to(dtype)
    fast = twice(layer, x)
    assert len(layer.packs.made) == 1
    if dtype == torch.float32:
        assert list(layer.packs.made) == [KINDS[case]]
    assert distance(fast, plain(layer, x)) < LIMITS[dtype]


@pytest.mark.parametrize("threads_worth", [1, 4 << 10, 1 << 30])
def test_winograd_is_the_same_in_pieces(monkeypatch, threads_worth):
    monkeypatch.setattr("ldm.nets.winograd.CHUNK", threads_worth)
    for kind in (Conv2d, DoublingConv2d):
        layer, x = conv(kind, size=(12, 10))
        assert distance(twice(layer, x), plain(layer, x)) < 1e-6


def test_winograd_rounds_no_worse_than_the_direct_form():
    layer, x = conv(channels=(512, 256), size=(16, 16))
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    direct = plain(layer, x.contiguous(memory_format=torch.channels_last))
    ours = twice(layer, x)
    assert distance(ours.double(), exact) < 3 * distance(direct.double(), exact)


def test_an_odd_size_after_doubling_is_cut_before_the_convolution():
    layer, x = Upsample(32).eval(), torch.randn(1, 32, 5, 4)
    with torch.no_grad():
        layer(x, (9, 8))
        y = layer(x, (9, 8))
    expected = F.conv2d(
        F.interpolate(x, scale_factor=2.0)[:, :, :9], layer.conv.weight, layer.conv.bias, padding=1
    )
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("case", ["linear", "conv", "winograd", "doubled"])
@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: setattr(w, "data", w.data * 2),
        lambda w: w.detach().copy_(w * 2),
    ],
    ids=["in place", "through data", "another storage", "through an alias"],
)
def test_a_changed_weight_is_noticed(case, change):
    layer, x = CASES[case]()
    twice(layer, x)
    with torch.no_grad():
        change(layer.weight)
        fast = layer(x)
    assert distance(fast, plain(layer, x)) < 1e-6


def gradients(layer, x, *, on):
    """Output, and gradients of input, weight and bias."""
    cpu.enable(on)
    x, parameters = x.clone().requires_grad_(), list(layer.parameters())
    y = layer(x)
    found = torch.autograd.grad(y.square().sum(), [x, *parameters], create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in found), [x, *parameters])
    cpu.enable()
    return [y, *found, *again]


def graph(y):
    """The functions that y came by, back to the first with two inputs."""
    found = [y.grad_fn]
    while len(found[-1].next_functions) == 1:
        found.append(found[-1].next_functions[0][0])
    return found


def functions(y):
    return [f.name() for f in graph(y)]


LEARNING = {
    "linear": "LinearBackward",
    "linear without bias": "LinearBackward",
    "conv": "ConvolutionBackward",
    "conv with stride": "ConvolutionBackward",
    "winograd without bias": "ConvolutionBackward",
    "doubled": "DoubledConvolutionBackward",
    "doubled and narrow": "DoubledConvolutionBackward",
    "conv without padding": "ConvolutionBackward0",  # torch's own
}


@pytest.mark.parametrize("case", LEARNING)
def test_layers_with_gradients_equal_the_plain_ones(case, monkeypatch):
    """Those of gradients too; 1e-6 is the rounding of sums in another order."""
    monkeypatch.setattr(cpu, "FEW_PIXELS", 1 << 20)
    monkeypatch.setattr(cpu, "MANY_WEIGHTS", 1)
    monkeypatch.setattr(cpu, "TAPS_WIDTH", 1)
    layer, x = CASES[case]()
    twice(layer, x)  # packs do not get in the way
    fast, slow = gradients(layer, x, on=True), gradients(layer, x, on=False)
    assert LEARNING[case] in functions(fast[0])
    for one, other in zip(fast, slow, strict=True):
        assert distance(one, other) < 1e-6
    assert all(one.is_contiguous() for one in fast[: 2 + len(list(layer.parameters()))])


@pytest.mark.parametrize("case", LEARNING)
def test_frozen_layers_pass_gradients_on_and_get_none(case):
    layer, x = CASES[case]()
    layer.requires_grad_(False)
    x.requires_grad_()
    layer(x).mul_(2).sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.weight.grad is None


def test_a_frozen_layer_keeps_no_input():
    layer, x = linear()
    layer.requires_grad_(False)
    y = layer(2 * x.requires_grad_())
    (linear_function,) = [f for f in graph(y) if f.name() == "LinearBackward"]
    kept = linear_function.saved_tensors
    assert [t if t is None else t.shape for t in kept] == [None, layer.weight.shape]


def test_transforms_of_functions_take_the_plain_way():
    layer, x = linear()
    found = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)
    assert distance(found, layer.weight.sum(0).expand_as(x)) < 1e-6


def test_training_between_samplings_is_seen():
    layer, x = linear()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert distance(twice(layer, x), plain(layer, x)) < 1e-6


@pytest.mark.parametrize("case", ["linear", "winograd", "doubled"])
def test_moving_a_packed_layer_drops_its_packs(case):
    layer, x = CASES[case]()
    twice(layer, x)
    layer.to(torch.bfloat16)
    assert not layer.packs.made
    assert distance(twice(layer, x.bfloat16()), plain(layer, x.bfloat16())) < 3e-3


@pytest.mark.parametrize("case", ["linear", "winograd", "doubled"])
def test_a_packed_layer_saves_copies_and_pickles_as_if_plain(case):
    layer, x = CASES[case]()
    expected = twice(layer, x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = CASES[case]()[0]
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert set(copied.state_dict()) == {"weight", "bias"}
        assert not copied.packs.made
        assert torch.equal(twice(copied, x), expected)


def test_a_copy_does_not_share_packs():
    layer, x = linear()
    twice(layer, x)
    other = copy.deepcopy(layer)
    nn.init.ones_(other.weight)
    assert distance(twice(other, x), plain(other, x)) < 1e-6
    assert distance(twice(layer, x), plain(layer, x)) < 1e-6


def test_weights_made_in_inference_mode_work():
    with torch.inference_mode():
        layer, x = linear()
        layer(x)
        assert distance(layer(x), plain(layer, x)) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_first_use_gives_what_later_ones_give(case):
    layer, x = CASES[case]()
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))


def test_nothing_is_packed_without_memory_for_it(monkeypatch):
    monkeypatch.setattr(cpu, "_fits", lambda nbytes: False)
    for case in ("linear", "winograd", "doubled"):
        layer, x = CASES[case]()
        assert distance(twice(layer, x), plain(layer, x)) < 1e-6
        assert not layer.packs.made


def test_a_sensible_amount_fits_in_memory():
    assert cpu._fits(1)
    assert not cpu._fits(1 << 60)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_autocast_takes_the_plain_way(precision):
    layer, x = linear()
    twice(layer, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x.to(precision))
    assert y.dtype == torch.bfloat16


def test_compiled_and_exported_graphs_hold_only_ordinary_operators():
    layer, x = conv()
    twice(layer, x)
    with torch.no_grad():
        graph = torch.export.export(layer, (x,)).graph
    assert not [node for node in graph.nodes if "mkldnn" in str(node.target)]


def test_a_whole_unet_is_equal_and_contiguous():
    unet, (x, t, context) = tiny_unet(), tiny_inputs()
    with torch.no_grad():
        unet(x, t, context)
        fast = unet(x, t, context)
        cpu.enable(False)
        expected = unet(x, t, context)
    assert fast.is_contiguous()
    assert distance(fast, expected) < 1e-5


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 100, 130), (1, 200, 40), (1, 97, 64)])
def test_norms_of_large_maps_keep_their_digits(batch, height, width):
    torch.manual_seed(0)
    norm, x = GroupNorm(64, eps=1e-6), torch.randn(batch, 64, height, width) + 0.5
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.no_grad():
        y = norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert distance(y.double(), exact) < 3e-7


@pytest.mark.skipif(torch.bfloat16 not in cpu._dtypes(), reason="needs bfloat16")
@pytest.mark.parametrize(("n", "m"), [(300, 300), (300, 77), (16, 16)])
@pytest.mark.parametrize("tile", [1, 8 << 10, 1 << 30])
def test_tiled_attention_is_as_near_as_sdpa(monkeypatch, n, m, tile):
    monkeypatch.setattr("ldm.nets.attention.TILE", tile)
    monkeypatch.setattr("ldm.nets.attention._multiplies_bfloat16", lambda: True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, size, 3, 40).bfloat16().transpose(1, 2) for size in (n, m, m))
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    with torch.no_grad():
        tiled, sdpa = attention(q, k, v), attention(q, k, v, backend="sdpa")
    assert distance(tiled.double(), exact) < 3 * distance(sdpa.double(), exact)


def test_the_allocator_answers():
    assert cpu.keep_memory() in (True, False)
