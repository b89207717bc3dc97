"""Perturbed attention: self-attention with an identity attention map, for some samples of a batch.

Ahn et al. 2024 (arXiv:2403.17377).
"""

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
def perturb_self_attention(module: nn.Module, is_perturbed: Tensor) -> Iterator[None]:
    """Within the context, replace self-attention maps by the identity, in this thread only.

    Args:
        module: A submodule of the UNet, such as its middle block.
        is_perturbed: Samples to perturb, bool (B,).
    """
    thread_id = threading.get_ident()
    perturbed_indices = is_perturbed.nonzero()[:, 0]
    unchanged_indices = (~is_perturbed).nonzero()[:, 0]
    inputs: list[Tensor] = []  # the input of the current layer, with all samples

    # Attention runs on the unchanged samples only. With an identity map, it reduces to the value
    # and output projections, which run on the perturbed samples.
    def select_unchanged(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread_id or not len(unchanged_indices):
            return None
        inputs.append(args[0])
        return (args[0][unchanged_indices.to(args[0].device)], *args[1:])

    def add_perturbed(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != thread_id:
            return None
        assert isinstance(layer, CrossAttention)
        x: Tensor = inputs.pop() if inputs else args[0]  # (B, N, query_dim)
        out = output.new_empty(x.shape)
        out[unchanged_indices.to(x.device)] = output[: len(unchanged_indices)]
        perturbed = perturbed_indices.to(x.device)
        out[perturbed] = layer.to_out(layer.to_v(x[perturbed]))
        return out

    layers = find_self_attentions(module)
    hooks = [layer.register_forward_pre_hook(select_unchanged) for layer in layers]
    hooks += [layer.register_forward_hook(add_perturbed) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
