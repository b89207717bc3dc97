"""Self-attention whose map is the identity, for some rows of a batch (arXiv:2403.17377)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nets.transformer import CrossAttention, SpatialTransformer, TransformerBlock

__all__ = ["find_self_attentions", "perturb_self_attention"]


def find_self_attentions(module: nn.Module) -> list[CrossAttention]:
    """Return the self-attention of each block of the transformers in a module."""
    transformers = [m for m in module.modules() if isinstance(m, SpatialTransformer)]
    blocks = [block for m in transformers for block in m.transformer_blocks]
    return [
        block.attn1
        for block in blocks
        if isinstance(block, TransformerBlock) and not block.disable_self_attn
    ]


@contextmanager
def perturb_self_attention(module: nn.Module, rows: Tensor) -> Iterator[None]:
    """Let positions attend to themselves only, in what this thread runs within the block.

    Args:
        module: The part of a network whose transformers are meant.
        rows: Samples that are perturbed, bool (B,).
    """
    thread = threading.get_ident()

    def replace(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        assert isinstance(layer, CrossAttention)
        x: Tensor = args[0]
        own = layer.to_out(layer.to_v(x))  # (B, N, query_dim)
        return torch.where(rows.to(output.device)[:, None, None], own, output)

    hooks = [layer.register_forward_hook(replace) for layer in find_self_attentions(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
