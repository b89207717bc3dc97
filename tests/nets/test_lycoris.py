"""Each kind of adapter against lycoris-lora, with which they are trained."""

import importlib

import pytest
import torch
from torch import nn

from ldm.nets.lora import Target, merge_changes
from ldm.nets.lycoris import Adapter, build_change

ROWS, COLUMNS, RANK, ALPHA, STRENGTH = 32, 16, 4, 2.0, 0.7
LOCON = ("up", "down", "mid")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@pytest.fixture(scope="module")
def lycoris():
    """The functions of lycoris-lora, imported only here, as that takes seconds."""
    return importlib.import_module("lycoris.functional")


@pytest.fixture(params=["linear", "convolution"])
def layer(request):
    torch.manual_seed(0)
    is_linear = request.param == "linear"
    return nn.Linear(COLUMNS, ROWS) if is_linear else nn.Conv2d(COLUMNS, ROWS, 3)


def draw_tensor(*shape):
    return torch.randn(shape) / 2


def make_change(layer, tensors, alpha=ALPHA, strength=STRENGTH, **options):
    return build_change(Target(layer), Adapter(tensors, alpha, **options), strength)


def name_tensors(names, *tensors):
    """Return tensors by name, without those that are None."""
    return {n: value for n, value in zip(names, tensors, strict=True) if value is not None}


def get_kernel_size(layer):
    return layer.weight.shape[2:]


def make_low_rank(layer):
    ones = [1] * len(get_kernel_size(layer))
    return draw_tensor(ROWS, RANK, *ones), draw_tensor(RANK, COLUMNS, *get_kernel_size(layer))


def make_flat_factors(layer, rows=ROWS, columns=COLUMNS):
    return draw_tensor(rows, RANK), draw_tensor(RANK, columns * get_kernel_size(layer).numel())


def make_tucker(*, rows=ROWS, columns=COLUMNS):
    return draw_tensor(RANK, RANK, 3, 3), draw_tensor(RANK, rows), draw_tensor(RANK, columns)


def assert_close(ours, theirs):
    """Observed: at most 1.5e-5 of values to 110."""
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-5, atol=1e-4)


def test_lora_and_loha_add_products(lycoris, layer):
    up, down = make_low_rank(layer)
    assert_close(
        make_change(layer, {"up": up, "down": down}).compute_delta(),
        STRENGTH / 2 * (up.flatten(1) @ down.flatten(1)),
    )
    a1, b1, a2, b2 = *make_flat_factors(layer), *make_flat_factors(layer)
    ours = make_change(layer, name_tensors(LOHA[:4], a1, b1, a2, b2)).compute_delta()
    assert_close(ours, lycoris.loha.diff_weight(b1, a1, b2, a2, None, None, gamma=STRENGTH / 2))


def test_lora_and_loha_add_tucker_forms_to_convolutions(lycoris):
    layer = nn.Conv2d(COLUMNS, ROWS, 3)
    mid, up, down = make_tucker()
    up, down = up.t()[:, :, None, None], down[:, :, None, None]
    ours = make_change(layer, name_tensors(LOCON, up, down, mid)).compute_delta()
    assert_close(ours, lycoris.locon.diff_weight(down, up, mid, gamma=STRENGTH / 2))
    (t1, a1, b1), (t2, a2, b2) = make_tucker(), make_tucker()
    ours = make_change(layer, name_tensors(LOHA, a1, b1, a2, b2, t1, t2)).compute_delta()
    assert_close(ours, lycoris.loha.diff_weight(b1, a1, b2, a2, t1, t2, gamma=STRENGTH / 2))


