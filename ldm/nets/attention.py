"""attention(q, k, v): one function, three backends, and the choice between them.

"xformers" calls its memory-efficient kernel, "sdpa" torch's fused one, "math" writes the formula
out (it allocates all N x M scores: a reference). Unless a call, `set_backend` or the variable
LDM_ATTENTION names one, xformers is taken where it is installed and its kernel runs on this device
and dtype, else SDPA.

Precision: the fused kernels multiply in the dtype of q and sum scores and softmax in float32.
"math" does the same by casting q and k to float32 first, unless ATTN_PRECISION names another
precision ("fp16"): SD 2.1 overflows float16 scores.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("xformers", "sdpa", "math")

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
    if backend is None:
        backend = "xformers" if mask is None and _xformers_runs(q, k, v) else "sdpa"
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
