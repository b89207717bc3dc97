"""Perturbed attention: self-attention with an identity map for some rows (arXiv:2403.17377)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    """Within the context, replace self-attention maps by the identity, in this thread only.

    Args:
        module: A part of the UNet, such as its middle block.
        rows: Samples to perturb, bool (B,).
    """
    thread = threading.get_ident()
    perturbed, others = rows.nonzero()[:, 0], (~rows).nonzero()[:, 0]  # indices of rows
    inputs: list[Tensor] = []  # the full input of the current layer

    # Run attention on the other rows only, and its value and output projections on perturbed ones.
    def select(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread or not len(others):
            return None
        inputs.append(args[0])
        return (args[0][others.to(args[0].device)], *args[1:])

    def replace(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        assert isinstance(layer, CrossAttention)
        x: Tensor = inputs.pop() if inputs else args[0]  # (B, N, query_dim)
        out = output.new_empty(x.shape)
        out[others.to(x.device)] = output[: len(others)]
        out[perturbed.to(x.device)] = layer.to_out(layer.to_v(x[perturbed.to(x.device)]))
        return out

    layers = find_self_attentions(module)
    hooks = [layer.register_forward_pre_hook(select) for layer in layers]
    hooks += [layer.register_forward_hook(replace) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