def test_kronecker_products_are_scaled_only_if_a_factor_is_a_product(lycoris, layer):
    w1, w2 = draw_tensor(4, 4), draw_tensor(ROWS // 4, COLUMNS // 4, *get_kernel_size(layer))
    a1, b1 = draw_tensor(4, RANK), draw_tensor(RANK, 4)
    a2, b2 = make_flat_factors(layer, ROWS // 4, COLUMNS // 4)
    shaped = b2.view(RANK, -1, *get_kernel_size(layer))
    for tensors in [
        (w1, None, None, w2, None, None, None),
        (None, a1, b1, w2, None, None, None),
        (w1, None, None, None, a2, shaped, None),
        (None, a1, b1, None, a2, shaped, None),
    ]:
        ours = make_change(layer, name_tensors(LOKR, *tensors)).compute_delta()
        assert_close(ours, STRENGTH * lycoris.lokr.diff_weight(*tensors, gamma=ALPHA))


def test_kronecker_product_with_a_tucker_factor(lycoris):
    # The oracle takes the rank from the wrong axis of `lokr_w2_a`, which is as long here.
    t2, a2, b2 = make_tucker(rows=RANK, columns=COLUMNS // 4)
    tensors = (draw_tensor(ROWS // RANK, 4), None, None, None, a2, b2, t2)
    ours = make_change(nn.Conv2d(COLUMNS, ROWS, 3), name_tensors(LOKR, *tensors)).compute_delta()
    assert_close(ours, lycoris.lokr.diff_weight(*tensors, gamma=ALPHA * STRENGTH))


@pytest.mark.parametrize("by_row", [True, False])
def test_dora_sets_the_length_by_row_or_column(lycoris, layer, by_row):
    up, down = make_low_rank(layer)
    ones = [1] * len(get_kernel_size(layer))
    length = torch.rand(*((ROWS, 1) if by_row else (1, COLUMNS)), *ones) + 0.5
    weight = layer.weight.detach()
    ours = make_change(layer, {"up": up, "down": down, "dora_scale": length}).change_weight(weight)
    changed = weight + lycoris.locon.diff_weight(down, up, None, gamma=STRENGTH / 2)
    assert_close(
        ours,
        lycoris.general.weight_decompose(changed, length, multiplier=STRENGTH, wd_on_out=by_row),
    )


@pytest.mark.parametrize("constraint", [None, 0.001])
def test_oft_and_boft_rotate_rows(lycoris, layer, constraint):
    weight, rescale = layer.weight.detach(), torch.rand(ROWS, 1) + 0.5
    blocks, stages = draw_tensor(4, 8, 8) / 2, draw_tensor(3, 8, 4, 4) / 2
    shaped = rescale.view(-1, *[1] * (weight.dim() - 1))
    total_constraint = constraint and constraint * ROWS
    ours = make_change(layer, {"oft_blocks": blocks, "rescale": rescale}, constraint).change_weight(
        weight
    )
    theirs = lycoris.diag_oft.diff_weight(weight, blocks, shaped, constraint=total_constraint)
    assert_close(ours, weight + STRENGTH * theirs)
    ours = make_change(layer, {"oft_blocks": stages}, constraint).change_weight(weight)
    assert_close(
        ours,
        weight
        + STRENGTH * lycoris.boft.diff_weight(weight, stages, None, constraint=total_constraint),
    )


@pytest.mark.parametrize("on_input", [True, False])
def test_ia3_scales_rows_or_columns(layer, on_input):
    from lycoris.modules.ia3 import IA3Module

    theirs = IA3Module("x", layer, 1.0, train_on_input=on_input)
    nn.init.normal_(theirs.weight)
    ours = make_change(layer, {"weight": theirs.weight.data}, None, 1.0, on_input=on_input)
    expected = theirs.get_merged_weight()[0].detach()
    assert_close(ours.change_weight(layer.weight.detach()), expected)


def test_glora_adds_a_product_with_the_weight():
    from lycoris.modules.glora import GLoRAModule

    layer = nn.Linear(COLUMNS, ROWS)
    theirs = GLoRAModule("x", layer, 1.0, lora_dim=RANK, alpha=ALPHA)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    tensors = {f"{n}.weight": getattr(theirs, n).weight.data for n in ("a1", "a2", "b1", "b2")}
    ours = make_change(layer, tensors, strength=1.0).change_weight(layer.weight.detach())
    assert_close(ours, theirs.get_merged_weight()[0].detach())


def test_full_differences_are_added_to_weights_and_biases_of_any_layer():
    layer, diff = nn.LayerNorm(8), torch.arange(8.0)
    for name, role in [("weight", "w_norm"), ("bias", "b_norm"), ("bias", "diff_b")]:
        before = getattr(layer, name).detach().clone()
        merge_changes([build_change(Target(layer, name=name), Adapter({role: diff}), 0.5)])
        assert torch.equal(getattr(layer, name), before + 0.5 * diff)


def test_the_order_matters_for_rotations_but_not_for_additions():
    torch.manual_seed(1)
    additions = [{"diff": draw_tensor(ROWS, COLUMNS)} for _ in range(5)]
    rotations = [{"oft_blocks": draw_tensor(4, 8, 8)}, {"oft_blocks": draw_tensor(2, 16, 16)}]
    weight = draw_tensor(ROWS, COLUMNS)

    def merge_into_layer(*adapters):
        layer = nn.Linear(COLUMNS, ROWS).requires_grad_(False)
        layer.weight.copy_(weight)
        merge_changes([make_change(layer, tensors, None) for tensors in adapters])
        return layer.weight

    expected = merge_into_layer(*additions, rotations[0])
    assert torch.equal(merge_into_layer(rotations[0], *reversed(additions)), expected)
    assert torch.equal(
        merge_into_layer(additions[2], rotations[0], *additions[:2], *additions[3:]), expected
    )
    assert not torch.allclose(
        merge_into_layer(*rotations), merge_into_layer(*reversed(rotations)), atol=1e-3
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"up": (ROWS, 4)}, "no type of adapter has the tensors `up`"),
        ({"up": (COLUMNS, 4), "down": (4, ROWS)}, r"shape \(16, 32\), the weight \(32, 16\)"),
        ({"up": (ROWS, 4), "down": (5, COLUMNS)}, r"do not fit a weight of shape \(32, 16\)"),
        ({"oft_blocks": (3, 8, 8)}, "do not fit"),
        ({"oft_blocks": (4, 8, 8), "dora_scale": (ROWS, 1)}, "need the tensors of LoRA"),
        ({"up": (ROWS, 4), "down": (4, COLUMNS), "dora_scale": (5, 1)}, "do not fit"),
    ],
)
def test_tensors_of_an_unknown_adapter_or_another_shape_are_refused(tensors, message):
    tensors = {name: torch.zeros(shape) for name, shape in tensors.items()}
    with pytest.raises(ValueError, match=message):
        make_change(nn.Linear(COLUMNS, ROWS), tensors)
