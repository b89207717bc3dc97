"""Self-attention whose map is the identity, for some rows of a batch (arXiv:2403.17377)."""

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
    """Let positions attend to themselves only, in what this thread runs within the block.

    Args:
        module: The part of a network whose transformers are meant.
        rows: Samples that are perturbed, bool (B,).
    """
    thread = threading.get_ident()
    own, others = rows.nonzero()[:, 0], (~rows).nonzero()[:, 0]
    whole: list[Tensor] = []  # input of the layer that runs

    # Only what is needed is computed: attention for the other rows, its projections for these.
    def select(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread or not len(others):
            return None
        whole.append(args[0])
        return (args[0][others.to(args[0].device)], *args[1:])

    def replace(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        assert isinstance(layer, CrossAttention)
        x: Tensor = whole.pop() if whole else args[0]  # (B, N, query_dim)
        out = output.new_empty(x.shape)
        out[others.to(x.device)] = output[: len(others)]
        out[own.to(x.device)] = layer.to_out(layer.to_v(x[own.to(x.device)]))
        return out

    layers = find_self_attentions(module)
    hooks = [layer.register_forward_pre_hook(select) for layer in layers]
    hooks += [layer.register_forward_hook(replace) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
