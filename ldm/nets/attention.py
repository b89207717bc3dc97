"""attention(q, k, v) by one of three backends.

"xformers" calls xformers' memory-efficient kernel, "sdpa" torch's fused one; "math" computes the
formula and allocates all N x M scores. The backend is selected by the argument `backend`, else by
`set_backend`, else by the environment variable LDM_ATTENTION. The default is xformers if its kernel
runs on this device and dtype, else SDPA. On CPUs, attention is computed in tiles
instead: in float32 to at most MAX_TILED_KEYS keys, in bfloat16 without AMX.

The fused kernels compute scores and softmax in float32. "math" casts q and k to float32 first, as
float16 scores of SD 2.1 overflow, unless the environment variable ATTN_PRECISION is not "fp32".
"""

import functools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nets import cpu
from ldm.runtime.device import has_amx
from ldm.runtime.errors import check_name

__all__ = ["BACKENDS", "attention", "set_backend"]

BACKENDS = ("xformers", "sdpa", "math")

TILE_BYTES = 1 << 20  # of scores per thread: few enough for the cache, enough for fast products
MIN_TILED_HEAD_DIM = 40  # features per head; with fewer, products are mostly overhead
# In float32 on CPUs, SDPA takes 1.2 to 1.5 times as long as tiles for the keys of one chunk of a
# prompt, and as long for those of two chunks.
MAX_TILED_KEYS = 96

_default_backend: str | None = None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v per head (arXiv:1706.03762, equation 1).

    Args:
        q: (B, heads, N, d).
        k, v: (B, heads, M, d).
        mask: Bool, broadcastable to (B, heads, N, M); True = keep, at least one key per query; None
            keeps all. With a mask, SDPA replaces xformers.
        backend: Name in BACKENDS; None = selected as in the docstring of this module.

    Returns:
        (B, heads, N, d), in the dtype of v.
    """
    backend = (
        _parse_backend(backend)
        or _default_backend
        or _parse_backend(os.environ.get("LDM_ATTENTION"), "LDM_ATTENTION")
    )
    if backend is None and mask is None:
        if _should_tile(q, k):
            return _attend_in_tiles(q, k, v)
        backend = "xformers" if _can_use_xformers(q, k, v) else "sdpa"
    if backend == "math":
        return _attend_by_math(q, k, v, mask)
    if backend == "xformers" and mask is None:
        return _attend_by_xformers(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def set_backend(name: str | None) -> None:
    """Set the default backend; None or "auto" = select it automatically."""
    global _default_backend
    _default_backend = _parse_backend(name)


def _parse_backend(name: str | None, where: str = "") -> str | None:
    if not name or name == "auto":
        return None
    check_name("attention backend", name, BACKENDS, where)
    if name == "xformers":
        _load_xformers_kernel()
    return name


def _attend_by_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if os.environ.get("ATTN_PRECISION", "fp32") == "fp32":
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(dtype), k.to(dtype)
    # Autocast would multiply q and k in half precision again.
    with torch.autocast(q.device.type, enabled=False):
        scores: Tensor = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, heads, N, M)
        if mask is not None:
            # As in the original: -inf would give NaN for a query without keys.
            scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
        return scores.softmax(-1).to(v.dtype) @ v  # (B, heads, N, d)


def _attend_in_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute scores for some queries of a head, or for some heads, at a time, to stay in cache."""
    n, m = q.shape[-2], k.shape[-2]
    out = v.new_empty(*q.shape[:-1], v.shape[-1])  # (B, heads, N, d)
    # Written to a new, contiguous tensor: the product itself would have the strides of q.
    q = torch.mul(q, q.shape[-1] ** -0.5, out=torch.empty(q.shape, dtype=q.dtype))
    q, k, v, flat_out = (x.flatten(0, 1) for x in (q, k, v, out))  # (B heads, N or M, d)
    k = k.transpose(1, 2)  # (B heads, d, M)
    tile_queries = max(1, TILE_BYTES * torch.get_num_threads() // (m * q.element_size()))
    tile_heads = max(1, tile_queries // n)
    for first_head in range(0, len(q), tile_heads):
        heads = slice(first_head, first_head + tile_heads)
        for first_query in range(0, n, tile_queries):
            queries = slice(first_query, first_query + tile_queries)
            weights = torch.bmm(q[heads, queries], k[heads]).softmax(-1)  # (heads, queries, M)
            torch.bmm(weights, v[heads], out=flat_out[heads, queries])
    return out


def _should_tile(q: Tensor, k: Tensor) -> bool:
    if q.shape[-1] < MIN_TILED_HEAD_DIM or not cpu.can_accelerate(q):
        return False
    if q.dtype == torch.bfloat16:  # without AMX, SDPA computes it in float32
        return not has_amx()
    return k.shape[-2] <= MAX_TILED_KEYS and q.shape[-2] > k.shape[-2]


def _load_xformers_kernel() -> Callable[..., Tensor]:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        message = "attention backend `xformers` needs `pip install 'ldm-revived[xformers]'`"
        raise ImportError(message) from error
    kernel: Callable[..., Tensor] = memory_efficient_attention
    return kernel


def _attend_by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, heads, d), the layout of xformers
    out: Tensor = _load_xformers_kernel()(q, k, v)
    return out.transpose(1, 2)  # (B, heads, N, d)


def _can_use_xformers(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not q.is_cuda or torch.compiler.is_compiling():
        return False
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _probe_xformers(q.device, q.dtype, q.shape[-1], needs_grad)


@functools.cache
def _probe_xformers(
    device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool
) -> bool:
    """Return whether the kernel runs on a small input: it may be installed for another GPU."""
    with torch.enable_grad():
        x = torch.zeros(1, 1, 16, head_dim, device=device, dtype=dtype, requires_grad=needs_grad)
        try:
            out = _attend_by_xformers(x, x, x)
            if needs_grad:
                torch.autograd.backward(out.sum())
            torch.cuda.synchronize(device)
        except (ImportError, NotImplementedError, ValueError, RuntimeError):
            return False
    return True
