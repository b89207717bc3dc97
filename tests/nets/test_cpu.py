import platform
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.nets import cpu
from ldm.nets.attention import attention
from ldm.nets.blocks import Conv2d, GroupNorm, Linear, Upsample, UpsampleConv2d
from ldm.nets.cpu import layers, products, support, weight_cache, winograd
from ldm.nets.transformer import ContextLinear, FeedForward
from nets.nethelp import build_tiny_unet, make_tiny_inputs

pytestmark = pytest.mark.skipif(not support.get_fast_dtypes(), reason="this CPU has no fast paths")
needs_bfloat16 = pytest.mark.skipif(
    torch.bfloat16 not in support.get_fast_dtypes(), reason="needs a CPU that multiplies bfloat16"
)
# Of relative errors; observed: 1.4e-6 in float32, in bfloat16 7.3e-3 with Winograd, else 2.8e-3.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def use_fast_paths_for_small_layers(monkeypatch):
    for name in ("MIN_LINEAR_WORK", "MIN_CONV_WORK", "MIN_TAPS_WORK", "MIN_TAPS_CHANNELS"):
        monkeypatch.setattr(layers, name, 1)
    monkeypatch.setattr(layers, "MIN_IM2COL_WEIGHTS", 128 * 160 * 9)
    yield
    cpu.set_enabled(True)


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"])
def matmul_library(request, monkeypatch):
    if request.param and not products._has_onednn():
        pytest.skip("this version of torch has another operator")
    monkeypatch.setattr(products, "is_onednn_faster", lambda rows: request.param)


def make_linear(**options):
    torch.manual_seed(0)
    return Linear(48, 80, **options).eval(), torch.randn(2, 7, 48)


def make_context_linear():
    torch.manual_seed(0)
    return ContextLinear(48, 80, bias=False).eval(), torch.randn(2, 7, 48)


