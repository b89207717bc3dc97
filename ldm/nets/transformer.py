"""Transformer layers of the UNet: self-attention over positions, cross-attention to the context.

Rombach et al. 2022 (arXiv:2112.10752), appendix E.2.1; gates: Shazeer 2020 (arXiv:2002.05202).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets import cpu
from ldm.nets.attention import attention
from ldm.nets.blocks import (
    CheckpointedLayer,
    Conv2d,
    GroupNorm,
    Layer,
    LayerNorm,
    Linear,
    zero_module,
)

__all__ = [
    "GEGLU", "AttentionBlock", "ContextLinear", "CrossAttention", "FeedForward",
    "SpatialTransformer", "TransformerBlock",
]  # fmt: skip


class GEGLU(Layer):
    """value * gelu(gate), which are the halves of one projection."""

    def __init__(self, *, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # (B, N, dim_out) each
        gate = F.gelu(gate)
        return value * gate if torch.is_grad_enabled() else gate.mul_(value)


class FeedForward(Layer):
    """MLP with one hidden layer of `mult * dim` features, and GEGLU if `glu`, else GELU.

    Args:
        dim_out: Features of the output; None = `dim`.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_out: int | None = None,
        mult: int = 4,
        glu: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner_dim = dim * mult
        in_layer: nn.Module  # only one is built, as building draws random initial weights
        if glu:
            in_layer = GEGLU(dim_in=dim, dim_out=inner_dim)
        else:
            in_layer = nn.Sequential(Linear(dim, inner_dim), nn.GELU())
        self.hidden_features = 2 * inner_dim if glu else inner_dim
        self.net = nn.Sequential(in_layer, nn.Dropout(dropout), Linear(inner_dim, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        return cpu.apply_in_blocks(self.net, x, self.hidden_features)  # (B, N, dim_out)


class ContextLinear(Linear):
    """A linear layer without bias, for a context that is the same at all steps of sampling."""

    def forward(self, x: Tensor) -> Tensor:
        return cpu.project_context(x, self.weight)


class CrossAttention(Layer):
    """Multi-head attention of x to a context, or of x to itself.

    Args:
        context_dim: Features of the context; None = self-attention, with `query_dim` features.
    """

    def __init__(
        self,
        *,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.context_dim = context_dim or query_dim
        self.to_q = Linear(query_dim, inner_dim, bias=False)
        linear_class = Linear if context_dim is None else ContextLinear
        self.to_k = linear_class(self.context_dim, inner_dim, bias=False)
        self.to_v = linear_class(self.context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from x (B, N, query_dim) to a context, and return (B, N, query_dim).

        Args:
            context: (B, M, context_dim); None = x.
            mask: Tokens of the context to keep, bool (B, M); None = all.
        """
        context = x if context is None else context
        if context.shape[-1] != self.context_dim:
            raise ValueError(
                f"the context needs {self.context_dim} features, got {context.shape[-1]}\n"
                "hint: does the text encoder match this UNet (SD 1: 768, SD 2: 1024)?"
            )
        q, k, v = (
            self._split_heads(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        h = attention(q, k, v, None if mask is None else mask[:, None, None])  # (B, heads, N, d)
        out: Tensor = self.to_out(h.transpose(1, 2).flatten(2))  # (B, N, query_dim)
        return out

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, heads, N, d)


class TransformerBlock(CheckpointedLayer):
    """Self-attention, cross-attention and feed-forward, each pre-norm and residual.

    Args:
        context_dim: Features of the context; None if the second attention is also self-attention.
        disable_self_attn: Whether the first attention is also cross-attention.
    """

    def __init__(
        self,
        *,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        use_checkpoint: bool = False,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.disable_self_attn = disable_self_attn
        self.attn1 = CrossAttention(
            query_dim=dim,
            context_dim=context_dim if disable_self_attn else None,
            heads=n_heads,
            dim_head=d_head,
            dropout=dropout,
        )
        # Built before `attn2`, as in the original: initial weights are drawn in this order.
        self.ff = FeedForward(dim=dim, glu=gated_ff, dropout=dropout)
        self.attn2 = CrossAttention(
            query_dim=dim, context_dim=context_dim, heads=n_heads, dim_head=d_head, dropout=dropout
        )
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)

    def compute(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)  # (B, N, C)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(Layer):
    """TransformerBlocks over the positions of a feature map, with a residual connection.

    Args:
        depth: Number of blocks.
        context_dim: Features of the context, or a list of one per block; None = see
            TransformerBlock.
        disable_self_attn: See TransformerBlock.
        use_linear: Whether projections are linear layers (SD 2) instead of 1x1 convolutions (SD 1);
            only the shapes of their weights differ.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        inner_dim = n_heads * d_head
        self.use_linear = use_linear
        self.norm = GroupNorm(in_channels, eps=1e-6)  # residual blocks have 1e-5
        self.proj_in = (
            Linear(in_channels, inner_dim) if use_linear else Conv2d(in_channels, inner_dim, 1)
        )
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                dim=inner_dim,
                n_heads=n_heads,
                d_head=d_head,
                dropout=dropout,
                context_dim=dim,
                use_checkpoint=use_checkpoint,
                disable_self_attn=disable_self_attn,
            )
            for dim in _list_per_block(context_dim, depth, "context_dim")
        )
        proj_out = (
            Linear(inner_dim, in_channels) if use_linear else Conv2d(inner_dim, in_channels, 1)
        )
        self.proj_out = zero_module(proj_out)

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Attend over the positions of x (B, C, h, w) and to the context.

        Args:
            context: (B, M, D) for all blocks, or a list of one per block; None = self-attention
                instead of cross-attention.
        """
        h = self.norm(x)  # (B, C, h, w); below, tokens (B, h w, C)
        h = self.proj_in(_to_tokens(h)) if self.use_linear else _to_tokens(self.proj_in(h))
        contexts = _list_per_block(context, len(self.transformer_blocks), "context")
        for block, block_context in zip(self.transformer_blocks, contexts, strict=True):
            h = block(h, block_context)  # (B, h w, C)
        size = x.shape[-2:]
        if self.use_linear:
            return x + _to_feature_map(self.proj_out(h), size)
        out: Tensor = self.proj_out(_to_feature_map(h, size))
        return x + out  # (B, C, h, w)


class AttentionBlock(CheckpointedLayer):
    """Self-attention over all positions, with a residual connection (arXiv:2105.05233).

    Args:
        num_heads: Number of heads if `num_head_channels` is -1.
        use_new_attention_order: Whether the channels of `qkv` are ordered by q, k, v and then by
            head, instead of by head and then by q, k, v.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if channels % self.heads:
            raise ValueError(f"{channels} channels cannot be divided among {self.heads} heads")
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def compute(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(self.norm(x).flatten(2))  # (B, 3 C, h w)
        if self.use_new_attention_order:  # (B, heads, 3, d, h w) in both orders
            qkv = qkv.view(len(x), 3, self.heads, -1, qkv.shape[-1]).transpose(1, 2)
        else:
            qkv = qkv.view(len(x), self.heads, 3, -1, qkv.shape[-1])
        q, k, v = qkv.transpose(-2, -1).contiguous().unbind(2)  # (B, heads, h w, d) each
        h = attention(q, k, v).transpose(-2, -1).flatten(1, 2)  # (B, C, h w)
        out: Tensor = self.proj_out(h)
        return x + out.view(x.shape)  # (B, C, h, w)


def _list_per_block(value: Any, depth: int, name: str) -> Sequence[Any]:
    """Return one value per block: repeat a single one, check the length of a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"{name} has {len(value)} entries for {depth} transformer blocks")
    return value


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, h w, C)


def _to_feature_map(x: Tensor, size: Sequence[int]) -> Tensor:
    return x.transpose(1, 2).view(len(x), -1, *size)  # (B, C, h, w)
