import sys
import types

import pytest
import torch
import torch.nn.functional as F

from ldm.nets import attention as attention_module
from ldm.nets.attention import BACKENDS, attention, set_backend


@pytest.fixture(autouse=True)
def reset_backend(monkeypatch):
    for name in ("LDM_ATTENTION", "ATTN_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    yield
    set_backend(None)


@pytest.fixture
def fake_xformers(monkeypatch):
    """Install a module with the interface of xformers, which runs without its kernels."""

    def memory_efficient_attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def make_qkv(n=12, m=7, heads=3, d=16, dtype=torch.float32, scale=1.0, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, n, d), (2, heads, m, d), (2, heads, m, d)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(device, dtype) for x in (q * scale, k * scale, v)]


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
@pytest.mark.parametrize("shape", [(12, 7, 3, 16), (1, 1, 1, 8), (64, 64, 1, 40)])
def test_backends_and_their_gradients_equal_the_formula(shape, backend, fake_xformers):
    def compute(backend):
        inputs = [x.requires_grad_() for x in make_qkv(*shape, dtype=torch.float64)]
        out = attention(*inputs, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    for ours, theirs in zip(compute(backend), compute("math"), strict=True):
        assert (ours - theirs).abs().max() < 1e-13  # observed: 4e-15


@pytest.mark.parametrize("tile_bytes", [4 * 7 * 5, attention_module.TILE_BYTES])
@torch.no_grad()
def test_tiles_of_a_short_context_equal_the_formula(tile_bytes, monkeypatch):
    q, k, v = make_qkv(24, 7, 3, 40)
    exact = attention(q.double(), k.double(), v.double(), backend="math")
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # is not called
    # on every processor
    monkeypatch.setattr(attention_module.cpu, "can_accelerate", lambda x: True)
    monkeypatch.setattr(attention_module, "TILE_BYTES", tile_bytes)
    assert (attention(q, k, v) - exact).abs().max() < 3e-6  # observed: 5.6e-7


@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (2, 3, 12, 7), (12, 7)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_have_no_effect(shape, backend, fake_xformers):
    q, k, v = make_qkv()
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 4:] = False
    masked = attention(q, k, v, mask, backend=backend)
    assert (masked - attention(q, k[:, :, :4], v[:, :, :4], backend="math")).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_half_precision_do_not_overflow(backend, dtype):
    q, k, v = make_qkv(64, 64, d=64, dtype=dtype, scale=300.0)
    assert (q.float() @ k.float().mT).abs().max() > 65504 * 8
    exact = attention(q.double(), k.double(), v.double(), backend="math")
    out = attention(q, k, v, backend=backend)
    assert out.dtype == dtype
    assert (out - exact).abs().max() < 0.02


def test_attn_precision_fp16_computes_the_scores_in_half_precision(monkeypatch):
    q, k, v = make_qkv(64, 64, d=64, dtype=torch.float16, scale=300.0)
    monkeypatch.setenv("ATTN_PRECISION", "fp16")
    assert not attention(q, k, v, backend="math").isfinite().all()


def test_scores_stay_in_float32_under_autocast():
    q, k, v = make_qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, backend="math")
    assert torch.equal(out, attention(q, k, v, backend="math"))


def record_backends(monkeypatch):
    """Return a list that gets the name of each backend when it is called."""
    calls = []
    monkeypatch.setattr(attention_module, "_attend_by_math", lambda *args: calls.append("math"))
    monkeypatch.setattr(
        attention_module, "_attend_by_xformers", lambda *args: calls.append("xformers")
    )
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: calls.append("sdpa"))
    return calls


def test_on_a_cpu_sdpa_is_chosen_even_with_xformers_installed(monkeypatch, fake_xformers):
    calls = record_backends(monkeypatch)
    attention(*make_qkv())
    assert calls == ["sdpa"]


def test_xformers_is_chosen_where_its_kernel_runs(monkeypatch):
    calls = record_backends(monkeypatch)
    monkeypatch.setattr(attention_module, "_can_use_xformers", lambda *args: True)
    attention(*make_qkv())
    attention(*make_qkv(), torch.ones(7, dtype=torch.bool))
    assert calls == ["xformers", "sdpa"]


def test_the_argument_overrides_set_backend_which_overrides_the_environment(monkeypatch):
    calls = record_backends(monkeypatch)
    monkeypatch.setenv("LDM_ATTENTION", "math")
    attention(*make_qkv())
    set_backend("sdpa")
    attention(*make_qkv())
    attention(*make_qkv(), backend="math")
    set_backend("auto")
    attention(*make_qkv())
    monkeypatch.setenv("LDM_ATTENTION", "auto")
    attention(*make_qkv())
    assert calls == ["math", "sdpa", "math", "math", "sdpa"]


def test_an_unknown_backend_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="`flash`.* choose one of xformers, sdpa, math"):
        set_backend("flash")
    monkeypatch.setenv("LDM_ATTENTION", "fast")
    with pytest.raises(ValueError, match="LDM_ATTENTION: unknown attention backend `fast`"):
        attention(*make_qkv())


def test_the_error_for_missing_xformers_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match=r"pip install 'ldm-revived\[xformers\]'"):
        attention(*make_qkv(), backend="xformers")


def test_a_kernel_that_fails_its_trial_is_not_chosen(monkeypatch):
    def fail(*args):
        raise NotImplementedError("no operator found")

    monkeypatch.setattr(attention_module, "_attend_by_xformers", fail)
    attention_module._probe_xformers.cache_clear()
    assert not attention_module._probe_xformers(torch.device("cpu"), torch.float32, 8, True)
    attention_module._probe_xformers.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [40, 64, 160, 512])
@pytest.mark.parametrize("backend", ["xformers", "sdpa", None])
def test_backends_agree_on_a_gpu(dtype, d, backend):
    if backend == "xformers":
        pytest.importorskip("xformers")
    q, k, v = make_qkv(256, 77, 2, d, dtype, device="cuda")
    if backend == "xformers" and not attention_module._can_use_xformers(q, k, v):
        pytest.skip("xformers has no kernel for this")
    error = attention(q, k, v, backend=backend) - attention(q, k, v, backend="math")
    assert error.abs().max() < {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", None])
def test_scores_beyond_half_precision_do_not_overflow_on_a_gpu(backend):
    q, k, v = make_qkv(64, 64, d=64, dtype=torch.float16, scale=300.0, device="cuda")
    exact = attention(q.double(), k.double(), v.double(), backend="math")
    assert (attention(q, k, v, backend=backend) - exact).abs().max() < 0.05