def make_conv(layer_class=Conv2d, channels=(128, 160), size=(8, 10), kernel=3, **options):
    torch.manual_seed(0)
    layer = layer_class(*channels, kernel, **{"padding": kernel // 2, **options}).eval()
    return layer, torch.randn(2, channels[0], *size)


CASES = {
    "linear": make_linear,
    "linear without bias": lambda: make_linear(bias=False),
    "linear of a context": make_context_linear,
    "Winograd": make_conv,
    "Winograd without bias": lambda: make_conv(bias=False),
    "Winograd in bfloat16": lambda: make_conv(channels=(640, 640), size=(8, 8)),
    "im2col": lambda: make_conv(size=(5, 7)),
    "im2col with stride": lambda: make_conv(stride=2),
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


def compute_error(x, y):
    """Compute the relative error of x in the Euclidean norm."""
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def assert_close_to_torch(layer, x):
    assert compute_error(layer(x), run_torch(layer, x)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("matmul_library")
def test_layers_equal_those_of_torch(case, layout, dtype):
    layer, x = CASES[case]()
    layer, x = layer.to(dtype), x.to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    expected = run_torch(layer, x)
    with torch.no_grad():
        assert compute_error(layer(x), expected) < TOLERANCES[dtype]
        with cpu.cache_weights():
            first, second = layer(x), layer(x)
    assert compute_error(first, expected) < TOLERANCES[dtype]
    assert torch.equal(first, second)  # an image must not depend on what its model did before


@pytest.mark.parametrize("chunk_bytes", [1, 4 << 10, 1 << 30])
def test_winograd_in_chunks_gives_the_same(monkeypatch, chunk_bytes):
    monkeypatch.setattr(winograd, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(winograd, "MIN_CHUNK_TILES", 1)
    for layer_class in (Conv2d, UpsampleConv2d):
        layer, x = make_conv(layer_class, size=(12, 10))
        with torch.no_grad(), cpu.cache_weights():
            assert_close_to_torch(layer, x)


@pytest.mark.parametrize("block_bytes", [1, 4 << 10])
def test_a_feed_forward_layer_in_blocks_gives_the_same(monkeypatch, block_bytes):
    monkeypatch.setattr(layers, "BLOCK_BYTES", block_bytes)
    layer, x = FeedForward(dim=48, dim_out=40, glu=True).eval(), torch.randn(2, 7, 48)
    with torch.no_grad():
        assert_close_to_torch(layer, x)


def test_winograd_rounds_no_worse_than_direct_convolution():
    layer, x = make_conv(channels=(512, 256), size=(16, 16))
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    direct = run_torch(layer, x.contiguous(memory_format=torch.channels_last))
    with torch.no_grad(), cpu.cache_weights():
        ours = layer(x)
    assert compute_error(ours.double(), exact) < 3 * compute_error(direct.double(), exact)


def test_an_upsampled_image_of_odd_size_is_cropped_before_the_convolution():
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
    "case", ["linear", "linear of a context", "Winograd", "im2col", "1x1", "upsampled"]
)
@pytest.mark.parametrize("write", WRITES)
def test_every_write_to_a_weight_is_noticed(case, write):
    """By calls outside `cache_weights`, and by the next block with it."""
    layer, x = CASES[case]()
    with torch.no_grad():
        for context_manager in [nullcontext(), cpu.cache_weights()]:
            with cpu.cache_weights():
                before = layer(x)
            layer(x)
            WRITES[write](layer)
            with context_manager:
                after = layer(x)
            assert compute_error(after, run_torch(layer, x)) < TOLERANCES[torch.float32]
            assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "case", ["linear of a context", "Winograd", "upsampled", "upsampled and narrow"]
)
@pytest.mark.parametrize("write", COUNTED_WRITES)
def test_writes_that_torch_counts_are_noticed_while_weights_are_cached(case, write):
    layer, x = CASES[case]()
    with torch.no_grad(), cpu.cache_weights():
        before = layer(x)
        COUNTED_WRITES[write](layer)
        assert_close_to_torch(layer, x)
        assert not torch.equal(layer(x), before)


def test_a_context_is_projected_once_while_its_values_are_the_same():
    layer, x = make_context_linear()
    with torch.no_grad():
        with cpu.cache_weights():
            first = layer(x)
            assert layer(x.clone()) is first
            for context in [x[:1], x + 1, *torch.randn(6, 2, 7, 48), x]:
                assert_close_to_torch(layer, context)
            x = torch.randn(1, 77, 48)  # its output is larger than the weight
            assert layer(x) is not layer(x)
        assert layer(x) is not layer(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_write_to_a_context_is_noticed(mode):
    layer, _ = make_context_linear()
    with mode(), cpu.cache_weights():
        x = torch.randn(2, 7, 48)
        for write in (lambda: x.mul_(2), lambda: x.data[1, 5, 7].add_(3), lambda: x.fill_(0.5)):
            before = layer(x)
            write()
            assert not torch.equal(layer(x), before)
            assert_close_to_torch(layer, x)


def test_weights_are_not_cached_without_free_memory_or_if_made_in_inference_mode(monkeypatch):
    layer, x = make_conv()
    with torch.inference_mode():
        inference_layer, _ = make_conv()
    monkeypatch.setattr(weight_cache, "get_free_memory", lambda: 1 << 20)
    with torch.inference_mode(), cpu.cache_weights():
        for conv in (layer, inference_layer):
            for _ in range(2):
                assert_close_to_torch(conv, x)
                conv.weight.data[3, 4] += 1


def test_cached_weights_take_at_most_half_of_the_memory_that_was_free(monkeypatch):
    (layer, x), *others = make_conv(), make_conv(), make_conv()
    convs = [layer, *(conv for conv, _ in others)]
    free_memory = 2 * 2 * weight_cache.MAX_RESULT_SIZE * layer.weight.nbytes
    monkeypatch.setattr(weight_cache, "get_free_memory", lambda: free_memory)
    with torch.no_grad(), cpu.cache_weights():
        for conv in convs:
            conv(x)
        assert [weight_cache.is_caching(conv.weight) for conv in convs] == [True, True, False]


def compute_gradients(layer, x, *, on):
    """Compute the output and its first and second derivatives by input, weight and bias."""
    cpu.set_enabled(on)
    x, parameters = x.clone().requires_grad_(), list(layer.parameters())
    y = layer(x)
    first = torch.autograd.grad(y.square().sum(), [x, *parameters], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *parameters])
    cpu.set_enabled(True)
    return [y, *first, *second]


def list_backward_functions(y):
    """List the backward functions down to the first one with several inputs."""
    functions = [y.grad_fn]
    while len(functions[-1].next_functions) == 1:
        functions.append(functions[-1].next_functions[0][0])
    return functions


BACKWARD_FUNCTIONS = {
    "linear": "LinearFunctionBackward",
    "linear without bias": "LinearFunctionBackward",
    "im2col": "Conv3x3FunctionBackward",
    "im2col with stride": "Conv3x3FunctionBackward",
    "upsampled": "UpsampleConv3x3FunctionBackward",
    "upsampled and narrow": "UpsampleConv3x3FunctionBackward",
    "without padding": "ConvolutionBackward0",  # torch's own
}


@pytest.mark.parametrize("case", BACKWARD_FUNCTIONS)
def test_gradients_equal_those_of_torch(case, monkeypatch):
    monkeypatch.setattr(layers, "MAX_IM2COL_PIXELS_WITH_GRADIENTS", 1 << 20)
    monkeypatch.setattr(products, "is_onednn_faster", lambda rows: True)
    monkeypatch.setattr("ldm.nets.cpu.gradients.apply_linear", F.linear)
    layer, x = CASES[case]()
    fast, slow = compute_gradients(layer, x, on=True), compute_gradients(layer, x, on=False)
    names = [function.name() for function in list_backward_functions(fast[0])]
    assert BACKWARD_FUNCTIONS[case] in names
    for ours, theirs in zip(fast, slow, strict=True):
        assert compute_error(ours, theirs) < TOLERANCES[torch.float32]
    assert all(tensor.is_contiguous() for tensor in fast[: 2 + len(list(layer.parameters()))])


@pytest.mark.parametrize("case", BACKWARD_FUNCTIONS)
def test_frozen_layers_propagate_gradients_and_save_no_input(case, monkeypatch):
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


def test_function_transforms_use_torch():
    layer, x = make_linear()
    gradients = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)
    assert compute_error(gradients, layer.weight.sum(0).expand_as(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_uses_torch(dtype):
    layer, x = make_linear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x.to(dtype))
    assert y.dtype == torch.bfloat16


def test_exported_graphs_have_only_operators_of_torch():
    layer, x = make_conv()
    with torch.no_grad(), cpu.cache_weights():
        graph = torch.export.export(layer, (x,)).graph
    operators = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert operators == ["aten.conv2d.default"]


def test_the_output_of_a_unet_is_equal_and_contiguous():
    unet, (x, t, context) = build_tiny_unet(), make_tiny_inputs()
    with torch.no_grad(), cpu.cache_weights():
        fast = unet(x, t, context)
        cpu.set_enabled(False)
        expected = unet(x, t, context)
    assert fast.is_contiguous()
    assert compute_error(fast, expected) < 1e-5


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 100, 130), (1, 200, 40), (1, 97, 64)])
def test_group_norm_of_large_feature_maps_is_accurate(batch, height, width):
    torch.manual_seed(0)
    norm, x = GroupNorm(64, eps=1e-6), torch.randn(batch, 64, height, width) + 0.5
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.no_grad():
        y = norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert compute_error(y.double(), exact) < 3e-7


@needs_bfloat16
@pytest.mark.parametrize(("n", "m"), [(300, 300), (300, 77), (16, 16)])
@pytest.mark.parametrize("tile_bytes", [1, 8 << 10, 1 << 30])
def test_tiled_attention_is_as_accurate_as_sdpa(monkeypatch, n, m, tile_bytes):
    monkeypatch.setattr("ldm.nets.attention.TILE_BYTES", tile_bytes)
    monkeypatch.setattr("ldm.nets.attention.has_amx", lambda: False)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, size, 3, 40).bfloat16().transpose(1, 2) for size in (n, m, m))
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    with torch.no_grad():
        tiled, sdpa = attention(q, k, v), attention(q, k, v, backend="sdpa")
    assert compute_error(tiled.double(), exact) < 3 * compute_error(sdpa.double(), exact)


def test_freed_memory_is_kept_with_the_allocator_of_glibc():
    assert cpu.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
