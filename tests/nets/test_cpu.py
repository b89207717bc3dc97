import platform
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from nethelp import build_tiny_unet, make_tiny_inputs
from torch import nn

from ldm.nets import cpu
from ldm.nets.attention import attention
from ldm.nets.blocks import Conv2d, GroupNorm, Linear, Upsample, UpsampleConv2d
from ldm.nets.cpu import layers, products, support, weight_cache, winograd
from ldm.nets.transformer import ContextLinear, FeedForward

pytestmark = pytest.mark.skipif(not support.get_fast_dtypes(), reason="this CPU has no fast paths")
needs_bfloat16 = pytest.mark.skipif(
    torch.bfloat16 not in support.get_fast_dtypes(), reason="needs a CPU that multiplies bfloat16"
)
# Relative; observed are 1.4e-6 at most, and 7.3e-3 by Winograd in bfloat16, 2.8e-3 elsewhere.
LIMITS = {torch.float32: 4e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def fast_paths_for_small_layers(monkeypatch):
    for name in ("MIN_LINEAR_WORK", "MIN_CONV_WORK", "MIN_TAPS_WORK", "MIN_TAPS_CHANNELS"):
        monkeypatch.setattr(layers, name, 1)
    monkeypatch.setattr(layers, "MIN_IM2COL_WEIGHTS", 128 * 160 * 9)
    yield
    cpu.set_enabled(True)


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"])
def each_product(request, monkeypatch):
    if request.param and not products._has_onednn():
        pytest.skip("this version of torch has another operator")
    monkeypatch.setattr(products, "is_onednn_faster", lambda rows: request.param)


def make_linear(**options):
    torch.manual_seed(0)
    return Linear(48, 80, **options).eval(), torch.randn(2, 7, 48)


def make_context_linear():
    torch.manual_seed(0)
    return ContextLinear(48, 80, bias=False).eval(), torch.randn(2, 7, 48)


def make_conv(kind=Conv2d, channels=(128, 160), size=(8, 10), kernel=3, **options):
    torch.manual_seed(0)
    layer = kind(*channels, kernel, **{"padding": kernel // 2, **options}).eval()
    return layer, torch.randn(2, channels[0], *size)


CASES = {
    "linear": make_linear,
    "linear without bias": lambda: make_linear(bias=False),
    "linear of a context": make_context_linear,
    "Winograd": make_conv,
    "Winograd without bias": lambda: make_conv(bias=False),
    "Winograd in bfloat16": lambda: make_conv(channels=(640, 640), size=(8, 8)),
    "one product": lambda: make_conv(size=(5, 7)),
    "one product with stride": lambda: make_conv(stride=2),
    "1x1": lambda: make_conv(kernel=1),
    "without padding": lambda: make_conv(padding=0, bias=False),
    "groups": lambda: make_conv(groups=4),
    "reflected": lambda: make_conv(padding_mode="reflect"),
    "upsampled": lambda: make_conv(UpsampleConv2d, size=(5, 7)),
    "upsampled and narrow": lambda: make_conv(UpsampleConv2d, channels=(16, 24)),
}


def run_torch(layer, x):
    cpu.set_enabled(False)
    with torch.no_grad():
        y = layer(x)
    cpu.set_enabled(True)
    return y


def get_error(x, y):
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("each_product")
def test_layers_equal_torchs(case, layout, dtype):
    layer, x = CASES[case]()
    layer, x = layer.to(dtype), x.to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    expected = run_torch(layer, x)
    with torch.no_grad():
        assert get_error(layer(x), expected) < LIMITS[dtype]
        with cpu.cache_weights():
            first, second = layer(x), layer(x)
    assert get_error(first, expected) < LIMITS[dtype]
    assert torch.equal(first, second)  # an image must not depend on what its model did before


@pytest.mark.parametrize("chunk", [1, 4 << 10, 1 << 30])
def test_winograd_is_the_same_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr(winograd, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(winograd, "MIN_CHUNK_TILES", 1)
    for kind in (Conv2d, UpsampleConv2d):
        layer, x = make_conv(kind, size=(12, 10))
        with torch.no_grad(), cpu.cache_weights():
            assert get_error(layer(x), run_torch(layer, x)) < LIMITS[torch.float32]


@pytest.mark.parametrize("block", [1, 4 << 10])
def test_a_feed_forward_layer_is_the_same_in_blocks(monkeypatch, block):
    monkeypatch.setattr(layers, "BLOCK_BYTES", block)
    layer, x = FeedForward(dim=48, dim_out=40, glu=True).eval(), torch.randn(2, 7, 48)
    with torch.no_grad():
        assert get_error(layer(x), run_torch(layer, x)) < LIMITS[torch.float32]


def test_winograd_rounds_no_worse_than_the_direct_form():
    layer, x = make_conv(channels=(512, 256), size=(16, 16))
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    direct = run_torch(layer, x.contiguous(memory_format=torch.channels_last))
    with torch.no_grad(), cpu.cache_weights():
        ours = layer(x)
    assert get_error(ours.double(), exact) < 3 * get_error(direct.double(), exact)


def test_an_odd_size_after_upsampling_is_cut_before_the_convolution():
    layer, x = Upsample(32).eval(), torch.randn(1, 32, 5, 4)
    with torch.no_grad():
        y = layer(x, (9, 8))
    expected = F.conv2d(
        F.interpolate(x, scale_factor=2.0)[:, :, :9], layer.conv.weight, layer.conv.bias, padding=1
    )
    assert torch.allclose(y, expected, atol=1e-5)


def run_optimizer(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW([layer.weight], lr=0.1).step()


COUNTED_WRITES = {
    "optimizer": run_optimizer,
    "in place": lambda layer: layer.weight.mul_(2),
    "one element": lambda layer: layer.weight[5, 7].add_(3),
    "through an alias": lambda layer: layer.weight.detach().view(-1)[-1:].add_(3),
    "another storage": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {"weight": layer.weight * 2}, strict=False
    ),
}
WRITES = COUNTED_WRITES | {
    "one element through data": lambda layer: layer.weight.data[5, 7].add_(3),
    "a flat element through data": lambda layer: layer.weight.data.view(-1)[1234:1235].add_(1),
    "rows moved through data": lambda layer: layer.weight.data.copy_(layer.weight.roll(1, 0)),
    "through numpy": lambda layer: layer.weight.detach().numpy().reshape(-1)[77:78].__iadd__(1),
}


@pytest.mark.parametrize(
    "case", ["linear", "linear of a context", "Winograd", "one product", "1x1", "upsampled"]
)
@pytest.mark.parametrize("write", WRITES)
def test_every_write_to_a_weight_is_seen(case, write):
    """By all calls outside `cache_weights`, and by the next such block."""
    layer, x = CASES[case]()
    with torch.no_grad():
        for block in [nullcontext(), cpu.cache_weights()]:
            with cpu.cache_weights():
                before = layer(x)
            layer(x)
            WRITES[write](layer)
            with block:
                after = layer(x)
            assert get_error(after, run_torch(layer, x)) < LIMITS[torch.float32]
            assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "case", ["linear of a context", "Winograd", "upsampled", "upsampled and narrow"]
)
@pytest.mark.parametrize("write", COUNTED_WRITES)
def test_writes_that_torch_counts_are_seen_while_weights_are_cached(case, write):
    layer, x = CASES[case]()
    with torch.no_grad(), cpu.cache_weights():
        before = layer(x)
        COUNTED_WRITES[write](layer)
        assert get_error(layer(x), run_torch(layer, x)) < LIMITS[torch.float32]
        assert not torch.equal(layer(x), before)


def test_a_context_is_projected_once_while_its_values_stay_the_same():
    layer, x = make_context_linear()
    with torch.no_grad():
        with cpu.cache_weights():
            first = layer(x)
            assert layer(x.clone()) is first
            for context in [x[:1], x + 1, *torch.randn(6, 2, 7, 48), x]:
                assert get_error(layer(context), run_torch(layer, context)) < LIMITS[torch.float32]
            x = torch.randn(1, 77, 48)  # its output is larger than the weight
            assert layer(x) is not layer(x)
        assert layer(x) is not layer(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_write_to_a_context_is_seen(mode):
    layer, _ = make_context_linear()
    with mode(), cpu.cache_weights():
        x = torch.randn(2, 7, 48)
        for write in (lambda: x.mul_(2), lambda: x.data[1, 5, 7].add_(3), lambda: x.fill_(0.5)):
            before = layer(x)
            write()
            assert not torch.equal(layer(x), before)
            assert get_error(layer(x), run_torch(layer, x)) < LIMITS[torch.float32]


def test_nothing_is_cached_without_memory_for_it_or_for_weights_of_inference_mode(monkeypatch):
    layer, x = make_conv()
    with torch.inference_mode():
        uncounted, _ = make_conv()
    monkeypatch.setattr(weight_cache, "get_free_memory", lambda: 1 << 20)
    with torch.inference_mode(), cpu.cache_weights():
        for each in (layer, uncounted):
            for _ in range(2):
                assert get_error(each(x), run_torch(each, x)) < LIMITS[torch.float32]
                each.weight.data[3, 4] += 1


def test_cached_weights_take_at_most_half_of_the_memory_that_was_free(monkeypatch):
    (layer, x), (second, _), (third, _) = make_conv(), make_conv(), make_conv()
    layers = [layer, second, third]
    room = 2 * 2 * weight_cache.MAX_RESULT_SIZE * layer.weight.nbytes
    monkeypatch.setattr(weight_cache, "get_free_memory", lambda: room)
    with torch.no_grad(), cpu.cache_weights():
        for each in layers:
            each(x)
        assert [weight_cache.is_caching(each.weight) for each in layers] == [True, True, False]


def compute_gradients(layer, x, *, on):
    """Output, its gradients by input, weight and bias, and gradients of those."""
    cpu.set_enabled(on)
    x, parameters = x.clone().requires_grad_(), list(layer.parameters())
    y = layer(x)
    first = torch.autograd.grad(y.square().sum(), [x, *parameters], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *parameters])
    cpu.set_enabled(True)
    return [y, *first, *second]


def list_backward_functions(y):
    """Follow the graph back to the first function with two inputs."""
    functions = [y.grad_fn]
    while len(functions[-1].next_functions) == 1:
        functions.append(functions[-1].next_functions[0][0])
    return functions


BACKWARD = {
    "linear": "LinearFunctionBackward",
    "linear without bias": "LinearFunctionBackward",
    "one product": "Conv3x3FunctionBackward",
    "one product with stride": "Conv3x3FunctionBackward",
    "upsampled": "UpsampleConv3x3FunctionBackward",
    "upsampled and narrow": "UpsampleConv3x3FunctionBackward",
    "without padding": "ConvolutionBackward0",  # torch's own
}


@pytest.mark.parametrize("case", BACKWARD)
def test_layers_with_gradients_equal_torchs(case, monkeypatch):
    monkeypatch.setattr(layers, "MAX_IM2COL_PIXELS_WITH_GRADIENTS", 1 << 20)
    monkeypatch.setattr(products, "is_onednn_faster", lambda rows: True)
    monkeypatch.setattr("ldm.nets.cpu.gradients.apply_linear", F.linear)
    layer, x = CASES[case]()
    fast, slow = compute_gradients(layer, x, on=True), compute_gradients(layer, x, on=False)
    assert BACKWARD[case] in [function.name() for function in list_backward_functions(fast[0])]
    for ours, torchs in zip(fast, slow, strict=True):
        assert get_error(ours, torchs) < LIMITS[torch.float32]
    assert all(each.is_contiguous() for each in fast[: 2 + len(list(layer.parameters()))])


@pytest.mark.parametrize("case", BACKWARD)
def test_frozen_layers_pass_gradients_on_and_keep_no_input(case, monkeypatch):
    monkeypatch.setattr(layers, "MAX_IM2COL_PIXELS_WITH_GRADIENTS", 1 << 20)
    layer, x = CASES[case]()
    layer.requires_grad_(False)
    y = layer(2 * x.requires_grad_())
    for function in list_backward_functions(y):
        if function.name() in ("Conv3x3FunctionBackward", "UpsampleConv3x3FunctionBackward"):
            assert function.saved_tensors[0] is None
    y.mul_(2).sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.weight.grad is None


def test_transforms_of_functions_take_torchs_path():
    layer, x = make_linear()
    by_row = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)
    assert get_error(by_row, layer.weight.sum(0).expand_as(x)) < 1e-6


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_autocast_takes_torchs_path(precision):
    layer, x = make_linear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x.to(precision))
    assert y.dtype == torch.bfloat16


def test_exported_graphs_hold_only_ordinary_operators():
    layer, x = make_conv()
    with torch.no_grad(), cpu.cache_weights():
        graph = torch.export.export(layer, (x,)).graph
    operators = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert operators == ["aten.conv2d.default"]


def test_a_whole_unet_is_equal_and_contiguous():
    unet, (x, t, context) = build_tiny_unet(), make_tiny_inputs()
    with torch.no_grad(), cpu.cache_weights():
        fast = unet(x, t, context)
        cpu.set_enabled(False)
        expected = unet(x, t, context)
    assert fast.is_contiguous()
    assert get_error(fast, expected) < 1e-5


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
    assert get_error(y.double(), exact) < 3e-7


@needs_bfloat16
@pytest.mark.parametrize(("n", "m"), [(300, 300), (300, 77), (16, 16)])
@pytest.mark.parametrize("tile", [1, 8 << 10, 1 << 30])
def test_tiled_attention_is_as_near_as_sdpa(monkeypatch, n, m, tile):
    monkeypatch.setattr("ldm.nets.attention.TILE_BYTES", tile)
    monkeypatch.setattr("ldm.nets.attention.has_amx", lambda: False)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, size, 3, 40).bfloat16().transpose(1, 2) for size in (n, m, m))
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    with torch.no_grad():
        tiled, sdpa = attention(q, k, v), attention(q, k, v, backend="sdpa")
    assert get_error(tiled.double(), exact) < 3 * get_error(sdpa.double(), exact)


def test_freed_memory_is_kept_where_the_allocator_is_that_of_glibc():
    assert cpu.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
