"""attention(q, k, v): one function, three backends, and the choice between them.

"xformers" calls its memory-efficient kernel, "sdpa" torch's fused one, "math" writes the formula
out (it allocates all N x M scores: a reference). Unless a call, `set_backend` or the variable
LDM_ATTENTION names one, xformers is taken where it is installed and its kernel runs on this device
and dtype, else SDPA; except that torch's SDPA for bfloat16 multiplies in float32 on CPUs without
matrix tiles (AMX), where plain products, a few rows of scores at a time, take two thirds of its
time.

Precision: the fused kernels multiply in the dtype of q and sum scores and softmax in float32.
"math" does the same by casting q and k to float32 first, unless ATTN_PRECISION names another
precision ("fp16"): SD 2.1 overflows float16 scores.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nets import cpu

BACKENDS = ("xformers", "sdpa", "math")

TILE = 1 << 20  # bytes of scores per thread; more leave the cache, fewer make small products
TILE_WIDTH = 40  # features per head; with fewer, products are mostly overhead

_chosen: str | None = None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, per head.

        q: (B, heads, N, d).  k, v: (B, heads, M, d).
        mask: bool, broadcastable to (B, heads, N, M); True = keep, at least one key per query.
        backend: one of BACKENDS; None = what `set_backend` or LDM_ATTENTION says, else automatic.
        Returns (B, heads, N, d), dtype of v.
        Raises ValueError for an unknown backend, ImportError if xformers is asked for and absent.

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1.
    """
    backend = _known(backend) or _chosen or _known(os.environ.get("LDM_ATTENTION"))
    if backend is None and mask is None:
        if _tiles_pay(q):
            return _tiled(q, k, v)
        backend = "xformers" if _xformers_runs(q, k, v) else "sdpa"
    if backend == "math":
        return _math(q, k, v, mask)
    if backend == "xformers" and mask is None:
        return _xformers(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def set_backend(name: str | None) -> None:
    """Use backend `name` for every call that names none; None or "auto" = choose automatically."""
    global _chosen
    _chosen = _known(name)


def _known(name: str | None) -> str | None:
    if not name or name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend `{name}`, choose one of {', '.join(BACKENDS)}")
    return name


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if os.environ.get("ATTN_PRECISION", "fp32") == "fp32":
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(dtype), k.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, heads, N, M)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
        return scores.softmax(-1).to(v.dtype) @ v  # (B, heads, N, d)


def _tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of a few rows, or of a few whole heads, at a time, so that they stay in the cache."""
    n, m = q.shape[-2], k.shape[-2]
    out = v.new_empty(*q.shape[:-1], v.shape[-1])  # (B, heads, N, d)
    q = torch.mul(q, q.shape[-1] ** -0.5, out=torch.empty(q.shape, dtype=q.dtype))
    q, k, v, flat = (x.flatten(0, 1) for x in (q, k, v, out))  # (B heads, N or M, d)
    k = k.transpose(1, 2)
    rows = max(1, TILE * torch.get_num_threads() // (m * q.element_size()))
    heads = max(1, rows // n)
    for i in range(0, len(q), heads):
        some = slice(i, i + heads)
        for j in range(0, n, rows):
            scores = torch.bmm(q[some, j : j + rows], k[some]).softmax(-1)
            torch.bmm(scores, v[some], out=flat[some, j : j + rows])
    return out


def _tiles_pay(q: Tensor) -> bool:
    wide = q.dtype == torch.bfloat16 and q.shape[-1] >= TILE_WIDTH
    return wide and cpu.applies(q) and _multiplies_bfloat16()


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16 in its vector unit, and no matrix unit."""
    supported = [
        getattr(torch.cpu, f"_is_{name}_supported", lambda: False)
        for name in ("avx512_bf16", "amx_tile")
    ]
    return supported[0]() and not supported[1]()


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        hint = "attention backend `xformers` needs `pip install 'ldm-revived[xformers]'`"
        raise ImportError(hint) from error
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, heads, d), its own layout
    out: Tensor = memory_efficient_attention(q, k, v)
    return out.transpose(1, 2)  # (B, heads, N, d)


def _xformers_runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not q.is_cuda or torch.compiler.is_compiling():
        return False
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _xformers_probe(q.device, q.dtype, q.shape[-1], needs_grad)


@functools.cache
def _xformers_probe(device: torch.device, dtype: torch.dtype, d: int, needs_grad: bool) -> bool:
    """Run the kernel once on a few numbers: being installed does not mean that it works here."""
    with torch.enable_grad():
        x = torch.zeros(1, 1, 16, d, device=device, dtype=dtype, requires_grad=needs_grad)
        try:
            out = _xformers(x, x, x)
            if needs_grad:
                out.sum().backward()
            torch.cuda.synchronize(device)
        except (ImportError, NotImplementedError, ValueError, RuntimeError):
            return False
    return True
